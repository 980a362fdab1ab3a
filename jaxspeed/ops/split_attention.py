# SPDX-License-Identifier: Apache-2.0
"""Attention over sequences that the mesh axis `context` splits (`jaxspeed.context`).

`exchange` is DeepSpeed-Ulysses (arXiv 2309.14509): an all-to-all gives each device whole sequences
for its share of the heads, any kernel does the rest, a second one gives them back. `ring_attention`
is ring attention (arXiv 2310.01889): queries stay, keys and values go around, and the softmax is
added up as they pass by. Both run with the axis in hand, inside the step's shard_map.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxspeed.ambient import current
from jaxspeed.config import config_error, divisors
from jaxspeed.context import AXIS, places_on
from jaxspeed.ops import splash
from jaxspeed.ops.cpu_attention import HIDDEN_SCORE
from jaxspeed.remat import NORMALISER_NAME


CHUNK_QUERIES, CHUNK_KEYS = 512, 1024
"""Most tokens whose scores exist at once."""


def exchange(
    attend: Callable[..., Float[Array, "B S n H"]],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B s K H"],
    v: Float[Array, "B s K H"],
    segment_ids: Int[Array, "B T"] | None,
    key_segment_ids: Int[Array, "B s"] | None,
) -> Float[Array, "B T N H"]:
    """Returns attention by whole sequences and a share of the heads (Ulysses).

    Key heads that the devices do not divide are repeated first, as often as they must be.

    Args:
        attend: `(q, k, v, segment_ids, key_segment_ids) -> attended`, of whole sequences.
        q: queries of this device's tokens.
        k: keys of this device's tokens.
        v: their values.
        segment_ids: of this device's tokens.
        key_segment_ids: the same for keys of another sequence.

    Raises:
        ConfigError: the devices do not divide the query heads.
    """
    size, N, K = current().context, q.shape[2], k.shape[2]
    if N % size:
        low = max(n for n in divisors(N) if n <= size)
        raise config_error(
            "mesh.context",
            size,
            f"Ulysses splits the heads too, and this model has {N} a device of mesh.tensor",
            f"give {low}, or --context ring",
        )
    times = math.lcm(K, size) // K
    k, v = (jnp.repeat(x, times, 2) if times > 1 else x for x in (k, v))
    whole = functools.partial(
        jax.lax.all_to_all, axis_name=AXIS, split_axis=2, concat_axis=1, tiled=True
    )
    back = functools.partial(
        jax.lax.all_to_all, axis_name=AXIS, split_axis=1, concat_axis=2, tiled=True
    )
    ids = [
        None if x is None else jax.lax.all_gather(x, AXIS, axis=1, tiled=True)
        for x in (segment_ids, key_segment_ids)
    ]
    attended = back(attend(whole(q), whole(k), whole(v), *ids))
    # Else the backward pass would exchange it again, for the product that reads it.
    return checkpoint_name(attended, "attended")


def own_heads(x: Float[Array, "N ..."]) -> Float[Array, "n ..."]:
    """Returns the share of the heads (dim 0) that this device has after an `exchange`."""
    share = x.shape[0] // current().context
    start = jax.lax.axis_index(AXIS) * share
    return jax.lax.dynamic_slice_in_dim(x, start, share, 0)


class Ring(NamedTuple):
    """What is static of a ring."""

    size: int
    compute: Any
    causal: bool
    window: int
    kernel: str
    """What makes the blocks: splash, or xla."""


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B T"] | None,
    key_segment_ids: Int[Array, "B S"] | None,
    windowed: Bool[Array, ""] | None,
    *,
    causal: bool,
    window: int,
    scale: float,
    kernel: str = "xla",
) -> Float[Array, "B T N H"]:
    """Returns attention to the keys of all devices, which pass by one device's after another's.

    Scores exist a block at a time, in the backward pass too, where keys and values go around
    again together with their gradients.

    Args:
        q: queries of this device's tokens.
        k: keys of this device's tokens.
        v: their values.
        segment_ids: of this device's tokens.
        key_segment_ids: of the keys, where they are of another sequence.
        windowed: whether the window is in force; None: it is.
        causal: hide keys after the query.
        window: hide keys that lie this many tokens or more from the query; 0: none.
        scale: of the scores.
        kernel: what makes the blocks, splash or xla (products of this module).
    """
    settings = current()
    B, T, N, H = q.shape
    K, compute = k.shape[2], settings.compute
    q = (q * scale).astype(compute).reshape(B, T, K, N // K, H)
    queries = q.transpose(0, 2, 3, 1, 4)
    pair = jnp.concatenate([k.astype(compute), v.astype(compute)], -1).swapaxes(1, 2)
    if segment_ids is not None and key_segment_ids is None:
        key_segment_ids = segment_ids
    ring = Ring(settings.context, compute, causal, window, kernel)
    out: Any = _ring(ring, queries, pair, segment_ids, key_segment_ids, windowed)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


class _Keys(NamedTuple):
    """What goes around: one device's keys and values, and whose they are."""

    pair: Float[Array, "B K S HH"]
    """Keys and values beside each other."""
    segments: Int[Array, "B S"] | None
    owner: Int[Array, ""]


