# SPDX-License-Identifier: Apache-2.0
"""What must happen to a process before jax starts: allocator, virtual devices, compile cache, distributed set-up.

jax ends a process whose job does not come together with a stack trace, and never writes a damaged
entry of its compilation cache anew; both are dealt with here. jax is imported by the functions:
what `quiet` sets must be there when jax is loaded. Layer 4.
"""

import contextlib
import ctypes
import glob
import logging
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxspeed.config import ConfigError, RunConfig, config_error
from jaxspeed.rollcall import call_roll


JOIN_TIMEOUT_S = float(os.environ.get("JAXSPEED_JOIN_TIMEOUT_S", "300"))
"""How long a process waits for the others of its job to start."""

_ACCELERATORS = (
    "/dev/nvidia*",
    "/dev/nvhost*",
    "/dev/nvgpu*",
    "/dev/dxg",
    "/dev/kfd",
    "/dev/accel*",
    "/dev/vfio/[0-9]*",
)
"""Device files of NVIDIA and AMD GPUs and of TPUs."""

_ZLIB_MAGIC = 0x78


def start(run: RunConfig) -> None:
    """Prepares this process for a run. Call it before anything asks jax for a device.

    Raises:
        ConfigError: the compilation cache cannot be written, or the job of several processes
            cannot come together as it is described.
    """
    start_alone(run.virtual_devices, run.compile_cache)
    _join(run)


def start_alone(virtual_devices: int, compile_cache: str) -> None:
    """Prepares a process that is the only one of its job; see `start`."""
    quiet()
    keep_freed_memory()
    import jax

    if virtual_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", virtual_devices)
    if compile_cache:
        _use_compile_cache(Path(compile_cache).expanduser())


def quiet() -> None:
    """Keeps what jax and its plugins say about absent hardware from the user; their errors stay."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", message="Transparent hugepages are not enabled")
    # A damaged or unwritable entry costs a compilation, nothing else.
    warnings.filterwarnings(
        "ignore", message="Error (reading|writing) persistent compilation cache entry"
    )
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    import jax

    if sys.platform == "linux" and not any(
        glob.glob(pattern) for pattern in _ACCELERATORS
    ):
        # The plugins of absent hardware would print traces and warnings.
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)
        if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
            jax.config.update("jax_platforms", "cpu")


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory in the process.

    XLA's CPU backend frees the step's temporary buffer (a gigabyte, say) after each step. Given
    back to the kernel it comes again as page faults, 12 to 30 % of a step. Must run before threads
    do; elsewhere than glibc it does nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    libc.mallopt(arena_max, 1)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)


def leave(code: int) -> None:
    """Ends this process at once if it fails as one of several; otherwise does nothing.

    jax would first wait minutes for the others, which wait for this one.
    """
    import jax

    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _use_compile_cache(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"compile_cache={str(path)!r}: {error.strerror}; give a writable folder, or '' for none"
        ) from None
    _drop_damaged(path)
    import jax

    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _drop_damaged(cache: Path) -> None:
    """Removes entries that a killed process left half-written.

    jax compiles past such an entry at every start and never replaces it. Only entries that are
    newer than the last look are read.
    """
    looked = cache / ".looked"
    now = time.time()
    with contextlib.suppress(OSError):  # what cannot be mended can still be read
        since = looked.stat().st_mtime if looked.exists() else 0.0
        for entry in cache.glob("*-cache"):
            if entry.stat().st_mtime >= since - 1 and not _is_whole(entry.read_bytes()):
                entry.unlink(missing_ok=True)
        looked.touch()
        os.utime(looked, (now, now))


def _is_whole(entry: bytes) -> bool:
    """Whether an entry can be unpacked; what is not in zlib's form is taken to be."""
    if entry[:1] not in (b"", bytes([_ZLIB_MAGIC])):
        return True
    try:
        zlib.decompress(entry)
    except zlib.error:
        return False
    return True


