# SPDX-License-Identifier: Apache-2.0
"""Questions whose answer is a piece of a passage (SQuAD).

A passage that does not fit beside its question is taken in windows that overlap by
`task.stride` tokens. In training a window without the whole answer has the row's first token
as answer; in an evaluation the best piece over all windows of a question counts.
Reference: BERT, arXiv 1810.04805 section 4.2.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int32

from jaxspeed.config import RunConfig, config_error
from jaxspeed.data import Tokenizer
from jaxspeed.data.documents import Record
from jaxspeed.data.tokenize import Pieces
from jaxspeed.losses import span_logits, span_sums
from jaxspeed.program import Program
from jaxspeed.tasks.records import (
    Answered,
    BadRecordError,
    Inference,
    Item,
    check_room,
    columns_of,
    predicted,
    text_in,
)
from jaxspeed.tasks.scores import squad_scores
from jaxspeed.types import Batch, Params, Sums


_CANDIDATES = 20
"""First and last tokens that are looked at together, the likeliest ones."""

_PASSAGES_KEPT = 4096


class _Windows(NamedTuple):
    """A question and the windows of its passage."""

    question: Int32[np.ndarray, " Q"]
    passage: Pieces
    begins: range
    """The first token of each window."""
    width: int
    """Most tokens of the passage in a window."""


class QuestionAnswering:
    """First and last token of an answer in a passage."""

    def __init__(self, run: RunConfig, tokenizer: Tokenizer) -> None:
        """Checks that windows advance."""
        (self._question, self._passage), self._target = columns_of(run)
        self._tokenizer, self._task = tokenizer, run.task
        self._frame = tokenizer.frame(2)
        self._room = check_room(run, self._frame.size)
        # Many questions share a passage.
        self._pieces = functools.lru_cache(_PASSAGES_KEPT)(tokenizer.pieces)
        if run.task.stride >= self._room - self._room // 2:
            raise config_error(
                "task.stride",
                run.task.stride,
                f"with seq_len={run.seq_len} a window may have no more tokens than that, so none would be new",
                f"give less than {self._room - self._room // 2}, or a larger seq_len",
            )

    def parts(self, record: Record) -> int:
        """Returns the number of windows; checks the answers."""
        self._golds(record)
        return len(self._windows(record).begins)

    def encode(self, record: Record) -> Sequence[Item]:
        """Returns question and window, framed, and the answer's first and last token."""
        windows, golds = self._windows(record), self._golds(record)
        answer = _tokens_of(windows.passage, golds[0]) if golds else None
        cut = len(windows.question) < len(
            self._tokenizer.encode(record[self._question])
        )
        items = []
        for begin in windows.begins:
            part = windows.passage.ids[begin : begin + windows.width]
            ids, types = self._frame.around(windows.question, part)
            shift = self._first(windows) - begin
            inside = answer and begin <= answer[0] and answer[1] < begin + len(part)
            first, last = (
                (answer[0] + shift, answer[1] + shift) if answer and inside else (0, 0)
            )
            arrays = {
                "inputs": ids,
                "segment_ids": np.ones_like(ids),
                "token_types": types,
            }
            arrays |= {
                "starts": np.asarray(first, np.int32),
                "ends": np.asarray(last, np.int32),
            }
            items.append(Item(arrays, "seq_len (the question)" if cut else ""))
        return items

    def reader(self, program: Program, params: Params) -> Inference:
        """Returns what gives the loss, and each token's logits as first and as last one."""
        return predicted(program, params, _ends)

    def score(self, answered: Sequence[Answered]) -> dict[str, float]:
        """Returns exact match and F1 in percent."""
        golds = [[text for text, _ in self._golds(one.record)] for one in answered]
        may_be_none = not all(golds)
        answers = [self._answer(one, may_be_none=may_be_none) for one in answered]
        return squad_scores(answers, golds)

    def show(self, answered: Answered) -> str:
        """Returns the question with the model's and the true answer."""
        golds = self._golds(answered.record)
        says = self._answer(answered, may_be_none=not golds)
        true = golds[0][0] if golds else "no answer"
        return f"{answered.record[self._question]}\n-> {says} (true: {true})"

    def _golds(self, record: Record) -> list[tuple[str, int]]:
        """Returns the answers and where each begins in the passage."""
        answers, passage = record[self._target], text_in(record, self._passage)
        try:
            texts, begins = answers["text"], answers["answer_start"]
            golds = [(str(t), int(b)) for t, b in zip(texts, begins, strict=True)]
        except (KeyError, TypeError, ValueError):
            why = f"has no answers with text and answer_start in {self._target!r}"
            raise BadRecordError(why, "give them as SQuAD does") from None
        for text, begin in golds:
            if not text or passage[begin : begin + len(text)] != text:
                there = passage[begin : begin + max(1, len(text))]
                why = f"has the answer {text!r} at {begin} of its passage, where {there!r} stands"
                raise BadRecordError(why, "mend or remove it")
        return golds

    def _windows(self, record: Record) -> _Windows:
        question = self._tokenizer.encode(text_in(record, self._question))
        question = question[: self._room // 2]
        passage = self._pieces(record[self._passage])
        width = self._room - len(question)
        last = max(0, len(passage.ids) - width)
        step = width - self._task.stride
        begins = range(0, -(-last // step) * step + 1, step)
        return _Windows(question, passage, begins, width)

    def _first(self, windows: _Windows) -> int:
        """Returns where the passage begins in a row."""
        around = (self._frame.before, windows.question, self._frame.between)
        return sum(map(len, around))

    def _answer(self, answered: Answered, *, may_be_none: bool) -> str:
        """Returns the piece of the passage with the likeliest ends, over all windows."""
        windows = self._windows(answered.record)
        spans, passage = windows.passage.spans, answered.record[self._passage]
        best, text, none = -np.inf, "", np.inf
        for begin, logits in zip(windows.begins, answered.outputs, strict=True):
            first = self._first(windows)
            size = min(windows.width, len(spans) - begin)
            none = min(none, float(logits[0, 0] + logits[1, 0]))
            found = _best_span(
                logits[:, first : first + size], self._task.max_answer_len
            )
            if found[0] > best:
                low, high = spans[begin + found[1], 0], spans[begin + found[2], 1]
                best, text = found[0], passage[low:high]
        return "" if may_be_none and none > best else text


def _best_span(
    logits: Float[np.ndarray, "2 S"], longest: int
) -> tuple[float, int, int]:
    """Returns the best sum of logits of a first and a last token, and those."""
    count = min(_CANDIDATES, logits.shape[1])
    firsts, lasts = np.argsort(logits, axis=1)[:, -count:]
    length = lasts[None] - firsts[:, None] + 1
    sums = logits[0, firsts][:, None] + logits[1, lasts][None]
    sums = np.where((length > 0) & (length <= longest), sums, -np.inf)
    at = np.unravel_index(np.argmax(sums), sums.shape)
    return float(sums[at]), int(firsts[at[0]]), int(lasts[at[1]])


def _tokens_of(passage: Pieces, gold: tuple[str, int]) -> tuple[int, int]:
    """Returns the first and last token of an answer."""
    text, begin = gold
    first = int(np.searchsorted(passage.spans[:, 1], begin, side="right"))
    last = int(np.searchsorted(passage.spans[:, 0], begin + len(text), side="left")) - 1
    return first, max(first, last)


def _ends(model: Any, batch: Batch) -> tuple[Sums, jax.Array]:
    logits = span_logits(model, batch)
    return span_sums(logits, batch), logits
