# SPDX-License-Identifier: Apache-2.0
"""Losses: functions of (model, batch) that return a sum and a count, and what a task minimises.

A row that only fills up a batch has a mask of False, or a label of -1: it counts nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspeed.auxiliary import with_auxiliary
from jaxspeed.config import ConfigError
from jaxspeed.context import need_whole
from jaxspeed.ops.cross_entropy import fused_cross_entropy
from jaxspeed.types import (
    Batch,
    CausalLM,
    Labeller,
    MaskedLM,
    Seq2Seq,
    Sums,
    output_bias,
)


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
        need_whole("a batch without targets", "give it targets and a mask")
        targets = jnp.roll(inputs, -1, axis=1)
        inner = jnp.broadcast_to(
            jnp.arange(inputs.shape[1]) < inputs.shape[1] - 1, inputs.shape
        )
        mask = inner if mask is None else mask & inner
    hidden = model.hidden(inputs, batch.get("positions"), batch.get("segment_ids"))
    sums = fused_cross_entropy(hidden, model.output_embedding(), targets, mask)
    everything = jnp.ones(targets.shape, bool) if mask is None else mask
    return with_auxiliary(sums, _targets_of_rows(everything))


def masked_lm_loss(model: MaskedLM, batch: Batch) -> Sums:
    """Returns -sum log p(target | the row around it) over the masked tokens, and their number.

    Reference: BERT, arXiv 1810.04805 section 3.1.

    Args:
        model: an encoder that predicts tokens.
        batch: `inputs`, `targets`, `mask`; optionally `slots`, the places of the targets in the
            row (without, there is a target for each place), `positions`, `segment_ids`,
            `token_types`.
    """
    hidden = model.hidden(
        batch["inputs"],
        batch.get("positions"),
        batch.get("segment_ids"),
        batch.get("token_types"),
    )
    if "slots" in batch:
        hidden = jnp.take_along_axis(hidden, batch["slots"][:, :, None], axis=1)
    return fused_cross_entropy(
        hidden,
        model.output_embedding(),
        batch["targets"],
        batch["mask"],
        model.output_bias(),
    )


def seq2seq_loss(model: Seq2Seq, batch: Batch) -> Sums:
    """Returns -sum log p(target | source, targets before it), and the targets counted.

    Args:
        model: an encoder-decoder.
        batch: `inputs`, `decoder_inputs`, `targets`, `mask`; optionally `segment_ids`,
            `decoder_segment_ids` and `decoder_positions`.
    """
    segment_ids = batch.get("segment_ids")
    hidden = model.hidden(
        batch["decoder_inputs"],
        batch.get("decoder_positions"),
        batch.get("decoder_segment_ids"),
        memory=model.encode(batch["inputs"], segment_ids),
        memory_segment_ids=segment_ids,
    )
    return fused_cross_entropy(
        hidden,
        model.output_embedding(),
        batch["targets"],
        batch["mask"],
        output_bias(model),
    )


def classification_loss(model: Labeller, batch: Batch) -> Sums:
    """Returns -sum log p(label | row), and the rows that count.

    Args:
        model: an encoder whose head gives (B, C).
        batch: `inputs`, `labels`; optionally `positions`, `segment_ids`, `token_types`.
    """
    labels = batch["labels"]
    sums = label_sums(label_logits(model, batch), labels, labels >= 0)
    return with_auxiliary(sums, _targets_of_rows(labels >= 0))


def tagging_loss(model: Labeller, batch: Batch) -> Sums:
    """Returns -sum log p(label of a token | row), and the tokens that count.

    Args:
        model: an encoder whose head gives (B, S, C).
        batch: `inputs`, `labels`, `mask`; optionally `positions`, `segment_ids`, `token_types`.
    """
    sums = label_sums(label_logits(model, batch), batch["labels"], batch["mask"])
    return with_auxiliary(sums, _targets_of_rows(batch["mask"]))


def span_loss(model: Labeller, batch: Batch) -> Sums:
    """Returns -sum (log p(start | row) + log p(end | row)) / 2, and the rows that count.

    Reference: BERT, arXiv 1810.04805 section 4.2. Padding cannot be an end.

    Args:
        model: an encoder whose head gives (B, S, 2).
        batch: `inputs`, `segment_ids`, `starts`, `ends`; optionally `positions`, `token_types`.
    """
    return span_sums(span_logits(model, batch), batch)


def _targets_of_rows(mask: Bool[Array, "B ..."]) -> Float[Array, " B"]:
    return jnp.sum(mask, tuple(range(1, mask.ndim)), dtype=jnp.float32)


def label_logits(model: Labeller, batch: Batch) -> Float[Array, "B ..."]:
    """Returns the head's logits in float32."""
    logits = model(
        batch["inputs"],
        batch.get("positions"),
        batch.get("segment_ids"),
        batch.get("token_types"),
    )
    return logits.astype(jnp.float32)


def label_sums(
    logits: Float[Array, "*rows C"],
    labels: Int[Array, "*rows"],
    mask: Bool[Array, "*rows"],
) -> Sums:
    """Returns the summed -log softmax(logits)[label] where the mask is True, and how often it is."""
    chosen = jnp.where(mask, labels, 0)[..., None]
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, -1)[..., 0]
    return Sums(-jnp.sum(jnp.where(mask, logps, 0.0)), jnp.sum(mask, dtype=jnp.float32))


def span_logits(model: Labeller, batch: Batch) -> Float[Array, "B 2 S"]:
    """Returns the logits of each token as first and as last one of the answer."""
    logits = label_logits(model, batch).swapaxes(1, 2)
    return jnp.where(batch["segment_ids"][:, None] > 0, logits, -1e9)


def span_sums(logits: Float[Array, "B 2 S"], batch: Batch) -> Sums:
    """Returns the loss of `span_loss` from logits."""
    ends = jnp.stack([batch["starts"], batch["ends"]], 1)
    total, count = label_sums(logits, ends, ends >= 0)
    return Sums(total / 2, count / 2)
