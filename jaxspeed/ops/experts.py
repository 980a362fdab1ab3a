# SPDX-License-Identifier: Apache-2.0
"""What experts make of the tokens that a router sends them, wherever the experts live.

Tokens are laid out by expert (`Layout`), go to the devices that have the experts and come back
(two all-to-all a pass, over the mesh axis `expert`), and are added up with their weights. With
`moe.capacity_factor` each expert has the same number of places for each row, as in GShard
(arXiv 2006.16668) and DeepSpeed, and who finds none is dropped. Without, none is: groups are as
long as they are (MegaBlocks, 2211.15841), and a device sends each other one just its rows.
Nothing is scattered: the derivative of each move is the move back.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P, get_abstract_mesh
from jaxtyping import Array, Float, Int

from jaxspeed.ambient import Ambient, ambient, current
from jaxspeed.ops.grouped import grouped_linear, tiles_of
from jaxspeed.ops.linear import gather_sequence, scatter_sequence
from jaxspeed.ops.pointwise import silu_gate
from jaxspeed.ops.route import Routing, random_order
from jaxspeed.sharding import on_tensor, splits_sequence


AXIS = "expert"

Mlp = Callable[[Float[Array, "R D"], Int[Array, " G"] | None, int], Array]
"""`(rows, sizes of their groups, tile) -> rows`: see `grouped_linear`."""


def experts(
    x: Float[Array, "B T D"],
    routing: Routing,
    w_gate: Float[Array, "e D F"],
    w_up: Float[Array, "e D F"],
    w_down: Float[Array, "e F D"],
) -> Float[Array, "B T D"]:
    """Returns the weighted sum of what each token's experts make of it, SwiGLU each.

    Args:
        x: what the layer reads.
        routing: where its tokens go.
        w_gate: of this device's experts (e = E over the devices of the mesh axis `expert`).
        w_up: the same.
        w_down: the same.
    """
    tensor = current().tensor
    split = tensor > 1 and w_gate.shape[2] % tensor == 0
    shared = split and splits_sequence(x.shape[1])

    def local(
        x: Array, chosen: Array, weights: Array, *matrices: Array
    ) -> tuple[Array, Array]:
        routed = routing._replace(experts=chosen, weights=weights)
        x = gather_sequence(x) if shared else x
        y, kept = _experts(x, routed, *matrices)
        if shared:
            return scatter_sequence(y), kept
        return jax.lax.psum(y, "tensor") if split else y, kept

    if tensor > 1:  # each device of that axis has a part of every expert's width
        axis = "tensor" if split else None
        up, down = P(None, None, axis), P(None, axis, None)
        tokens = P(None, "tensor") if shared else P()
        arguments = (tokens, P(), P(), up, up, down)
        local = on_tensor(local, arguments, (tokens, P()))
    y, kept = local(x, routing.experts, routing.weights, w_gate, w_up, w_down)
    if (auxiliary := current().auxiliary) is not None:
        wanted = jnp.sum(routing.experts < routing.num_experts)
        auxiliary.measure("router_dropped", wanted - kept, wanted)
    return y


def _experts(
    x: Array, routing: Routing, w_gate: Array, w_up: Array, w_down: Array
) -> tuple[Array, Array]:
    """Returns the result, and how many choices were not dropped."""
    matrices = w_gate, w_up, w_down
    mlp = functools.partial(_mlp, matrices)
    B, T, D = x.shape
    factor = current().moe.capacity_factor
    flat = x.reshape(B * T, D)
    kept = jnp.sum(routing.experts < routing.num_experts)
    if factor:
        y, kept = _with_places(flat, routing, mlp, factor)
    elif current().expert == 1:
        y = _all_here(flat, routing, mlp)
    else:
        y = _all_elsewhere(flat, routing, matrices)
    return y.reshape(B, T, D), kept


Matrices = tuple[Array, Array, Array]
"""Of gate, up and down: see `experts`."""


def _mlp(matrices: Matrices, rows: Array, sizes: Array | None, tile: int) -> Array:
    w_gate, w_up, w_down = matrices
    product = functools.partial(grouped_linear, sizes=sizes, tile=tile)
    return product(silu_gate(product(rows, w_gate), product(rows, w_up)), w_down)


class Layout(NamedTuple):
    """Places for the choices of tokens: n tokens with k choices each, in R places."""

    place: Int[Array, "n k"]
    """Of each choice; -1: none."""
    choice: Int[Array, " R"]
    """Whose place it is: token * k + number of the choice; -1: nobody's."""


