# SPDX-License-Identifier: Apache-2.0
"""Answers to prompts, in packed rows: only answers count, and the model writes its own."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxspeed.config import ConfigError, EvalConfig, RunConfig
from jaxspeed.program import Program
from jaxspeed.tasks import Evaluation, Task
from tests.toy_tasks import WriterConfig


MakeRun = Callable[..., RunConfig]
Opened = Callable[[RunConfig], tuple[Program, Task]]
Trained = Callable[[RunConfig], Evaluation]

MODEL = WriterConfig()


def test_rows_hold_whole_pairs_and_count_answers(
    make_run: MakeRun, opened: Opened
) -> None:
    pairs = [{"prompt": "ab", "completion": "xyz"[: n % 3 + 1]} for n in range(30)]
    run = make_run(
        MODEL, pairs, name="sft", prefix="Q:", max_target_len=2, run={"seq_len": 20}
    )
    _, task = opened(run)
    assert (
        "answers looked at are longer than task.max_target_len" in task.describe()[-1]
    )
    batch = next(task.train_iterator())
    for row in range(8):
        inputs, segments = batch["inputs"][row], batch["segment_ids"][row]
        for number in range(1, segments.max() + 1):
            here = segments == number
            assert bytes(inputs[here][1:].astype(np.uint8))[:4] == b"Q:ab"
            counted = batch["targets"][row][here & batch["mask"][row]].tolist()
            assert counted[-1] == 256
            assert bytes(counted[:-1]) in (b"x", b"xy")
        assert (segments == 0).sum() < 8


def test_answers_are_learnt_and_written(make_run: MakeRun, trained: Trained) -> None:
    draw = random.Random(0)
    pairs = []
    for _ in range(60):
        letters = draw.choices(draw.choice(["ab", "xy"]), k=3)
        pairs.append({"prompt": "".join(letters), "completion": "L" if letters[0] in "ab" else "R"})  # fmt: skip
    run = make_run(
        MODEL, pairs, name="sft", max_target_len=4, run={"steps": 40, "seq_len": 12, "eval": EvalConfig(batches=1)},
    )  # fmt: skip
    evaluation = trained(run)
    assert evaluation.metrics["eval/accuracy"] > 0.9
    assert evaluation.metrics["eval/loss"] < 0.3
    assert "8 held-out records: loss" in evaluation.summary
    assert "(true: " in evaluation.samples


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"completion": ""}, "record 0 has an empty 'completion'"),
        ({"prompt": None}, "record 0 has a NoneType as 'prompt'"),
    ],
)
def test_bad_record_is_named_before_training(
    record: dict[str, Any], message: str, make_run: MakeRun, opened: Opened
) -> None:
    bad = [{"prompt": "a", "completion": "b"} | record] * 9
    with pytest.raises(ConfigError, match=message):
        opened(make_run(MODEL, bad, name="sft"))
