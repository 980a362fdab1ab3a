# SPDX-License-Identifier: Apache-2.0
"""Layers in stages: which part of which micro-batch each device of the axis `stage` works on, and how it goes round.

A schedule is a table: at each tick every stage does a forward pass, a backward pass, both or
nothing, each of one chunk of its layers and one micro-batch (`Schedule`). `run_schedule` does what
any such table says; no model is rewritten for it, since `jaxspeed.nn.Layers` is where a model is
cut (`Pipe`). What stands before the layers and behind them is computed by every stage and counts in
the first and the last only: in lockstep nobody waits for that. Layer 1. ADR 0009.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxspeed.ambient import current
from jaxspeed.config import ConfigError
from jaxspeed.types import PyTree


AXIS = "stage"


@dataclass(frozen=True)
class Schedule:
    """What every stage does at every tick."""

    forward: Int[np.ndarray, "ticks p"]
    """The item of each stage's forward pass, `micro-batch * chunks + chunk`; -1: none."""
    backward: Int[np.ndarray, "ticks p"]
    """The same of its backward pass, which comes after the forward pass of the same tick."""
    micros: int
    """Micro-batches of an update (m)."""
    chunks: int = 1
    """Parts of the layers that each stage has (v): chunk j of stage s is the model's part number j p + s."""

    @property
    def stages(self) -> int:
        """The number of stages (p)."""
        return self.forward.shape[1]

    @property
    def ticks(self) -> int:
        """How long it takes."""
        return self.forward.shape[0]

    @property
    def in_flight(self) -> int:
        """Most inputs that a stage keeps between their two passes."""
        return self.rooms()[1]

    def order(self, stage: int) -> list[str]:
        """Returns a stage's instructions: F0, F1, B0, ...; with several chunks F0.0, F1.0, F0.1, ..."""
        said = []
        for pair in zip(self.forward[:, stage], self.backward[:, stage], strict=True):
            for letter, item in zip("FB", pair, strict=True):
                micro, chunk = divmod(int(item), self.chunks)
                part = f".{chunk}" if self.chunks > 1 else ""
                said += [f"{letter}{micro}{part}"] * int(item >= 0)
        return said

    def phases(self) -> Iterator[tuple[slice, bool, bool]]:
        """Yields runs of ticks in which there are forward passes, backward passes, or both."""
        does = [
            (bool((f >= 0).any()), bool((b >= 0).any()))
            for f, b in zip(self.forward, self.backward, strict=True)
        ]
        for kind, run in itertools.groupby(range(self.ticks), key=lambda t: does[t]):
            ticks = list(run)
            yield slice(ticks[0], ticks[-1] + 1), *kind

    def rooms(self) -> tuple[Int[np.ndarray, "p items"], int]:
        """Returns where a stage keeps the input of each item, and how many such places there are."""
        found = np.zeros((self.stages, self.micros * self.chunks), np.int64)
        most = 0
        for stage in range(self.stages):
            free: list[int] = []
            held = 0
            for f, b in zip(
                self.forward[:, stage], self.backward[:, stage], strict=True
            ):
                if f >= 0:
                    if not free:
                        free, held = [held], held + 1
                    found[stage, f] = free.pop()
                if b >= 0:
                    free.append(int(found[stage, b]))
            most = max(most, held)
        return found, most

    def bubble(self, backward_cost: float = 2.0) -> float:
        """Returns the share of time in which a stage waits, a forward pass being 1 long."""
        costs = np.asarray([1.0, backward_cost])
        does = np.stack([self.forward >= 0, self.backward >= 0])  # (2, ticks, p)
        long = float(costs @ does.any(-1).sum(-1))
        busy = float(costs @ does.sum((-1, -2)))
        return 1 - busy / (self.stages * long)


