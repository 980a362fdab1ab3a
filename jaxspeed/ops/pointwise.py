# SPDX-License-Identifier: Apache-2.0
"""Elementwise functions: activations and dropout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxspeed.ambient import current


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the tanh approximation of GELU. Reference: arXiv 1606.08415 section 2; `gelu_new` in Hugging Face."""
    return jax.nn.gelu(x, approximate=True)


def silu_gate(
    gate: Float[Array, "..."], up: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns silu(gate) * up, SwiGLU's product. Reference: arXiv 2002.05202 eq. 5."""
    return jax.nn.silu(gate) * up


def dropout(x: Float[Array, "..."], rate: float, site: int) -> Float[Array, "..."]:
    """Returns x with a share `rate` of its elements zeroed and the rest scaled up; x itself without an ambient key.

    Args:
        x: activations.
        rate: share zeroed, in [0, 1).
        site: which dropout of the layer this is, so that no two draw the same mask.
    """
    key = current().dropout_key
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
