# SPDX-License-Identifier: Apache-2.0
"""The loop writes what the configuration says, in order, whole, and stops when it must."""

import dataclasses
import fcntl
import json
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxspeed import loop
from jaxspeed.agreement import Neighbours
from jaxspeed.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    DTypeConfig,
    EvalConfig,
    LossScaleConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    to_dict,
)
from jaxspeed.loop import Result, TrainingError, fit
from jaxspeed.metrics import read_metrics
from tests.command import records, write_recipe
from tests.toy import Config


STEPS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that evaluates at 6 and 12, and saves at 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("loop")
    recipe = write_recipe(folder)
    return RunConfig(
        model=Config(vocab_size=264, max_seq_len=16, dropout=0.1),
        steps=STEPS,
        seq_len=16,
        global_batch_size=8,
        dtype=DTypeConfig(compute="float32"),
        optim=OptimConfig(lr=1e-2),
        schedule=ScheduleConfig(name="constant"),
        data=DataConfig(path=(str(recipe.text),), cache_dir=str(folder / "cache")),
        checkpoint=CheckpointConfig(every=4),
        eval=EvalConfig(every=6, batches=2, sample_tokens=0),
        log_every=3,
        workdir=str(folder / "run"),
        compile_cache="",
    )


@pytest.fixture(scope="module")
def done(run: RunConfig) -> Result:
    return fit(run, name="small")


def moved(run: RunConfig, workdir: Path, **changes: Any) -> RunConfig:
    """Returns the run in another directory, with changes."""
    return dataclasses.replace(run, workdir=str(workdir), **changes)


def test_result_says_how_the_run_ended(run: RunConfig, done: Result) -> None:
    assert (done.workdir, done.step, done.stopped_by) == (Path(run.workdir), STEPS, 0)
    assert done.metrics["eval/loss"] == read_metrics(done.workdir)[-1]["eval/loss"]


def test_metrics_are_logged_when_the_configuration_says(done: Result) -> None:
    logged = read_metrics(done.workdir)
    assert [r["step"] for r in logged] == [3, 6, 9, 12]
    assert [r["step"] for r in logged if "eval/loss" in r] == [6, 12]
    for record in logged:
        assert record["data/tokens"] == record["step"] * 8 * 16
        assert record["perf/step_seconds"] > 0
        assert record["perf/tokens_per_second"] > 0
        assert {"train/loss", "train/grad_norm", "train/lr"} <= record.keys()
        assert type(record["train/skipped"]) is int


def test_run_directory_holds_what_the_run_was_and_gave(
    run: RunConfig, done: Result
) -> None:
    names = {path.name for path in done.workdir.iterdir() if path.name[0] != "."}
    assert names == {
        "checkpoints",
        "config.json",
        "ledger.json",
        "memory.json",
        "metrics.jsonl",
        "report.html",
        "run.json",
        "tensorboard",
    }
    saved = json.loads((done.workdir / "config.json").read_text())
    assert saved.pop("family") == "tests.toy"
    assert saved == json.loads(json.dumps(to_dict(run)))
    kept = {path.name for path in (done.workdir / "checkpoints").iterdir()}
    assert kept == {"4", "8", "12"}


def test_finished_run_started_again_changes_nothing(
    run: RunConfig, done: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done.workdir / "metrics.jsonl").read_bytes()
    again = fit(run, name="small")
    assert again.step == STEPS
    assert (
        f"already trained to step {STEPS}; give a larger --steps"
        in capsys.readouterr().out
    )
    assert (done.workdir / "metrics.jsonl").read_bytes() == before


