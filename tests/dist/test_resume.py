# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, stopped or moved to other devices goes on as if nothing had happened."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.command import (
    STEPS,
    Recipe,
    logged,
    losses,
    records,
    resumed_from,
    saving,
    stop,
    write_recipe,
)


pytestmark = pytest.mark.slow

DROPOUT = ("--model.dropout", "0.1")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("resume")
    return write_recipe(folder, compile_cache=str(folder / "xla"))


@pytest.fixture(scope="module")
def uninterrupted(
    recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What a run writes that nobody disturbs; it has dropout, so the random key counts."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert resumed_from(recipe.run(workdir, *DROPOUT).out) == 0
    return records(workdir)


def test_the_uninterrupted_run_is_complete(
    uninterrupted: list[dict[str, Any]],
) -> None:
    assert [record["step"] for record in uninterrupted] == list(range(1, STEPS + 1))
    evaluated = [record["step"] for record in uninterrupted if "eval/loss" in record]
    assert evaluated == [10, 20, 30, 40]
    assert [record["data/tokens"] for record in uninterrupted] == [
        128 * step for step in range(1, STEPS + 1)
    ]
    assert uninterrupted[-1]["train/loss"] < uninterrupted[0]["train/loss"] - 1


def test_killed_run_repeats_the_uninterrupted_one_to_the_last_bit(
    recipe: Recipe, uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    workdir, before = tmp_path / "run", 0
    for reached in (
        logged(workdir, 4),  # before the first checkpoint
        logged(workdir, 13),
        saving(workdir),
        logged(workdir, 33),
    ):
        process = recipe.start(workdir, *DROPOUT)
        ended = stop(process, reached, signal.SIGKILL)
        assert ended.code == -signal.SIGKILL, ended
        assert resumed_from(ended.out) >= before
        before = resumed_from(ended.out)
        *whole, last = records(workdir)
        assert whole == uninterrupted[: len(whole)]
        # The evaluation of the last step may be missing yet.
        assert last.items() <= uninterrupted[len(whole)].items()
    ended = recipe.run(workdir, *DROPOUT)
    assert resumed_from(ended.out) > 0
    # A kill may have hit the writing of a checkpoint; nothing else is worth a word.
    assert all(line.endswith("it is unfinished") for line in ended.err.splitlines())
    assert records(workdir) == uninterrupted


def test_stopped_run_saves_and_goes_on_to_the_last_bit(
    recipe: Recipe, uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    for number, lines in ((signal.SIGTERM, 4), (signal.SIGINT, 23)):
        ended = stop(
            recipe.start(workdir, *DROPOUT, "--checkpoint.every", "0"),
            logged(workdir, lines),
            number,
        )
        assert ended.code == 128 + number, ended
        assert not ended.err
        step = len(records(workdir))
        word = f"stopped by {number.name} after step {step}: saved; the same command"
        assert word in ended.out
        assert (workdir / "checkpoints" / str(step)).is_dir()
    last = recipe.run(workdir, *DROPOUT, "--checkpoint.every", "0")
    assert resumed_from(last.out) == step
    assert records(workdir) == uninterrupted


def test_run_goes_on_with_other_devices_and_another_stage(
    recipe: Recipe, tmp_path: Path
) -> None:
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    recipe.run(alone, "--zero.stage", "0")
    eight = ("--virtual_devices", "8")
    for steps, flags in (
        ("14", (*eight, "--zero.stage", "3")),
        ("27", ("--zero.stage", "0")),
        (str(STEPS), (*eight, "--mesh.data", "2", "--zero.stage", "2")),
    ):
        recipe.run(moved, *flags, "--steps", steps)
    np.testing.assert_allclose(losses(moved), losses(alone), rtol=3e-5)
    ours, theirs = records(moved), records(alone)
    assert [r["data/tokens"] for r in ours] == [r["data/tokens"] for r in theirs]
    common = [n for n in range(STEPS) if "eval/loss" in theirs[n]]
    np.testing.assert_allclose(
        [ours[n]["eval/loss"] for n in common],
        [theirs[n]["eval/loss"] for n in common],
        rtol=3e-5,
    )
