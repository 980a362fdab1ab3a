# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a large vocabulary without ever holding (B, T, V).

The loss and its gradient are computed together, a chunk of tokens at a time: logits of a chunk,
their log-sum-exp, and at once what the chunk gives to the gradients of hidden states and of the
embedding. Peak memory is one chunk of logits; the products are the same three as without chunks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxspeed.ambient import current
from jaxspeed.ops.linear import (
    dot,
    gather_sequence,
    pack,
    rows_product,
    scatter_sequence,
)
from jaxspeed.sharding import on_tensor, opened_last, shard, splits_sequence
from jaxspeed.types import Parameter, Sums


CHUNK_TOKENS = 1024
"""Most tokens whose logits exist at once.

Every chunk reads and writes the whole gradient of the embedding, 8 bytes for 6 x CHUNK_TOKENS
floating-point operations: fewer tokens, and that traffic is what the step waits for.
"""


def fused_cross_entropy(
    hidden: Float[Array, "B T D"],
    embedding: Parameter,
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    bias: Float[Array, " V"] | None = None,
) -> Sums:
    """Returns the summed -log softmax(hidden @ embedding.T + bias)[target] over masked-in tokens, and their number.

    Args:
        hidden: last hidden states.
        embedding: output embedding, (V, D).
        targets: next tokens, in [0, V).
        mask: which targets count; None counts all.
        bias: of the logits.
    """
    weights = (
        jnp.ones(targets.shape, jnp.float32)
        if mask is None
        else mask.astype(jnp.float32)
    )
    # What does not count may be anything (-100, say), but must not index outside.
    targets = targets if mask is None else jnp.where(mask, targets, 0)
    hidden, table, split = opened_last(embedding, hidden)
    plan = _Plan(current().compute, split == 0, False)
    if not plan.split:
        hidden = shard(hidden, *(None,) * hidden.ndim)
        total: Any = _summed_loss(plan, hidden, table, bias, targets, weights)
        return Sums(total, jnp.sum(weights))
    plan = plan._replace(
        scatter=targets.ndim == 2 and splits_sequence(targets.shape[1])
    )
    states = P(None, "tensor") if plan.scatter else P()
    local = functools.partial(_summed_loss, plan)
    specs = (states, P("tensor"), P("tensor"), P(), P())
    total = on_tensor(local, specs, P())(hidden, table, bias, targets, weights)
    return Sums(total, jnp.sum(weights))


class _Plan(NamedTuple):
    """What is static of a loss."""

    compute: Any
    split: bool
    """Whether each device of `tensor` has a part of the vocabulary."""
    scatter: bool
    """Whether it has a part of each sequence of hidden states, too."""


def _chunks(
    plan: _Plan, hidden: Array, targets: Array, weights: Array
) -> tuple[Array, Array, Array]:
    """Returns all of them in chunks of tokens, the last one filled up."""
    hidden = hidden.astype(plan.compute)
    hidden = gather_sequence(hidden) if plan.scatter else hidden
    tokens = targets.size
    chunk = _chunk_tokens(tokens)

    def cut(x: Array, *dims: int) -> Array:
        flat = jnp.pad(
            x.reshape(tokens, *dims), [(0, -tokens % chunk)] + [(0, 0)] * len(dims)
        )
        return flat.reshape(-1, chunk, *dims)

    return cut(hidden, hidden.shape[-1]), cut(targets), cut(weights)


def _chunk_tokens(tokens: int) -> int:
    """Returns the tokens per chunk: equal chunks, as few as CHUNK_TOKENS allows; from 512 tokens on two at least."""
    chunks = max(1, min(2, tokens // 512), -(-tokens // CHUNK_TOKENS))
    return max(1, -(-tokens // chunks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_loss(
    plan: _Plan,
    hidden: Array,
    embedding: Array,
    bias: Array | None,
    targets: Array,
    weights: Array,
) -> Array:
    table = embedding.astype(plan.compute)

    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        h, t, m = chunk
        return total + _loss_and_shifted(plan, h, table, bias, t, m)[0], None

    chunks = _chunks(plan, hidden, targets, weights)
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)[0]


def _summed_loss_fwd(
    plan: _Plan,
    hidden: Array,
    embedding: Array,
    bias: Array | None,
    targets: Array,
    weights: Array,
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    table = embedding.astype(plan.compute)
    rows = rows_product(pack(table))

    def add(
        carry: tuple[Array, Array, Array | None], chunk: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array, Array | None], Array]:
        total, d_table, d_bias = carry
        h, t, m = chunk
        loss, exps, norm = _loss_and_shifted(plan, h, table, bias, t, m)
        hit = (t - _first_id(plan, table))[:, None] == jnp.arange(table.shape[0])[None]
        d_logits = exps * (m / norm)[:, None] - jnp.where(hit, m[:, None], 0.0)
        d_bias = None if d_bias is None else d_bias + jnp.sum(d_logits, 0)
        d_logits = d_logits.astype(plan.compute)
        d_hidden = dot(d_logits, table, (1, 0)).astype(hidden.dtype)
        return (total + loss, d_table + rows(h, d_logits), d_bias), d_hidden

    # (D, V), not (V, D): the small operand is the one to be turned.
    zero = (
        jnp.zeros((), jnp.float32),
        jnp.zeros(table.shape[::-1], jnp.float32),
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )
    (total, d_table, d_bias), d_hidden = jax.lax.scan(
        add, zero, _chunks(plan, hidden, targets, weights)
    )
    d_hidden = d_hidden.reshape(-1, hidden.shape[-1])[: targets.size]
    d_hidden = d_hidden.reshape(*targets.shape, -1)
    d_hidden = scatter_sequence(d_hidden) if plan.scatter else d_hidden
    return total, (d_hidden, d_table.T, d_bias)


def _summed_loss_bwd(
    plan: _Plan, residuals: tuple[Array, Array, Array | None], g: Array
) -> tuple[Array, Array, Array | None, None, None]:
    d_hidden, d_table, d_bias = residuals
    # The loss is the same on all devices of `tensor`, and so each was given a part of its gradient.
    g = jax.lax.psum(g, "tensor") if plan.split else g
    return (
        (d_hidden.astype(jnp.float32) * g).astype(d_hidden.dtype),
        d_table * g,
        None if d_bias is None else d_bias * g,
        None,
        None,
    )


_summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd)


def _loss_and_shifted(
    plan: _Plan,
    h: Array,
    table: Array,
    bias: Array | None,
    targets: Array,
    weights: Array,
) -> tuple[Array, Array, Array]:
    """Returns a chunk's summed loss, exp(logits - max) and the rows' sums of those."""
    logits = dot(h, table, (1, 1))
    logits = logits if bias is None else logits + bias.astype(jnp.float32)[None]
    top = jnp.max(logits, -1)
    top = jax.lax.pmax(top, "tensor") if plan.split else top
    exps = jnp.exp(logits - top[:, None])
    norm = jnp.sum(exps, -1)
    own = targets - _first_id(plan, table)
    chosen = jnp.take_along_axis(logits, own[:, None], -1, mode="clip")[:, 0]
    if plan.split:
        chosen = jnp.where((own >= 0) & (own < table.shape[0]), chosen, 0)
        norm, chosen = jax.lax.psum((norm, chosen), "tensor")
    return jnp.sum((top + jnp.log(norm) - chosen) * weights), exps, norm


def _first_id(plan: _Plan, table: Array) -> Array | int:
    """Returns the token of this device's first row of the table."""
    return jax.lax.axis_index("tensor") * table.shape[0] if plan.split else 0
