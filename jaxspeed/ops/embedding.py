# SPDX-License-Identifier: Apache-2.0
"""Table lookup, whose gradient is summed in float32.

Autodiff would add up a 16-bit table's gradient in 16 bits: a token that occurs 4096 times would
count 256 times.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxspeed.ambient import current
from jaxspeed.ops.linear import scatter_sequence
from jaxspeed.sharding import on_tensor, opened, splits_sequence
from jaxspeed.types import Parameter


def embed(table: Parameter, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Returns the rows of a table (V, D) at ids, rounded to the compute dtype, in the activation dtype.

    Ids out of range take the nearest row; that they are in range is the caller's duty.
    """
    settings = current()
    table, split = opened(table)
    if split == 0 and ids.ndim == 2:
        return _over_tensor(table, ids)
    rows: Any = _rows(settings.compute, table.shape[0], table, ids)
    return rows.astype(settings.activations)


def _over_tensor(table: Array, ids: Array) -> Array:
    """Returns rows of a table that `tensor` splits: each device looks up those it has, and their sum goes to where the sequence lies."""
    settings, shared = current(), splits_sequence(ids.shape[1])

    def local(table: Array, ids: Array) -> Array:
        count = table.shape[0]
        ids = ids - jax.lax.axis_index("tensor") * count
        here = (ids >= 0) & (ids < count)
        rows: Any = _rows(settings.compute, count, table, ids)
        rows = jnp.where(here[..., None], rows, 0).astype(settings.activations)
        return scatter_sequence(rows) if shared else jax.lax.psum(rows, "tensor")

    found = P(None, "tensor") if shared else P()
    ids = jnp.clip(ids, 0, table.shape[0] - 1)
    return on_tensor(local, (P("tensor"), P()), found)(table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rows(compute: Any, size: int, table: Array, ids: Array) -> Array:
    return jnp.take(table.astype(compute), ids, axis=0, mode="clip")


def _rows_fwd(compute: Any, size: int, table: Array, ids: Array) -> tuple[Array, Array]:
    return jnp.take(table.astype(compute), ids, axis=0, mode="clip"), ids


def _rows_bwd(compute: Any, size: int, ids: Array, g: Array) -> tuple[Array, None]:
    zeros = jnp.zeros((size, g.shape[-1]), jnp.float32)
    ids = jnp.clip(ids, 0, size - 1)
    return zeros.at[ids].add(g.astype(jnp.float32)), None


_rows.defvjp(_rows_fwd, _rows_bwd)
