# SPDX-License-Identifier: Apache-2.0
"""Each task's loss is minus the log-probability of what it is to predict, over what counts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed import nn
from jaxspeed.losses import (
    classification_loss,
    masked_lm_loss,
    seq2seq_loss,
    span_loss,
    tagging_loss,
)
from jaxspeed.types import Labeller, MaskedLM, Seq2Seq
from tests.toy_tasks import LabelConfig, PairConfig


RNG = np.random.default_rng(0)
B, S, T = 3, 7, 5
IDS = jnp.asarray(RNG.integers(0, 264, (B, S)), jnp.int32)
SEGMENTS = jnp.asarray(np.arange(S) < np.array([[7], [4], [5]]), jnp.int32)


def labels(head: str, num_labels: int = 3) -> Any:
    cfg: Any = LabelConfig(head=head, num_labels=num_labels)  # pyright: ignore[reportArgumentType]
    return cfg.build(nn.rngs(jax.random.key(0)))


def put(batch: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in batch.items()}


def nats(logits: Any, chosen: Any) -> np.ndarray:
    """Returns -log softmax(logits)[chosen]."""
    logps = np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))
    return -np.take_along_axis(logps, np.asarray(chosen)[..., None], -1)[..., 0]


def test_models_speak_the_protocols() -> None:
    assert isinstance(labels("row"), Labeller)
    assert isinstance(labels("row"), MaskedLM)
    assert isinstance(PairConfig().build(nn.rngs(jax.random.key(0))), Seq2Seq)


def test_classification_counts_rows_with_a_label() -> None:
    model = labels("row")
    batch = {
        "inputs": IDS,
        "segment_ids": SEGMENTS,
        "labels": np.array([2, -1, 0], np.int32),
    }
    expected = nats(model(IDS, None, SEGMENTS), [2, 0, 0])[[0, 2]].sum()
    total, count = classification_loss(model, put(batch))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == 2


def test_tagging_counts_tokens_of_the_mask() -> None:
    model = labels("token")
    tags = RNG.integers(0, 3, (B, S)).astype(np.int32)
    mask = np.asarray(SEGMENTS > 0) & (RNG.random((B, S)) < 0.6)
    batch = {"inputs": IDS, "segment_ids": SEGMENTS, "labels": tags, "mask": mask}
    total, count = tagging_loss(model, put(batch))
    expected = nats(model(IDS, None, SEGMENTS), tags)[mask].sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == mask.sum()


def test_span_is_the_mean_of_start_and_end_and_never_in_padding() -> None:
    model = labels("token", 2)
    starts, ends = np.array([1, 0, -1], np.int32), np.array([3, 2, -1], np.int32)
    batch = {"inputs": IDS, "segment_ids": SEGMENTS, "starts": starts, "ends": ends}
    total, count = span_loss(model, put(batch))
    expected = 0.0
    for row in range(2):
        inside = model(IDS, None, SEGMENTS)[row][SEGMENTS[row] > 0]
        expected += nats(inside.T, [starts[row], ends[row]]).sum() / 2
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == 2


@pytest.mark.parametrize("gathered", [False, True])
def test_masked_tokens_are_predicted_where_they_stand(gathered: bool) -> None:
    model = labels("row")
    slots = np.array([[0, 4], [3, 1], [2, 0]], np.int32)
    mask = np.array([[True, True], [True, False], [True, True]])
    targets = RNG.integers(0, 264, (B, 2)).astype(np.int32)
    logits = model.hidden(IDS, None, SEGMENTS) @ model.output_embedding().T
    rows = np.arange(B)[:, None]
    expected = nats(np.asarray(logits)[rows, slots], targets)[mask].sum()
    batch: dict[str, Any] = {"inputs": IDS, "segment_ids": SEGMENTS}
    if gathered:
        batch |= {"slots": slots, "targets": targets, "mask": mask}
    else:
        whole, where = np.zeros((B, S), np.int32), np.zeros((B, S), bool)
        for row, column in zip(*np.nonzero(mask), strict=True):
            whole[row, slots[row, column]] = targets[row, column]
            where[row, slots[row, column]] = True
        batch |= {"targets": whole, "mask": where}
    total, count = masked_lm_loss(model, put(batch))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == 5


def test_seq2seq_reads_the_memory_of_its_own_segment() -> None:
    model = PairConfig().build(nn.rngs(jax.random.key(0)))
    inside = jnp.asarray(RNG.integers(0, 264, (B, T)), jnp.int32)
    batch = {
        "inputs": IDS,
        "segment_ids": SEGMENTS,
        "decoder_inputs": inside,
        "targets": jnp.roll(inside, -1, 1),
        "mask": np.arange(T) < np.array([[5], [2], [3]]),
    }
    total, count = seq2seq_loss(model, put(batch))
    expected = 0.0
    for row in range(B):
        source = IDS[row][SEGMENTS[row] > 0][None]
        hidden = model.hidden(inside[row][None], memory=model.encode(source))
        logits = hidden[0] @ model.output_embedding().T
        expected += nats(logits, batch["targets"][row])[batch["mask"][row]].sum()
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    assert count == 10
    other = IDS + (SEGMENTS == 0).astype(np.int32)
    again = seq2seq_loss(model, put({**batch, "inputs": other % 264}))
    np.testing.assert_allclose(again.total, total, rtol=1e-6)
