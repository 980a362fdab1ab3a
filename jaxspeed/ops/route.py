# SPDX-License-Identifier: Apache-2.0
"""The router of a mixture of experts: which experts a token goes to, with which weights, and what keeps them busy alike.

Top-k gates as in GShard (arXiv 2006.16668), Switch (2101.03961) and DeepSpeed's
`moe/sharded_moe.py`. Logits, softmax and losses are float32. Each row of the batch is a group of
its own, for capacities and for the balance loss: so neither depends on how a batch is cut into
micro-steps and devices. (DeepSpeed's group is what one device has at a time.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspeed.ambient import current
from jaxspeed.context import AXIS


JITTER = 1e-2
"""DeepSpeed's epsilon of the noise on what the router reads."""

SITE = 0x6A5
"""Keeps the router's random numbers apart from those of dropout."""


class Routing(NamedTuple):
    """Where each token of a batch goes."""

    experts: Int[Array, "B T k"]
    """The experts' numbers, the best first; E, of which there is none, for padding."""
    weights: Float[Array, "B T k"]
    """What their results are multiplied by."""
    num_experts: int
    """E."""
    normalised: bool
    """Whether a token's weights are to sum to 1."""


def route(
    x: Float[Array, "B T D"],
    router: Float[Array, "D E"],
    *,
    each: int,
    normalise: bool,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Routing:
    """Returns the experts with the largest softmax(x router), and those values.

    In training it adds `moe.balance_coef` and `moe.z_coef` times their losses to each row's.

    Args:
        x: what the layer reads.
        router: a column for each expert.
        each: experts that a token goes to (k).
        normalise: divide a token's weights by their sum (Mixtral), or not (Switch).
        segment_ids: 0 is padding, which goes nowhere.
    """
    count = router.shape[1]
    moe = current().moe
    real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0
    read = x.astype(jnp.float32)
    if moe.noise == "jitter" and (key := _key(0)) is not None:
        read = read * jax.random.uniform(
            key, read.shape, minval=1 - JITTER, maxval=1 + JITTER
        )
    logits = jnp.matmul(
        read, router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    probabilities = jax.nn.softmax(logits)
    chosen = _choose(jax.lax.stop_gradient(logits), each)
    weights = jnp.take_along_axis(probabilities, chosen, -1)
    if normalise:
        weights = weights / jnp.sum(weights, -1, keepdims=True)
    _add_losses(logits, probabilities, chosen, real)
    chosen = jnp.where(real[..., None], chosen, count)
    weights = jnp.where(real[..., None], weights, 0.0)
    return Routing(chosen, weights, count, normalise)


def random_order(shape: tuple[int, ...]) -> Float[Array, "..."] | None:
    """Returns numbers to sort tokens by where the dropped are drawn by lot (`moe.random_priority`); None: first come, first served."""
    key = _key(2) if current().moe.random_priority else None
    return None if key is None else jax.random.uniform(key, shape)


def _key(number: int) -> Array | None:
    """Returns a key of this layer's, in training."""
    key = current().dropout_key
    return None if key is None else jax.random.fold_in(key, SITE + number)


def _choose(logits: Float[Array, "B T E"], each: int) -> Int[Array, "B T k"]:
    moe = current().moe
    key = _key(1)
    if moe.noise == "gumbel" and key is not None:
        return jax.lax.top_k(logits + jax.random.gumbel(key, logits.shape), each)[1]
    if not moe.sample_second or key is None:
        return jax.lax.top_k(logits, each)[1]
    first = jnp.argmax(logits, -1)
    others = ~jax.nn.one_hot(first, logits.shape[-1], dtype=bool)
    drawn = logits + jax.random.gumbel(key, logits.shape)
    second = jnp.argmax(jnp.where(others, drawn, -jnp.inf), -1)
    return jnp.stack([first, second], -1).astype(jnp.int32)


def _add_losses(
    logits: Float[Array, "B T E"],
    probabilities: Float[Array, "B T E"],
    chosen: Int[Array, "B T k"],
    real: Bool[Array, "B T"],
) -> None:
    auxiliary = current().auxiliary
    moe = current().moe
    if auxiliary is None:
        return
    count, each = logits.shape[-1], chosen.shape[-1]
    given = jnp.sum(jax.nn.one_hot(chosen, count), 2) * real[..., None]
    squares = jax.nn.logsumexp(logits, -1) ** 2
    sums = (
        jnp.sum(given, 1),
        jnp.sum(probabilities * real[..., None], 1),
        jnp.sum(real, 1, dtype=jnp.float32),
        jnp.sum(squares * real, 1),
    )
    if current().context > 1:  # a row is what all its devices have of it
        sums = jax.tree.map(lambda x: jax.lax.psum(x, AXIS), sums)
    given, believed, tokens, squares = sums
    tokens = jnp.maximum(tokens, 1.0)
    shares = given / (tokens[:, None] * each)
    balance = count * jnp.sum(shares * believed / tokens[:, None], -1)
    z = squares / tokens
    if moe.balance_coef or moe.z_coef:
        auxiliary.add(moe.balance_coef * balance + moe.z_coef * z)
    some = sums[2] > 0  # a row that only fills up the batch says nothing
    auxiliary.measure("router_balance", jnp.sum(balance * some), jnp.sum(some))
    auxiliary.measure("router_z", jnp.sum(z * some), jnp.sum(some))
