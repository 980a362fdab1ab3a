# SPDX-License-Identifier: Apache-2.0
"""Masked tokens and hidden spans of packed text: the rows, the loss, the same on any number of processes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxspeed.config import (
    ConfigError,
    DataConfig,
    DTypeConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TaskConfig,
)
from jaxspeed.program import Program
from jaxspeed.tasks import Evaluation, Task
from tests.toy_tasks import LabelConfig, PairConfig


Opened = Callable[[RunConfig], tuple[Program, Task]]
Trained = Callable[[RunConfig], Evaluation]

MODELS: dict[str, Any] = {
    "masked_lm": LabelConfig(),
    "span_corruption": PairConfig(vocab_size=290),
}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunConfig]:
    """Returns `make_run(task, **changes)` on a text that repeats itself."""

    def make(
        name: Any, *, task: dict[str, Any] | None = None, **changes: Any
    ) -> RunConfig:
        path = tmp_path / "text.txt"
        path.write_text("\n\n".join(["abcdefgh" * n for n in range(2, 40)]))
        run = RunConfig(
            model=MODELS[name],
            steps=40,
            seq_len=48,
            global_batch_size=4,
            dtype=DTypeConfig(compute="float32"),
            optim=OptimConfig(lr=2e-2),
            schedule=ScheduleConfig(name="constant"),
            data=DataConfig(path=(str(path),), cache_dir=str(tmp_path / "cache")),
            task=TaskConfig(name=name, **(task or {})),
            eval=EvalConfig(batches=2),
            compile_cache="",
        )
        return dataclasses.replace(run, **changes)

    return make


def test_masked_rows_hide_letters_and_tell_them(
    make_run: Callable[..., RunConfig], opened: Opened
) -> None:
    _, task = opened(make_run("masked_lm"))
    batches = task.train_iterator()
    first, second = next(batches), next(batches)
    for batch in (first, second):
        assert batch["slots"].shape == (4, 8)
        for row in range(4):
            mask, slots = batch["mask"][row], batch["slots"][row]
            restored = batch["inputs"][row].copy()
            restored[slots[mask]] = batch["targets"][row][mask]
            assert set(restored.tolist()) <= {256, *b"abcdefgh\n"}
            assert (batch["targets"][row][mask] != 256).all()
            # The first id beyond the tokenizer's is the mask.
            assert (batch["inputs"][row][slots[mask]] == 257).any()
    assert (first["inputs"] != second["inputs"]).any()


def test_spans_are_hidden_and_told_behind_their_sentinels(
    make_run: Callable[..., RunConfig], opened: Opened
) -> None:
    _, task = opened(make_run("span_corruption"))
    batch = next(task.train_iterator())
    for row in range(4):
        inputs, targets = batch["inputs"][row], batch["targets"][row]
        sentinels = inputs[inputs > 257].tolist()
        assert sentinels == sorted(sentinels, reverse=True)
        assert sentinels[0] == 289
        assert targets[targets > 257].tolist() == sentinels
        inside, segments = (
            batch["decoder_inputs"][row],
            batch["decoder_segment_ids"][row],
        )
        begins = np.diff(segments, prepend=0) != 0
        assert (inside[begins] == 257).all()
        assert (inside[~begins] == targets[np.flatnonzero(~begins) - 1]).all()


@pytest.mark.parametrize("name", MODELS)
def test_hidden_text_is_learnt(
    name: str, make_run: Callable[..., RunConfig], trained: Trained
) -> None:
    metrics = trained(make_run(name)).metrics
    assert metrics["eval/loss"] < 3.5
    assert ("eval/accuracy" in metrics) == (name == "masked_lm")


@pytest.mark.parametrize("name", MODELS)
def test_processes_hide_the_same(
    name: str, make_run: Callable[..., RunConfig], opened: Opened
) -> None:
    _, task = opened(make_run(name))
    task: Any = task
    whole = next(task.train_iterator())
    parts = []
    for index in range(2):
        task._share = (index, 2)
        parts.append(next(task.train_iterator()))
    for array in whole:
        both = np.concatenate([part[array] for part in parts])
        np.testing.assert_array_equal(whole[array], both)


def test_restored_position_hides_the_same(
    make_run: Callable[..., RunConfig], opened: Opened
) -> None:
    _, task = opened(make_run("masked_lm"))
    saved, restored = task.train_iterator(), task.train_iterator()
    next(saved)
    restored.set_state(saved.get_state())
    np.testing.assert_array_equal(next(saved)["inputs"], next(restored)["inputs"])
    _, other = opened(make_run("masked_lm", task={"mask_rate": 0.3}))
    with pytest.raises(ConfigError, match=r"task.mask_rate was 0.15 .* and is 0.3 now"):
        other.train_iterator().set_state(saved.get_state())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("masked_lm", {"model": LabelConfig(vocab_size=257)}, "tokenizer has no mask"),
        ("masked_lm", {"task": {"whole_word": True}}, "does not tell which tokens"),
        (
            "span_corruption",
            {"model": PairConfig(vocab_size=258)},
            "there are 1 sentinels",
        ),
    ],
)
def test_vocabulary_that_does_not_do_is_named(
    name: str,
    changes: dict[str, Any],
    message: str,
    make_run: Callable[..., RunConfig],
    opened: Opened,
) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(make_run(name, **changes))
