# SPDX-License-Identifier: Apache-2.0
"""Small runs of tasks on records that the tests write."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxspeed.config import (
    CheckpointConfig,
    DataConfig,
    DTypeConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TaskConfig,
)
from jaxspeed.program import Program, build_program
from jaxspeed.tasks import Evaluation, Task, open_task


MakeRun = Callable[..., RunConfig]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Returns `make_run(model, records, task fields..., run={...})`."""

    def make(
        model: Any,
        records: Sequence[Any],
        *,
        data: dict[str, Any] | None = None,
        run: dict[str, Any] | None = None,
        **task: Any,
    ) -> RunConfig:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        fields: dict[str, Any] = {
            "path": (str(path),),
            "cache_dir": str(tmp_path / "cache"),
            "eval_fraction": 0.2,
        } | (data or {})
        more: dict[str, Any] = {
            "steps": 20,
            "seq_len": 32,
            "global_batch_size": 8,
            "dtype": DTypeConfig(compute="float32"),
            "optim": OptimConfig(lr=3e-2),
            "schedule": ScheduleConfig(name="constant"),
            "checkpoint": CheckpointConfig(every=10),
            "eval": EvalConfig(every=0, batches=0),
            "workdir": str(tmp_path / "run"),
            "compile_cache": "",
        } | (run or {})
        return RunConfig(
            model=model, data=DataConfig(**fields), task=TaskConfig(**task), **more
        )

    return make


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[RunConfig], tuple[Program, Task]]:
    """Returns `opened(run)`: its program on one device, and its task, ready."""

    def open_one(run: RunConfig) -> tuple[Program, Task]:
        program = build_program(run, devices=jax.devices()[:1])
        task = open_task(run, program)
        task.prepare(tmp_path / "run")
        return program, task

    return open_one


@pytest.fixture
def trained(
    opened: Callable[[RunConfig], tuple[Program, Task]],
) -> Callable[[RunConfig], Evaluation]:
    """Returns `trained(run)`: what its model is worth after its steps on one device."""

    def train(run: RunConfig) -> Evaluation:
        program, task = opened(run)
        state, batches = program.init_state(), task.train_iterator()
        for _ in range(run.steps):
            rows = program.put_batch(next(batches))
            state, _ = program.train_step(state, rows)
        evaluation = task.evaluate(program, state["params"], step=run.steps)
        assert evaluation is not None
        return evaluation

    return train
