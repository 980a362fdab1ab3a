# SPDX-License-Identifier: Apache-2.0
"""Classes of texts and words: learnt, measured, and refused in one line where they cannot be."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxspeed.config import ConfigError, RunConfig
from jaxspeed.loop import fit
from jaxspeed.metrics import read_metrics
from jaxspeed.program import Program
from jaxspeed.tasks import Evaluation, Task
from jaxspeed.tasks.scores import class_scores, entity_f1
from models import vit
from tests.command import records
from tests.toy_tasks import LabelConfig


pytest.importorskip("sklearn")

MakeRun = Callable[..., RunConfig]
Opened = Callable[[RunConfig], tuple[Program, Task]]


def reviews(count: int = 60) -> list[dict[str, Any]]:
    """Returns texts of 3 to 30 letters: class 1 has only x and y, class 0 only a and b."""
    draw = random.Random(0)
    made = []
    for _ in range(count):
        label = draw.randrange(2)
        letters = draw.choices(["ab", "xy"][label], k=draw.randint(3, 30))
        made.append({"text": "".join(letters), "label": label})
    return made


def test_classification_is_learnt_and_measured(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(
        LabelConfig(), reviews(), name="classification", labels=("no", "yes"), buckets=(16,), pool_batches=3,
    )  # fmt: skip
    result = fit(run, name="labels")
    assert result.metrics["eval/accuracy"] == result.metrics["eval/f1"] == 1.0
    assert result.metrics["eval/loss"] < 0.3
    last = read_metrics(result.workdir)[-1]
    assert last["data/examples"] == 20 * 8
    assert last["perf/examples_per_second"] > 0
    out = capsys.readouterr().out
    assert "task: classification, label from text" in out
    assert "rows are padded: " in out
    assert "compiling the step for inputs (1, 8, 16)" in out
    assert "12 held-out records: loss" in out
    assert "(true: yes)" in (result.workdir / "samples.jsonl").read_text()


IMAGES = vit.Config(
    image_size=8, patch_size=4, num_layers=1, num_heads=2, d_model=16, d_ff=16
)


def test_classes_of_images_are_learnt_without_a_tokenizer(
    make_run: MakeRun, trained: Callable[[RunConfig], Evaluation]
) -> None:
    draw = np.random.default_rng(0)
    rows = []
    for n in range(40):
        pixels = draw.integers(0, 100, (8, 8, 3)) + 150 * (n % 2)
        rows.append({"image": pixels.tolist(), "label": ["dark", "bright"][n % 2]})
    run = make_run(
        IMAGES, rows, name="image_classification", labels=("dark", "bright"), run={"steps": 15},
    )  # fmt: skip
    evaluation = trained(run)
    assert evaluation.metrics["eval/accuracy"] == 1.0
    assert "-> bright (true: bright)" in evaluation.samples


def test_a_tokenizer_for_images_is_refused(make_run: MakeRun) -> None:
    run = make_run(IMAGES, [], name="image_classification", data={"tokenizer": "bpe"})
    message = "data.tokenizer='bpe' has no effect with task.name='image_classification'"
    with pytest.raises(ConfigError, match=message):
        run.validate(1)


@pytest.mark.slow
def test_interrupted_run_gives_the_same_metrics(
    make_run: MakeRun, tmp_path: Path
) -> None:
    def run(steps: int, workdir: str) -> RunConfig:
        return make_run(
            LabelConfig(dropout=0.1), reviews(), name="classification", buckets=(16,), pool_batches=4,
            run={"steps": steps, "workdir": str(tmp_path / workdir), "log_every": 1},
        )  # fmt: skip

    fit(run(7, "whole"), name="labels")
    fit(run(5, "parts"), name="labels")
    fit(run(7, "parts"), name="labels")
    whole, parts = (records(tmp_path / name) for name in ("whole", "parts"))
    assert [r["train/loss"] for r in parts] == [r["train/loss"] for r in whole]


def test_pair_of_texts_is_framed_and_cut_to_fit(
    make_run: MakeRun, opened: Opened
) -> None:
    pairs = [{"a": "abcdef" * 4, "b": "xyz" * n, "label": 0} for n in range(1, 20)]
    run = make_run(
        LabelConfig(), pairs, name="classification", input_fields=("a", "b"), run={"seq_len": 16},
    )  # fmt: skip
    _, task = opened(run)
    assert "are longer than seq_len and are cut" in task.describe()[-1]
    batch = next(task.train_iterator())
    for ids, types, segments in zip(
        batch["inputs"], batch["token_types"], batch["segment_ids"], strict=True
    ):
        assert (segments == (np.arange(16) < segments.sum())).all()
        ends = np.flatnonzero((ids == 256) & (segments == 1))
        assert len(ends) == 2
        assert ends[1] == segments.sum() - 1
        assert ids[0] == ord("a")
        assert ids[ends[0] + 1] == ord("x")
        assert (types == ((np.arange(16) > ends[0]) & (segments == 1))).all()


@pytest.mark.parametrize(
    ("record", "task", "message"),
    [
        ({"label": 2}, {}, "has 2 as 'label', which is no class of the model"),
        ({"label": -1}, {}, "-1 as 'label', which is no class of the model .0 to 1"),
        ({"label": "maybe"}, {"labels": ("no", "yes")}, "'maybe' .* only no, yes"),
        ({"label": "yes"}, {}, "and classes have no names; set task.labels"),
        ({"text": " \n"}, {}, "has an empty 'text'; remove it"),
        ({"text": 5}, {}, "has a int as 'text', where text is due"),
    ],
)
def test_bad_record_is_named_before_training(
    record: dict[str, Any],
    task: dict[str, Any],
    message: str,
    make_run: MakeRun,
    opened: Opened,
) -> None:
    bad = [{"text": "abc", "label": 1} | record for _ in range(9)]
    run = make_run(LabelConfig(), bad, name="classification", **task)
    with pytest.raises(ConfigError, match=f"data.path='.*': record 0 .*{message}"):
        opened(run)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"labels": ("a", "b", "c")}, "the model has 2 classes; give 2 names"),
        ({"input_fields": ("a", "b", "c")}, "reads text; name 1 field"),
        ({"input_fields": ("tekst",)}, "no field 'tekst', .* Did you mean 'text'"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    task: dict[str, Any], message: str, make_run: MakeRun, opened: Opened
) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(make_run(LabelConfig(), reviews(9), name="classification", **task))


def test_words_are_told_by_their_first_tokens(
    make_run: MakeRun, opened: Opened
) -> None:
    words = ["Anna", "\u20acsaw", "b", "Los", "Angeles", "."]
    tags = ["B-PER", "O", "O", "B-LOC", "I-LOC", "O"]
    names = ("O", "B-PER", "B-LOC", "I-LOC")
    model = LabelConfig(head="token", num_labels=4)
    task: dict[str, Any] = {"name": "token_classification", "labels": names}
    run = make_run(model, [{"tokens": words, "tags": tags}] * 9, **task)
    _, opened_task = opened(run)
    batch = next(opened_task.train_iterator())
    ids, mask, labels = (batch[name][0] for name in ("inputs", "mask", "labels"))
    firsts = np.flatnonzero(mask)
    assert [names[i] for i in labels[firsts]] == tags
    assert bytes(ids[firsts].astype(np.uint8)) == b"A\xe2bLA."
    short = make_run(
        model, [{"tokens": words, "tags": tags}] * 9, **task, run={"seq_len": 12}
    )
    _, opened_task = opened(short)
    assert "longer than seq_len" in opened_task.describe()[-1]
    assert next(opened_task.train_iterator())["mask"].sum() == 8 * 2
    with pytest.raises(
        ConfigError, match="record 0 has 6 words but 5 labels in 'tags'"
    ):
        opened(make_run(model, [{"tokens": words, "tags": tags[1:]}] * 9, **task))


def test_word_classes_are_learnt_and_measured_by_entity(make_run: MakeRun) -> None:
    draw = random.Random(0)
    kinds = {"Bo": "B-PER", "Al": "B-PER", "is": "O", "at": "O"}
    drawn = [draw.choices(list(kinds), k=draw.randint(2, 6)) for _ in range(60)]
    made = [{"tokens": ws, "tags": [kinds[w] for w in ws]} for ws in drawn]
    run = make_run(
        LabelConfig(head="token"), made, name="token_classification", labels=("O", "B-PER"),
    )  # fmt: skip
    metrics = fit(run, name="words").metrics
    assert metrics["eval/accuracy"] == metrics["eval/entity_f1"] == 1.0
    shown = json.loads((Path(run.workdir) / "samples.jsonl").read_text())["text"]
    assert "Bo/B-PER" in shown


def test_scores_are_those_of_the_field() -> None:
    assert class_scores([1, 1, 0, 0], [1, 0, 0, 0], 2) == pytest.approx(
        {"accuracy": 0.75, "f1": 2 / 3}
    )
    three = class_scores([0, 1, 1], [0, 1, 0], 3)
    assert three["f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    gold = [["B-A", "I-A", "O", "B-B"], ["I-A", "B-A", "O"]]
    ours = [["B-A", "I-A", "O", "O"], ["B-A", "I-A", "O"]]
    assert entity_f1(gold, gold) == 1.0
    # Found 2, of which 1 is right; wanted 4.
    assert entity_f1(gold, ours) == pytest.approx(2 * 1 / (2 + 4))
