# SPDX-License-Identifier: Apache-2.0
"""LSTM and GRU layers over packed documents, with their own derivative.

Only what must wait for the step before is inside the scan over time: one product with the state,
and the gates. The products with the inputs are a single one before it, and the gradients of both
matrices a single one each after it; autodiff would add to the recurrent matrix's gradient at
every step. Within the scan nothing is split over the `tensor` axis: each step would wait for a
collective.

While a model writes text (`jaxspeed.cache`), the state after the last token is kept, and the next
pass goes on from there.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxspeed.ambient import current
from jaxspeed.context import need_whole
from jaxspeed.ops.linear import dot, dot_rows, linear
from jaxspeed.remat import RECURRENCE_NAME


State = tuple[Array, ...]
"""What is handed from token to token, (B, D) each; the first is the output."""


def recurrence(
    cell: str,
    x: Float[Array, "B T D"],
    w_in: Float[Array, "D P F"],
    w_rec: Float[Array, "F P F"],
    b_in: Float[Array, "P F"],
    b_rec: Float[Array, "P F"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T F"]:
    """Returns the outputs h of a recurrent layer whose state is zero where a document begins.

    With a = w_in x[t] + b_in and u = w_rec h[t-1] + b_rec, each P parts (gates) of width F:

        lstm:  i, f, o = sigmoid(a + u),  g = tanh(a + u)       parts i f g o
               c[t] = f c[t-1] + i g,  h[t] = o tanh(c[t])
        gru:   r, z = sigmoid(a + u),  n = tanh(a + r u)        parts r z n
               h[t] = (1 - z) n + z h[t-1]

    References: Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000; arXiv
    1406.1078, with the reset gate behind the product, as in cuDNN and PyTorch.

    Args:
        cell: lstm or gru.
        x: inputs.
        w_in: the matrices of the inputs.
        w_rec: the matrices of the state.
        b_in: biases beside the inputs.
        b_rec: biases beside the state.
        segment_ids: document of each token in the row; None: one document.
    """
    need_whole("a recurrence")
    settings = current()
    cache, begins = settings.cache, None
    state = None if cache is None else cache.take()
    if state is None:
        zeros = jnp.zeros((x.shape[0], w_rec.shape[0]), jnp.float32)
        state = (zeros,) * CELLS[cell].states
        begins = None if segment_ids is None else _begins(segment_ids)
    a = linear(x.swapaxes(0, 1), w_in)
    result: Any = _run(cell, settings.compute, a, w_rec, b_in, b_rec, begins, state)
    h, state = result
    if cache is not None:
        cache.keep(state)
    return h.astype(settings.activations).swapaxes(0, 1)


class _Cell(NamedTuple):
    """The elementwise part of a step. `a` and `u` are (..., P, F), states (..., F)."""

    states: int
    """Number of arrays of the state."""
    forward: Callable[[Array, Array, State], tuple[State, Array]]
    """(a, u, state before) -> (state after, what the derivative needs, (..., 4, F))."""
    backward: Callable[[Array, State, State, State], tuple[Array, State]]
    """(what was kept, state before, state after, its gradient) -> gradients of a and, but for u, of the state before."""
    of_u: Callable[[Array, Array], Array]
    """(gradient of a, what was kept) -> gradient of u."""


def _lstm(a: Array, u: Array, before: State) -> tuple[State, Array]:
    i, f, g, o = (x[..., p, :] for x in (a + u,) for p in range(4))
    i, f, g, o = (
        jax.nn.sigmoid(i),
        jax.nn.sigmoid(f),
        jnp.tanh(g),
        jax.nn.sigmoid(o),
    )
    c = f * before[1] + i * g
    return (o * jnp.tanh(c), c), jnp.stack([i, f, g, o], -2)


def _lstm_backward(
    kept: Array, before: State, after: State, d_after: State
) -> tuple[Array, State]:
    i, f, g, o = (kept[..., p, :] for p in range(4))
    d_h, d_c = d_after
    squashed = jnp.tanh(after[1])
    d_c = d_c + d_h * o * (1 - squashed * squashed)
    d_a = [
        d_c * g * i * (1 - i),
        d_c * before[1] * f * (1 - f),
        d_c * i * (1 - g * g),
        d_h * squashed * o * (1 - o),
    ]
    return jnp.stack(d_a, -2), (jnp.zeros_like(d_h), d_c * f)


def _gru(a: Array, u: Array, before: State) -> tuple[State, Array]:
    r, z = (jax.nn.sigmoid(a[..., p, :] + u[..., p, :]) for p in range(2))
    n = jnp.tanh(a[..., 2, :] + r * u[..., 2, :])
    return ((1 - z) * n + z * before[0],), jnp.stack([r, z, n, u[..., 2, :]], -2)


def _gru_backward(
    kept: Array, before: State, after: State, d_after: State
) -> tuple[Array, State]:
    r, z, n, u = (kept[..., p, :] for p in range(4))
    (d_h,) = d_after
    d_n = d_h * (1 - z) * (1 - n * n)
    d_a = [d_n * u * r * (1 - r), d_h * (before[0] - n) * z * (1 - z), d_n]
    return jnp.stack(d_a, -2), (d_h * z,)


def _gru_of_u(d_a: Array, kept: Array) -> Array:
    return jnp.concatenate([d_a[..., :2, :], d_a[..., 2:, :] * kept[..., :1, :]], -2)


CELLS: Mapping[str, _Cell] = {
    "lstm": _Cell(2, _lstm, _lstm_backward, lambda d_a, kept: d_a),
    "gru": _Cell(1, _gru, _gru_backward, _gru_of_u),
}
"""Recurrent cells by name."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(
    cell: str,
    compute: Any,
    a: Float[Array, "T B P F"],
    w_rec: Array,
    b_in: Array,
    b_rec: Array,
    begins: Array | None,
    state: State,
) -> tuple[Array, State]:
    """Returns outputs (T, B, F) and the last state."""
    out, _ = _run_fwd(cell, compute, a, w_rec, b_in, b_rec, begins, state)
    return out


