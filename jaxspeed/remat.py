# SPDX-License-Identifier: Apache-2.0
"""Rematerialisation policies by name: what a layer keeps for its backward pass.

No policy keeps a whole weight: at ZeRO stage 3 the backward pass gathers it again, which is what
makes it stage 3. Layer 1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


CUDNN_NAME = "dot_product_attention_fwd_wrapper"
"""The primitive of cuDNN's attention, whose results have no checkpoint names."""

PRODUCTS = frozenset({"dot_general", "conv_general_dilated", CUDNN_NAME})
"""Primitives whose results are dear: matrix products and an attention kernel."""

PRODUCT_NAME = "product"
"""The checkpoint name that `jaxspeed.ops.linear` gives its results, rounded: its sums are float32, twice as large."""

RECURRENCE_NAME = "recurrence"
"""The checkpoint name of a recurrent layer's states and gates: computing them again is a scan over time."""

NORMALISER_NAME = "normaliser"
"""The checkpoint name of attention's log-sum-exp, where a kernel holds it; splash's of its result, too."""

ATTENTION_NAMES = frozenset({"q", "k", "v", "attended", NORMALISER_NAME})
"""Checkpoint names that attention gives its operands and its result."""


EXPERT_NAMES = frozenset({"dispatched", "grouped", "returned"})
"""Checkpoint names of what has travelled to experts, their products, and what has come back: computing it again is to send it again."""

RESIDUAL_NAME = "residual"
"""The checkpoint name of what a layer reads."""

KEPT_NAMES = EXPERT_NAMES | {PRODUCT_NAME}
"""Checkpoint names of all products other than attention's."""

EXPANSION = 16
"""A product with this many times more columns than terms in a sum is done again in the backward pass."""


def checkpoint_layer(layer: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Returns the layer with this policy applied.

    Args:
        layer: the body of a scan over layers.
        policy: none (do no product again; elementwise work is done again, which is cheaper than
            keeping it), full (keep the layer's inputs only), dots (keep the results of matrix
            products, attention's own apart, and what experts were sent), attention (keep what attention reads and gives),
            offload (keep the layer's input, `RESIDUAL_NAME`, in the host's memory; DeepSpeed's `cpu_checkpointing`).
    """
    policies = jax.checkpoint_policies
    table = {
        "none": _keep_products,
        "full": policies.nothing_saveable,
        "dots": _keep_flat_products,
        "attention": _keep_attention,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[RESIDUAL_NAME],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return jax.checkpoint(layer, policy=table[policy], prevent_cse=False)


def _keep_products(primitive: Any, *operands: Any, **params: Any) -> bool:
    if primitive.name == "name":
        return params["name"] in ATTENTION_NAMES | KEPT_NAMES | {RECURRENCE_NAME}
    return primitive.name in PRODUCTS and not _expands(primitive, operands, params)


def _keep_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    if primitive.name == "name":
        return params["name"] in ATTENTION_NAMES
    return primitive.name == CUDNN_NAME


def _keep_flat_products(primitive: Any, *operands: Any, **params: Any) -> bool:
    if primitive.name == "name":
        return params["name"] in KEPT_NAMES
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return bool(keep(primitive, *operands, **params)) and not _expands(
        primitive, operands, params
    )


def _expands(
    primitive: Any, operands: Sequence[Any], params: Mapping[str, Any]
) -> bool:
    """Whether a flat product's result is so much wider than what it is made of that it is done again.

    It is an adapter's B: the sum that it goes into would be kept twice, as its two terms.
    """
    if primitive.name != "dot_general":
        return False
    (contracting, _), (batch, _) = params["dimension_numbers"]
    terms = math.prod(operands[0].shape[i] for i in contracting)
    columns = operands[1].size // terms
    return not batch and EXPANSION * terms <= columns
