# SPDX-License-Identifier: Apache-2.0
"""What is hidden can be put back, is as much as was asked for, and another part each time."""

from typing import Any

import numpy as np
import pytest

from jaxspeed.data.corrupt import hide_spans, make_continues, mask_tokens, shifted
from jaxspeed.objectives import noise_of, span_lengths


IDS = np.arange(10, 210, dtype=np.int32)
ALL, NONE = np.ones(200, bool), np.zeros(200, bool)
MASK, VOCAB = 999, 500


def masked(seed: int = 0, **changes: Any) -> Any:
    how: dict[str, Any] = {
        "maskable": ALL,
        "continues": NONE,
        "rate": 0.15,
        "most": 30,
    } | changes
    return mask_tokens(
        IDS, rng=np.random.default_rng(seed), mask_id=MASK, vocab_size=VOCAB, **how
    )


def test_masked_row_is_the_row_but_for_the_targets() -> None:
    row = masked()
    assert len(row.slots) == 30
    assert (np.diff(row.slots) > 0).all()
    np.testing.assert_array_equal(row.targets, IDS[row.slots])
    restored = row.inputs.copy()
    restored[row.slots] = row.targets
    np.testing.assert_array_equal(restored, IDS)


def test_hidden_tokens_are_mostly_masks_and_differ_by_seed() -> None:
    rows = [masked(seed) for seed in range(100)]
    hidden = np.concatenate([row.inputs[row.slots] for row in rows])
    shown = np.concatenate([row.targets for row in rows])
    assert np.mean(hidden == MASK) == pytest.approx(0.8, abs=0.02)
    assert np.mean(hidden == shown) == pytest.approx(0.1, abs=0.02)
    assert hidden[hidden != MASK].max() < VOCAB
    counts = np.bincount(np.concatenate([row.slots for row in rows]), minlength=200)
    assert counts.min() >= 2


def test_special_tokens_and_padding_are_not_masked() -> None:
    maskable = np.arange(200) % 3 > 0
    row = masked(maskable=maskable)
    assert maskable[row.slots].all()
    assert len(row.slots) == round(0.15 * maskable.sum())
    assert len(masked(maskable=NONE).slots) == 0
    assert len(masked(most=7).slots) == 7


def test_words_are_hidden_whole() -> None:
    continues = np.arange(200) % 4 > 0
    chosen = np.zeros(200, bool)
    chosen[masked(continues=continues, most=24).slots] = True
    words = chosen.reshape(50, 4)
    assert (words.all(1) | ~words.any(1)).all()
    assert words.all(1).sum() == 6
    # A special token parts a word.
    apart = masked(continues=ALL, maskable=np.arange(200) % 10 > 0, rate=0.05)
    assert len(apart.slots) == 9


@pytest.mark.parametrize("length", [2, 3, 10, 77, 200])
@pytest.mark.parametrize(("rate", "mean_span"), [(0.15, 3.0), (0.5, 3.0), (0.15, 1.0)])
def test_spans_put_back_give_the_row(
    length: int, rate: float, mean_span: float
) -> None:
    ids, sentinels = IDS[:length], list(range(900, 800, -1))
    segments = np.repeat([1, 2], [length - length // 2, length // 2]).astype(np.int32)
    row = hide_spans(
        ids, segments, np.random.default_rng(3), rate=rate, mean_span=mean_span, sentinels=sentinels, end_id=1,
    )  # fmt: skip
    hidden, spans = noise_of(length, rate, mean_span)
    assert len(row.inputs) == length - hidden + spans + 1
    assert len(row.targets) == hidden + spans + 1
    assert row.inputs[-1] == row.targets[-1] == 1
    parts = np.split(row.targets[:-1], np.flatnonzero(row.targets >= 800))[1:]
    assert [int(part[0]) for part in parts] == sentinels[:spans]
    back = {int(part[0]): part[1:].tolist() for part in parts}
    restored = [x for i in row.inputs[:-1].tolist() for x in back.get(i, [i])]
    assert restored == ids.tolist()
    # Each token keeps its segment; a sentinel and its span have one.
    place = {int(i): int(s) for i, s in zip(ids, segments, strict=True)}
    for i, s in zip(row.inputs[:-1].tolist(), row.segment_ids.tolist(), strict=False):
        assert s == place.get(i, place.get(back.get(i, [i])[0]))
    assert len(row.segment_ids) == len(row.inputs)
    assert len(row.target_segment_ids) == len(row.targets)
    assert (np.diff(row.target_segment_ids) >= 0).all()


@pytest.mark.parametrize("length", [0, 1])
def test_row_that_is_too_short_hides_nothing(length: int) -> None:
    ids = IDS[:length]
    row = hide_spans(
        ids, np.ones(length, np.int32), np.random.default_rng(0), rate=0.15, mean_span=3.0, sentinels=[9], end_id=1,
    )  # fmt: skip
    assert len(row.targets) == 0
    assert len(row.segment_ids) == len(row.inputs)


def test_lengths_are_those_of_t5() -> None:
    assert span_lengths(512, 0.15, 3.0) == (568, 512, 114)


def test_decoder_reads_the_target_before_and_the_start_in_each_segment() -> None:
    targets = np.array([5, 6, 7, 8], np.int32)
    segments = np.array([1, 1, 2, 2], np.int32)
    assert shifted(targets, segments, 0).tolist() == [0, 5, 0, 7]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["[CLS]", "be", "##s", "##t"], [False, False, True, True]),
        (["\u2581be", "s", "\u2581to", "</s>"], [False, True, False, True]),
        (["\u0120be", "s", "\u0120to", "x"], [False, True, False, True]),
        (["a", "b", "\u0120", "c"], None),
    ],
)
def test_words_are_told_by_the_marks_of_the_vocabulary(
    tokens: list[str], expected: list[bool] | None
) -> None:
    table = make_continues({token: i for i, token in enumerate(tokens)}, 4)
    assert (None if table is None else table.tolist()) == expected
