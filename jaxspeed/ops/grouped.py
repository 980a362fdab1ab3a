# SPDX-License-Identifier: Apache-2.0
"""The matrix product of experts: rows in groups, each group by a matrix of its own.

As in `jaxspeed.ops.linear`, operands are cast to the ambient compute dtype, sums are float32, and
the weights' gradient leaves in float32. Groups of any size are done by a kernel for each platform:
on a TPU Pallas's megablox (what XLA makes of the gradient of `jax.lax.ragged_dot` there multiplies
every row by every matrix), on a GPU `jax.lax.ragged_dot`, on a CPU a loop over tiles of a group.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxspeed.ambient import current


TILE = {"cpu": 128, "tpu": 512}
"""Rows of a tile at most."""


def tiles_of(rows: int, groups: int) -> tuple[int, int]:
    """Returns what (the rows of each group, all rows) should be padded to a multiple of, for the platform's kernel.

    Args:
        rows: of all groups.
        groups: how many there are.
    """
    platform = current().platform
    if platform == "cpu":
        share = max(1, rows // groups)
        tile = min(TILE["cpu"], 1 << max(3, share.bit_length() - 2))
        return tile, tile
    return 1, TILE.get(platform, 1)


def grouped_linear(
    x: Float[Array, "R K"],
    w: Float[Array, "G K N"],
    sizes: Int[Array, " G"] | None,
    *,
    tile: int = 1,
) -> Float[Array, "R N"]:
    """Returns each row times its group's matrix, in the ambient activation dtype.

    Args:
        x: the rows of group 0, then those of group 1, and so on; what is behind them is of none.
        w: a matrix for each group.
        sizes: rows of each group, multiples of `tile`; None: all have the same, R / G.
        tile: see `tiles_of`.
    """
    settings = current()
    kernel = ("even" if sizes is None else settings.platform, tile)
    y: Any = _grouped(kernel, settings.compute, settings.activations, x, w, sizes)
    return checkpoint_name(y, "grouped")


def _batched(a: Array, b: Array, contracting: tuple[int, int]) -> Array:
    dims = (((contracting[0],), (contracting[1],)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


Kernel = tuple[str, int]
"""The platform, or `even` where all groups have the same number of rows; and the tile."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _grouped(
    kernel: Kernel, compute: Any, out: Any, x: Array, w: Array, sizes: Array | None
) -> Array:
    return _forward(kernel, x.astype(compute), w.astype(compute), sizes).astype(out)


def _grouped_fwd(
    kernel: Kernel, compute: Any, out: Any, x: Array, w: Array, sizes: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    xc, wc = x.astype(compute), w.astype(compute)
    y = _forward(kernel, xc, wc, sizes).astype(out)
    return y, (xc, wc, sizes, jnp.zeros((0,), x.dtype))


def _grouped_bwd(
    kernel: Kernel, compute: Any, out: Any, residuals: tuple[Any, ...], g: Array
) -> tuple[Array, Array, None]:
    x, w, sizes, like = residuals
    g = g.astype(compute)
    dx = _forward(kernel, g, w, sizes, transposed=True)
    dw = _weight_gradient(kernel, x, g, sizes, w.shape[0])
    return dx.astype(like.dtype), dw, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _forward(
    kernel: Kernel, x: Array, w: Array, sizes: Any, *, transposed: bool = False
) -> Array:
    """Returns x w, or x w^T, group by group, in float32."""
    platform, tile = kernel
    if platform == "even":
        apart = x.reshape(w.shape[0], -1, x.shape[-1])
        return _batched(apart, w, (2, 2 if transposed else 1)).reshape(x.shape[0], -1)
    if platform == "cpu":
        return _tiles_forward(tile, x, w, sizes, transposed)
    if platform == "tpu":
        from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

        K, N = x.shape[1], w.shape[1 if transposed else 2]
        tiling = _tiling(x.shape[0], K, N)
        return gmm(x, w, sizes, jnp.float32, tiling, transpose_rhs=transposed)
    w = w.swapaxes(1, 2) if transposed else w
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)


def _weight_gradient(
    kernel: Kernel, x: Array, g: Array, sizes: Any, groups: int
) -> Array:
    """Returns x^T g of each group, in float32."""
    platform, tile = kernel
    if platform == "even":
        apart = [a.reshape(groups, -1, a.shape[-1]) for a in (x, g)]
        return _batched(apart[0], apart[1], (1, 1))
    if platform == "cpu":
        return _tiles_weight_gradient(tile, x, g, sizes)
    if platform == "tpu":
        from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

        rows, *tile_there = _tiling(x.shape[0], x.shape[1], g.shape[1])
        tiling = (rows, min(512, tile_there[0]), tile_there[1])
        return tgmm(x.T, g, sizes, jnp.float32, tiling, num_actual_groups=groups)
    zeros = jnp.zeros((groups, x.shape[1], g.shape[1]), x.dtype)
    product = lambda w: jax.lax.ragged_dot(
        x, w, sizes, preferred_element_type=jnp.float32
    )
    return jax.vjp(product, zeros)[1](g.astype(jnp.float32))[0].astype(jnp.float32)


def _tiling(rows: int, inner: int, outer: int) -> tuple[int, int, int]:
    """Returns the kernel's tile of a product (rows, inner) (inner, outer), for 16 MiB of VMEM."""
    return (math.gcd(rows, TILE["tpu"]), min(inner, 1024), min(outer, 1024))


def _tiles_forward(
    tile: int, x: Array, w: Array, sizes: Array, transposed: bool
) -> Array:
    columns = w.shape[1 if transposed else 2]
    dims = (((1,), (1 if transposed else 0,)), ((), ()))

    def group(y: Array, per: tuple[Array, Array, Array]) -> tuple[Array, None]:
        matrix, start, size = per

        def one(i: Array, y: Array) -> Array:
            at = start + i * tile
            rows = jax.lax.dynamic_slice_in_dim(x, at, tile)
            product = jax.lax.dot_general(
                rows, matrix, dims, preferred_element_type=jnp.float32
            )
            return jax.lax.dynamic_update_slice_in_dim(y, product, at, 0)

        return jax.lax.fori_loop(0, size // tile, one, y), None

    starts = jnp.cumsum(sizes) - sizes
    zeros = jnp.zeros((x.shape[0], columns), jnp.float32)
    return jax.lax.scan(group, zeros, (w, starts, sizes))[0]


def _tiles_weight_gradient(tile: int, x: Array, g: Array, sizes: Array) -> Array:
    def group(_: None, per: tuple[Array, Array]) -> tuple[None, Array]:
        start, size = per

        def one(i: Array, dw: Array) -> Array:
            at = start + i * tile
            left, right = (jax.lax.dynamic_slice_in_dim(a, at, tile) for a in (x, g))
            dims = (((0,), (0,)), ((), ()))
            return dw + jax.lax.dot_general(
                left, right, dims, preferred_element_type=jnp.float32
            )

        zeros = jnp.zeros((x.shape[1], g.shape[1]), jnp.float32)
        return None, jax.lax.fori_loop(0, size // tile, one, zeros)

    starts = jnp.cumsum(sizes) - sizes
    return jax.lax.scan(group, None, (starts, sizes))[1]
