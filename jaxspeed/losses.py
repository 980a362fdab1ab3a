# SPDX-License-Identifier: Apache-2.0
"""Losses: functions of (model, batch) that return a sum and a count."""

import jax.numpy as jnp

from jaxspeed.config import ConfigError
from jaxspeed.ops.cross_entropy import fused_cross_entropy
from jaxspeed.types import Batch, CausalLM, Sums


def next_token_loss(model: CausalLM, batch: Batch) -> Sums:
    """Returns the language-modelling loss, -sum log p(target | inputs so far), and the targets counted.

    Without `targets` the inputs shifted by one are used, and the last position does not count.

    Args:
        model: a decoder.
        batch: `inputs`, and optionally `targets`, `mask`, `positions`, `segment_ids`.

    Raises:
        ConfigError: there is no `inputs`, ids are not integers, or a mask is not of booleans or
            integers (its 0 and 1): a fraction would be taken for a whole.
    """
    if "inputs" not in batch:
        raise ConfigError(
            f"batch has {sorted(batch)}: next_token_loss needs inputs, token ids of shape (B, T); "
            "name them so, or give a loss_fn of your own"
        )
    known = ("inputs", "targets", "mask", "positions", "segment_ids")
    for name in (name for name in known if name in batch):
        dtype = batch[name].dtype
        if not (jnp.issubdtype(dtype, jnp.integer) or (name, dtype) == ("mask", bool)):
            what = "booleans (True counts)" if name == "mask" else "integers"
            raise ConfigError(f"batch[{name!r}] is of {dtype}: give {what}")
    inputs, mask = batch["inputs"], batch.get("mask")
    mask = None if mask is None else mask.astype(bool)
    if "targets" in batch:
        targets = batch["targets"]
    else:
        targets = jnp.roll(inputs, -1, axis=1)
        inner = jnp.broadcast_to(
            jnp.arange(inputs.shape[1]) < inputs.shape[1] - 1, inputs.shape
        )
        mask = inner if mask is None else mask & inner
    hidden = model.hidden(inputs, batch.get("positions"), batch.get("segment_ids"))
    return fused_cross_entropy(hidden, model.output_embedding(), targets, mask)
