# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers equal their equations written out, in values and gradients, for packed and padded rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed import ops
from jaxspeed.ambient import ambient
from jaxspeed.cache import Cache


recurrence: Any = ops.recurrence

B, T, D, F = 3, 7, 5, 4
GATES = {"lstm": 4, "gru": 3}
SEGMENTS = np.array(
    [[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 2], [1, 2, 3, 3, 3, 0, 0]], np.int32
)

by_cell = pytest.mark.parametrize("cell", list(GATES))


def weights(cell: str) -> list[jax.Array]:
    """Returns x, w_in, w_rec, b_in and b_rec."""
    rng, P = np.random.default_rng(0), GATES[cell]
    shapes = ((B, T, D), (D, P, F), (F, P, F), (P, F), (P, F))
    return [jnp.asarray(rng.normal(size=s, scale=0.7), jnp.float32) for s in shapes]


def step(cell: str, x: Any, state: Any, w_in: Any, w_rec: Any, *biases: Any) -> Any:
    """Returns the next state of one row, by the equations of the docstring."""
    sigmoid, (h, *c) = jax.nn.sigmoid, state
    a = jnp.einsum("D,DPF->PF", x, w_in) + biases[0]
    u = jnp.einsum("D,DPF->PF", h, w_rec) + biases[1]
    if cell == "lstm":
        i, f, o = (sigmoid(a[p] + u[p]) for p in (0, 1, 3))
        new = f * c[0] + i * jnp.tanh(a[2] + u[2])
        return o * jnp.tanh(new), new
    r, z = (sigmoid(a[p] + u[p]) for p in (0, 1))
    return ((1 - z) * jnp.tanh(a[2] + r * u[2]) + z * h,)


def written_out(cell: str, segments: Any, x: jax.Array, *args: jax.Array) -> jax.Array:
    """Returns the outputs of each document by itself, token by token."""
    rows = []
    for b in range(B):
        state, said, last = (jnp.zeros(F),) * 2, [], None
        for t in range(T):
            if last is not None and segments[b, t] != last:
                state = (jnp.zeros(F),) * 2
            state, last = step(cell, x[b, t], state, *args), segments[b, t]
            said.append(state[0])
        rows.append(jnp.stack(said))
    return jnp.stack(rows)


@by_cell
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_recurrence_equals_its_equations_with_gradients(
    cell: str, compute: str
) -> None:
    args = weights(cell)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, F)), jnp.float32)
    ours = lambda *args: recurrence(cell, *args, jnp.asarray(SEGMENTS))
    theirs = lambda *args: written_out(cell, SEGMENTS, *args)

    def both(f: Any) -> Any:
        y, pull = jax.vjp(f, *args)
        return y, pull(g)

    with ambient(compute=jnp.dtype(compute)):
        got = jax.jit(lambda: both(ours))()
    want = jax.jit(lambda: both(theirs))()
    close = {"float32": 1e-5, "bfloat16": 3e-2}[compute]
    for ours, exact in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == jnp.float32
        limit = close * float(jnp.abs(exact).max())
        np.testing.assert_allclose(ours, exact, rtol=0, atol=limit)


@by_cell
def test_rows_without_segments_are_one_document(cell: str) -> None:
    args = weights(cell)
    whole = recurrence(cell, *args, jnp.ones((B, T), jnp.int32))
    np.testing.assert_allclose(recurrence(cell, *args), whole, atol=1e-6)


@by_cell
def test_tokens_after_a_token_change_nothing(cell: str) -> None:
    x, *rest = weights(cell)
    changed = recurrence(cell, x.at[:, 4:].set(9.0), *rest)
    np.testing.assert_array_equal(recurrence(cell, x, *rest)[:, :4], changed[:, :4])


@by_cell
def test_state_kept_between_passes_gives_the_outputs_of_one_pass(cell: str) -> None:
    """The first pass begins behind padding, which the state must not see; the next ones are a token each."""
    x, *rest = weights(cell)
    visible = jnp.asarray([[0, 0, 1, 1, 1, 1, 1]] * B, jnp.int32)
    got, before = [], None
    for begin, end in ((0, 4), (4, 5), (5, 6), (6, 7)):
        start = None if before is None else jnp.int32(begin)
        cache = Cache(T, visible > 0, start, before)
        with ambient(cache=cache):
            part = slice(begin, end)
            got.append(recurrence(cell, x[:, part], *rest, visible[:, part]))
        before = cache.kept
    whole = recurrence(cell, x[:, 2:], *rest)
    np.testing.assert_allclose(jnp.concatenate(got, 1)[:, 2:], whole, atol=1e-6)
