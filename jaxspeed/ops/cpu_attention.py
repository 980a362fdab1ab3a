# SPDX-License-Identifier: Apache-2.0
"""Causal attention for CPUs: one sequence at a time, in causal blocks, with its own derivative.

The scores of a sequence stay in the cache and are computed again in the backward pass, so nothing
of size T x T is ever in memory (arXiv 2205.14135). They are kept transposed, (keys, queries): then
every product sums over the last dim of its left operand, which is what XLA's fast CPU routines
want, and no score is ever turned. Grouped queries lie beside each other behind their key head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxspeed.ambient import current
from jaxspeed.ops.linear import pack, unpack
from jaxspeed.remat import NORMALISER_NAME


HIDDEN_SCORE = -1e30


def cpu_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T N H"]:
    """Returns what `jaxspeed.ops.attention` does, in float32.

    Operands are rounded to the ambient compute dtype one sequence at a time: XLA's CPU backend
    slices no 16-bit floats, and would widen and narrow whole arrays around the scan (jaxlib 0.10).
    """
    out: Any = _attend(current().compute, q, k, v, segment_ids)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    dtype: Any, q: Array, k: Array, v: Array, segment_ids: Array | None
) -> Array:
    return _attend_fwd(dtype, q, k, v, segment_ids)[0]


def _attend_fwd(
    dtype: Any, q: Array, k: Array, v: Array, segment_ids: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    _, T, N, H = q.shape
    K, like = k.shape[2], jnp.zeros((0,), q.dtype)
    G, block = N // K, _block(T)

    def one(_: None, sequence: Any) -> tuple[None, tuple[Array, ...]]:
        q, k, v, segments = sequence
        k, v = k.astype(dtype), v.astype(dtype)
        q = _heads((q * H**-0.5).astype(dtype)).reshape(K, G, T, H)
        k, v, out, normaliser = _heads(k), _heads(v), [], []
        # A row of ones under the values: the same product gives the sum of the weights.
        v_turned = jnp.concatenate([_turned(v), jnp.ones((K, 1, T), dtype)], 1)
        for start in range(0, T, block):
            stop = min(start + block, T)
            queries = q[:, :, start:stop].reshape(K, -1, H)
            scores = _dot(k[:, :stop], queries, 2).reshape(K, stop, G, stop - start)
            visible = _visible(segments, (0, stop), (start, stop))
            scores = jnp.where(visible[None, :, None], scores, HIDDEN_SCORE)
            top = jnp.max(scores, 1)
            weights = jnp.exp(scores - top[:, None]).astype(dtype)
            summed = _dot(v_turned[:, :, :stop], weights.reshape(K, stop, -1), 1)
            norm = summed[:, H]
            out.append((summed[:, :H] / norm[:, None]).reshape(K, H, G, -1))
            normaliser.append(top + jnp.log(norm).reshape(K, G, -1))
        result = jnp.concatenate(out, 3).transpose(3, 0, 2, 1).reshape(T, N, H)
        return None, (result, pack(q), pack(k), pack(v), jnp.concatenate(normaliser, 2))

    _, (out, *kept) = jax.lax.scan(one, None, (q, k, v, segment_ids))
    names = ("q", "k", "v", NORMALISER_NAME)
    kept = [checkpoint_name(x, name) for x, name in zip(kept, names, strict=True)]
    attended = checkpoint_name(pack(out.astype(dtype)), "attended")
    return out, (*kept, attended, segment_ids, like)


def _attend_bwd(
    dtype: Any, residuals: tuple[Any, ...], g: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, normaliser, attended, segment_ids, like = residuals
    B, K, G, T, H = q.shape
    block = _block(T)
    delta = jnp.sum(g * unpack(attended, dtype).astype(jnp.float32), -1)

    def one(_: None, sequence: Any) -> tuple[None, tuple[Array, Array, Array]]:
        q, k, v, normaliser, delta, g, segments = sequence
        q, k, v = (unpack(x, dtype) for x in (q, k, v))
        g = _heads(g.astype(dtype)).reshape(K, G, T, H)
        delta = delta.transpose(1, 2, 0)
        k_turned, d_q = _turned(k), jnp.zeros((K, H, G, T), jnp.float32)
        d_k, d_v = [], []
        for start in range(0, T, block):
            stop = min(start + block, T)
            queries, gs = (x[:, :, start:].reshape(K, -1, H) for x in (q, g))
            scores = _dot(k[:, start:stop], queries, 2)
            scores = scores.reshape(K, stop - start, G, T - start)
            visible = _visible(segments, (start, stop), (start, T))
            scores = jnp.where(visible[None, :, None], scores, HIDDEN_SCORE)
            probs = jnp.exp(scores - normaliser[:, None, :, start:]).astype(dtype)
            # Else XLA computes them once for each of their two readers (jaxlib 0.10).
            probs = jax.lax.optimization_barrier(probs)
            d_probs = _dot(v[:, start:stop], gs, 2).reshape(scores.shape)
            d_scores = probs.astype(jnp.float32) * (d_probs - delta[:, None, :, start:])
            d_scores = d_scores.astype(dtype).reshape(K, stop - start, -1)
            d_v.append(_dot(probs.reshape(K, stop - start, -1), gs, 1))
            d_k.append(_dot(d_scores, queries, 1))
            part = _dot(k_turned[:, :, start:stop], d_scores, 1)
            later = d_q[..., start:] + part.reshape(K, H, G, -1)
            d_q = jnp.concatenate([d_q[..., :start], later], 3)
        d_q = (d_q * H**-0.5).transpose(3, 0, 2, 1).reshape(T, K * G, H)
        by_token = [jnp.concatenate(x, 1).transpose(1, 0, 2) for x in (d_k, d_v)]
        d_q, d_k, d_v = (x.astype(like.dtype) for x in (d_q, *by_token))
        return None, (d_q, d_k, d_v)

    delta = delta.reshape(B, T, K, G)
    inputs = (q, k, v, normaliser, delta, g, segment_ids)
    _, (d_q, d_k, d_v) = jax.lax.scan(one, None, inputs)
    return d_q, d_k, d_v, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _block(T: int) -> int:
    """Returns the causal block: at most eight of them, each at least 128 tokens."""
    return max(128, -(-T // 8))


def _visible(
    segments: Array | None, keys: tuple[int, int], queries: tuple[int, int]
) -> Bool[Array, "k q"]:
    """Returns which keys of a range each query of a range sees."""
    visible = jnp.arange(*keys)[:, None] <= jnp.arange(*queries)[None]
    if segments is None:
        return visible
    return visible & (segments[slice(*keys), None] == segments[None, slice(*queries)])


def _heads(x: Float[Array, "T N H"]) -> Float[Array, "N T H"]:
    """Returns one matrix a head.

    Through four dims, here and in `_turned`: a three-dimensional transpose is folded into the
    product, which is then slow.
    """
    T, N, H = x.shape
    return x.reshape(1, T, N, H).transpose(0, 2, 1, 3).reshape(N, T, H)


def _turned(x: Float[Array, "N P Q"]) -> Float[Array, "N Q P"]:
    N, P, Q = x.shape
    return x.reshape(1, N, P, Q).transpose(0, 1, 3, 2).reshape(N, Q, P)


def _dot(a: Array, b: Array, contract: int) -> Array:
    """Returns the batched product over the last dim of a and dim `contract` of b, in float32."""
    dims = (((2,), (contract,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
