# SPDX-License-Identifier: Apache-2.0
"""Attention for CPUs: one sequence at a time, in blocks, with its own derivative.

The scores of a sequence stay in the cache and are computed again in the backward pass, so nothing
of size T x S is ever in memory (arXiv 2205.14135), and blocks that hold no visible pair are never
computed. Scores are kept transposed, (keys, queries): then every product sums over the last dim
of its left operand, which is what XLA's fast CPU routines want, and no score is ever turned.
Grouped queries lie beside each other behind their key head.
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

Reach = tuple[int | None, int | None]
"""How many tokens (behind, ahead of) a query its keys may lie; None: any number."""


def cpu_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B T"] | None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    bias: Float[Array, "N T S"] | None = None,
    *,
    reach: Reach,
) -> Float[Array, "B T N H"]:
    """Returns what `jaxspeed.ops.attention` does, in float32.

    Operands are rounded to the ambient compute dtype one sequence at a time: XLA's CPU backend
    slices no 16-bit floats, and would widen and narrow whole arrays around the scan (jaxlib 0.10).
    """
    if bias is not None:  # as the scores lie
        N, T, S = bias.shape
        K = k.shape[2]
        bias = bias.reshape(K, N // K, T, S).transpose(0, 3, 1, 2)
    out: Any = _attend(
        current().compute, reach, q, k, v, segment_ids, key_segment_ids, bias
    )
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    dtype: Any,
    reach: Reach,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    key_segment_ids: Array | None,
    bias: Float[Array, "K S G T"] | None,
) -> Array:
    return _attend_fwd(dtype, reach, q, k, v, segment_ids, key_segment_ids, bias)[0]


def _attend_fwd(
    dtype: Any,
    reach: Reach,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    key_segment_ids: Array | None,
    bias: Array | None,
) -> tuple[Array, tuple[Any, ...]]:
    _, T, N, H = q.shape
    S, K, like = k.shape[1], k.shape[2], jnp.zeros((0,), q.dtype)
    G, block = N // K, _block(T, reach)

    def one(_: None, sequence: Any) -> tuple[None, tuple[Array, ...]]:
        q, k, v, *segments = sequence
        k, v = k.astype(dtype), v.astype(dtype)
        q = _heads((q * H**-0.5).astype(dtype)).reshape(K, G, T, H)
        k, v, out, normaliser = _heads(k), _heads(v), [], []
        # A row of ones under the values: the same product gives the sum of the weights.
        v_turned = jnp.concatenate([_turned(v), jnp.ones((K, 1, S), dtype)], 1)
        for start in range(0, T, block):
            queries = slice(start, min(start + block, T))
            keys = _reached(queries, S, reach)
            scores = _dot(k[:, keys], q[:, :, queries].reshape(K, -1, H), 2)
            scores = scores.reshape(K, _size(keys), G, _size(queries))
            scores = _masked(scores, bias, segments, keys, queries, reach)
            top = jnp.max(scores, 1)
            weights = jnp.exp(scores - top[:, None]).astype(dtype)
            weights = weights.reshape(K, _size(keys), -1)
            summed = _dot(v_turned[:, :, keys], weights, 1)
            norm = summed[:, H]
            out.append((summed[:, :H] / norm[:, None]).reshape(K, H, G, -1))
            normaliser.append(top + jnp.log(norm).reshape(K, G, -1))
        result = jnp.concatenate(out, 3).transpose(3, 0, 2, 1).reshape(T, N, H)
        return None, (result, pack(q), pack(k), pack(v), jnp.concatenate(normaliser, 2))

    inputs = (q, k, v, segment_ids, key_segment_ids)
    _, (out, *kept) = jax.lax.scan(one, None, inputs)
    names = ("q", "k", "v", NORMALISER_NAME)
    kept = [checkpoint_name(x, name) for x, name in zip(kept, names, strict=True)]
    attended = checkpoint_name(pack(out.astype(dtype)), "attended")
    return out, (*kept, attended, segment_ids, key_segment_ids, bias, like)


def _attend_bwd(
    dtype: Any, reach: Reach, residuals: tuple[Any, ...], g: Array
) -> tuple[Array | None, ...]:
    q, k, v, normaliser, attended, segment_ids, key_segment_ids, bias, like = residuals
    B, K, G, T, H = q.shape
    S = k.shape[2]
    delta = jnp.sum(g * unpack(attended, dtype).astype(jnp.float32), -1)
    # Each block's part is added to that of d_q which it reaches: where this is all, to fewer.
    block = _block(S, reach) * (2 if reach == (None, None) else 1)
    blocks = [slice(start, min(start + block, S)) for start in range(0, S, block)]
    behind, ahead = reach
    pairs = [(keys, _reached(keys, T, (ahead, behind))) for keys in blocks]

    def one(d_biases: list[Array], sequence: Any) -> tuple[list[Array], Any]:
        q, k, v, normaliser, delta, g, *segments = sequence
        q, k, v = (unpack(x, dtype) for x in (q, k, v))
        g = _heads(g.astype(dtype)).reshape(K, G, T, H)
        delta = delta.transpose(1, 2, 0)
        k_turned, d_q = _turned(k), jnp.zeros((K, H, G, T), jnp.float32)
        d_k, d_v, summed = [], [], []
        for number, (keys, queries) in enumerate(pairs):
            qs, gs = (x[:, :, queries].reshape(K, -1, H) for x in (q, g))
            scores = _dot(k[:, keys], qs, 2)
            scores = scores.reshape(K, _size(keys), G, _size(queries))
            scores = _masked(scores, bias, segments, keys, queries, reach)
            probs = jnp.exp(scores - normaliser[:, None, :, queries]).astype(dtype)
            # Else XLA computes them once for each of their two readers (jaxlib 0.10).
            probs = jax.lax.optimization_barrier(probs)
            d_probs = _dot(v[:, keys], gs, 2).reshape(scores.shape)
            d_scores = probs.astype(jnp.float32) * (
                d_probs - delta[:, None, :, queries]
            )
            if d_biases:
                summed.append(d_biases[number] + d_scores)
            d_scores = d_scores.astype(dtype).reshape(K, _size(keys), -1)
            d_v.append(_dot(probs.reshape(K, _size(keys), -1), gs, 1))
            d_k.append(_dot(d_scores, qs, 1))
            part = _dot(k_turned[:, :, keys], d_scores, 1).reshape(K, H, G, -1)
            here = d_q[..., queries] + part
            around = d_q[..., : queries.start], d_q[..., queries.stop :]
            d_q = jnp.concatenate([around[0], here, around[1]], 3)
        d_q = (d_q * H**-0.5).transpose(3, 0, 2, 1).reshape(T, K * G, H)
        by_token = [jnp.concatenate(x, 1).transpose(1, 0, 2) for x in (d_k, d_v)]
        d_q, d_k, d_v = (x.astype(like.dtype) for x in (d_q, *by_token))
        return summed, (d_q, d_k, d_v)

    delta = delta.reshape(B, T, K, G)
    inputs = (q, k, v, normaliser, delta, g, segment_ids, key_segment_ids)
    nothing = [
        jnp.zeros((K, _size(keys), G, _size(queries)), jnp.float32)
        for keys, queries in (pairs if bias is not None else [])
    ]
    d_biases, (d_q, d_k, d_v) = jax.lax.scan(one, nothing, inputs)
    d_bias = None
    if bias is not None:
        rooms = [(queries.start, T - queries.stop) for _, queries in pairs]
        padded = [
            jnp.pad(part, [(0, 0), (0, 0), (0, 0), room])
            for part, room in zip(d_biases, rooms, strict=True)
        ]
        d_bias = jnp.concatenate(padded, 1).astype(bias.dtype)
    return d_q, d_k, d_v, None, None, d_bias


_attend.defvjp(_attend_fwd, _attend_bwd)


def _block(length: int, reach: Reach) -> int:
    """Returns how many tokens are done at once, at least 128: an eighth of them, less where few others are read."""
    few = reach[0] is not None
    return max(128, -(-length // (16 if few else 8)))


def _reached(of: slice, length: int, reach: Reach) -> slice:
    """Returns those of `length` tokens that any token of a range can reach."""
    behind, ahead = reach
    low = 0 if behind is None else max(0, of.start - behind)
    high = length if ahead is None else min(length, of.stop + ahead)
    assert low < high, (of, length, reach)
    return slice(low, high)


def _size(tokens: slice) -> int:
    return tokens.stop - tokens.start


def _masked(
    scores: Float[Array, "K k G q"],
    bias: Float[Array, "K S G T"] | None,
    segments: list[Array | None],
    keys: slice,
    queries: slice,
    reach: Reach,
) -> Float[Array, "K k G q"]:
    """Returns the scores of some pairs with their bias, and with those of invisible pairs hidden."""
    if bias is not None:
        scores = scores + bias[:, keys, :, queries]
    visible = _visible(segments, keys, queries, reach)
    if visible is None:
        return scores
    return jnp.where(visible[None, :, None], scores, HIDDEN_SCORE)


def _visible(
    segments: list[Array | None], keys: slice, queries: slice, reach: Reach
) -> Bool[Array, "k q"] | None:
    """Returns which keys of a range each query of a range sees; None: all."""
    here, there = segments[0], segments[1] if segments[1] is not None else segments[0]
    behind, ahead = reach
    key = jnp.arange(keys.start, keys.stop)[:, None]
    query = jnp.arange(queries.start, queries.stop)[None]
    visible = None if ahead is None else key <= query + ahead
    if behind is not None:
        near = key >= query - behind
        visible = near if visible is None else visible & near
    if here is not None and there is not None:
        same = there[keys, None] == here[None, queries]
        visible = same if visible is None else visible & same
    return visible


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
