# SPDX-License-Identifier: Apache-2.0
"""Chips as tables, and devices that are not there to compile for.

`get_topology("v5p:2x2x2")` gives devices for a `Mesh` on a machine that has none of them:
a program lowered for them compiles, and its memory and collectives can be read. Nothing
can run on them. `CHIPS` holds what a planner needs to know of a chip, each row with its
source, and the compiler options that its kind of chip wants.

The one design decision: jax's public `topologies.get_topology_desc` does the work, and the
environment is touched only for libtpu, only before it loads. Layer 1.
"""

import importlib.resources
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import topologies

from jaxspeed.config import ConfigError, config_error, suggest


CompilerOptions = Mapping[str, bool | str]
"""What `jax.stages.Lowered.compile(compiler_options=...)` takes."""

ASYNC_COLLECTIVES: CompilerOptions = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
}
"""TPU: gathers run beside the matrix products of the same layer. Without, all of them block.

Without the last one a gather over a whole three-dimensional slice (v5p:4x4x4) is an all-reduce of zeros
and one shard: twice the bytes, and it blocks (libtpu 0.0.42).
"""

RING_REDUCE_SCATTER: CompilerOptions = {
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
}
"""TPU, an option and no default: a real reduce-scatter over several torus dimensions.

Without it the compiler makes an all-reduce of twice the bytes there. That one uses all links
at once and this one a single ring, so fewer bytes need not be less time: measure.
"""

SPARSE_CORE_REDUCE_SCATTER: CompilerOptions = {
    **RING_REDUCE_SCATTER,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_check_legacy_constraints_in_reduce_scatter_legalizer": False,
}
"""TPU v5p and v6e: reduce-scatters over a whole slice are real ones, half the bytes, and run on the SparseCores beside other work.

Without the last one a gradient's over a three-dimensional slice (v5p:4x4x4) is an all-reduce of which
each chip keeps its part, and everything waits for it (libtpu 0.0.42).
"""

SPARSE_CORE_GATHER: CompilerOptions = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
}
"""TPU v5p and v6e: gathers run on the SparseCores, beside the products of any layer.

Fused with the products of their own layer (`ASYNC_COLLECTIVES`), the first gather of each layer has nothing to run
beside, and everything waits for it. Offloading them needs the option for the slice's number of dimensions, too (libtpu 0.0.42).
"""

LARGE_VMEM: CompilerOptions = {"xla_tpu_scoped_vmem_limit_kib": "49152"}
"""TPU v5p and v6e: larger tiles for matrix products.

By the compiler's own estimate they then reach 94 % of a v5p's peak, not 69 %; compiling takes
up to four times as long. Public recipes for these chips set twice as much; no run of ours on hardware has
confirmed the gain.
"""

WITH_SPARSE_CORES: CompilerOptions = {
    **ASYNC_COLLECTIVES,
    **SPARSE_CORE_REDUCE_SCATTER,
    **SPARSE_CORE_GATHER,
    **LARGE_VMEM,
}
"""TPU v5p and v6e: all of these."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What is known of a kind of accelerator. Rates are per second, sizes in bytes."""

    name: str
    """The name before the colon in a topology's name."""
    device: str
    """The product."""
    kind: str
    """`device_kind` of its jax devices."""
    platform: Literal["tpu", "gpu"]
    """`platform` of its jax devices."""
    hbm_bytes: int
    """Memory of one device that a program can use (TPU: what the compiler allows)."""
    hbm_bandwidth: float
    """Bytes read or written."""
    peak_flops: Mapping[str, float]
    """Floating-point (or int8) operations of dense matrix products, by the operands' dtype."""
    links: int
    """Links of one device to its neighbours (of a GPU: to the switch)."""
    link_bandwidth: float
    """Bytes over one link in one direction."""
    dims: int
    """Dimensions of the torus that the links make; 0 for a switch that reaches all alike."""
    clock_hz: float
    """Of the matrix units, by which a TPU compiler's cycle estimates become seconds."""
    source: str
    """Where the figures are from."""
    compiler_options: CompilerOptions
    """What to compile with on this kind of chip, ahead of time and in a real run."""


_TPU_DOCS = "cloud.google.com/tpu/docs/"
_HBM = "hbm_bytes: libtpu 0.0.42 (its out-of-memory message)"
_NVIDIA = "NVIDIA data sheet (SXM, dense), NVLink per direction"
_GPU_OPTIONS: CompilerOptions = {"xla_gpu_enable_latency_hiding_scheduler": True}
_HOPPER_FLOPS = {
    "float32": 66.9e12,
    "tensorfloat32": 494.7e12,
    "bfloat16": 989.4e12,
    "float16": 989.4e12,
    "float8_e4m3fn": 1978.9e12,
    "int8": 1978.9e12,
}

