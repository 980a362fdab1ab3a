# SPDX-License-Identifier: Apache-2.0
"""Rematerialisation policies by name: what a layer keeps for its backward pass.

Whole weights are never kept, whatever the policy: at ZeRO stage 3 the backward pass gathers them
again, which is what makes it stage 3. Layer 1.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxspeed.sharding import WEIGHT_NAME


MOVES = frozenset(
    {"all_gather", "broadcast_in_dim", "convert_element_type", "reshape", "sharding_constraint", "squeeze", "transpose"}
)
"""Primitives that only move or cast: done again rather than kept, and all that happens to a weight before its product."""

ATTENTION_NAMES = ("q", "k", "v", "attended")
"""Checkpoint names that attention gives its operands and its result."""


def checkpoint_layer(layer: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Returns the layer with this policy applied.

    Args:
        layer: the body of a scan over layers.
        policy: none (keep what the backward pass reads), full (keep the layer's inputs only),
            dots (keep the results of matrix products), attention (keep what attention reads and
            gives).
    """
    policies = jax.checkpoint_policies
    table = {
        "none": _all_but_weights,
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "attention": policies.save_only_these_names(*ATTENTION_NAMES),
    }
    return jax.checkpoint(layer, policy=table[policy], prevent_cse=False)


def _all_but_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    # save_anything_except_these_names would keep what the name was given to (jax 0.10).
    if primitive.name == "name":
        return params["name"] != WEIGHT_NAME
    return primitive.name not in MOVES
