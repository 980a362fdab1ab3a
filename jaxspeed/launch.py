# SPDX-License-Identifier: Apache-2.0
"""What must happen to a process before jax starts: allocator, virtual devices, compile cache, distributed set-up."""

import ctypes
import logging
import os
import sys
import warnings
from pathlib import Path

import jax

from jaxspeed.config import ConfigError, RunConfig


INIT_TIMEOUT_S = 300


def start(run: RunConfig) -> None:
    """Prepares this process for a run. Call it before anything asks jax for a device.

    Raises:
        ConfigError: virtual devices on a machine that has accelerators, or a coordinator that does not answer.
    """
    quiet()
    keep_freed_memory()
    if run.virtual_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", run.virtual_devices)
    if run.compile_cache:
        _use_compile_cache(Path(run.compile_cache).expanduser())
    _join(run)


def quiet() -> None:
    """Keeps what jax and its plugins say about absent hardware from the user; their errors stay."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*Transparent hugepages are not enabled.*")


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


def is_main() -> bool:
    """Whether this process writes logs, metrics and reports."""
    return jax.process_index() == 0


def _use_compile_cache(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"compile_cache={str(path)!r}: {error.strerror}; give a writable folder, or '' for none") from None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _join(run: RunConfig) -> None:
    """Joins the run's process group, named explicitly or found in the cluster's environment."""
    if jax.distributed.is_initialized():
        return
    if run.coordinator:
        try:
            jax.distributed.initialize(
                run.coordinator, run.num_processes, run.process_id, initialization_timeout=INIT_TIMEOUT_S
            )
        except RuntimeError as error:
            raise ConfigError(
                f"coordinator={run.coordinator!r}: process {run.process_id} of {run.num_processes} could not join within "
                f"{INIT_TIMEOUT_S} s ({str(error).splitlines()[0]}); check that every process was started and reaches that address"
            ) from None
    elif _in_cluster():
        jax.distributed.initialize(initialization_timeout=INIT_TIMEOUT_S)


def _in_cluster() -> bool:
    """Whether the environment names more than one process: Slurm, Open MPI, Cloud TPU pods, GKE."""
    env = os.environ
    several = int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env
    several |= int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    hosts = env.get("TPU_WORKER_HOSTNAMES", "")
    several |= len(hosts.split(",")) > 1 and "TPU_WORKER_ID" in env
    return several or "MEGASCALE_COORDINATOR_ADDRESS" in env