_ROWS = (
    Chip(
        name="v4",
        device="TPU v4",
        kind="TPU v4",
        platform="tpu",
        hbm_bytes=int(30.75 * 2**30),
        hbm_bandwidth=1.228e12,
        peak_flops={"bfloat16": 275e12, "int8": 275e12},
        links=6,
        link_bandwidth=50e9,
        dims=3,
        clock_hz=1.05e9,
        source=f"{_TPU_DOCS}v4; {_HBM}",
        compiler_options=ASYNC_COLLECTIVES,
    ),
    Chip(
        name="v5e",
        device="TPU v5e",
        kind="TPU v5 lite",
        platform="tpu",
        hbm_bytes=int(15.75 * 2**30),
        hbm_bandwidth=0.819e12,
        peak_flops={"bfloat16": 197e12, "int8": 393e12},
        links=4,
        link_bandwidth=50e9,
        dims=2,
        clock_hz=1.503e9,
        source=f"{_TPU_DOCS}v5e (400 GB/s both ways over 4 links); {_HBM}",
        compiler_options=ASYNC_COLLECTIVES,
    ),
    Chip(
        name="v5p",
        device="TPU v5p",
        kind="TPU v5",
        platform="tpu",
        hbm_bytes=int(95.74 * 2**30),
        hbm_bandwidth=2.765e12,
        peak_flops={"bfloat16": 459e12, "int8": 918e12},
        links=6,
        link_bandwidth=100e9,
        dims=3,
        clock_hz=1.75e9,
        source=f"{_TPU_DOCS}v5p (1200 GB/s both ways over 6 links); {_HBM}",
        compiler_options=WITH_SPARSE_CORES,
    ),
    Chip(
        name="v6e",
        device="TPU v6e (Trillium)",
        kind="TPU v6 lite",
        platform="tpu",
        hbm_bytes=int(31.25 * 2**30),
        hbm_bandwidth=1.6e12,
        peak_flops={"bfloat16": 918e12, "int8": 1836e12},
        links=4,
        link_bandwidth=100e9,
        dims=2,
        clock_hz=1.75e9,
        source=f"{_TPU_DOCS}v6e (800 GB/s both ways over 4 links); {_HBM}",
        compiler_options=WITH_SPARSE_CORES,
    ),
    Chip(
        name="a100",
        device="NVIDIA A100 SXM4 80 GB",
        kind="NVIDIA A100-SXM4-80GB",
        platform="gpu",
        hbm_bytes=80 * 2**30,
        hbm_bandwidth=2.039e12,
        peak_flops={
            "float32": 19.5e12,
            "tensorfloat32": 156e12,
            "bfloat16": 312e12,
            "float16": 312e12,
            "int8": 624e12,
        },
        links=12,
        link_bandwidth=25e9,
        dims=0,
        clock_hz=1.41e9,
        source=_NVIDIA,
        compiler_options=_GPU_OPTIONS,
    ),
    Chip(
        name="h100",
        device="NVIDIA H100 SXM5 80 GB",
        kind="NVIDIA H100 80GB HBM3",
        platform="gpu",
        hbm_bytes=80 * 2**30,
        hbm_bandwidth=3.35e12,
        peak_flops=_HOPPER_FLOPS,
        links=18,
        link_bandwidth=25e9,
        dims=0,
        clock_hz=1.98e9,
        source=_NVIDIA,
        compiler_options=_GPU_OPTIONS,
    ),
    Chip(
        name="h200",
        device="NVIDIA H200 SXM 141 GB",
        kind="NVIDIA H200",
        platform="gpu",
        hbm_bytes=141 * 10**9,
        hbm_bandwidth=4.8e12,
        peak_flops=_HOPPER_FLOPS,
        links=18,
        link_bandwidth=25e9,
        dims=0,
        clock_hz=1.98e9,
        source=_NVIDIA,
        compiler_options=_GPU_OPTIONS,
    ),
)

CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _ROWS}
"""The chips that can be planned for, by the name before the colon."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to compile for, and what they are."""

    name: str
    """As it was asked for: `v5p:2x2x2`."""
    devices: tuple[Any, ...]
    """For `jaxspeed.mesh.build_mesh` or `jax.sharding.Mesh`."""
    platform: Literal["cpu", "tpu", "gpu"]
    """Of the devices."""
    chip: Chip | None
    """None for a CPU, of which nothing is known."""
    compiler_options: CompilerOptions = field(default_factory=dict)
    """For `Lowered.compile(compiler_options=dict(...))`."""

    @property
    def hbm_bytes(self) -> int | None:
        """Memory of one device; None where it is not known (CPU)."""
        return None if self.chip is None else self.chip.hbm_bytes


