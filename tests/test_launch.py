# SPDX-License-Identifier: Apache-2.0
"""A process is prepared before jax starts: cache, devices, job."""

import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxspeed import launch
from jaxspeed.config import ConfigError, RunConfig
from tests.command import ROOT, write_recipe
from tests.toy import run_of


CLUSTER = (
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_STEP_NODELIST",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "TPU_WORKER_HOSTNAMES",
    "TPU_WORKER_ID",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "TPU_ML_PLATFORM",
    "TPU_SKIP_MDS_QUERY",
)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each roll call, which no one answers here."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(launch, "call_roll", lambda *args: calls.append(args))
    return calls


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Records the calls that would join a job, in an environment that names none."""
    for name in CLUSTER:
        monkeypatch.delenv(name, raising=False)
    calls: list[tuple[Any, ...]] = []
    record = lambda *group, **_: calls.append(group)
    monkeypatch.setattr(jax.distributed, "initialize", record)
    return calls


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the tests' own compilation cache in force."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)


@pytest.mark.usefixtures("no_cache")
def test_half_written_cache_entries_are_removed(tmp_path: Path) -> None:
    whole = zlib.compress(os.urandom(5000))
    entries = {"a-cache": whole, "b-cache": whole[:700], "c-cache": b""}
    # A zstd frame (Python 3.14), and what is no entry.
    entries |= {"d-cache": b"\x28\xb5\x2f\xfd...", "notes": b"x"}
    for name, data in entries.items():
        (tmp_path / name).write_bytes(data)
    launch._use_compile_cache(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        ".looked",
        "a-cache",
        "d-cache",
        "notes",
    }


@pytest.mark.usefixtures("no_cache")
def test_only_new_cache_entries_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[bytes] = []
    check = lambda entry: bool(looked_at.append(entry)) or True
    monkeypatch.setattr(launch, "_is_whole", check)
    for name in ("old", "new"):
        (tmp_path / f"{name}-cache").write_bytes(name.encode())
    os.utime(tmp_path / "old-cache", (1e9, 1e9))
    launch._use_compile_cache(tmp_path)
    assert sorted(looked_at) == [b"new", b"old"]
    looked_at.clear()
    launch._use_compile_cache(tmp_path)
    assert looked_at == [
        b"new"
    ]  # as old as the last look: it may have been half-written


def test_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="compile_cache=.*: Not a directory; give a"):
        launch._use_compile_cache(tmp_path / "file" / "cache")


@pytest.mark.slow
def test_damaged_cache_entry_is_mended_without_a_word(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, compile_cache=str(tmp_path / "xla"))
    recipe.run(tmp_path / "one", "--steps", "1")
    (step,) = (tmp_path / "xla").glob("jit_step-*")
    size = step.stat().st_size
    step.write_bytes(step.read_bytes()[: size // 2])
    assert not recipe.run(tmp_path / "two", "--steps", "1").err
    assert step.stat().st_size == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"coordinator": "h:1"}, "coordinator, num_processes and process_id go toge"),
        ({"num_processes": 2}, "coordinator, num_processes and process_id go together"),
        ({"process_id": 0}, "coordinator, num_processes and process_id go together"),
        (
            {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
            "process_id=2: there are 2 processes, numbered from 0; give 0 to 1",
        ),
        (
            {"coordinator": "h", "num_processes": 2, "process_id": 0},
            "coordinator='h': it wants an address and a port; give",
        ),
        (
            {"coordinator": "h:port", "num_processes": 2, "process_id": 0},
            "coordinator='h:port': it wants an address and a port; give",
        ),
    ],
)
def test_job_that_is_not_described_is_refused(
    flags: dict[str, Any], words: str, joined: list[tuple[Any, ...]]
) -> None:
    with pytest.raises(ConfigError, match=words):
        launch.start(run_of(**flags))
    assert not joined


def test_flags_name_the_job(
    joined: list[tuple[Any, ...]], called: list[tuple[Any, ...]]
) -> None:
    launch.start(run_of(coordinator="host0:99", num_processes=4, process_id=3))
    assert joined == [("host0:99", 4, 3)]
    assert called == [("host0:99", 4, 3, launch.JOIN_TIMEOUT_S)]


def test_roll_is_called_where_slurm_says_who_there_is(
    joined: list[tuple[Any, ...]],
    called: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "gpu[3-6]", "SLURM_NTASKS": "4",
        "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    }  # fmt: skip
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    launch._join(run_of())
    assert joined == [()]
    assert called == [("gpu3:61447", 4, 2, launch.JOIN_TIMEOUT_S)]


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, False),
        ({"SLURM_NTASKS": "2"}, False),  # a batch script, outside srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
        ({"TPU_ML_PLATFORM": "JAX"}, True),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, False),
    ],
)
def test_clusters_are_recognised(
    environment: dict[str, str],
    joins: bool,
    joined: list[tuple[Any, ...]],
    called: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_platforms", "tpu,cpu")
    try:
        launch._join(run_of())
    finally:
        jax.config.update("jax_platforms", platforms)
    assert joined == ([()] if joins else [])


def test_virtual_devices_stay_out_of_a_cluster(
    joined: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    launch._join(run_of(virtual_devices=8))
    assert not joined


def test_failure_to_join_is_one_line(
    called: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("UNKNOWN: Failed to start\nRPC server")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    run: RunConfig = run_of(coordinator="h:1", num_processes=2, process_id=0)
    with pytest.raises(ConfigError) as caught:
        launch.start(run)
    assert str(caught.value).startswith(
        "coordinator='h:1': process 0 of 2: could not join (UNKNOWN: Failed to start RPC"
    )


def test_deadline_that_is_met_leaves_nothing_behind() -> None:
    before = threading.active_count()
    with launch._deadline(60, "late"):
        pass
    assert threading.active_count() == before


def test_leaving_a_job_needs_a_job_and_a_failure() -> None:
    launch.leave(2)  # would end this process if it were one of several
    launch.leave(0)


def test_absent_hardware_is_not_spoken_of() -> None:
    """A plugin without its device must not make jax print; here none may be at all."""
    code = "from jaxspeed import launch; launch.quiet(); import jax; jax.devices()"
    environment = {n: v for n, v in os.environ.items() if n != "JAX_PLATFORMS"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_freed_memory_is_kept_wherever_there_is_glibc() -> None:
    launch.keep_freed_memory()
    launch.keep_freed_memory()
