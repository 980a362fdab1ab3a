# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding. Reference: arXiv 2104.09864 section 3.4."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], *, theta: float
) -> Float[Array, "B T N H"]:
    """Returns x with each pair (x[i], x[i + H/2]) turned by positions * theta^(-2i/H).

    The halves are paired, as in Hugging Face's Llama, not neighbours as in the paper.

    Args:
        x: queries or keys.
        positions: of each token within its document.
        theta: base of the wavelengths.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], -1
    ).astype(x.dtype)
