# SPDX-License-Identifier: Apache-2.0
"""Chip tables and devices that are not there.

What needs libtpu or jax's CUDA plugin is skipped where they are not installed.
"""

import importlib.resources
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxspeed.config import ConfigError
from jaxspeed.ledger import read_ledger, read_partitioned
from jaxspeed.mesh import build_mesh
from jaxspeed.topology import (
    ASYNC_COLLECTIVES,
    CHIPS,
    LARGE_VMEM,
    RING_REDUCE_SCATTER,
    SPARSE_CORE_GATHER,
    SPARSE_CORE_REDUCE_SCATTER,
    Chip,
    find_chip,
    get_topology,
)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs jaxspeed[tpu]"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs jaxspeed[cuda12]",
)


def test_cpu_topology_is_of_this_process() -> None:
    topology = get_topology("cpu:8")
    assert topology.devices == tuple(jax.devices("cpu"))
    assert get_topology("cpu:2").devices == topology.devices[:2]
    assert (topology.platform, topology.chip, topology.hbm_bytes) == ("cpu", None, None)
    assert not topology.compiler_options


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "topology='': it is not CHIP:SIZES; give one like cpu:8"),
        ("v5p", "it is not CHIP:SIZES"),
        ("v5p:2x2x", "it is not CHIP:SIZES"),
        ("v5p:2*2*2", "it is not CHIP:SIZES"),
        ("v5:2x2", "no such chip; give one of cpu, v4, .*Did you mean 'v5"),
        ("cpu:0", "a size is 0"),
        ("cpu:2x4", "CPU devices have no shape"),
        ("cpu:9", "has made its 8 CPU devices already; .* or start with 9"),
    ],
)
def test_topology_that_cannot_be_is_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        get_topology(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "tpu"), ("h100:8", "cuda12")])
def test_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"pip install 'jaxspeed\[{extra}\]'"):
        get_topology(name)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_chip_figures_agree_with_each_other(chip: Chip) -> None:
    """A misplaced unit or digit breaks one of these ratios."""
    assert find_chip(chip.kind) is chip
    bandwidth = chip.links * chip.link_bandwidth
    assert 10 < chip.peak_flops["bfloat16"] / chip.hbm_bandwidth < 1000
    assert 2 < chip.hbm_bandwidth / bandwidth < 20
    assert 4e-3 < chip.hbm_bytes / chip.hbm_bandwidth < 0.05
    assert chip.links == 2 * chip.dims or chip.platform == "gpu"
    multipliers = chip.peak_flops["bfloat16"] / chip.clock_hz / 2
    array = 128 * 128 if chip.platform == "tpu" else 1024
    assert multipliers / array == pytest.approx(round(multipliers / array), rel=0.03)


def test_unknown_device_has_no_chip() -> None:
    assert find_chip("cpu") is None
    assert find_chip("NVIDIA H100 PCIe") is None


@pytest.mark.parametrize(
    "chip",
    [chip for chip in CHIPS.values() if chip.platform == "gpu"],
    ids=lambda chip: chip.name,
)
def test_gpu_description_agrees_with_the_chip_table(chip: Chip) -> None:
    folder = importlib.resources.files("jaxspeed") / "topologies"
    text = (folder / f"{chip.name}.txt").read_text(encoding="utf-8")
    fields = dict(re.findall(r"^\s*(\w+): (\S.*)$", text, re.MULTILINE))
    assert fields["device_description_str"] == f'"{chip.kind}"'
    assert float(fields["clock_rate_ghz"]) * 1e9 == chip.clock_hz
    assert float(fields["memory_bandwidth"]) == chip.hbm_bandwidth
    assert chip.hbm_bytes <= int(fields["device_memory_size"]) < 1.1 * chip.hbm_bytes
    assert int(fields["shared_memory_per_block_optin"]) < int(
        fields["shared_memory_per_core"]
    )


def lowered_scatter(name: str) -> tuple[jax.stages.Lowered, dict[str, int]]:
    """A gather and a scatter in a scan, for all devices of a topology as one axis."""
    devices = get_topology(name).devices
    axes = {"fsdp": len(devices)}
    mesh = build_mesh(axes, devices)

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        whole = jax.lax.all_gather(x, "fsdp", axis=1, tiled=True)
        return jax.lax.psum_scatter(
            whole * 2, "fsdp", scatter_dimension=1, tiled=True
        ), None

    f = jax.shard_map(
        lambda x: jax.lax.scan(step, x, None, length=3)[0],
        mesh=mesh,
        in_specs=P(None, "fsdp"),
        out_specs=P(None, "fsdp"),
        check_vma=False,
    )
    sharding = NamedSharding(mesh, P(None, "fsdp"))
    x = jax.ShapeDtypeStruct((256, 4096), jnp.float32, sharding=sharding)
    return jax.jit(f).lower(x), axes