class _Softmax(NamedTuple):
    """A softmax that is being added up (arXiv 1805.02867)."""

    total: Float[Array, "B K G T H"]
    top: Float[Array, "B K G T"]
    norm: Float[Array, "B K G T"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    ring: Ring,
    q: Array,
    pair: Array,
    segments: Array | None,
    key_segments: Array | None,
    windowed: Array | None,
) -> Array:
    return _ring_fwd(ring, q, pair, segments, key_segments, windowed)[0]


def _ring_fwd(
    ring: Ring,
    q: Float[Array, "B K G T H"],
    pair: Float[Array, "B K S HH"],
    segments: Array | None,
    key_segments: Array | None,
    windowed: Array | None,
) -> tuple[Array, tuple[Any, ...]]:
    like = jnp.zeros(q.shape, jnp.float32)
    low = jnp.full(q.shape[:-1], HIDDEN_SCORE, jnp.float32)
    first = _Softmax(like, low, jnp.zeros_like(low))
    see = _seen_by(ring, segments, windowed, q)

    def add(
        state: _Softmax, nothing: tuple[()], keys: _Keys, part: "_Part"
    ) -> tuple[_Softmax, tuple[()]]:
        own = jax.tree.map(lambda x: x[:, :, :, part.queries], state)
        new = _add_up(own, q[:, :, :, part.queries], keys, part, see)
        put = lambda x, y: x.at[:, :, :, part.queries].set(y)
        return jax.tree.map(put, state, new), nothing

    keys = _own_keys(pair, key_segments)
    state, _ = _around(ring, keys, first, (), add, q.shape[3])
    out = state.total / state.norm[..., None]
    normaliser = state.top + jnp.log(state.norm)
    out = checkpoint_name(out.astype(ring.compute), "attended")
    q, pair = checkpoint_name(q, "q"), checkpoint_name(pair, "k")
    normaliser = checkpoint_name(normaliser, NORMALISER_NAME)
    return out, (q, pair, out, normaliser, segments, key_segments, windowed)


def _ring_bwd(
    ring: Ring, residuals: tuple[Any, ...], g: Array
) -> tuple[Array | None, ...]:
    q, pair, out, normaliser, segments, key_segments, windowed = residuals
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1)
    g = g.astype(ring.compute)
    see = _seen_by(ring, segments, windowed, q)

    def add(
        d_q: Array, d_pair: Array, keys: _Keys, part: "_Part"
    ) -> tuple[Array, Array]:
        chosen = part.queries
        some = lambda x: x[:, :, :, chosen]
        here, there = _take_back(
            some(q), some(g), some(normaliser), some(delta), keys, part, see
        )
        d_pair = d_pair.at[:, :, part.keys].add(there)
        return d_q.at[:, :, :, chosen].add(here), d_pair

    keys = _own_keys(pair, key_segments)
    zeros = lambda like: jnp.zeros(like.shape, jnp.float32)
    d_q, d_pair = _around(ring, keys, zeros(q), zeros(pair), add, q.shape[3])
    return d_q.astype(q.dtype), d_pair.astype(pair.dtype), None, None, None


