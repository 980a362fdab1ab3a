# SPDX-License-Identifier: Apache-2.0
"""Where tokens stand, for models that are not told."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxspeed.ambient import current
from jaxspeed.context import AXIS, device_order, token_places


def row_places(shape: tuple[int, ...]) -> Int[Array, "B T"]:
    """Returns the place of each token in its row, also where the axis `context` splits the row.

    Args:
        shape: of the tokens here, (B, T).
    """
    return jnp.broadcast_to(token_places(shape[1]), shape)


def document_places(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns how many tokens of its own document stand before each token in the row.

    Args:
        segment_ids: document of each token; one document's tokens stand together.
    """
    settings, length = current(), segment_ids.shape[1]
    if settings.context == 1:
        return _since_begin(segment_ids)
    everyone = jax.lax.all_gather(segment_ids, AXIS, axis=1, tiled=True)
    size = settings.context
    order = device_order(length * size, settings.context_by, size)
    places = _since_begin(everyone[:, np.argsort(order)])
    return jnp.take(places, token_places(length), axis=1)


def _since_begin(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    slots = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    before = jnp.pad(segment_ids, [(0, 0), (1, 0)])[:, :-1]
    begins = jnp.where(segment_ids != before, slots, 0)
    return slots - jax.lax.cummax(begins, axis=1)
