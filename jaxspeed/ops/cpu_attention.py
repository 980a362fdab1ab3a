# SPDX-License-Identifier: Apache-2.0
"""Causal attention with its own derivative, in the layouts that XLA's CPU backend multiplies fast.

Scores are kept transposed, (keys, queries): then all six products sum over the last dim of their
left operand, which is what the fast 16-bit and 32-bit routines want, and nothing of size T x T is
ever turned. The probabilities are kept for the backward pass, in the compute dtype.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxspeed.ops.linear import pack, unpack
from jaxspeed.remat import PROBABILITIES_NAME


def cpu_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T N H"]:
    """Returns what `jaxspeed.ops.attention` does, in the dtype of q."""
    B, T, N, H = q.shape
    repeats = N // k.shape[2]
    if repeats > 1:
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    earlier = jnp.arange(T)[:, None] <= jnp.arange(T)[None]
    visible = earlier[None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
    out: Any = _attend(N, _by_head(q), _by_head(k), _by_head(v), visible)
    return out.reshape(N, B, H, T).transpose(1, 3, 0, 2)


def _by_head(x: Float[Array, "B T N H"]) -> Float[Array, "NB T H"]:
    """Returns one matrix a head, heads outermost, since the `tensor` axis may split them.

    The reshape keeps XLA from giving the product a transposed operand.
    """
    B, T, N, H = x.shape
    return x.transpose(2, 0, 1, 3).reshape(N * B, T, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(N: int, q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Returns the result transposed, (N * B, H, T)."""
    return _attend_fwd(N, q, k, v, visible)[0]


def _attend_fwd(
    N: int, q: Array, k: Array, v: Array, visible: Array
) -> tuple[Array, tuple[Array, ...]]:
    scores = _dot(k, q, 2) * q.shape[-1] ** -0.5
    T = scores.shape[-1]
    scores = jnp.where(visible[None], scores.reshape(N, -1, T, T), -1e30).reshape(
        -1, T, T
    )
    exps = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    probs = (exps / jnp.sum(exps, axis=1, keepdims=True)).astype(q.dtype)
    out = _dot(_turned(N, v), probs, 1).astype(q.dtype)
    kept = [
        checkpoint_name(pack(x), name)
        for x, name in ((q, "q"), (k, "k"), (v, "v"), (probs, PROBABILITIES_NAME))
    ]
    return out, (*kept, jnp.zeros((0,), q.dtype))


def _attend_bwd(
    N: int, residuals: tuple[Array, ...], g: Array
) -> tuple[Array, Array, Array, None]:
    *kept, like = residuals
    q, k, v, probs = (unpack(x, like.dtype) for x in kept)
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    g = _turned(N, g)
    d_probs = _dot(v, g, 2)
    p32 = probs.astype(jnp.float32)
    d_scores = p32 * (d_probs - jnp.sum(p32 * d_probs, axis=1, keepdims=True))
    d_scores = (d_scores * scale).astype(dtype)
    d_query = _turned(N, _dot(_turned(N, k), d_scores, 1).astype(dtype))
    return (
        d_query,
        _dot(d_scores, q, 1).astype(dtype),
        _dot(probs, g, 1).astype(dtype),
        None,
    )


_attend.defvjp(_attend_fwd, _attend_bwd)


def _dot(a: Array, b: Array, contract: int) -> Array:
    """Returns the batched product over the last dim of a and dim `contract` of b, in float32."""
    return jax.lax.dot_general(
        a, b, (((2,), (contract,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )


def _turned(N: int, x: Float[Array, "NB P Q"]) -> Float[Array, "NB Q P"]:
    """Returns each matrix transposed, through four dims: XLA would fold a three-dimensional one into the product."""
    NB, P, Q = x.shape
    return x.reshape(N, NB // N, P, Q).transpose(0, 1, 3, 2).reshape(NB, Q, P)
