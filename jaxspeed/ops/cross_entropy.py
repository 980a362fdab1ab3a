# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a large vocabulary without ever holding (B, T, V).

The loss and its gradient are computed together, a chunk of tokens at a time: logits of a chunk,
their log-sum-exp, and at once what the chunk gives to the gradients of hidden states and of the
embedding. Peak memory is one chunk of logits; the products are the same three as without chunks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspeed.ambient import current
from jaxspeed.ops.linear import dot, pack, rows_product
from jaxspeed.types import Sums


CHUNK_TOKENS = 1024
"""Most tokens whose logits exist at once.

Every chunk reads and writes the whole gradient of the embedding, 8 bytes for 6 x CHUNK_TOKENS
floating-point operations: fewer tokens, and that traffic is what the step waits for.
"""


def fused_cross_entropy(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    bias: Float[Array, " V"] | None = None,
) -> Sums:
    """Returns the summed -log softmax(hidden @ embedding.T + bias)[target] over masked-in tokens, and their number.

    Args:
        hidden: last hidden states.
        embedding: output embedding.
        targets: next tokens, in [0, V).
        mask: which targets count; None counts all.
        bias: of the logits.
    """
    d_model, tokens = hidden.shape[-1], targets.size
    weights = (
        jnp.ones(targets.shape, jnp.float32)
        if mask is None
        else mask.astype(jnp.float32)
    ).reshape(-1)
    # What does not count may be anything (-100, say), but must not index outside.
    targets = targets if mask is None else jnp.where(mask, targets, 0)
    chunk = _chunk_tokens(tokens)
    pad = -tokens % chunk
    split = lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(
        -1, chunk, *x.shape[1:]
    )
    total: Any = _summed_loss(
        current().compute,
        split(hidden.reshape(-1, d_model)),
        embedding,
        bias,
        split(targets.reshape(-1)),
        split(weights),
    )
    return Sums(total, jnp.sum(weights))


def _chunk_tokens(tokens: int) -> int:
    """Returns the tokens per chunk: equal chunks, as few as CHUNK_TOKENS allows; from 512 tokens on two at least."""
    chunks = max(1, min(2, tokens // 512), -(-tokens // CHUNK_TOKENS))
    return max(1, -(-tokens // chunks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_loss(
    compute: Any,
    hidden: Array,
    embedding: Array,
    bias: Array | None,
    targets: Array,
    weights: Array,
) -> Array:
    table = embedding.astype(compute)

    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        h, t, m = chunk
        return total + _loss_and_shifted(h.astype(compute), table, bias, t, m)[0], None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), (hidden, targets, weights))[0]


def _summed_loss_fwd(
    compute: Any,
    hidden: Array,
    embedding: Array,
    bias: Array | None,
    targets: Array,
    weights: Array,
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    table = embedding.astype(compute)
    rows = rows_product(pack(table))

    def add(
        carry: tuple[Array, Array, Array | None], chunk: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array, Array | None], Array]:
        total, d_table, d_bias = carry
        h, t, m = chunk
        h = h.astype(compute)
        loss, exps, norm = _loss_and_shifted(h, table, bias, t, m)
        hit = t[:, None] == jnp.arange(table.shape[0])[None]
        d_logits = exps * (m / norm)[:, None] - jnp.where(hit, m[:, None], 0.0)
        d_bias = None if d_bias is None else d_bias + jnp.sum(d_logits, 0)
        d_logits = d_logits.astype(compute)
        d_hidden = dot(d_logits, table, (1, 0)).astype(hidden.dtype)
        return (total + loss, d_table + rows(h, d_logits), d_bias), d_hidden

    # (D, V), not (V, D): the small operand is the one to be turned.
    zero = (
        jnp.zeros((), jnp.float32),
        jnp.zeros(table.shape[::-1], jnp.float32),
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )
    (total, d_table, d_bias), d_hidden = jax.lax.scan(
        add, zero, (hidden, targets, weights)
    )
    return total, (d_hidden, d_table.T, d_bias)


def _summed_loss_bwd(
    compute: Any, residuals: tuple[Array, Array, Array | None], g: Array
) -> tuple[Array, Array, Array | None, None, None]:
    d_hidden, d_table, d_bias = residuals
    return (
        (d_hidden.astype(jnp.float32) * g).astype(d_hidden.dtype),
        d_table * g,
        None if d_bias is None else d_bias * g,
        None,
        None,
    )


_summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd)


def _loss_and_shifted(
    h: Array, table: Array, bias: Array | None, targets: Array, weights: Array
) -> tuple[Array, Array, Array]:
    """Returns a chunk's summed loss, exp(logits - max) and the rows' sums of those."""
    logits = dot(h, table, (1, 1))
    logits = logits if bias is None else logits + bias.astype(jnp.float32)[None]
    top = jnp.max(logits, -1)
    exps = jnp.exp(logits - top[:, None])
    norm = jnp.sum(exps, -1)
    chosen = jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
    return jnp.sum((top + jnp.log(norm) - chosen) * weights), exps, norm
