# SPDX-License-Identifier: Apache-2.0
"""The train state is made in its shards: shapes, placements, bytes and values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxspeed.config import SHARD_AXES, LossScaleConfig, MeshConfig, OptimConfig
from jaxspeed.program import Program
from jaxspeed.sharding import is_placement
from jaxspeed.state import bytes_per_device
from tests.toy import assert_same, host, program_of


MESHES = {
    "1x8": MeshConfig(fsdp=8),
    "2x4": MeshConfig(data=2, fsdp=4),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
}
CASES = [(stage, "1x8") for stage in (0, 1, 2, 3)] + [(3, "2x4"), (1, "2x2x2")]


def program(stage: int, mesh: str, **changes: Any) -> Program:
    return program_of(devices=8, stage=stage, mesh=MESHES[mesh], **changes)


def leaves(program: Program) -> list[tuple[Any, jax.Array]]:
    """Returns (what was announced, what was made) for each leaf."""
    state = program.init_state()
    assert jax.tree.structure(state) == jax.tree.structure(program.abstract_state)
    return list(
        zip(
            jax.tree.leaves(program.abstract_state), jax.tree.leaves(state), strict=True
        )
    )


@pytest.mark.parametrize(("stage", "mesh"), CASES)
def test_state_is_what_was_announced(stage: int, mesh: str) -> None:
    for announced, made in leaves(program(stage, mesh)):
        assert isinstance(announced, jax.ShapeDtypeStruct)
        assert (made.shape, made.dtype) == (announced.shape, announced.dtype)
        assert made.sharding.is_equivalent_to(announced.sharding, made.ndim)


@pytest.mark.parametrize(("stage", "mesh"), CASES)
def test_bytes_per_device_are_those_that_a_device_holds(stage: int, mesh: str) -> None:
    ours = program(stage, mesh)
    state = ours.init_state()
    held = 0
    for x in jax.tree.leaves(state):
        data = (
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        )
        held += data.addressable_shards[0].data.nbytes
    assert bytes_per_device(ours.abstract_state) == bytes_per_device(state) == held


@pytest.mark.parametrize(("stage", "mesh"), CASES)
def test_values_are_those_of_one_device(stage: int, mesh: str) -> None:
    one = program_of().init_state()
    assert_same(program(stage, mesh).init_state(), one)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_masters_and_moments_are_sharded_from_stage_1_on(stage: int) -> None:
    abstract = program(stage, "1x8").abstract_state
    specs = {x.sharding.spec for x in jax.tree.leaves(abstract["params"]) if x.ndim}
    assert ({SHARD_AXES in spec for spec in specs} == {True}) == (stage > 0)
    moments = [x for x in jax.tree.leaves(abstract["opt"]) if x.ndim]
    for param in jax.tree.leaves(abstract["params"]):
        assert (
            sum(
                m.shape == param.shape and m.sharding == param.sharding for m in moments
            )
            >= 2
        )


def test_scalars_are_whole_on_each_device() -> None:
    abstract = program(3, "1x8", compute="float16").abstract_state
    for name in ("step", "skipped", "key", "loss_scale"):
        assert all(x.sharding.spec == P() for x in jax.tree.leaves(abstract[name]))


def test_seed_decides_the_state() -> None:
    first, again, other = (program_of(seed=seed).init_state() for seed in (0, 0, 1))
    assert_same(first, again)
    assert np.any(host(first["params"]["embed"]) != host(other["params"]["embed"]))
    assert np.any(host(first["key"]) != host(other["key"]))


def test_step_starts_at_zero_and_float16_has_a_scale() -> None:
    state = program_of(
        compute="float16", loss_scale=LossScaleConfig(initial_power=5)
    ).init_state()
    assert (
        int(state["step"]),
        int(state["skipped"]),
        float(state["loss_scale"].scale),
    ) == (0, 0, 32.0)
    assert program_of().init_state()["loss_scale"] == ()


@pytest.mark.parametrize("name", ["sgd", "adafactor", "muon", "lion"])
def test_state_of_any_optimizer_is_placed(name: Any) -> None:
    ours = program(3, "1x8", optim=OptimConfig(name=name))
    places = jax.tree.leaves(ours.spec.placements, is_leaf=is_placement)
    shapes = {place.shape: place.spec("master") for place in places}
    for x in jax.tree.leaves(ours.abstract_state["opt"]):
        assert x.sharding.spec == shapes.get(x.shape, P())
