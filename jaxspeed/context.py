# SPDX-License-Identifier: Apache-2.0
"""Sequences that are split over the mesh axis `context`: which tokens each device has.

Ulysses takes them in order. A ring has each device two chunks, one from either end of the sequence:
c devices have 2c chunks, and device i has chunks i and 2c - 1 - i. Under a causal mask each
device then has the same number of visible pairs to compute, whoever's keys it holds (arXiv
2311.09431 solves the same by stripes). All else in a model goes token by token and asks
`token_places` where its tokens stand. Layer 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxspeed.ambient import current
from jaxspeed.config import ConfigError


AXIS = "context"


def parts_of(by: str, size: int) -> int:
    """Returns in how many equal parts a sequence is cut, for attention `by` this name over so many devices."""
    return 2 * size if by == "ring" and size > 1 else size


@functools.lru_cache(maxsize=16)
def device_order(length: int, by: str, size: int) -> Int[np.ndarray, " T"]:
    """Returns the places of a sequence's tokens as they lie on the devices, one device's after another's.

    Args:
        length: of the whole sequence; divides by `parts_of`.
        by: ulysses or ring.
        size: devices that share the sequence.
    """
    order = np.arange(length)
    if by != "ring" or size == 1:
        return order
    chunks = order.reshape(2 * size, -1)
    pairs = [chunks[[i, 2 * size - 1 - i]] for i in range(size)]
    return np.concatenate(pairs).reshape(-1)


def places_on(device: Any, length: int, by: str, size: int) -> Int[Array, " T"]:
    """Returns the places, in the whole sequence, of the tokens that a device has.

    Args:
        device: its number on the axis; may be traced.
        length: tokens that each device has.
        by: ulysses or ring.
        size: devices that share the sequence.
    """
    here = jnp.arange(length)
    if by != "ring" or size == 1:
        return device * length + here
    half = length // 2
    late = (2 * size - 1 - device) * half + here - half
    return jnp.where(here < half, device * half + here, late)


def token_places(length: int) -> Int[Array, " T"]:
    """Returns the places, in the whole sequence, of the tokens that this device has: 0, 1, ... where nothing is split.

    Args:
        length: tokens that each device has.
    """
    settings = current()
    if settings.context == 1:
        return jnp.arange(length)
    device = jax.lax.axis_index(AXIS)
    return places_on(device, length, settings.context_by, settings.context)


def need_whole(what: str, change: str = "set mesh.context 1") -> None:
    """Raises if sequences are split, which `what` cannot have.

    Raises:
        ConfigError: they are.
    """
    size = current().context
    if size > 1:
        raise ConfigError(
            f"mesh.context={size}: {what} needs whole sequences; {change}"
        )