def pipeline_schedule(name: str, stages: int, micros: int, chunks: int = 1) -> Schedule:
    """Returns the table of a schedule.

    In lockstep a forward and a backward pass make one tick, so the first stage is 2 (p - 1) forward
    passes ahead of its backward ones and not p - 1, as where each stage keeps its own time; the
    bubble is the same, (p - 1) / (v m + p - 1).

    Args:
        name: gpipe (arXiv 1811.06965): all forward passes, then all backward ones, an input kept for
            each. 1f1b (PipeDream-Flush, arXiv 2006.09503): a backward pass as soon as there is one,
            so that at most 2 p - 1 are kept.
        stages: p.
        micros: micro-batches of an update (m); with several chunks a multiple of p.
        chunks: v parts of the layers to a stage (interleaved, arXiv 2104.04473): p micro-batches go
            through the first chunk of every stage, then through the second, and so on.
    """
    p, m, v = stages, micros, chunks
    assert v == 1 or m % p == 0, (m, p)
    n = np.arange(m * v)  # a stage's work, in order
    part = n % (p * v)
    micro, chunk = n // (p * v) * p + part % p, part // p
    if v == 1:
        micro, chunk = n, np.zeros_like(n)
    ahead, back = micro * v + chunk, micro * v + (v - 1 - chunk)
    stage = np.arange(p)[None]
    begin = m * v + p - 1 if name == "gpipe" else p * v - 1
    ticks = np.arange(begin + m * v + p - 1)[:, None]

    def table(items: Int[np.ndarray, " items"], at: Any) -> Any:
        inside = (at >= 0) & (at < m * v)
        return np.where(inside, items[np.clip(at, 0, m * v - 1)], -1)

    forward = table(ahead, ticks - stage)
    backward = table(back, ticks - begin - (p - 1 - stage))
    return Schedule(forward, backward, m, v)


