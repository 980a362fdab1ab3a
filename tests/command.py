# SPDX-License-Identifier: Apache-2.0
"""Runs of `train.py` as a user starts them: a small recipe in a folder, processes, what they wrote."""

import contextlib
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxspeed.metrics import deterministic, read_metrics


ROOT = Path(__file__).parents[1]
STEPS = 40
PATIENCE_S = 240

RECIPE = """
from jaxspeed.config import CheckpointConfig, DataConfig, DTypeConfig, EvalConfig
from jaxspeed.config import OptimConfig, RunConfig, ScheduleConfig, ZeroConfig
from tests.toy import Config


def config():
    return RunConfig(
        model=Config(vocab_size=264, max_seq_len=16),
        steps={steps},
        seq_len=16,
        global_batch_size=8,
        zero=ZeroConfig(param_persistence_threshold=0),
        dtype=DTypeConfig(compute="float32"),
        optim=OptimConfig(lr=1e-2),
        schedule=ScheduleConfig(name="constant"),
        data=DataConfig(path=({text!r},), cache_dir={cache!r}),
        checkpoint=CheckpointConfig(every=10),
        eval=EvalConfig(every=10, batches=2, sample_tokens=0),
        log_every=1,
        compile_cache={compile_cache!r},
    )
"""


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


class Recipe(NamedTuple):
    """A recipe file, beside the text that it trains on."""

    path: Path
    text: Path

    def command(self, workdir: Path, *flags: str) -> list[str]:
        """Returns the command that trains it."""
        train = [sys.executable, str(ROOT / "train.py"), str(self.path)]
        return [*train, "--workdir", str(workdir), *flags]

    def start(
        self, workdir: Path, *flags: str, cwd: Path | None = None, **keywords: Any
    ) -> "subprocess.Popen[str]":
        """Starts the command, in the repository's root or another folder."""
        return subprocess.Popen(
            self.command(workdir, *flags),
            cwd=cwd or ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **keywords,
        )

    def run(self, workdir: Path, *flags: str, code: int = 0) -> Ended:
        """Runs the command to its end, which must be of this exit code."""
        ended = end(self.start(workdir, *flags))
        assert ended.code == code, ended
        return ended


def write_recipe(folder: Path, *, compile_cache: str = "") -> Recipe:
    """Writes the recipe and its text."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(50)]
    documents = [" ".join(draw.choices(words, k=30)) for _ in range(200)]
    recipe = Recipe(folder / "small.py", folder / "text.txt")
    recipe.text.write_text("\n\n".join(documents))
    filled = RECIPE.format(
        steps=STEPS,
        text=str(recipe.text),
        cache=str(folder / "cache"),
        compile_cache=compile_cache,
    )
    recipe.path.write_text(filled)
    return recipe


def end(process: "subprocess.Popen[str]") -> Ended:
    """Waits for a process; kills it if it hangs."""
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"it hung; stdout: {out}; stderr: {err}") from None
    return Ended(process.returncode, out, err)


def wait_until(reached: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Waits until something shows on disk, or fails if the process ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def stop(
    process: "subprocess.Popen[str]",
    reached: Callable[[], bool],
    number: signal.Signals,
) -> Ended:
    """Sends a signal once something is reached; returns how the process ended."""
    wait_until(reached, process)
    process.send_signal(number)
    return end(process)


def logged(workdir: Path, lines: int) -> Callable[[], bool]:
    """Returns the question whether metrics.jsonl has so many lines."""

    def reached() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return (workdir / "metrics.jsonl").read_bytes().count(b"\n") >= lines
        return False

    return reached


def saving(workdir: Path) -> Callable[[], bool]:
    """Returns the question whether a checkpoint is being written."""
    return lambda: any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def records(workdir: Path) -> list[dict[str, Any]]:
    """Returns what metrics.jsonl holds, without times."""
    return [deterministic(record) for record in read_metrics(workdir)]


def losses(workdir: Path, name: str = "train/loss") -> list[float]:
    """Returns the losses of metrics.jsonl, in order."""
    return [record[name] for record in records(workdir) if name in record]


def resumed_from(out: str) -> int:
    """Returns the step that a run said it goes on from, or 0."""
    found = re.search(r"going on from step (\d+)", out)
    return int(found[1]) if found else 0


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path | None]:
    """Gives a disk of this size, or None where it cannot be had."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