def get_topology(name: str) -> Topology:
    """Returns devices to compile for, whether this machine has them or not.

    Args:
        name: chip and arrangement. `cpu:8` is 8 devices of this process's CPU (they can
            run programs, too). `v5p:2x2x2`, `v4:2x2x1`: a 3-D slice of TPUs. `v5e:4x4`,
            `v6e:2x4`: a 2-D slice. `2xv5e:4x4`: two of them, which the data center's network
            joins. `h100:8`: one host of 8 GPUs; `h100:4x8`: 4 hosts.

    Raises:
        ConfigError: an unknown chip, an arrangement that it does not have, or a missing
            package, named with what to install.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(\w+):(\d+(?:x\d+)*)", name)
    known = ["cpu", *CHIPS]
    if match is None:
        raise config_error(
            "topology", name, "it is not CHIP:SIZES", "give one like cpu:8 or v5e:4x4"
        )
    key, sizes = match[2], [int(size) for size in match[3].split("x")]
    slices = int(match[1] or 1)
    if key not in known:
        change = f"give one of {', '.join(known)}.{suggest(key, known)}"
        raise config_error("topology", name, "no such chip", change)
    if 0 in (slices, *sizes):
        raise config_error("topology", name, "a size is 0", "give sizes of at least 1")
    if slices > 1 and (key == "cpu" or CHIPS[key].platform != "tpu"):
        change = f"give {key}:8" if key == "cpu" else f"give {key}:{slices}x8"
        raise config_error("topology", name, "only TPUs come in slices", change)
    if key == "cpu":
        return _cpu(name, sizes)
    chip = CHIPS[key]
    if chip.platform == "tpu":
        return _tpu(name, chip, sizes, slices)
    return _gpu(name, chip, sizes)


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip of a device that is there, by its `device_kind`; None if unknown."""
    return next((chip for chip in _ROWS if chip.kind == device_kind), None)


def _cpu(name: str, sizes: Sequence[int]) -> Topology:
    if len(sizes) != 1:
        raise config_error("topology", name, "CPU devices have no shape", "give cpu:8")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            count = max(sizes[0], jax.config.values["jax_num_cpu_devices"])
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            pass  # JAX has made its devices already, so these are what there is
    devices = jax.devices("cpu")
    if len(devices) < sizes[0]:
        why = f"this process has made its {len(devices)} CPU devices already"
        change = f"ask before anything else uses jax, or start with {sizes[0]}"
        raise config_error("topology", name, why, change)
    return Topology(
        name=name, devices=tuple(devices[: sizes[0]]), platform="cpu", chip=None
    )


def _tpu(name: str, chip: Chip, sizes: Sequence[int], slices: int) -> Topology:
    _require("libtpu", name, "tpu")
    if len(sizes) != chip.dims:
        change = f"give {chip.name}:{'x'.join('4' * chip.dims)}"
        raise config_error(
            "topology", name, f"{chip.device} slices are {chip.dims}-D", change
        )
    _prepare_libtpu()
    options: dict[str, Any] = {}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # else each chip is two devices
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    one = f"{chip.name}:{'x'.join(map(str, sizes))}"
    try:
        description = topologies.get_topology_desc(one, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as e:
        why = f"libtpu refuses it ({str(e).splitlines()[0]})"
        raise config_error("topology", name, why, "give a slice of 2x2 hosts") from e
    return _topology(name, chip, description)


def _gpu(name: str, chip: Chip, sizes: Sequence[int]) -> Topology:
    if not _is_installed("jax_plugins.xla_cuda13"):
        _require("jax_plugins.xla_cuda12", name, "cuda12")
    hosts, gpus = sizes if len(sizes) == 2 else (1, sizes[0])
    if len(sizes) > 2 or gpus > 8:
        change = f"give HOSTSxGPUS, as in {chip.name}:2x8"
        raise config_error("topology", name, "a host has at most 8 GPUs", change)
    files = importlib.resources.files("jaxspeed") / "topologies"
    target = (files / f"{chip.name}.txt").read_text(encoding="utf-8")
    description = topologies.get_topology_desc(
        platform="cuda", topology=f"1x{hosts}x{gpus}", target_config=target
    )
    return _topology(name, chip, description)


def _topology(name: str, chip: Chip, description: Any) -> Topology:
    return Topology(
        name=name,
        devices=tuple(description.devices),
        platform=chip.platform,
        chip=chip,
        compiler_options=chip.compiler_options,
    )


def _require(module: str, name: str, extra: str) -> None:
    if not _is_installed(module):
        raise ConfigError(
            f"topology={name!r}: needs {module}, which is not installed; "
            f"pip install 'jaxspeed[{extra}]'"
        )


def _is_installed(module: str) -> bool:
    parent = module.rpartition(".")[0]
    found = not parent or importlib.util.find_spec(parent) is not None
    return found and importlib.util.find_spec(module) is not None


def _prepare_libtpu() -> None:
    """Tells libtpu, before it loads, not to look for a TPU that is not there."""
    if any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*")):
        return
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        # Else a second process that compiles at the same time is stopped.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
