# SPDX-License-Identifier: Apache-2.0
"""Rows of text with something hidden, for models that are trained to restore it.

Tokens masked where they stand (BERT), or spans replaced by sentinels (T5). What is hidden in
a row depends on the generator that is given, so it can follow from the row's place in the
data, and is another one each time a text comes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

from jaxspeed.objectives import noise_of


class Masked(NamedTuple):
    """A row with tokens masked."""

    inputs: Int32[np.ndarray, " S"]
    slots: Int32[np.ndarray, " P"]
    """Where the targets stand, ascending."""
    targets: Int32[np.ndarray, " P"]


class Spans(NamedTuple):
    """A row with spans hidden, and the spans."""

    inputs: Int32[np.ndarray, " S"]
    segment_ids: Int32[np.ndarray, " S"]
    targets: Int32[np.ndarray, " T"]
    target_segment_ids: Int32[np.ndarray, " T"]


def mask_tokens(
    ids: Int32[np.ndarray, " S"],
    maskable: Bool[np.ndarray, " S"],
    continues: Bool[np.ndarray, " S"],
    rng: np.random.Generator,
    *,
    rate: float,
    most: int,
    mask_id: int,
    vocab_size: int,
) -> Masked:
    """Returns a row with a share of its tokens hidden: 80 % by the mask, 10 % by any token, 10 % as they are.

    Reference: BERT, arXiv 1810.04805 section 3.1. Differs: the 10 % are drawn for each token,
    the number of tokens is exact.

    Args:
        ids: of the row.
        maskable: which of them are text: neither special nor padding.
        continues: which of them belong to the word of the token before; those are hidden with it.
        rng: draws.
        rate: share of the tokens of text.
        most: tokens that may be hidden.
        mask_id: the mask.
        vocab_size: any token is below it.
    """
    places = np.flatnonzero(maskable)
    wanted = min(most, max(1, round(rate * len(places))))
    apart = ~continues[places] | (np.diff(places, prepend=-2) > 1)
    begins = np.flatnonzero(apart)
    ends = np.append(begins[1:], len(places))
    chosen: list[int] = []
    for word in rng.permutation(len(begins)).tolist():
        if len(chosen) + ends[word] - begins[word] <= wanted:
            chosen.extend(places[begins[word] : ends[word]].tolist())
        if len(chosen) == wanted:
            break
    slots = np.sort(np.asarray(chosen, np.int32))
    draw, inputs = rng.random(len(slots)), ids.copy()
    inputs[slots[draw < 0.8]] = mask_id
    any_token = (draw >= 0.8) & (draw < 0.9)
    inputs[slots[any_token]] = rng.integers(vocab_size, size=any_token.sum())
    return Masked(inputs, slots, ids[slots])


def hide_spans(
    ids: Int32[np.ndarray, " R"],
    segment_ids: Int32[np.ndarray, " R"],
    rng: np.random.Generator,
    *,
    rate: float,
    mean_span: float,
    sentinels: Sequence[int],
    end_id: int,
) -> Spans:
    """Returns a row with spans replaced by sentinels, and the sentinels with the spans; an end behind both.

    Reference: T5, arXiv 1910.10683 section 3.1.4, whose published code cuts the row into as many
    visible and hidden spans, of random lengths, the first visible.

    Args:
        ids: of the row, without padding.
        segment_ids: of the row; a span has that of its first token.
        rng: draws.
        rate: share of the tokens that is hidden.
        mean_span: mean length of a hidden span.
        sentinels: a token for each span, in order.
        end_id: ends a row.
    """
    if len(ids) < 2:
        nothing = np.zeros(0, np.int32)
        return Spans(ids, segment_ids, nothing, nothing)
    hidden, spans = noise_of(len(ids), rate, mean_span)
    shown_lengths = _random_parts(len(ids) - hidden, spans, rng)
    hidden_lengths = _random_parts(hidden, spans, rng)
    inputs, sources, targets, places = [], [], [], []
    at = 0
    for sentinel, shown, gone in zip(
        sentinels, shown_lengths, hidden_lengths, strict=False
    ):
        begin, end = at + shown, at + shown + gone
        inputs += [*ids[at:begin], sentinel]
        sources += [*range(at, begin), begin]
        targets += [sentinel, *ids[begin:end]]
        places += [begin] * (gone + 1)
        at = end
    last = len(ids) - 1
    return Spans(
        np.asarray([*inputs, end_id], np.int32),
        segment_ids[[*sources, last]],
        np.asarray([*targets, end_id], np.int32),
        segment_ids[[*places, places[-1]]],
    )


def shifted(
    targets: Int32[np.ndarray, " T"],
    segment_ids: Int32[np.ndarray, " T"],
    start_id: int,
) -> Int32[np.ndarray, " T"]:
    """Returns a decoder's inputs: the target before each, the start where a segment begins."""
    inputs = np.roll(targets, 1)
    begins = np.diff(segment_ids, prepend=-1) != 0
    inputs[begins] = start_id
    return inputs


def make_continues(
    vocabulary: dict[str, int], vocab_size: int
) -> Bool[np.ndarray, " V"] | None:
    """Returns which tokens belong to the word of the token before, or None if the vocabulary does not tell.

    By WordPiece's ##, or else by the sign of a space that SentencePiece and byte-level BPE
    put before a word's first token.
    """
    marks: tuple[tuple[str, Callable[[str], bool]], ...] = (
        ("##", lambda token: token.startswith("##")),
        ("\u2581", lambda token: not token.startswith("\u2581")),
        ("\u0120", lambda token: not token.startswith("\u0120")),
    )
    for mark, continues in marks:
        if sum(token.startswith(mark) for token in vocabulary) > 1:
            table = np.zeros(vocab_size, bool)
            for token, number in vocabulary.items():
                table[number] = continues(token)
            return table
    return None


def _random_parts(
    total: int, parts: int, rng: np.random.Generator
) -> Int[np.ndarray, " P"]:
    """Returns positive lengths that add up to `total`, every division as likely."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
