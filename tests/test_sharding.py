# SPDX-License-Identifier: Apache-2.0
"""Placements are the ZeRO table's; a weight has one gradient under every stage."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxspeed.ambient import ambient
from jaxspeed.config import SHARD_AXES, ZeroConfig
from jaxspeed.sharding import (
    SHARDED,
    Placement,
    Weight,
    materialise,
    place,
    place_all,
    shard,
)


SIZES = {"stage": 1, "data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
TENSOR = {"stage": 1, "data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
CONTEXT = {"stage": 1, "data": 2, "fsdp": 2, "expert": 1, "context": 2, "tensor": 1}

RNG = np.random.default_rng(0)


def zero(stage: int, threshold: int = 0) -> ZeroConfig:
    return ZeroConfig(stage=stage, param_persistence_threshold=threshold)  # pyright: ignore[reportArgumentType]


TABLE = {
    0: {"master": False, "gradient": False, "compute": False},
    1: {"master": True, "gradient": False, "compute": False},
    2: {"master": True, "gradient": True, "compute": False},
    3: {"master": True, "gradient": True, "compute": True},
}


@pytest.mark.parametrize("kind", ["master", "gradient", "compute"])
@pytest.mark.parametrize("stage", list(TABLE))
def test_stage_shards_the_kinds_of_the_table(stage: int, kind: str) -> None:
    placement = place((16, 32), ("embed", "mlp"), SIZES, zero(stage))
    assert placement.spec(kind) == (
        P(None, SHARD_AXES) if TABLE[stage][kind] else P(None, None)
    )
    assert (kind in SHARDED[stage]) == TABLE[stage][kind]


PLACES = [
    # shape, dims, mesh, spec of the master
    ((16, 32), ("embed", "mlp"), SIZES, P(None, SHARD_AXES)),
    ((32, 16), ("mlp", "embed"), SIZES, P(SHARD_AXES, None)),
    ((16, 16), ("embed", "mlp"), SIZES, P(SHARD_AXES, None)),
    ((16, 33), ("embed", "mlp"), SIZES, P(SHARD_AXES, None)),
    ((128, 256), ("embed", "mlp"), SIZES, P(SHARD_AXES, None)),  # parts of 16 rows
    ((120, 256), ("embed", "mlp"), SIZES, P(None, SHARD_AXES)),  # of 15: the larger dim
    ((2, 4), ("embed", "mlp"), CONTEXT, P(None, SHARD_AXES)),
    ((2, 6), ("embed", "mlp"), CONTEXT, P(None, None)),
    ((15, 33), ("embed", "mlp"), SIZES, P(None, None)),
    ((8, 16, 15), ("layers", "embed", "mlp"), SIZES, P(None, SHARD_AXES, None)),
    ((8, 15, 15), ("layers", "embed", "mlp"), SIZES, P(None, None, None)),
    ((8,), ("embed",), SIZES, P(SHARD_AXES)),
    ((4,), ("embed",), SIZES, P(None)),
    ((), (), SIZES, P()),
    ((3, 24), None, SIZES, P(None, SHARD_AXES)),
    (
        (16, 32),
        ("embed", "mlp"),
        {"stage": 1, "data": 8, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1},
        P(None, None),
    ),
    ((16, 32), ("embed", "mlp"), TENSOR, P(SHARD_AXES, "tensor")),
    ((32, 16), ("mlp", "embed"), TENSOR, P("tensor", SHARD_AXES)),
    ((16, 4, 8), ("embed", "heads", "head_dim"), TENSOR, P(SHARD_AXES, "tensor", None)),
    ((16, 3, 8), ("embed", "heads", "head_dim"), TENSOR, P(SHARD_AXES, None, None)),
    ((16, 1, 8), ("embed", "kv_heads", "head_dim"), TENSOR, P(SHARD_AXES, None, None)),
    ((64, 16), ("vocab", "embed"), TENSOR, P("tensor", SHARD_AXES)),
    ((63, 16), ("vocab", "embed"), TENSOR, P(None, SHARD_AXES)),
    (
        (3, 16, 4, 8),
        ("layers", "embed", "heads", "head_dim"),
        TENSOR,
        P(None, SHARD_AXES, "tensor", None),
    ),
    ((16,), ("mlp",), TENSOR, P("tensor")),
    ((16, 32), None, TENSOR, P(None, SHARD_AXES)),
    ((16, 32), (None, "mlp"), TENSOR, P(SHARD_AXES, "tensor")),
]


@pytest.mark.parametrize(("shape", "dims", "sizes", "spec"), PLACES)
def test_dims_go_over_tensor_by_name_and_over_fsdp_by_size(
    shape: Any, dims: Any, sizes: Any, spec: P
) -> None:
    placement = place(shape, dims, sizes, zero(3))
    assert placement.spec("master") == spec
    manual = P(*(axis if axis == SHARD_AXES else None for axis in spec))
    assert placement.spec("master", manual_only=True) == manual
    assert place(shape, dims, sizes, zero(0)).spec("master") == P(
        *(axis if axis == "tensor" else None for axis in spec)
    )


@pytest.mark.parametrize(
    ("shape", "dims", "sizes", "spec"),
    [row for row in PLACES if row[1] and row[1][0] == "layers"],
)
def test_slice_of_a_layer_has_the_placement_of_the_stack(
    shape: Any, dims: Any, sizes: Any, spec: P
) -> None:
    placement = place(shape, dims, sizes, zero(3))
    assert placement.stacked
    tensor = tuple(axis if axis == "tensor" else None for axis in spec)
    assert placement.tensor_spec(len(shape)) == P(*tensor)
    assert placement.tensor_spec(len(shape) - 1) == P(*tensor[1:])


@pytest.mark.parametrize(
    ("shape", "dims", "threshold", "gathered_in_layers"),
    [
        ((16, 32), ("embed", "mlp"), 512, True),
        ((16, 32), ("embed", "mlp"), 513, False),
        ((4, 16, 32), ("layers", "embed", "mlp"), 512, True),
        ((4, 16, 32), ("layers", "embed", "mlp"), 513, False),
    ],
)
def test_small_parameter_of_a_layer_is_gathered_once_a_step(
    shape: Any, dims: Any, threshold: int, gathered_in_layers: bool
) -> None:
    placement = place(shape, dims, SIZES, zero(3, threshold))
    assert (SHARD_AXES in placement.spec("compute")) == gathered_in_layers
    assert SHARD_AXES in placement.spec("master")
    assert SHARD_AXES in placement.spec("gradient")


def test_dims_and_shape_of_different_length_are_refused() -> None:
    with pytest.raises(AssertionError):
        place((4, 4), ("embed",), SIZES, zero(3))


def test_tree_of_parameters_gives_a_tree_of_placements() -> None:
    params = {"a": {"w": jnp.zeros((8, 4))}, "b": jnp.zeros((3,))}
    dims = {"a": {"w": ("embed", "mlp")}, "b": None}
    tree = place_all(params, dims, SIZES, zero(2))
    assert tree["a"]["w"] == place((8, 4), ("embed", "mlp"), SIZES, zero(2))
    assert tree["b"] == Placement((3,), (None,), None, None, SHARDED[2])


X, W = (RNG.normal(size=s).astype(np.float32) for s in ((16, 8), (8, 24)))
MESHES = {"1x8": (1, 8), "2x4": (2, 4)}


def loss(x: Any, w: Any) -> Any:
    return jnp.sum(jnp.sin(x @ w))


@functools.cache
def weight_program(
    stage: int, mesh: Mesh, compute: Any, reduce_dtype: Any
) -> Callable[..., Any]:
    """Returns (x, master) -> (loss, gradient), jitted, taken as the step takes them."""
    placement = place(W.shape, ("embed", "mlp"), dict(mesh.shape), zero(stage))
    copy_spec, slot_spec = placement.spec("compute"), placement.spec("gradient")

    def local(
        x: jax.Array, copy: jax.Array, slot: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def value(slot: jax.Array) -> jax.Array:
            with ambient(compute=compute):
                return loss(x, materialise(Weight(copy, slot, placement, reduce_dtype)))

        total, gradient = jax.value_and_grad(value)(slot)
        left = ("data",) if "gradient" in placement.sharded else ("data", "fsdp")
        return jax.lax.psum(total, ("data", "fsdp")), jax.lax.psum(gradient, left)

    def run(x: jax.Array, master: jax.Array) -> tuple[jax.Array, jax.Array]:
        copy = master.astype(compute) if placement.sharded else master
        parts = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(("data", "fsdp")), copy_spec, slot_spec),
            out_specs=(P(), slot_spec),
            check_vma=False,
        )
        return parts(x, copy, jnp.zeros(master.shape, jnp.float32))

    return jax.jit(run, out_shardings=(None, NamedSharding(mesh, slot_spec)))


@pytest.mark.parametrize("shape", list(MESHES))
@pytest.mark.parametrize("stage", list(TABLE))
def test_weight_has_one_gradient_under_every_stage(
    stage: int, shape: str, mesh: Callable[..., Mesh]
) -> None:
    value, gradient = jax.value_and_grad(loss, argnums=1)(X, W)
    devices = mesh(*MESHES[shape])
    ours, slope = weight_program(stage, devices, jnp.float32, jnp.float32)(X, W)
    np.testing.assert_allclose(ours, value, rtol=1e-5)
    np.testing.assert_allclose(slope, gradient, rtol=1e-5, atol=1e-5)
    parts = MESHES[shape][1] if TABLE[stage]["gradient"] else 1
    assert slope.addressable_shards[0].data.size == W.size // parts


@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16_weight_is_rounded_and_its_gradient_is_not(
    stage: int, mesh: Callable[..., Mesh]
) -> None:
    rounded = W.astype(jnp.bfloat16).astype(np.float32)
    value, gradient = jax.value_and_grad(loss, argnums=1)(X, rounded)
    ours, slope = weight_program(stage, mesh(1, 8), jnp.bfloat16, jnp.float32)(X, W)
    assert slope.dtype == jnp.float32
    np.testing.assert_allclose(ours, value, rtol=1e-5)
    np.testing.assert_allclose(slope, gradient, rtol=1e-5, atol=1e-5)


def test_weight_without_a_slot_has_a_value() -> None:
    placement = place(
        W.shape,
        None,
        {"stage": 1, "data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1},
        zero(3),
    )
    assert jnp.array_equal(
        Weight(jnp.asarray(W), None, placement, jnp.float32).materialise(), W
    )


def test_what_is_not_a_weight_passes_unchanged() -> None:
    x = jnp.ones((3,))
    assert materialise(x) is x


def test_weight_is_a_pytree_of_its_arrays() -> None:
    placement = place(W.shape, None, SIZES, zero(3))
    weight = Weight(jnp.asarray(W), jnp.zeros(W.shape), placement, jnp.float32)
    assert len(jax.tree.leaves(weight)) == 2
    assert jax.tree.leaves(dataclasses.replace(weight, slot=None)) == [weight.copy]
    doubled = jax.tree.map(lambda x: 2 * x, weight)
    assert (doubled.placement, doubled.reduce_dtype) == (placement, jnp.float32)


def test_shard_says_nothing_without_a_tensor_axis() -> None:
    x = jnp.ones((4, 8))
    assert shard(x, "batch", "mlp") is x


@pytest.mark.parametrize(
    ("shape", "dims", "spec"),
    [
        ((4, 8), ("batch", "mlp"), P(None, "tensor")),
        ((4, 7), ("batch", "mlp"), P(None, None)),
        ((4, 8), ("batch", "embed"), P(None, None)),
        ((4, 2, 8), ("batch", "heads", "head_dim"), P(None, "tensor", None)),
    ],
)
def test_shard_puts_named_dims_over_tensor(
    shape: Any, dims: Any, spec: P, mesh: Callable[..., Mesh]
) -> None:
    with ambient(tensor=2), jax.set_mesh(mesh(2, 2, 2)):
        jaxpr = jax.make_jaxpr(lambda x: shard(x, *dims))(jnp.ones(shape))
    (equation,) = jaxpr.eqns
    assert equation.params["sharding"].spec == spec


def test_shard_wants_a_name_for_each_dim() -> None:
    with ambient(tensor=2), pytest.raises(ValueError, match="zip"):
        shard(jnp.ones((4, 8)), "batch")
