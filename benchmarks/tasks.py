# SPDX-License-Identifier: Apache-2.0
"""Trains the recipes of real tasks from beginning to end and prints what each came to, beside its baselines.

    jaxspeed data imdb_reviews squad minilm-l6 jaxspeed_help_en_de jaxspeed_package_summaries
    python benchmarks/tasks.py                      # all of them: hours on two cores
    python benchmarks/tasks.py --only imdb translate

Each is the command of its recipe's docstring, in a run directory of its own (a second call goes on
where the first was stopped). A baseline is what a program without learning scores on the same
held-out records: the commonest answer of the training records, or a copy of the source.
"""

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxspeed.config import DataConfig
from jaxspeed.data.corpus import open_record_corpus
from jaxspeed.data.documents import Record
from jaxspeed.tasks.scores import written_scores


ROOT = pathlib.Path(__file__).resolve().parent.parent
MINILM = "~/.cache/jaxspeed/weights/minilm-l6"


class Baseline(NamedTuple):
    """An answer that needs no model."""

    name: str
    answer: Callable[[Record, str], str]
    """From a held-out record, and the commonest target of the training records."""


class Job(NamedTuple):
    """A recipe, and what it is compared with."""

    recipe: str
    figures: tuple[str, ...]
    """Names in metrics.jsonl, without `eval/`."""
    init: str = ""
    path: str = ""
    sources: tuple[str, ...] = ()
    target: str = ""
    metrics: tuple[str, ...] = ()
    baselines: tuple[Baseline, ...] = ()


COMMONEST = Baseline("the commonest answer", lambda record, commonest: commonest)

JOBS = {
    "imdb": Job("bert_imdb", ("accuracy", "f1"), MINILM),
    "squad": Job("bert_squad", ("exact_match", "f1"), MINILM),
    "translate": Job(
        "marian_translate",
        ("bleu", "chrf"),
        path="tfds:jaxspeed_help_en_de",
        sources=("en",),
        target="de",
        metrics=("bleu", "chrf"),
        baselines=(
            Baseline("a copy of the English", lambda record, _: record["en"]),
            COMMONEST,
        ),
    ),
    "summarize": Job(
        "bart_summarize",
        ("rouge1", "rouge2", "rougeL"),
        path="tfds:jaxspeed_package_summaries",
        sources=("document",),
        target="summary",
        metrics=("rouge",),
        baselines=(
            Baseline(
                "the first 8 words",
                lambda record, _: " ".join(record["document"].split()[:8]),
            ),
            COMMONEST,
        ),
    ),
    "speech": Job("whisper_speech", ("wer",)),
    "images": Job(
        "image_qa",
        ("accuracy",),
        path="tfds:jaxspeed_easy_vqa",
        target="answer",
        metrics=("accuracy",),
        baselines=(COMMONEST,),
    ),
    "transformer": Job("tiny", ("loss", "bits_per_byte")),
    "lstm": Job("lm_rnn", ("loss", "bits_per_byte")),
}


def main() -> None:
    """Runs the jobs asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--runs", default="runs/bench", help="where the runs lie")
    args = parser.parse_args()
    lines = ["| task | what | minutes | figures |", "|---|---|---|---|"]
    for name in args.only:
        job = JOBS[name]
        minutes, figures = train(job, pathlib.Path(args.runs) / name)
        lines.append(row(name, f"configs/{job.recipe}.py", f"{minutes:.1f}", figures))
        for baseline, scores in compare(job):
            lines.append(row(name, baseline, "", scores))
        sys.stdout.write("\n".join(lines[-1 - len(job.baselines) :]) + "\n")
        sys.stdout.flush()
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


def row(*cells: Any) -> str:
    """Returns a line of the table; figures by name are written out."""
    text = lambda cell: (
        ", ".join(f"{k} {v:.4g}" for k, v in cell.items())
        if isinstance(cell, dict)
        else str(cell)
    )
    return "| " + " | ".join(map(text, cells)) + " |"


def train(job: Job, workdir: pathlib.Path) -> tuple[float, dict[str, float]]:
    """Returns the minutes that the recipe took, and its last figures; a failing run ends the program."""
    command = [sys.executable, "train.py", f"configs/{job.recipe}.py"]
    command += ["--workdir", str(workdir.resolve())]
    command += ["--init", os.path.expanduser(job.init)] if job.init else []
    begin = time.perf_counter()
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"{' '.join(command)}: failed")
    minutes = (time.perf_counter() - begin) / 60
    found: dict[str, float] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found |= {n: record[f"eval/{n}"] for n in job.figures if f"eval/{n}" in record}
    return minutes, found


def compare(job: Job) -> list[tuple[str, dict[str, float]]]:
    """Returns each baseline's name and scores on all held-out records."""
    if not job.baselines:
        return []
    cfg = DataConfig(path=(job.path,))
    corpus = open_record_corpus(cfg, [*job.sources, job.target])
    train, held_out = (
        [source[i] for source in part for i in range(len(source))]
        for part in (corpus.train, corpus.held_out)
    )
    counts = collections.Counter(record[job.target] for record in train)
    commonest = counts.most_common(1)[0][0]
    targets = [record[job.target] for record in held_out]
    scores = []
    for name, answer in job.baselines:
        written = [answer(record, commonest) for record in held_out]
        scores.append((name, written_scores(job.metrics, written, targets)))
    return scores


if __name__ == "__main__":
    main()
