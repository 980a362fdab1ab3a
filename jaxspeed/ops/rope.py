# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, and its stretching to contexts longer than those of pretraining.

Reference: arXiv 2104.09864 section 3.4. What depends on the sequence's length (transformers'
dynamic and longrope) is not here: a text's keys would have to be turned anew as it grows.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxspeed.ambient import current


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How frequencies are lowered: wholly below some frequency, not at all above another."""

    kind: Literal["linear", "llama3", "yarn"]
    """All alike (arXiv 2306.15595); or with a ramp between, over frequencies (2407.21783) or their logarithms (2309.00071)."""
    factor: float
    """What low frequencies are divided by."""
    original: int
    """Tokens of pretraining's longest sequence (llama3, yarn)."""
    low_turns: float
    """Turns within them, up to which a frequency is low."""
    high_turns: float
    """Turns within them, from which it is left alone."""
    attention_factor: float
    """What queries and keys are multiplied by."""


def rotate(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    *,
    theta: float,
    scaling: RopeScaling | None = None,
) -> Float[Array, "B T N H"]:
    """Returns x with each pair (x[i], x[i + H/2]) turned by positions * theta^(-2i/H).

    The halves are paired, as in Hugging Face's Llama, not neighbours as in the paper.

    Args:
        x: queries or keys.
        positions: of each token within its document.
        theta: base of the wavelengths.
        scaling: what is done to the frequencies; None: nothing.
    """
    half = x.shape[-1] // 2
    frequency = jnp.asarray(rope_frequencies(half, theta, scaling), jnp.float32)
    angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if scaling is not None and scaling.attention_factor != 1:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    turned: Any = _turned(current().platform == "tpu", x, cos, sin)
    return turned


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turned(on_tpu: bool, x: Array, cos: Array, sin: Array) -> Array:
    """Returns each pair turned, in float32, rounded once.

    Whole rows at once: halves of them would be arrays of their own, padded on a TPU, and a CPU takes
    three times as long for their gradient. Its derivative turns back.
    """
    other = _halves_swapped(on_tpu, x) * jnp.concatenate([-sin, sin], -1)
    both = x.astype(jnp.float32) * jnp.concatenate([cos, cos], -1) + other
    return both.astype(x.dtype)


def _turned_fwd(
    on_tpu: bool, x: Array, cos: Array, sin: Array
) -> tuple[Array, tuple[Array, Array]]:
    # Within a rule it is opaque to rematerialisation: no policy keeps the product that swaps.
    return _turned(on_tpu, x, cos, sin), (cos, sin)


def _turned_bwd(
    on_tpu: bool, turn: tuple[Array, Array], g: Array
) -> tuple[Array, None, None]:
    cos, sin = turn
    return _turned(on_tpu, g, cos, -sin), None, None


_turned.defvjp(_turned_fwd, _turned_bwd)


def _halves_swapped(on_tpu: bool, x: Array) -> Array:
    """Returns x, in float32, with the halves of its rows swapped: on a TPU by a product, which is exact and becomes one operation with what is around it.

    Moving them cost 10 % of a Llama-2 7B's cycles there, and a GB (libtpu 0.0.42, v5p).
    """
    size = x.shape[-1]
    if not on_tpu:
        return jnp.roll(x.astype(jnp.float32), size // 2, -1)
    swap = np.roll(np.eye(size), size // 2, 1)
    return jax.lax.dot_general(
        x,
        jnp.asarray(swap, x.dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def rope_frequencies(
    count: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, " h"]:
    """Returns radians per token of each pair, as transformers' `modeling_rope_utils` defines them, in float64.

    Args:
        count: of pairs, H/2.
        theta: base of the wavelengths.
        scaling: what is done to them; None: nothing.
    """
    index = np.arange(count)
    frequency = theta ** -(index / count)
    if scaling is None:
        return frequency
    low, high = scaling.low_turns, scaling.high_turns
    if scaling.kind == "linear":
        kept = np.zeros(count)
    elif scaling.kind == "llama3":
        turns = scaling.original * frequency / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
    else:
        # The pair that makes this many turns, rounded to whole pairs away from the ramp's middle.
        pair = lambda turns: (
            count * math.log(scaling.original / (2 * math.pi * turns)) / math.log(theta)
        )
        first = max(math.floor(pair(high)), 0)
        last = min(math.ceil(pair(low)), 2 * count - 1)
        kept = 1 - np.clip((index - first) / (last - first or 0.001), 0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)