def test_sample_and_held_out_loss_are_shown(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = dataclasses.replace(run.eval, sample_tokens=5, prompt="abc")
    result = fit(moved(run, tmp_path, steps=1, eval=sampled), name="small")
    out = capsys.readouterr().out
    assert "sample at step 1:\nabc" in out
    assert f"done: step 1, held-out loss {result.metrics['eval/loss']:.4f}" in out
    assert out.rstrip().endswith(f"report: {tmp_path / 'report.html'}")
    sample = json.loads((tmp_path / "samples.jsonl").read_text())
    assert sample["step"] == 1
    assert sample["text"].startswith("abc")


def test_step_is_dispatched_before_the_metrics_of_the_one_before_are_read(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    compile_, note = loop._Run._compile, loop._Run._note

    def compiled(self: Any, state: Any) -> Callable[..., Any]:
        step_fn = compile_(self, state)

        def step(state: Any, batch: Any) -> Any:
            order.append(f"dispatch {sum(o[0] == 'd' for o in order) + 1}")
            return step_fn(state, batch)

        return step

    def noted(self: Any, pending: Any, state: Any) -> None:
        order.append(f"read {pending.step}")
        note(self, pending, state)

    monkeypatch.setattr(loop._Run, "_compile", compiled)
    monkeypatch.setattr(loop._Run, "_note", noted)
    every = dataclasses.replace(run.checkpoint, every=0)
    fit(moved(run, tmp_path, steps=4, checkpoint=every), name="small")
    assert order == [
        "dispatch 1",
        "dispatch 2",
        "read 1",
        "dispatch 3",
        "read 2",
        "dispatch 4",
        "read 3",
        "read 4",
    ]


@pytest.mark.parametrize("at", [6, STEPS])
def test_evaluation_that_a_signal_cut_off_is_made_up_for(
    at: int,
    run: RunConfig,
    done: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate = loop._Run._evaluate

    def interrupted(self: Any, state: Any, step: int) -> None:
        if step == at:
            signal.raise_signal(signal.SIGTERM)
        evaluate(self, state, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_evaluate", interrupted)
        stopped = fit(moved(run, tmp_path), name="small")
    assert (stopped.step, stopped.stopped_by) == (at, signal.SIGTERM)
    assert "eval/loss" not in records(tmp_path)[-1]
    again = fit(moved(run, tmp_path), name="small")
    assert again.metrics == done.metrics
    assert records(tmp_path) == records(done.workdir)


def test_second_signal_has_its_usual_effect(run: RunConfig, tmp_path: Path) -> None:
    # One of several test processes ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with loop._signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.agreed() == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_loss_that_is_not_finite_stops_with_step_data_position_and_parameter(
    run: RunConfig, tmp_path: Path
) -> None:
    hot = moved(run, tmp_path, optim=OptimConfig(lr=1e30, clip_norm=0.0))
    with pytest.raises(TrainingError) as caught:
        fit(hot, name="small")
    words = str(caught.value)
    # The first update ruins the parameters, the second step's loss shows it.
    assert words.startswith("step 2: the loss is nan; data tokens 128 to 256; ")
    assert "first non-finite gradient: embed" in words
    assert "there is no checkpoint yet" in words
    assert "\n" not in words


def test_overflow_at_the_smallest_loss_scale_stops_with_parameter_and_checkpoint(
    run: RunConfig, tmp_path: Path
) -> None:
    half = moved(
        run,
        tmp_path,
        dtype=DTypeConfig(compute="float16"),
        loss_scale=LossScaleConfig(initial_power=2, hysteresis=1),
        checkpoint=CheckpointConfig(every=1),
        optim=OptimConfig(lr=1e30, clip_norm=0.0),
    )
    with pytest.raises(TrainingError) as caught:
        fit(half, name="small")
    words = str(caught.value)
    # Scales 4 and 2 are halved; at 1 there is nowhere to go.
    assert words.startswith("step 4: a gradient overflowed at the smallest loss scale")
    assert "first non-finite gradient: embed" in words
    assert "the newest checkpoint is of step 3" in words


def test_init_takes_the_parameters_and_begins_at_step_one(
    run: RunConfig, done: Result, tmp_path: Path
) -> None:
    warm = moved(run, tmp_path, init=str(done.workdir), steps=1)
    assert fit(warm, name="small").step == 1
    first, last = (read_metrics(w)[-1]["train/loss"] for w in (tmp_path, done.workdir))
    assert first == pytest.approx(last, abs=0.2)
    assert first < np.log(264) - 1
    assert records(tmp_path)[0]["data/tokens"] == 128


def test_resume_never_refuses_a_run_and_must_wants_one(
    run: RunConfig, done: Result, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="resume='never': .* holds a run already"):
        fit(dataclasses.replace(run, resume="never"), name="small")
    with pytest.raises(ConfigError, match="no whole checkpoint in .*; there: none"):
        fit(moved(run, tmp_path, resume="must"), name="small")


def test_run_directory_is_one_runs_at_a_time(run: RunConfig, tmp_path: Path) -> None:
    with loop._locked(tmp_path):
        with pytest.raises(ConfigError, match=r"process \d+ on .* is training in it"):
            fit(moved(run, tmp_path), name="small")
    assert fit(moved(run, tmp_path, steps=1), name="small").step == 1


def test_lock_that_the_file_system_cannot_give_is_a_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with loop._locked(tmp_path):
        assert "cannot be locked (Operation not supported)" in caplog.text


@pytest.mark.parametrize(
    ("said", "processes", "words"),
    [
        ("RESOURCE_EXHAUSTED: 9 bytes.", 1, "out of memory on a device (RESOURCE_EXH"),
        (
            "INTERNAL: Out of memory allocating",
            2,
            "out of memory on a device (INTERNAL",
        ),
        ("UNKNOWN: Gloo AllGather failed", 2, "another process of the job is gone"),
        ("UNKNOWN: Gloo AllGather failed", 1, ""),
        ("INTERNAL: a defect", 2, ""),
    ],
)
def test_runtime_failures_are_told_in_words(
    said: str, processes: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Neighbours()
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    told = loop._device_trouble(said, alone)
    assert told.startswith(words)
    assert bool(told) == bool(words)


def test_door_that_closes_late_is_waited_for() -> None:
    # A killed process's links and its door are cut one after the other.
    doors = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    neighbours = Neighbours()
    neighbours._me = 1
    neighbours._doors = [door.getsockname() for door in doors]
    closing = threading.Timer(0.5, doors[0].close)
    closing.start()
    assert neighbours.gone() == [0]
    closing.join()
    doors[1].close()


def test_memory_rows_add_up_to_the_state(run: RunConfig) -> None:
    program = loop.build_program(run, devices=jax.devices()[:1])
    rows = dict(loop.memory_rows(program, program.lower_step().compile()))
    count = sum(x.size for x in jax.tree.leaves(program.abstract_state["params"]))
    assert rows["parameters (float32)"] == 4 * count
    assert rows["optimizer state"] == pytest.approx(8 * count, abs=64)
    assert rows["batch"] == 8 * 16 * (4 * 4 + 1)
