# SPDX-License-Identifier: Apache-2.0
"""What each task minimises and the arrays of its batches: all of a task that a compiled step depends on.

The shapes follow from the configuration alone, so a step can be compiled (or planned) without
data. Where rows are padded to several lengths there is a shape, and a step, for each.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxspeed.config import RunConfig
from jaxspeed.losses import (
    classification_loss,
    masked_lm_loss,
    next_token_loss,
    seq2seq_loss,
    span_loss,
    tagging_loss,
)
from jaxspeed.types import LossFn


class Leaf(NamedTuple):
    """One example's part of an array of a batch."""

    shape: tuple[int, ...] = ()
    dtype: Any = np.int32
    fill: int = 0
    """What padding holds."""


Leaves = dict[str, Leaf]


class Objective(NamedTuple):
    """What a task is to the step."""

    loss: LossFn
    leaves: Callable[[RunConfig, int], Leaves]
    """From the configuration and a row's length to the arrays of a batch."""


class SpanLengths(NamedTuple):
    """Tokens of a row before and after its spans are hidden."""

    raw: int
    inputs: int
    targets: int


def span_lengths(seq_len: int, rate: float, mean_span: float) -> SpanLengths:
    """Returns the longest text whose visible part fits `seq_len`, and the lengths of its parts.

    Visible tokens, a sentinel for each hidden span, and an end; and hidden tokens, a sentinel
    before each span, and an end. Reference: T5, arXiv 1910.10683 section 3.1.4.

    Args:
        seq_len: tokens of a row for the encoder.
        rate: share of the tokens that is hidden.
        mean_span: mean tokens of a span.
    """

    def lengths(raw: int) -> SpanLengths:
        hidden, spans = noise_of(raw, rate, mean_span)
        return SpanLengths(raw, raw - hidden + spans + 1, hidden + spans + 1)

    raw = seq_len
    while lengths(raw + 1).inputs <= seq_len:
        raw += 1
    while raw > 2 and lengths(raw).inputs > seq_len:
        raw -= 1
    return lengths(raw)


def noise_of(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """Returns the hidden tokens of a text of this length, and in how many spans they lie."""
    hidden = min(max(round(length * rate), 1), length - 1)
    return hidden, min(max(round(hidden / mean_span), 1), length - hidden)


def max_masked(length: int, rate: float) -> int:
    """Returns the most tokens that a masked model predicts in a row."""
    return max(1, math.ceil(length * rate))


def target_len(run: RunConfig, length: int) -> int:
    """Returns the tokens of a target in a row whose source is padded to `length`: the same share of the longest."""
    return max(1, math.ceil(run.task.max_target_len * length / run.seq_len))


def objective_of(run: RunConfig) -> Objective:
    """Returns what the run's task minimises and reads."""
    return OBJECTIVES[run.task.name]


def _packed(run: RunConfig, length: int) -> Leaves:
    row = Leaf((length,))
    return {
        "inputs": row,
        "targets": row,
        "mask": Leaf((length,), np.bool_),
        "positions": row,
        "segment_ids": row,
    }


def _masked(run: RunConfig, length: int) -> Leaves:
    row, few = Leaf((length,)), (max_masked(length, run.task.mask_rate),)
    return {
        "inputs": row,
        "positions": row,
        "segment_ids": row,
        "slots": Leaf(few),
        "targets": Leaf(few),
        "mask": Leaf(few, np.bool_),
    }


def _spans_hidden(run: RunConfig, length: int) -> Leaves:
    _, inputs, targets = span_lengths(length, run.task.mask_rate, run.task.mean_span)
    return {
        "inputs": Leaf((inputs,)),
        "segment_ids": Leaf((inputs,)),
        "decoder_segment_ids": Leaf((targets,)),
        **_written(targets),
    }


def _written(length: int) -> Leaves:
    row = Leaf((length,))
    return {
        "decoder_inputs": row,
        "targets": row,
        "mask": Leaf((length,), np.bool_),
    }


def _source(run: RunConfig, length: int) -> Leaves:
    row = Leaf((length,))
    return {"inputs": row, "segment_ids": row}


def _typed(run: RunConfig, length: int) -> Leaves:
    """Of one text or two; two are told apart by their types."""
    two = run.task.name == "question_answering" or len(run.task.input_fields) == 2
    return _source(run, length) | ({"token_types": Leaf((length,))} if two else {})


def _features(run: RunConfig, length: int) -> Leaves:
    return {"inputs": Leaf(run.model.feature_shape, np.float32), **_written(length)}


def _heard(run: RunConfig, length: int) -> Leaves:
    """With silence up to the model's length; or, where there are buckets, masked behind the same share of it."""
    if not run.task.buckets:
        return _features(run, length)
    frames, channels = run.model.feature_shape
    positions = math.ceil(frames // 2 * length / run.seq_len)
    return {
        "inputs": Leaf((2 * positions, channels), np.float32),
        "segment_ids": Leaf((positions,)),
        **_written(length),
    }


SPLIT_TASKS = frozenset(
    {"lm", "sft", "seq2seq", "span_corruption", "token_classification"}
)
"""Tasks whose losses go token by token, so that the axis `context` may split their rows."""

_NONE = Leaf(fill=-1)

OBJECTIVES: Mapping[str, Objective] = {
    "lm": Objective(next_token_loss, _packed),
    "sft": Objective(next_token_loss, _packed),
    "masked_lm": Objective(masked_lm_loss, _masked),
    "span_corruption": Objective(seq2seq_loss, _spans_hidden),
    "classification": Objective(
        classification_loss, lambda run, length: _typed(run, length) | {"labels": _NONE}
    ),
    "token_classification": Objective(
        tagging_loss,
        lambda run, length: (
            _source(run, length)
            | {"labels": Leaf((length,)), "mask": Leaf((length,), np.bool_)}
        ),
    ),
    "question_answering": Objective(
        span_loss,
        lambda run, length: _typed(run, length) | {"starts": _NONE, "ends": _NONE},
    ),
    "seq2seq": Objective(
        seq2seq_loss,
        lambda run, length: _source(run, length) | _written(target_len(run, length)),
    ),
    "speech": Objective(seq2seq_loss, _heard),
    "image_qa": Objective(seq2seq_loss, _features),
    "image_classification": Objective(
        classification_loss,
        lambda run, length: {
            "inputs": Leaf(run.model.feature_shape, np.float32),
            "labels": _NONE,
        },
    ),
}
"""By the names of `TaskConfig.name`."""