def _all_here(x: Array, routing: Routing, mlp: Mlp) -> Array:
    """Returns the result of experts that are all on this device and drop nothing."""
    each = routing.experts.shape[-1]
    layout, sizes, tile = _by_group(
        routing.experts.reshape(-1, each), routing.num_experts
    )
    return _collect(
        mlp(_spread(x, layout), sizes, tile), _flat_weights(routing), layout
    )


def _with_places(
    x: Array, routing: Routing, mlp: Mlp, factor: float
) -> tuple[Array, Array]:
    """Returns the result of experts that have so many places for each row, and how many choices found one."""
    B, T, each = routing.experts.shape
    count, devices = routing.num_experts, current().expert
    least = max(current().moe.min_capacity, math.ceil(factor * each * T / count))
    places = min(least, T)
    rank = _ranks(_by_priority(routing.experts), count)
    rank = rank.reshape(B, each, T).swapaxes(1, 2)
    kept = (rank < places) & (routing.experts < count)
    row = jnp.arange(B)[:, None, None]
    place = jnp.where(kept, (routing.experts * B + row) * places + rank, -1)
    layout = _layout(place.reshape(B * T, each), count * B * places)
    weights = jnp.where(kept, routing.weights, 0.0)
    if routing.normalised:  # over those that are kept, as DeepSpeed does
        total = jnp.sum(weights, -1, keepdims=True)
        weights = weights / jnp.maximum(total, jnp.finfo(jnp.float32).eps)
    rows = _spread(x, layout)
    if devices > 1:
        there = functools.partial(
            jax.lax.all_to_all, axis_name=AXIS, tiled=True, split_axis=0, concat_axis=1
        )
        back = functools.partial(
            jax.lax.all_to_all, axis_name=AXIS, tiled=True, split_axis=1, concat_axis=0
        )
        apart = rows.reshape(count, B * places, -1)
        moved = checkpoint_name(there(apart), "dispatched")
        done = mlp(moved.reshape(-1, rows.shape[-1]), None, 1)
        rows = back(done.reshape(moved.shape)).reshape(rows.shape)
        rows = checkpoint_name(rows, "returned")
    else:
        rows = mlp(rows, None, 1)
    return _collect(rows, weights.reshape(B * T, each), layout), jnp.sum(kept)


ROOMS = (1.5, 3.0)
"""How much more than an even share a device may be sent, before it makes room for the worst case."""


class _Plan(NamedTuple):
    """Who sends what to whom."""

    layout: Layout
    """Of this device's choices, by expert."""
    everyone: Int[Array, "devices devices e"]
    """How many go from one device (first index) to each expert of another."""


def _all_elsewhere(x: Array, routing: Routing, matrices: Matrices) -> Array:
    """Returns the result of experts on all devices of the axis, which drop nothing.

    At worst all tokens of all devices come to the experts of one, which hardly happens: all devices
    take the smallest of a few sizes of room that is enough for each of them. Where the layer's products
    are kept for the backward pass, there is room for the worst case: what is kept has one size.
    """
    n, each = x.shape[0], routing.experts.shape[-1]
    settings = current()
    devices = settings.expert
    mine = routing.num_experts // devices
    chosen = routing.experts.reshape(n, each)
    counts = _counts(chosen.reshape(1, -1), routing.num_experts)[0]
    everyone = jax.lax.all_gather(counts, AXIS).reshape(devices, devices, mine)
    plan = _Plan(_in_order(chosen, routing.num_experts), everyone)
    worst = devices * n * min(each, mine)
    rooms = [math.ceil(factor * n * each) for factor in ROOMS]
    rooms = (*(room for room in rooms if room < worst), worst)
    weights = _flat_weights(routing)
    if settings.remat in ("none", "dots") or len(rooms) == 1:
        return _in_room(worst, x, weights, matrices, plan)
    arriving = jnp.max(jnp.sum(everyone, (0, 2)))
    # One choice for all: collectives of unlike branches would never meet.
    arriving = jax.lax.pmax(arriving, tuple(get_abstract_mesh().manual_axes))
    level = jnp.sum(arriving > jnp.asarray(rooms[:-1]))
    bare = dataclasses.replace(settings, dropout_key=None, auxiliary=None)
    made: Any = _in_rooms((bare, rooms), level, x, weights, matrices, plan)
    return made