def check_absent_device(name: str, count: int) -> None:
    topology = get_topology(name)
    assert len(topology.devices) == count
    assert topology.chip is not None
    assert find_chip(topology.devices[0].device_kind) is topology.chip
    lowered, axes = lowered_scatter(name)
    compiled = lowered.compile(compiler_options=dict(topology.compiler_options))
    made, asked = read_ledger(compiled, axes), read_partitioned(lowered, axes)
    size = 3 * 256 * 4096
    assert made.elements("all-gather") == asked.elements("all-gather") == size
    assert asked.elements("reduce-scatter") == size
    reduced = made.select("reduce-scatter").entries + made.select("all-reduce").entries
    assert sum(e.elements * e.trips for e in reduced) == size
    # A TPU reduces over several dims of its torus at once, and each device takes its part.
    assert all(e.sliced for e in made.select("all-reduce"))
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.peak_memory_in_bytes >= 256 * 4096 * 4


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "count"),
    [("v4:2x2x1", 4), ("v5e:4x4", 16), ("v5p:2x2x2", 8), ("v6e:2x4", 8)],
)
def test_program_compiles_for_absent_tpus(name: str, count: int) -> None:
    check_absent_device(name, count)


@needs_cuda
@pytest.mark.parametrize(
    ("name", "count"), [("h100:8", 8), ("h200:2x4", 8), ("a100:4", 4)]
)
def test_program_compiles_for_absent_gpus(name: str, count: int) -> None:
    check_absent_device(name, count)


@needs_libtpu
def test_single_chip_of_each_tpu_is_a_topology() -> None:
    for name in ("v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1"):
        assert len(get_topology(name).devices) == 1


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "message"),
    [("v5p:4x4", "slices are 3-D; give v5p:4x4x4"), ("v5e:3x4", "libtpu refuses it")],
)
def test_slice_that_does_not_exist_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_topology(name)


@needs_cuda
def test_host_holds_at_most_eight_gpus() -> None:
    with pytest.raises(ConfigError, match="as in h100:2x8"):
        get_topology("h100:16")


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "options", "overlapped"),
    [
        ("v5e:4x4", dict(RING_REDUCE_SCATTER), False),
        ("v5p:2x2x2", {**RING_REDUCE_SCATTER, **LARGE_VMEM}, False),
        ("v5p:2x2x2", dict(SPARSE_CORE_REDUCE_SCATTER), True),
        ("v6e:4x4", dict(SPARSE_CORE_REDUCE_SCATTER), True),
    ],
)
def test_option_makes_a_reduce_scatter_over_a_whole_slice(
    name: str, options: dict[str, bool | str], overlapped: bool
) -> None:
    lowered, axes = lowered_scatter(name)
    made = read_ledger(lowered.compile(compiler_options=options), axes)
    assert not made.select("all-reduce")
    assert {e.is_async for e in made.select("reduce-scatter")} == {overlapped}


@needs_libtpu
@pytest.mark.parametrize("name", ["v5p:2x2x2", "v6e:4x4"])
def test_gathers_on_sparse_cores_all_start_beside_others_work(name: str) -> None:
    lowered, axes = lowered_scatter(name)
    options = {**ASYNC_COLLECTIVES, **SPARSE_CORE_GATHER}
    made = read_ledger(lowered.compile(compiler_options=options), axes)
    assert {e.is_async for e in made.select("all-gather")} == {True}
    made = read_ledger(lowered.compile(compiler_options=dict(ASYNC_COLLECTIVES)), axes)
    assert {e.is_async for e in made.select("all-gather")} == {False}


@needs_libtpu
@pytest.mark.parametrize("axis", ["data", "stage"])
def test_step_for_several_slices_sends_little_between_them(axis: str) -> None:
    topology = get_topology("2xv5e:2x4")
    assert len(topology.devices) == 16
    mesh = build_mesh({"stage": 1, "data": 1, axis: 2, "fsdp": 8}, topology.devices)

    def f(x: jax.Array) -> jax.Array:
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        part = jax.lax.psum_scatter(whole * whole, "fsdp", tiled=True)
        return jax.lax.psum(part, axis)

    run = jax.shard_map(
        f, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False
    )
    x = jax.ShapeDtypeStruct(
        (1024, 256), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))
    )
    compiled = jax.jit(run).lower(x).compile()
    made = read_ledger(compiled, dict(mesh.shape))
    assert made.elements("all-gather", ("fsdp",)) == 1024 * 256
    assert made.elements("all-reduce", (axis,)) == 1024 * 256 // 8


@pytest.mark.parametrize(
    ("name", "message"),
    [("2xh100:8", "only TPUs come in slices; give h100:2x8"), ("0xv5e:2x4", "a size is 0"), ("2xcpu:8", "give cpu:8")],
)  # fmt: skip
def test_slices_of_other_devices_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_topology(name)
