# SPDX-License-Identifier: Apache-2.0
"""Table lookup."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspeed.ambient import current


def embed(table: Float[Array, "V D"], ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Returns the table's rows at ids, in the ambient activation dtype. Ids out of range are a caller's error."""
    settings = current()
    return jnp.take(table.astype(settings.compute), ids, axis=0, mode="clip").astype(
        settings.activations
    )
