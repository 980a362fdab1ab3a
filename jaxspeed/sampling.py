# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen from its logits: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

No sort over the vocabulary: each filter is a threshold, so a vocabulary that is sharded stays so.
The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p. Layer 2.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxspeed.config import config_error


_BISECTIONS = 32
"""Halvings of [0, 1] that find the probability at which top-p cuts."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How text is written."""

    max_new_tokens: int = 128
    """Tokens to write, at most."""
    min_new_tokens: int = 0
    """Tokens before the text may end."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (greedy)."""
    top_k: int = 0
    """Draw from so many likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the likeliest (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Above 1: logits of tokens that occurred are divided by it, negative ones multiplied (arXiv 1909.05858)."""
    num_samples: int = 1
    """Texts written for each prompt."""
    stop: tuple[str, ...] = ()
    """Strings at which a text ends; they are not part of it."""
    seed: int = 0
    """Of the draws. A row's draws depend on its number and this only, not on what else is in the batch."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        ranges = {
            "max_new_tokens": (1, math.inf),
            "min_new_tokens": (0, self.max_new_tokens),
            "temperature": (0, math.inf),
            "top_k": (0, math.inf),
            "top_p": (1e-6, 1),
            "min_p": (0, 1),
            "repetition_penalty": (1e-6, math.inf),
            "num_samples": (1, math.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high or math.isinf(value):
                why = "out of range" if math.isfinite(value) else "not a number"
                change = f"give {low:g} or more" + (
                    "" if math.isinf(high) else f", at most {high:g}"
                )
                raise config_error(name, value, why, change)
        if any(not text for text in self.stop):
            raise config_error(
                "stop", self.stop, "an empty string ends every text", "leave it out"
            )
        idle = SamplingConfig
        if self.temperature == 0 and (self.top_k, self.top_p, self.min_p) != (
            idle.top_k,
            idle.top_p,
            idle.min_p,
        ):
            raise config_error(
                "temperature",
                self.temperature,
                "top_k, top_p and min_p have no effect on greedy text",
                "leave them out, or give a temperature above 0",
            )

    @property
    def rule(self) -> "Rule":
        """What of it a compiled program depends on."""
        return Rule(
            draws=self.temperature > 0,
            top_k=self.top_k,
            nucleus=self.top_p < 1,
            relative=self.min_p > 0,
            penalised=self.repetition_penalty != 1,
        )

    @property
    def knobs(self) -> "Knobs":
        """The numbers that may change without compiling anew."""
        return Knobs(
            *(
                jnp.float32(x)
                for x in (
                    self.temperature,
                    self.top_p,
                    self.min_p,
                    self.repetition_penalty,
                )
            )
        )


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
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = keep_likely(logits / knobs.temperature, rule, knobs)
    draw = jax.vmap(jax.random.categorical)(keys, logits)
    return draw.astype(jnp.int32)


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