def _run_fwd(
    cell: str,
    compute: Any,
    a: Array,
    w_rec: Array,
    b_in: Array,
    b_rec: Array,
    begins: Array | None,
    state: State,
) -> tuple[tuple[Array, State], tuple[Any, ...]]:
    P, F = b_rec.shape
    w = w_rec.reshape(F, P * F).astype(compute)
    b_in, b_rec = (b.reshape(1, P, F) for b in (b_in, b_rec))

    def step(state: State, token: Any) -> tuple[State, tuple[State, Array]]:
        a, begins = token
        before = _cleared(state, begins)
        u = dot(before[0].astype(compute), w, (1, 0)).reshape(-1, P, F) + b_rec
        after, kept = CELLS[cell].forward(a.astype(jnp.float32) + b_in, u, before)
        return after, (after, kept.astype(a.dtype))

    last, (states, kept) = jax.lax.scan(step, state, (a, begins))
    states, kept = jax.tree.map(
        lambda x: checkpoint_name(x, RECURRENCE_NAME), (states, kept)
    )
    return (states[0], last), (kept, states, state, w, begins)


def _run_bwd(
    cell: str, compute: Any, residuals: tuple[Any, ...], g: tuple[Array, State]
) -> tuple[Array, Array, Array, Array, None, State]:
    kept, states, first, w, begins = residuals
    T, B, _, F = kept.shape
    d_out, d_last = g
    before = tuple(
        jnp.concatenate([x[None], xs[:-1]]) for x, xs in zip(first, states, strict=True)
    )
    before = _cleared(before, begins)

    def step(d_state: State, token: Any) -> tuple[State, Array]:
        kept, before, after, g, begins = token
        kept = kept.astype(jnp.float32)
        d_state = (d_state[0] + g, *d_state[1:])
        d_a, d_before = CELLS[cell].backward(kept, before, after, d_state)
        d_u = CELLS[cell].of_u(d_a, kept).reshape(B, -1).astype(compute)
        d_before = (d_before[0] + dot(d_u, w, (1, 1)), *d_before[1:])
        return _cleared(d_before, begins), d_a.astype(token[0].dtype)

    d_first, d_a = jax.lax.scan(
        step, d_last, (kept, before, states, d_out, begins), reverse=True
    )
    d_u = CELLS[cell].of_u(d_a, kept).reshape(T * B, -1)
    h, narrow = before[0].reshape(T * B, F).astype(compute), d_u.astype(compute)
    d_w = dot(h, narrow, (0, 0)) if compute == jnp.float32 else dot_rows(h, narrow)
    d_b_in = jnp.sum(d_a, (0, 1), dtype=jnp.float32)
    d_b_rec = jnp.sum(d_u, 0, dtype=jnp.float32).reshape(-1, F)
    return d_a, d_w.reshape(F, -1, F), d_b_in, d_b_rec, None, d_first


_run.defvjp(_run_fwd, _run_bwd)


def _begins(segment_ids: Int[Array, "B T"]) -> Array:
    """Returns, time first, where a token belongs to another document than the one before it."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, [(0, 0), (1, 0)]).T


def _cleared(state: State, begins: Array | None) -> State:
    """Returns the state, zero where a document begins."""
    if begins is None:
        return state
    return tuple(jnp.where(begins[..., None], 0.0, x) for x in state)