def _join(run: RunConfig) -> None:
    """Joins the run's process group, named explicitly or found in the cluster's environment."""
    import jax

    if jax.distributed.is_initialized():
        return
    if run.coordinator or run.num_processes or run.process_id >= 0:
        _check_group(run)
        who = f"coordinator={run.coordinator!r}: process {run.process_id} of {run.num_processes}"
        group = (run.coordinator, run.num_processes, run.process_id)
        call_roll(*group, JOIN_TIMEOUT_S)
        _initialise(who, *group)
    elif not run.virtual_devices and (where := _cluster()):
        if found := _found_group():
            call_roll(*found, JOIN_TIMEOUT_S)
        _initialise(where)


def _check_group(run: RunConfig) -> None:
    """Raises unless the three flags name a process of a group."""
    if not (run.coordinator and run.num_processes > 0 and run.process_id >= 0):
        raise ConfigError(
            "coordinator, num_processes and process_id go together; give all three or none"
        )
    if run.process_id >= run.num_processes:
        why = f"there are {run.num_processes} processes, numbered from 0"
        raise config_error(
            "process_id", run.process_id, why, f"give 0 to {run.num_processes - 1}"
        )
    _, colon, port = run.coordinator.rpartition(":")
    if not (colon and port.isdecimal() and 0 < int(port) < 65536):
        raise config_error(
            "coordinator",
            run.coordinator,
            "it wants an address and a port",
            "give for instance host0:9876",
        )


def _found_group() -> tuple[str, int, int] | None:
    """Returns (coordinator, processes, number of this one) as jax will find them under Slurm and Open MPI; None elsewhere."""
    try:
        from jax._src.clusters import OmpiCluster, SlurmCluster

        for cluster in (SlurmCluster, OmpiCluster):
            if cluster.is_env_present():
                address = cluster.get_coordinator_address(None, None)
                return address, cluster.get_process_count(), cluster.get_process_id()
    except (ImportError, TypeError, AttributeError, ValueError, KeyError):
        pass  # jax says itself what it cannot find, or moved the names of its own
    return None


def _initialise(who: str, *group: Any) -> None:
    """Calls jax.distributed.initialize; what it would do with a stack trace is one line here."""
    late = (
        f"{who}: not all processes of the job came within {JOIN_TIMEOUT_S:g} s; check that every one "
        "was started and reaches the coordinator's address, or set JAXSPEED_JOIN_TIMEOUT_S"
    )
    import jax

    try:
        with _deadline(JOIN_TIMEOUT_S, late):
            jax.distributed.initialize(
                *group,
                initialization_timeout=int(JOIN_TIMEOUT_S) + 60,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"{who}: could not join ({' '.join(str(error).split())[:200]}); "
            "check the address, or give --coordinator, --num_processes and --process_id"
        ) from None


@contextlib.contextmanager
def _deadline(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with the message and code 2 if the body takes longer.

    Nothing softer reaches into the call that it is for; so a signal ends the process too.
    """

    def give_up() -> None:
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    before = {
        number: signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _cluster() -> str:
    """Returns what in the environment speaks of several processes, or ""."""
    import jax

    env = os.environ
    if int(env.get("SLURM_NTASKS") or 1) > 1 and "SLURM_STEP_NODELIST" in env:
        return f"Slurm: task {env.get('SLURM_PROCID')} of {env['SLURM_NTASKS']}"
    if int(env.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return f"Open MPI: rank {env.get('OMPI_COMM_WORLD_RANK')} of {env['OMPI_COMM_WORLD_SIZE']}"
    if (
        "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
    ):
        return f"TPU worker {env.get('TPU_WORKER_ID')} of {env.get('TPU_WORKER_HOSTNAMES')}"
    # jax sets this where it finds TPU chips; a Cloud TPU VM tells its metadata server the rest.
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    on_tpu = "TPU_ML_PLATFORM" in env and not env.get("TPU_SKIP_MDS_QUERY")
    return (
        "Cloud TPU VM" if on_tpu and platforms in (None, "", "tpu", "tpu,cpu") else ""
    )
