# SPDX-License-Identifier: Apache-2.0
"""Things that are computed once a text, not once a token."""

from collections.abc import Callable
from typing import TypeVar

from jaxspeed.ambient import current


X = TypeVar("X")


def remember(make: Callable[[], X]) -> X:
    """Returns `make()`, or while a model writes what it returned at the first pass.

    For what depends on the encoder alone: keys and values of cross-attention.

    Args:
        make: returns arrays, any pytree of them.
    """
    cache = current().cache
    if cache is None:
        return make()
    before = cache.take()
    value = make() if before is None else before
    cache.keep(value)
    return value