def _in_room(
    room: int, x: Array, weights: Array, matrices: Matrices, plan: _Plan
) -> Array:
    """Returns the result where no device is sent more than so many rows."""
    layout, everyone = plan
    n, each = layout.place.shape
    devices, _, mine = everyone.shape
    pair = min(room, n * min(each, mine))
    journey = _Journey(n * each, room, pair, current().platform)
    me = jax.lax.axis_index(AXIS)
    sent = jnp.sum(everyone, 2)
    arrived = _travel(journey, _spread(x, layout), sent, me)
    arrived = checkpoint_name(arrived, "dispatched")
    numbers = _numbers(everyone[:, me], room)
    there, sizes, tile = _by_group(numbers[:, None], mine)
    done = _mlp(matrices, _spread(arrived, there), sizes, tile)
    ones = jnp.ones((room, 1), jnp.float32)
    back = journey._replace(rows=room, out=n * each)
    rows = _travel(back, _collect(done, ones, there), sent.T, me)
    rows = checkpoint_name(rows, "returned")
    return _collect(rows, weights, layout)


Rooms = tuple[Ambient, tuple[int, ...]]
"""The ambient settings, and the sizes."""


def _in_enough_room(
    how: Rooms, level: Array, x: Array, weights: Array, matrices: Matrices, plan: _Plan
) -> Array:
    """Returns `_in_room` of the size with this number; the backward pass computes all of it again."""
    branches = [functools.partial(_in_room, room) for room in how[1]]
    return jax.lax.switch(level, branches, x, weights, matrices, plan)


_in_rooms = jax.custom_vjp(_in_enough_room, nondiff_argnums=(0,))


def _in_rooms_fwd(
    how: Rooms, level: Array, *given: Any
) -> tuple[Array, tuple[Any, ...]]:
    return _in_enough_room(how, level, *given), (level, given)


