# SPDX-License-Identifier: Apache-2.0
"""The train state: one nested dict, abstract first, then made straight into its shards.

`{"params", "opt", "step", "skipped", "key", "loss_scale"}`. Nothing unsharded ever exists: shapes
come from `eval_shape`, placements from shapes, and one jitted function with out_shardings makes
the arrays.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxspeed.config import LossScaleConfig
from jaxspeed.loss_scale import init_loss_scale
from jaxspeed.optim import map_like_params
from jaxspeed.sharding import is_placement, part_of
from jaxspeed.types import Params, PyTree


def make_init(
    make_params: Callable[[jax.Array], Params],
    tx: optax.GradientTransformation,
    loss_scale: LossScaleConfig | None,
    placements: PyTree,
) -> Callable[[jax.Array], PyTree]:
    """Returns `key -> state`; to be jitted with out_shardings, never called eagerly on a large model.

    Args:
        make_params: makes all parameters of a key.
        tx: the optimizer, which keeps state for those that are trained.
        loss_scale: float16's dynamic scaling, None in other dtypes.
        placements: a `Placement` per parameter.
    """

    def init(key: jax.Array) -> PyTree:
        init_key, step_key = jax.random.split(key)
        params = make_params(init_key)
        return {
            "params": params,
            "opt": tx.init(part_of(params, placements)),
            "step": jnp.zeros((), jnp.int32),
            "skipped": jnp.zeros((), jnp.int32),
            "key": step_key,
            "loss_scale": init_loss_scale(loss_scale) if loss_scale else (),
        }

    return init


def state_shardings(abstract: PyTree, placements: PyTree, mesh: Mesh) -> PyTree:
    """Returns a NamedSharding for every leaf of the state: masters and their optimizer moments by placement, scalars whole."""
    whole = NamedSharding(mesh, P())
    params = master_shardings(placements, mesh)
    shardings = {
        name: jax.tree.map(lambda _: whole, part)
        for name, part in abstract.items()
        if name not in ("params", "opt")
    }
    opt = map_like_params(abstract["opt"], abstract["params"], params, whole)
    return {**shardings, "params": params, "opt": opt}


def master_shardings(placements: PyTree, mesh: Mesh) -> PyTree:
    """Returns the NamedSharding of every master parameter."""
    return jax.tree.map(
        lambda place: NamedSharding(mesh, place.spec("master")),
        placements,
        is_leaf=is_placement,
    )


def with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
    """Returns the abstract state with its shardings, as checkpoints and ahead-of-time compilation want it."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        shardings,
    )


def bytes_per_device(abstract: Any) -> int:
    """Returns the bytes that a tree of sharded abstract (or real) arrays takes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract)
    )
