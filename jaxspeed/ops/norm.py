# SPDX-License-Identifier: Apache-2.0
"""Normalisation over the last dim, in float32 whatever comes in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxspeed.ambient import current


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], *, eps: float
) -> Float[Array, "*B D"]:
    """Returns x / sqrt(mean(x^2) + eps) * scale. Reference: arXiv 1910.07467 eq. 4."""
    x = x.astype(jnp.float32)
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    return (y * _row(scale, y)).astype(current().activations)


def layer_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    *,
    eps: float,
) -> Float[Array, "*B D"]:
    """Returns (x - mean) / sqrt(var + eps) * scale + bias. Reference: arXiv 1607.06450 eq. 4."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, -1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + eps)
    return (y * _row(scale, y) + _row(bias, y)).astype(current().activations)


def _row(v: Array, like: Array) -> Array:
    return v.reshape((1,) * (like.ndim - 1) + v.shape)