_ring.defvjp(_ring_fwd, _ring_bwd)


# Who meets whom


class _Part(NamedTuple):
    """A block of pairs: some of this device's queries, some of the keys that pass by."""

    queries: slice
    keys: slice
    ordered: bool
    """Whether some of the pairs are hidden by their order."""


def _next(ring: Ring, x: Any) -> Any:
    """Returns what the device before this one has."""
    to = [(i, (i + 1) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, to), x)


def _with_part(
    ring: Ring, keys: _Keys, tokens: int, run: Callable[[_Part], Any]
) -> Any:
    """Returns `run` of the pairs of another device's keys, half of them if causal.

    An earlier device has an earlier first chunk and a later last one: all queries see its first
    chunk, none its last. Of a later one the last queries see both, the first ones neither.
    """
    everyone = slice(0, tokens)
    all_keys = slice(0, keys.pair.shape[2])
    if not ring.causal:
        return run(_Part(everyone, all_keys, False))
    half = tokens // 2
    earlier = _Part(everyone, slice(0, half), False)
    later = _Part(slice(half, tokens), all_keys, False)
    is_earlier = keys.owner < jax.lax.axis_index(AXIS)
    return jax.lax.cond(is_earlier, lambda: run(earlier), lambda: run(later))


def _around(
    ring: Ring,
    keys: _Keys,
    state: Any,
    luggage: Any,
    add: Callable[[Any, Any, _Keys, _Part], tuple[Any, Any]],
    tokens: int,
) -> tuple[Any, Any]:
    """Returns the state after the keys of all devices, and what this device's keys took along.

    Keys are sent on while they are used, size - 1 times; their luggage once more, home.

    Args:
        ring: what is static.
        keys: this device's.
        state: what stays here.
        luggage: what goes around with the keys; may be empty.
        add: `(state, luggage, keys, part) -> (state, luggage)`.
        tokens: queries here.
    """
    own = _Part(slice(0, tokens), slice(0, keys.pair.shape[2]), ring.causal)

    def meet(state: Any, luggage: Any, keys: _Keys) -> tuple[Any, Any]:
        run = lambda part: add(state, luggage, keys, part)
        return _with_part(ring, keys, tokens, run)

    def one(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
        state, luggage, keys = carry
        coming = _next(ring, keys)
        state, luggage = meet(state, luggage, keys)
        return (state, _next(ring, luggage), coming), None

    coming = _next(ring, keys)
    state, luggage = add(state, luggage, keys, own)
    luggage = _next(ring, luggage)
    if ring.size > 2:
        carry = (state, luggage, coming)
        (state, luggage, coming), _ = jax.lax.scan(one, carry, None, ring.size - 2)
    state, luggage = meet(state, luggage, coming)
    return state, _next(ring, luggage)


# Blocks of scores


class _Sight(NamedTuple):
    """What decides whether a query sees a key."""

    ring: Ring
    segments: Int[Array, "B T"] | None
    windowed: Bool[Array, ""] | None
    places: Int[Array, " T"]


def _seen_by(
    ring: Ring, segments: Array | None, windowed: Array | None, q: Array
) -> _Sight:
    # The ambient settings are not in force in a backward pass.
    places = places_on(jax.lax.axis_index(AXIS), q.shape[3], "ring", ring.size)
    return _Sight(ring, *_because_of(q, (segments, windowed, places)))


def _own_keys(pair: Array, segments: Array | None) -> _Keys:
    marks = _because_of(pair, (segments, jax.lax.axis_index(AXIS)))
    return _Keys(pair, *marks)


def _because_of(x: Array, marks: Any) -> Any:
    """Returns marks, made to depend on x.

    What depends on a scan's constants alone jax computes before the scan over layers, for all
    its inner loops at once: of the masks of blocks this is T x T numbers a head.
    """
    return jax.lax.optimization_barrier((marks, x))[0]


def _blocks(length: int, most: int) -> int:
    """Returns into how many equal blocks of at most so many tokens a range is cut."""
    return next(n for n in range(-(-length // most), length + 1) if length % n == 0)


def _cut(x: Array, dim: int, blocks: int) -> Array:
    """Returns the blocks of a dim, counted by a new leading one."""
    shape = x.shape
    x = x.reshape(*shape[:dim], blocks, shape[dim] // blocks, *shape[dim + 1 :])
    return jnp.moveaxis(x, dim, 0)


def _joined(x: Array, dim: int) -> Array:
    """Undoes `_cut`."""
    x = jnp.moveaxis(x, 0, dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


class _Marks(NamedTuple):
    """Where tokens stand and what they belong to: cut into blocks together with them."""

    places: Int[Array, " T"]
    segments: Int[Array, "T B"] | None


def _marks(sight: _Sight, keys: _Keys, part: _Part) -> tuple[_Marks, _Marks]:
    turned = lambda x: None if x is None else x.T
    there = places_on(keys.owner, keys.pair.shape[2], "ring", sight.ring.size)
    return (
        _Marks(sight.places[part.queries], _rows(turned(sight.segments), part.queries)),
        _Marks(there[part.keys], _rows(turned(keys.segments), part.keys)),
    )


def _rows(x: Array | None, chosen: slice) -> Array | None:
    return None if x is None else x[chosen]


def _in_blocks(
    sight: _Sight, keys: _Keys, part: _Part
) -> tuple[Callable[[Array], Array], _Marks, tuple[Array, _Marks]]:
    """Returns what cuts arrays of the queries into blocks, the queries' marks, and keys with theirs, in blocks."""
    pair = keys.pair[:, :, part.keys]
    by_query = _blocks(part.queries.stop - part.queries.start, CHUNK_QUERIES)
    by_key = _blocks(pair.shape[2], CHUNK_KEYS)
    here, there = _marks(sight, keys, part)
    here = jax.tree.map(lambda x: _cut(x, 0, by_query), here)
    there = jax.tree.map(lambda x: _cut(x, 0, by_key), there)
    return lambda x: _cut(x, 3, by_query), here, (_cut(pair, 2, by_key), there)


def _masked(
    scores: Float[Array, "B K G t s"],
    queries: _Marks,
    keys: _Marks,
    sight: _Sight,
    part: _Part,
) -> Float[Array, "B K G t s"]:
    """Returns the scores, those of invisible pairs hidden."""
    visible: Any = None
    distance = queries.places[:, None] - keys.places[None]
    if part.ordered:
        visible = (distance >= 0)[None]
    if sight.ring.window:
        near = (jnp.abs(distance) < sight.ring.window)[None]
        near = near if sight.windowed is None else near | ~sight.windowed
        visible = near if visible is None else visible & near
    if queries.segments is not None and keys.segments is not None:
        same = queries.segments.T[:, :, None] == keys.segments.T[:, None]
        visible = same if visible is None else visible & same
    if visible is None:
        return scores
    return jnp.where(visible[:, None, None], scores, HIDDEN_SCORE)


def _add_up(
    state: _Softmax, q: Array, keys: _Keys, part: _Part, sight: _Sight
) -> _Softmax:
    """Returns the softmax with a block of pairs added, some queries by some keys at a time."""
    if sight.ring.kernel == "splash":
        return _joined_up(state, _by_splash(q, keys, part, sight))
    H = q.shape[-1]
    cut, here, there = _in_blocks(sight, keys, part)

    def some_queries(block: tuple[_Softmax, Array, _Marks]) -> _Softmax:
        state, q, here = block

        def some_keys(
            state: _Softmax, block: tuple[Array, _Marks]
        ) -> tuple[_Softmax, None]:
            pair, marks = block
            scores = _product("bkgth,bksh->bkgts", q, pair[..., :H])
            scores = _masked(scores, here, marks, sight, part)
            top = jnp.maximum(state.top, jnp.max(scores, -1))
            shrink = jnp.exp(state.top - top)
            weights = jnp.exp(scores - top[..., None])
            norm = state.norm * shrink + jnp.sum(weights, -1)
            part_sum = _product(
                "bkgts,bksh->bkgth", weights.astype(q.dtype), pair[..., H:]
            )
            return _Softmax(state.total * shrink[..., None] + part_sum, top, norm), None

        return jax.lax.scan(some_keys, state, there)[0]

    new = jax.lax.map(some_queries, (jax.tree.map(cut, state), cut(q), here))
    return jax.tree.map(lambda x: _joined(x, 3), new)


def _take_back(
    q: Array,
    g: Array,
    normaliser: Array,
    delta: Array,
    keys: _Keys,
    part: _Part,
    sight: _Sight,
) -> tuple[Array, Array]:
    """Returns what a block of pairs gives to d_q and d_pair (arXiv 2205.14135 algorithm 4)."""
    if sight.ring.kernel == "splash":
        given = _for_splash(q, keys, part, sight)
        rows = [_by_heads(x) for x in (normaliser, g, delta)]
        d_q, d_k, d_v = splash.part_gradients(*given, *rows)
        d_pair = jnp.concatenate([d_k, d_v], -1).astype(jnp.float32)
        return d_q.reshape(q.shape).astype(jnp.float32), d_pair
    H = q.shape[-1]
    cut, here, there = _in_blocks(sight, keys, part)

    def some_queries(d_pairs: Array, block: tuple[Any, ...]) -> tuple[Array, Array]:
        q, g, normaliser, delta, here = block

        def some_keys(d_q: Array, block: tuple[Array, _Marks]) -> tuple[Array, Array]:
            pair, marks = block
            scores = _product("bkgth,bksh->bkgts", q, pair[..., :H])
            scores = _masked(scores, here, marks, sight, part)
            probs = jnp.exp(scores - normaliser[..., None])
            d_probs = _product("bkgth,bksh->bkgts", g, pair[..., H:])
            d_scores = (probs * (d_probs - delta[..., None])).astype(q.dtype)
            d_k = _product("bkgts,bkgth->bksh", d_scores, q)
            d_v = _product("bkgts,bkgth->bksh", probs.astype(q.dtype), g)
            d_q = d_q + _product("bkgts,bksh->bkgth", d_scores, pair[..., :H])
            return d_q, jnp.concatenate([d_k, d_v], -1)

        zeros = jnp.zeros(q.shape, jnp.float32)
        d_q, here_pairs = jax.lax.scan(some_keys, zeros, there)
        return d_pairs + here_pairs, d_q

    blocks = (cut(q), cut(g), cut(normaliser), cut(delta), here)
    zeros = jnp.zeros(there[0].shape, jnp.float32)
    d_pairs, d_q = jax.lax.scan(some_queries, zeros, blocks)
    return _joined(d_q, 3), _joined(d_pairs, 2)


def _by_splash(q: Array, keys: _Keys, part: _Part, sight: _Sight) -> _Softmax:
    """Returns the softmax of a block of pairs alone."""
    out, normaliser = splash.part(*_for_splash(q, keys, part, sight))
    # Of a query that sees none of these keys the kernel's is lower still: it must not hide all others.
    top = jnp.maximum(normaliser.reshape(q.shape[:-1]), HIDDEN_SCORE)
    total = out.reshape(q.shape).astype(jnp.float32)
    return _Softmax(total, top, jnp.ones_like(top))


def _for_splash(q: Array, keys: _Keys, part: _Part, sight: _Sight) -> tuple[Any, ...]:
    H = q.shape[-1]
    pair = keys.pair[:, :, part.keys]
    reach = splash.EARLIER if part.ordered else splash.EVERYONE
    mine, theirs = (
        None if ids is None else ids[:, chosen]
        for ids, chosen in ((sight.segments, part.queries), (keys.segments, part.keys))
    )
    return _by_heads(q), pair[..., :H], pair[..., H:], mine, theirs, reach


def _by_heads(x: Float[Array, "B K G ..."]) -> Float[Array, "B N ..."]:
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _joined_up(a: _Softmax, b: _Softmax) -> _Softmax:
    """Returns the softmax over the keys of both."""
    top = jnp.maximum(a.top, b.top)
    shares = jnp.exp(a.top - top), jnp.exp(b.top - top)
    add = lambda x, y, by: x * by(shares[0]) + y * by(shares[1])
    total = add(a.total, b.total, lambda share: share[..., None])
    return _Softmax(total, top, add(a.norm, b.norm, lambda share: share))


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
