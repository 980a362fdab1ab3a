# SPDX-License-Identifier: Apache-2.0
"""The matrix product of every layer, with its own derivative.

Operands are cast to the ambient compute dtype, sums are float32 on every backend, and all three
products (forward, dx, dw) are flat two-dimensional ones: on CPU that is 1.2 to 1.5 times as fast
as what autodiff makes of an einsum, elsewhere it is the same. The weight's gradient leaves in
float32 whatever the compute dtype.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxspeed.ambient import current
from jaxspeed.sharding import WEIGHT_NAME


def linear(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    bias: Float[Array, "..."] | None = None,
    *,
    contract: int = 1,
) -> Float[Array, "..."]:
    """Returns x times w, plus bias, in the ambient activation dtype.

    y[..., n...] = sum_k x[..., k...] w[k..., n...] + bias[n...]

    Args:
        x: activations; its last `contract` dims are summed over.
        w: weight; its first `contract` dims are summed over.
        bias: one value per output feature.
        contract: number of dims summed over.
    """
    lead, inner, outer = x.shape[: x.ndim - contract], w.shape[:contract], w.shape[contract:]
    assert x.shape[x.ndim - contract :] == inner, (x.shape, w.shape, contract)
    flat = x.reshape(-1, math.prod(inner))
    matrix = w.reshape(math.prod(inner), math.prod(outer))
    settings = current()
    if bias is None:
        y = _product(settings.compute, settings.activations, flat, matrix)
    else:
        y = _affine(settings.compute, settings.activations, flat, matrix, bias.reshape(-1))
    return y.reshape(*lead, *outer)


def dot(a: Float[Array, "..."], b: Float[Array, "..."], contracting: tuple[int, int]) -> Float[Array, "..."]:
    """Returns the two-dimensional product over one dim of each operand, summed in float32."""
    dims = (((contracting[0],), (contracting[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(compute: Any, out: Any, x: Array, w: Array) -> Array:
    return dot(x.astype(compute), w.astype(compute), (1, 0)).astype(out)


def _product_fwd(compute: Any, out: Any, x: Array, w: Array) -> tuple[Array, tuple[Array, ...]]:
    xc = checkpoint_name(x.astype(compute), "product_input")
    wc = checkpoint_name(w.astype(compute), WEIGHT_NAME)
    return dot(xc, wc, (1, 0)).astype(out), (xc, wc, jnp.zeros((0,), x.dtype))


def _product_bwd(compute: Any, out: Any, residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array]:
    x, w, like = residuals
    g = g.astype(compute)
    return dot(g, w, (1, 1)).astype(like.dtype), dot(x, g, (0, 0))


_product.defvjp(_product_fwd, _product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _affine(compute: Any, out: Any, x: Array, w: Array, bias: Array) -> Array:
    return (dot(x.astype(compute), w.astype(compute), (1, 0)) + bias[None]).astype(out)


def _affine_fwd(compute: Any, out: Any, x: Array, w: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    xc = checkpoint_name(x.astype(compute), "product_input")
    wc = checkpoint_name(w.astype(compute), WEIGHT_NAME)
    return (dot(xc, wc, (1, 0)) + bias[None]).astype(out), (xc, wc, jnp.zeros((0,), x.dtype))


def _affine_bwd(compute: Any, out: Any, residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    dx, dw = _product_bwd(compute, out, residuals, g)
    return dx, dw, sum_rows(g)


_affine.defvjp(_affine_fwd, _affine_bwd)


def sum_rows(g: Float[Array, "M N"]) -> Float[Array, " N"]:
    """Returns the float32 sum over rows, as a product: XLA's CPU column sums are many times slower."""
    return dot(jnp.ones((1, g.shape[0]), jnp.float32), g.astype(jnp.float32), (1, 0))[0]