def _in_rooms_bwd(how: Rooms, residuals: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
    settings, rooms = how
    level, (*slopes, plan) = residuals

    def pull(room: int, g: Array, *given: Any) -> Any:
        run: Any = functools.partial(_in_room, room, plan=plan)
        with ambient(settings):
            return jax.vjp(run, *given)[1](g)

    branches = [functools.partial(pull, room) for room in rooms]
    return None, *jax.lax.switch(level, branches, g, *slopes), None


_in_rooms.defvjp(_in_rooms_fwd, _in_rooms_bwd)


def _flat_weights(routing: Routing) -> Array:
    return routing.weights.reshape(-1, routing.weights.shape[-1])


def _by_priority(chosen: Int[Array, "B T k"]) -> Int[Array, "B m"]:
    """Returns each row's choices, first choices before second ones, m = k T."""
    return chosen.swapaxes(1, 2).reshape(chosen.shape[0], -1)


def _ranks(chosen: Int[Array, "B m"], count: int) -> Int[Array, "B m"]:
    """Returns how many of a row's choices before each are of the same expert.

    "Before" is by first choices, then in the order of the row, or by lot (`moe.random_priority`).
    """
    lots = random_order(chosen.shape)
    if lots is not None:
        turn = jnp.argsort(lots, 1)
        ranks = _ranks_in_order(jnp.take_along_axis(chosen, turn, 1), count)
        return jnp.take_along_axis(ranks, jnp.argsort(turn, 1), 1)
    return _ranks_in_order(chosen, count)


def _counts(chosen: Int[Array, "B m"], count: int) -> Int[Array, "B count"]:
    """Returns how many of a row's choices each expert is."""
    return jnp.sum(jax.nn.one_hot(chosen, count, dtype=jnp.int32), 1)


def _sorted_places(chosen: Int[Array, "B m"]) -> Int[Array, "B m"]:
    """Returns where each choice stands once a row's are sorted by expert."""
    return jnp.argsort(jnp.argsort(chosen, 1, stable=True), 1)


def _ranks_in_order(chosen: Int[Array, "B m"], count: int) -> Int[Array, "B m"]:
    sizes = _counts(chosen, count)
    starts = jnp.cumsum(sizes, 1) - sizes
    starts = jnp.concatenate([starts, jnp.sum(sizes, 1, keepdims=True)], 1)
    return _sorted_places(chosen) - jnp.take_along_axis(starts, chosen, 1)


def _in_order(chosen: Int[Array, "n k"], count: int) -> Layout:
    """Returns places one behind another, by expert."""
    place = _sorted_places(chosen.reshape(1, -1)).reshape(chosen.shape)
    place = jnp.where(chosen < count, place, -1)
    return _layout(place, chosen.size)


def _by_group(
    chosen: Int[Array, "n k"], count: int
) -> tuple[Layout, Int[Array, " G"], int]:
    """Returns places by expert, each expert's a multiple of the tile; how many; and the tile."""
    tile, whole = tiles_of(chosen.size, count)
    sizes = _counts(chosen.reshape(1, -1), count)[0]
    padded = -(-sizes // tile) * tile
    starts = jnp.cumsum(padded) - padded
    rank = _ranks_in_order(chosen.reshape(1, -1), count).reshape(chosen.shape)
    place = jnp.append(starts, 0)[chosen] + rank
    rows = chosen.size + count * (tile - 1)
    rows = -(-rows // whole) * whole
    return _layout(jnp.where(chosen < count, place, -1), rows), padded, tile


def _layout(place: Int[Array, "n k"], rows: int) -> Layout:
    """Returns the layout with these places, of so many."""
    nobody = jnp.full((rows,), -1, jnp.int32)
    at = jnp.where(place < 0, rows, place).reshape(-1)
    choice = jnp.arange(at.size, dtype=jnp.int32)
    return Layout(place.astype(jnp.int32), nobody.at[at].set(choice, mode="drop"))


def _taken(x: Array, index: Array) -> Array:
    """Returns the rows of x that an index names, 0 for -1."""
    rows = jnp.take(x, jnp.maximum(index, 0), 0)
    return jnp.where((index >= 0)[..., None], rows, jnp.zeros((), x.dtype))


def _at_choices(x: Float[Array, "n D"], layout: Layout) -> Float[Array, "R D"]:
    """Returns the tokens at the places of their choices, 0 where there is none."""
    return _taken(x, _tokens(layout))


def _tokens(layout: Layout) -> Int[Array, " R"]:
    """Returns whose place each is; -1: nobody's."""
    return jnp.where(layout.choice < 0, -1, layout.choice // layout.place.shape[1])


_spread = jax.custom_vjp(_at_choices)


def _spread_fwd(x: Array, layout: Layout) -> tuple[Array, Layout]:
    return _at_choices(x, layout), layout


def _spread_bwd(layout: Layout, g: Array) -> tuple[Array, None]:
    place = layout.place
    each = (_taken(g, place[:, i]).astype(jnp.float32) for i in range(place.shape[1]))
    return functools.reduce(jnp.add, each).astype(g.dtype), None


_spread.defvjp(_spread_fwd, _spread_bwd)


def _added_up(
    rows: Float[Array, "R D"], weights: Float[Array, "n k"], layout: Layout
) -> Float[Array, "n D"]:
    """Returns the weighted sum, for each token, of what stands at the places of its choices."""
    each = (
        _taken(rows, layout.place[:, i]).astype(jnp.float32) * weights[:, i, None]
        for i in range(weights.shape[1])
    )
    return functools.reduce(jnp.add, each).astype(rows.dtype)


_collect = jax.custom_vjp(_added_up)


def _collect_fwd(
    rows: Array, weights: Array, layout: Layout
) -> tuple[Array, tuple[Array, Array, Layout]]:
    return _added_up(rows, weights, layout), (rows, weights, layout)


def _collect_bwd(
    residuals: tuple[Array, Array, Layout], g: Array
) -> tuple[Array, Array, None]:
    rows, weights, layout = residuals
    g, choice = g.astype(jnp.float32), layout.choice
    weight = jnp.where(choice < 0, 0.0, weights.reshape(-1)[jnp.maximum(choice, 0)])
    d_rows = _taken(g, _tokens(layout)) * weight[:, None]
    d_weights = [
        jnp.sum(g * _taken(rows, layout.place[:, i]).astype(jnp.float32), -1)
        for i in range(weights.shape[1])
    ]
    return d_rows.astype(rows.dtype), jnp.stack(d_weights, -1), None


_collect.defvjp(_collect_fwd, _collect_bwd)


def _numbers(counts: Int[Array, "devices e"], rows: int) -> Int[Array, " rows"]:
    """Returns which of its experts each row that has arrived is for; e, of which there is none, behind the last."""
    ends = jnp.cumsum(counts.reshape(-1))
    slot = jnp.searchsorted(ends, jnp.arange(rows), side="right", method="compare_all")
    each = counts.shape[1]
    return jnp.where(slot < ends.size, slot % each, each).astype(jnp.int32)


class _Journey(NamedTuple):
    """What is static of sending rows."""

    rows: int
    """That a device has to send, at most."""
    out: int
    """That a device receives, at most."""
    pair: int
    """That go from one device to another, at most."""
    platform: str


def _moved(journey: _Journey, x: Array, sent: Array, me: Array) -> Array:
    """Returns the rows that the others have for this device, one device's behind another's.

    Args:
        journey: the static part.
        x: this device's rows, those for device 0 first.
        sent: (devices, devices): rows from one device (first index) to another.
        me: this device's number.
    """
    first = lambda sizes: jnp.cumsum(sizes) - sizes  # of each part, where it begins
    starts, lengths = first(sent[me]), sent[me]
    arriving = sent[:, me]
    if journey.platform != "cpu":
        there = (jnp.cumsum(sent, 0) - sent)[me]
        out = jnp.zeros((journey.out, x.shape[1]), x.dtype)
        return jax.lax.ragged_all_to_all(
            x, out, starts, lengths, there, arriving, axis_name=AXIS
        )
    # XLA's CPU backend has no such collective: parts of one length go, the longest there can be.
    slot = jnp.arange(journey.pair)[None]
    index = jnp.where(slot < lengths[:, None], starts[:, None] + slot, -1)
    parts = jax.lax.all_to_all(
        _taken(x, index), AXIS, split_axis=0, concat_axis=0, tiled=True
    )
    place = jnp.arange(journey.out)
    ends = jnp.cumsum(arriving)
    source = jnp.searchsorted(ends, place, side="right", method="compare_all")
    inside = place - jnp.append(first(arriving), 0)[source]
    at = jnp.where(source < ends.size, source * journey.pair + inside, -1)
    return _taken(parts.reshape(-1, x.shape[1]), at)


_travel = jax.custom_vjp(_moved, nondiff_argnums=(0,))


def _travel_fwd(
    journey: _Journey, x: Array, sent: Array, me: Array
) -> tuple[Array, tuple[Array, ...]]:
    return _moved(journey, x, sent, me), (sent, me)


def _travel_bwd(
    journey: _Journey, residuals: tuple[Array, ...], g: Array
) -> tuple[Any, ...]:
    sent, me = residuals
    back = journey._replace(rows=journey.out, out=journey.rows)
    return _moved(back, g, sent.T, me), None, None


_travel.defvjp(_travel_fwd, _travel_bwd)
