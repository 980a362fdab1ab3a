# SPDX-License-Identifier: Apache-2.0
"""Table lookup, whose gradient is summed in float32.

Autodiff would add up a 16-bit table's gradient in 16 bits: a token that occurs 4096 times would
count 256 times.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspeed.ambient import current


def embed(table: Float[Array, "V D"], ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Returns the table's rows at ids, rounded to the compute dtype, in the activation dtype.

    Ids out of range take the nearest row; that they are in range is the caller's duty.
    """
    settings = current()
    rows: Any = _rows(settings.compute, table.shape[0], table, ids)
    return rows.astype(settings.activations)


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
