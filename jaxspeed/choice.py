# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen from its logits: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

No sort over the vocabulary: each filter is a threshold, so a vocabulary that is sharded stays so.
The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p. Layer 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxspeed.sampling import SamplingConfig


_BISECTIONS = 32
"""Halvings of [0, 1] that find the probability at which top-p cuts."""


class Rule(NamedTuple):
    """Which steps of the choice are done."""

    draws: bool
    top_k: int
    nucleus: bool
    relative: bool
    penalised: bool


class Knobs(NamedTuple):
    """The numbers of the choice."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    penalty: Float[Array, ""]


def rule_of(cfg: SamplingConfig) -> Rule:
    """Returns what of the settings a compiled program depends on."""
    return Rule(
        draws=cfg.temperature > 0,
        top_k=cfg.top_k,
        nucleus=cfg.top_p < 1,
        relative=cfg.min_p > 0,
        penalised=cfg.repetition_penalty != 1,
    )


def knobs_of(cfg: SamplingConfig) -> Knobs:
    """Returns the numbers that may change without compiling anew."""
    numbers = (cfg.temperature, cfg.top_p, cfg.min_p, cfg.repetition_penalty)
    return Knobs(*map(jnp.float32, numbers))


def choose(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    rule: Rule,
    knobs: Knobs,
    seen: Bool[Array, "B V"] | None,
) -> Int[Array, " B"]:
    """Returns the next token of each row.

    Args:
        logits: float32.
        keys: one per row.
        rule: which steps.
        knobs: their numbers.
        seen: tokens that occurred, for the penalty.
    """
    if rule.penalised:
        assert seen is not None
        scaled = jnp.where(logits > 0, logits / knobs.penalty, logits * knobs.penalty)
        logits = jnp.where(seen, scaled, logits)
    if not rule.draws:
        return _argmax(logits)
    logits = keep_likely(logits / knobs.temperature, rule, knobs)
    draw = jax.vmap(jax.random.categorical)(keys, logits)
    return draw.astype(jnp.int32)


def _argmax(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Returns the first place of each row's largest value: by two reductions, which a CPU does eight times as fast as one of pairs."""
    last = logits.shape[-1] - 1
    places = jnp.arange(last + 1, dtype=jnp.int32)
    top = jnp.max(logits, -1, keepdims=True)
    # Where nothing is equal to itself (NaN), any place will do.
    return jnp.min(jnp.where(logits == top, places, last), -1)


def keep_likely(
    logits: Float[Array, "B V"], rule: Rule, knobs: Knobs
) -> Float[Array, "B V"]:
    """Returns the logits with minus infinity where top-k, top-p or min-p cut; of tokens that tie at the cut, all are kept."""
    if 0 < rule.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, rule.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if rule.nucleus:
        probs = jax.nn.softmax(logits, -1)
        least = _nucleus(probs, knobs.top_p)
        logits = jnp.where(probs < least[:, None], -jnp.inf, logits)
    if rule.relative:
        least = jnp.max(logits, -1, keepdims=True) + jnp.log(knobs.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _nucleus(probs: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, " B"]:
    """Returns the largest threshold (to 2^-32) that leaves a row this probability."""

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        left = jnp.sum(jnp.where(probs >= middle[:, None], probs, 0.0), -1)
        enough = left >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # A single token may have it all: the threshold is at most the largest probability.
    top = jnp.max(probs, -1)
    low, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.zeros_like(top), top))
    return low
