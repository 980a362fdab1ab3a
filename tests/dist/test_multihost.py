# SPDX-License-Identifier: Apache-2.0
"""Several processes that form one job train as one process with their devices does."""

import json
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from tests.command import (
    ROOT,
    STEPS,
    Ended,
    Recipe,
    end,
    logged,
    losses,
    records,
    resumed_from,
    wait_until,
    write_recipe,
)


pytestmark = [pytest.mark.slow, pytest.mark.multihost]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("multihost")
    return write_recipe(folder, compile_cache=str(folder / "xla"))


@pytest.fixture(scope="module")
def alone(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    recipe.run(workdir, "--virtual_devices", "4")
    return workdir


def start_job(
    recipe: Recipe,
    workdir: Path,
    count: int,
    *flags: str,
    devices: int = 4,
    own: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
    folders: Sequence[Path] = (),
) -> "list[subprocess.Popen[str]]":
    """Starts `count` processes with four devices, or so many, in all; some with flags or in a folder of their own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = ("--coordinator", f"localhost:{port}", "--num_processes", str(count))
    each = ("--virtual_devices", str(devices // count))
    return [
        recipe.start(
            workdir, *flags, *group, *each, "--process_id", str(index),
            *own.get(index, ()), cwd=folders[index] if folders else None,
        )
        for index in range(count)
    ]  # fmt: skip


def end_job(processes: "list[subprocess.Popen[str]]", code: int = 0) -> list[Ended]:
    """Waits for all processes, which must end with this exit code."""
    ended = [end(process) for process in processes]
    assert {e.code for e in ended} == {code}, ended
    return ended


def test_two_processes_train_as_one_and_their_checkpoint_goes_on_in_one(
    recipe: Recipe, alone: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    processes = start_job(recipe, workdir, 2)
    wait_until(logged(workdir, 13), processes[0])
    # The signal goes to one of them only: both must save, after the same step.
    processes[1].send_signal(signal.SIGTERM)
    first, second = end_job(processes, 128 + signal.SIGTERM)
    step = len(records(workdir))
    assert f"stopped by SIGTERM after step {step}: saved" in first.out
    assert "step " not in second.out
    assert [record["step"] for record in records(workdir)] == [*range(1, step + 1)]
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    written = workdir / "checkpoints" / str(step) / "params"
    assert {p.name for p in written.glob("ocdbt.process_*")} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }

    last = recipe.run(workdir, "--virtual_devices", "4")
    assert resumed_from(last.out) == step
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=3e-5)
    ours, theirs = records(workdir), records(alone)
    assert [r["data/tokens"] for r in ours] == [r["data/tokens"] for r in theirs]
    np.testing.assert_allclose(
        losses(workdir, "eval/loss"), losses(alone, "eval/loss"), rtol=3e-5
    )


def test_four_processes_train_as_one(
    recipe: Recipe, alone: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    end_job(start_job(recipe, workdir, 4, "--mesh.data", "2", "--zero.stage", "1"))
    assert len(records(workdir)) == STEPS
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=3e-5)


def test_process_that_does_not_come_is_one_line_within_the_time_out(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXSPEED_JOIN_TIMEOUT_S", "2")
    processes = start_job(recipe, tmp_path / "run", 2)
    processes[1].kill()
    end(processes[1])
    ended = end(processes[0])
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "process 0 of 2: process 1 did not come within 2 s" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--optim.lr", "0.5"), "the run: the processes of this job differ: optim.lr is "),
        (("--data.eval_fraction", "0.4"), "data.eval_fraction is 0.05 in process 0, 0.4 in process 1"),
    ],
)  # fmt: skip
def test_processes_with_other_settings_end_with_the_difference(
    flags: tuple[str, ...], message: str, recipe: Recipe, tmp_path: Path
) -> None:
    processes = start_job(recipe, tmp_path / "run", 2, own={1: flags})
    for ended in end_job(processes, 2):
        assert ended.err.count("\n") == 1
        assert message in ended.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_processes_with_other_text_end_with_the_difference(
    recipe: Recipe, tmp_path: Path
) -> None:
    """A file that is not the same on both hosts, under the same name; each has half of every row."""
    texts = [tmp_path / str(host) / "text.txt" for host in range(2)]
    for host, path in enumerate(texts):
        path.parent.mkdir()
        text = recipe.text.read_text()
        path.write_text(text if host else text.swapcase())
    shared = ("--mesh.fsdp", "1", "--mesh.tensor", "4")
    processes = start_job(
        recipe, tmp_path / "run", 2, *shared, "--data.path", "text.txt",
        folders=[path.parent for path in texts],
    )  # fmt: skip
    for ended in end_job(processes, 2):
        assert "the first batch: the processes of this job differ: the hash" in ended.err


@pytest.mark.parametrize("count", [2, 4])
def test_processes_whose_partner_dies_end_with_its_name(
    count: int, recipe: Recipe, tmp_path: Path
) -> None:
    # Without checkpoints they are in a step that they notice, not at a barrier of Orbax.
    endless = ("--steps", "100000", "--checkpoint.every", "0", "--eval.every", "0")
    processes = start_job(recipe, tmp_path / "run", count, *endless)
    wait_until(logged(tmp_path / "run", 15), processes[0])
    processes[1].kill()
    for process in processes:
        ended = end(process)
        if process is not processes[1]:
            assert ended.code == 2
            assert "error: process 1 of the job is gone" in ended.err


def test_a_process_that_fails_alone_takes_the_others_with_it(
    recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "text.txt").write_text(recipe.text.read_text())
    (tmp_path / "there").mkdir()
    processes = start_job(
        recipe, tmp_path / "run", 2, "--data.path", "text.txt",
        folders=[tmp_path / "here", tmp_path / "there"],
    )  # fmt: skip
    first, second = end_job(processes, 2)
    assert "data.path='text.txt': no such file" in second.err
    assert "error: process 1 of the job is gone" in first.err


WRITING = """
from jaxspeed.config import DataConfig, DTypeConfig, EvalConfig, OptimConfig, RunConfig
from jaxspeed.config import ScheduleConfig, TaskConfig
from tests.toy_tasks import PairConfig


def config():
    return RunConfig(
        model=PairConfig(),
        steps=6,
        seq_len=16,
        global_batch_size=8,
        dtype=DTypeConfig(compute="float32"),
        optim=OptimConfig(lr=3e-2),
        schedule=ScheduleConfig(name="constant"),
        data=DataConfig(path=({path!r},), eval_fraction=0.3),
        task=TaskConfig(name="seq2seq", max_target_len=8, metrics=("accuracy",)),
        eval=EvalConfig(every=0, batches=0),
        log_every=1,
        compile_cache={compile_cache!r},
    )
"""


def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    pairs = [{"source": "ab" * (n % 7 + 1), "target": "xyz"[n % 3]} for n in range(40)]
    data, path = tmp_path / "pairs.jsonl", tmp_path / "writing.py"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    cache = str(tmp_path / "xla")
    path.write_text(WRITING.format(path=str(data), compile_cache=cache))
    recipe = Recipe(path, data)
    recipe.run(tmp_path / "one", "--virtual_devices", "4")
    end_job(start_job(recipe, tmp_path / "two", 2))
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert one[-1].keys() == two[-1].keys() >= {"eval/accuracy", "eval/loss"}
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=3e-5)


@pytest.mark.parametrize("by", ["ring", "ulysses"])
def test_processes_that_share_sequences_train_as_one(
    by: str, recipe: Recipe, tmp_path: Path
) -> None:
    """Each of two processes has the half of every row; the checkpoint goes on without the axis."""
    small = Recipe(ROOT / "configs" / "tiny.py", recipe.text)
    flags = [
        "--data.path", str(recipe.text), "--data.tokenizer", "byte", "--steps", "6",
        "--model.num_layers", "1", "--model.num_heads", "2", "--model.d_model", "32",
        "--model.max_seq_len", "32", "--seq_len", "32", "--global_batch_size", "4",
        "--eval.every", "0", "--eval.sample_tokens", "0", "--log_every", "1",
        "--checkpoint.every", "3", "--compile_cache", str(tmp_path / "xla"),
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    small.run(one, *flags)
    split = ["--mesh.fsdp", "1", "--mesh.context", "2", "--context", by]
    end_job(start_job(small, two, 2, *flags, *split, devices=2))
    np.testing.assert_allclose(losses(two), losses(one), rtol=3e-5)
    np.testing.assert_allclose(
        losses(two, "eval/loss"), losses(one, "eval/loss"), rtol=3e-5
    )
    flags[5] = "9"
    last = small.run(two, *flags)
    assert resumed_from(last.out) == 6