def regrouped(x: Array, p: int, v: int, *, back: bool = False) -> Array:
    """Returns layers as the schedule wants them: from the v neighbouring chunks that a stage stores to those it works on.

    Each chunk travels once, in v rounds in which every stage sends one and receives one: chunk
    number c lies on stage c // v and is worked on by stage c mod p.

    Args:
        x: this stage's layers (leading dim), v chunks of them.
        p: stages.
        v: chunks of a stage.
        back: the other way round.
    """
    period = math.lcm(p, v)
    rounds = [(c + c // period) % v for c in range(p * v)]
    me, out = jax.lax.axis_index(AXIS), jnp.zeros_like(x)
    size = x.shape[0] // v
    for turn in range(v):
        pairs, leave, arrive = [], np.zeros(p, int), np.zeros(p, int)
        for c in (c for c in range(p * v) if rounds[c] == turn):
            stored, used = (c // v, c % v), (c % p, c // p)
            (source, out_of), (target, into) = (
                (used, stored) if back else (stored, used)
            )
            pairs.append((source, target))
            leave[source], arrive[target] = out_of * size, into * size
        piece = jax.lax.dynamic_slice_in_dim(x, jnp.asarray(leave)[me], size)
        piece = jax.lax.ppermute(piece, AXIS, pairs)
        out = jax.lax.dynamic_update_slice_in_dim(
            out, piece, jnp.asarray(arrive)[me], 0
        )
    return out


@dataclass
class Pipe:
    """Where a model's layers are cut, while one chunk of them is traced."""

    received: Float[Array, "B T D"] | None
    """The residual stream of the chunk before; None: only its shape is asked for."""
    first: Bool[Array, ""]
    """Whether it is the model's first chunk, which has none before it."""
    begin: Int[Array, ""] | int
    """The number of the chunk's first layer in the model."""
    given: Any = None
    """The residual stream behind the chunk's layers; its shape, if only that is asked for."""

    def through(
        self,
        layers: Callable[[Float[Array, "B T D"]], Float[Array, "B T D"]],
        x: Float[Array, "B T D"],
    ) -> Float[Array, "B T D"]:
        """Runs the chunk's layers on what was received, or on x if it is the first; notes what they give.

        Raises:
            ConfigError: the model has several stacks of layers.
        """
        if self.given is not None:
            raise ConfigError(
                "mesh.stage: the model has more than one stack of layers (jaxspeed.nn.Layers); set mesh.stage 1"
            )
        if self.received is not None:
            x = jnp.where(self.first, x, self.received)
        self.given = layers(x)
        return self.given


def one_behind_another(
    layers: Callable[[Float[Array, "..."]], Float[Array, "..."]], x: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns x behind the layers of all stages, on every stage: for what is no training step.

    Every stage does its layers each time and the one whose turn it is is heard.
    """
    me = jax.lax.axis_index(AXIS)
    for turn in range(current().stage):
        heard = jnp.where(me == turn, layers(x), jnp.zeros((), x.dtype))
        x = jax.lax.psum(heard.astype(jnp.float32), AXIS).astype(x.dtype)
    return x


class Item(NamedTuple):
    """A piece of work: one chunk's pass over one micro-batch."""

    micro: Int[Array, ""]
    chunk: Int[Array, ""]
    """Of this stage's."""
    first: Bool[Array, ""]
    """Whether it is the model's first chunk."""
    last: Bool[Array, ""]
    """Whether it is its last."""
    real: Bool[Array, ""]
    """Whether it is work at all: a stage that has none at a tick does something that counts nowhere."""


Forward = Callable[[Item, Float[Array, "B T D"]], Float[Array, "B T D"]]
"""`(item, received) -> what this chunk gives to the next`."""

Backward = Callable[
    [Item, Float[Array, "B T D"], Float[Array, "B T D"], PyTree],
    tuple[PyTree, Float[Array, "B T D"]],
]
"""`(item, received, gradient of what it gave, sums) -> (sums with its own added, gradient of received)`."""


def run_schedule(
    schedule: Schedule,
    forward: Forward,
    backward: Backward,
    like: jax.ShapeDtypeStruct,
    sums: PyTree,
    *,
    in_order: bool,
) -> PyTree:
    """Does what a schedule says, from inside a `shard_map` over the axis `stage`; returns the sums.

    All devices run the same program in lockstep, so that their collectives meet whatever they are.

    Args:
        schedule: the table.
        forward: a chunk's forward pass.
        backward: its backward pass, forward pass included.
        like: the residual stream of a micro-batch.
        sums: gradients and measurements so far.
        in_order: let a backward pass wait for what the forward pass beside it sends. XLA's CPU backend
            (jax 0.10) may begin a collective before those inside a loop that stands before it, and
            devices then wait for each other for ever; what depends on each other it does in order.
    """
    p, v, me = schedule.stages, schedule.chunks, jax.lax.axis_index(AXIS)
    places, depth = schedule.rooms()
    rooms = jnp.asarray(places)[me]
    zeros = jnp.zeros(like.shape, like.dtype)
    state = _State(
        kept=jnp.zeros((depth, *like.shape), like.dtype),
        coming=zeros,
        returning=zeros,
        sums=sums,
    )
    # From the last stage on to the first only where a micro-batch comes round again.
    ring = p if v > 1 else p - 1
    ahead = [(i, (i + 1) % p) for i in range(ring)]
    back = [(i, j) for j, i in ahead]

    def item_of(number: Array) -> Item:
        micro, chunk = jnp.divmod(jnp.maximum(number, 0), v)
        part = chunk * p + me
        return Item(micro, chunk, part == 0, part == v * p - 1, number >= 0)

    def tick(
        state: _State, plan: tuple[Array, Array], *, goes: bool, returns: bool
    ) -> tuple[_State, None]:
        f, b = (row[me] for row in plan)
        kept, coming, returning, sums = state
        if goes:
            item, place = item_of(f), rooms[jnp.maximum(f, 0)]
            kept = kept.at[place].set(jnp.where(item.real, coming, kept[place]))
            coming = jax.lax.ppermute(forward(item, coming), AXIS, ahead)
            b = _after(b, coming) if in_order else b
        if returns:
            received = kept[rooms[jnp.maximum(b, 0)]]
            sums, returned = backward(item_of(b), received, returning, sums)
            returning = jax.lax.ppermute(returned, AXIS, back)
        return _State(kept, coming, returning, sums), None

    for part, goes, returns in schedule.phases():
        plan = (
            jnp.asarray(schedule.forward[part]),
            jnp.asarray(schedule.backward[part]),
        )
        body = functools.partial(tick, goes=goes, returns=returns)
        state, _ = jax.lax.scan(body, state, plan)
    return state.sums


def _after(number: Array, x: Array) -> Array:
    """Returns number, made to depend on x: barriers are gone before XLA schedules."""
    never = jnp.ravel(x)[0] > jnp.inf
    return jnp.where(never, -1, number)


class _State(NamedTuple):
    """What goes from tick to tick on one stage."""

    kept: Array
    """Inputs of the items in flight."""
    coming: Array
    """What the stage before gave at the last tick."""
    returning: Array
    """The gradient that the stage behind gave back."""
    sums: PyTree
