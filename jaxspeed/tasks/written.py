# SPDX-License-Identifier: Apache-2.0
"""Tasks whose answer is written: text from a text, from sound, from an image and a question.

The decoder's row is the model's start token, what else the decoder is given (special tokens,
or a question), the answer and an end; the loss counts answer and end. In an evaluation the
model writes its answers, greedily, with the module that trains.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxspeed.config import TASK_METRICS, RunConfig, config_error
from jaxspeed.data import Tokenizer
from jaxspeed.data.audio import HOP, RATE
from jaxspeed.data.documents import Record
from jaxspeed.generate import Encoded, Writer
from jaxspeed.losses import seq2seq_loss
from jaxspeed.objectives import target_len
from jaxspeed.program import Program
from jaxspeed.sampling import SamplingConfig
from jaxspeed.tasks.features import pixels_in, seconds_in, spectrogram_in
from jaxspeed.tasks.records import (
    Answered,
    Inference,
    Item,
    check_room,
    columns_of,
    text_in,
)
from jaxspeed.tasks.scores import written_scores
from jaxspeed.types import Batch, Params, Sums


class SequenceToSequence:
    """A text from a text: translation, summaries."""

    parts = None

    def __init__(self, run: RunConfig, tokenizer: Tokenizer) -> None:
        """Asks the tokenizer for its special tokens."""
        (self._source,), target = columns_of(run)
        self._prefix, self._tokenizer = run.task.prefix, tokenizer
        self._frame = tokenizer.frame(1)
        self._room = check_room(run, self._frame.size)
        longest = target_len(run, run.seq_len)
        self._decoder = _Decoder(run, tokenizer, target, longest, "task.max_target_len")

    def encode(self, record: Record) -> Sequence[Item]:
        """Returns source and target, framed."""
        source = self._tokenizer.encode(self._prefix + text_in(record, self._source))
        cut = "seq_len" if len(source) > self._room else ""
        ids, _ = self._frame.around(source[: self._room])
        arrays = {"inputs": ids, "segment_ids": np.ones_like(ids)}
        written, long = self._decoder.rows(record)
        return [Item(arrays | written, long or cut)]

    def reader(self, program: Program, params: Params) -> Inference:
        """Returns what gives the loss, and what the model writes."""
        return self._decoder.reader(program, params)

    def score(self, answered: Sequence[Answered]) -> dict[str, float]:
        """Returns the metrics of written texts."""
        return self._decoder.score(answered)

    def show(self, answered: Answered) -> str:
        """Returns the source with the model's and the true target."""
        return self._decoder.show(answered.record[self._source], answered)


class Speech:
    """A transcript of sound; what is longer than the model reads is left out."""

    def __init__(self, run: RunConfig, tokenizer: Tokenizer) -> None:
        """Asks the tokenizer for its special tokens."""
        (self._sound, *rate), target = columns_of(run)
        self._shape, self._rate = run.model.feature_shape, run.task.sample_rate
        self._rate_field = rate[0] if rate else ""
        self._longest = self._shape[0] * HOP / RATE
        self._fills = not run.task.buckets
        self._decoder = _Decoder(run, tokenizer, target, run.seq_len, "seq_len")

    def parts(self, record: Record) -> int:
        """Returns 1, or 0 if the sound is too long."""
        return int(
            seconds_in(record, self._sound, self._rate_of(record)) <= self._longest
        )

    def encode(self, record: Record) -> Sequence[Item]:
        """Returns the spectrogram and the transcript."""
        if not self.parts(record):
            return []
        rate = self._rate_of(record)
        shape = self._shape if self._fills else (None, self._shape[1])
        heard = {"inputs": spectrogram_in(record, self._sound, shape, rate)}
        if not self._fills:
            heard["segment_ids"] = np.ones(len(heard["inputs"]) // 2, np.int32)
        written, long = self._decoder.rows(record)
        return [Item(heard | written, long)]

    def reader(self, program: Program, params: Params) -> Inference:
        """Returns what gives the loss, and what the model writes."""
        return self._decoder.reader(program, params)

    def score(self, answered: Sequence[Answered]) -> dict[str, float]:
        """Returns the word error rate, if nothing else is asked for."""
        return self._decoder.score(answered)

    def show(self, answered: Answered) -> str:
        """Returns the model's and the true transcript."""
        return self._decoder.show("", answered)

    def _rate_of(self, record: Record) -> int:
        return int(record[self._rate_field]) if self._rate_field else self._rate


class ImageQuestions:
    """The answer to a question about an image."""

    parts = None

    def __init__(self, run: RunConfig, tokenizer: Tokenizer) -> None:
        """Asks the tokenizer for its special tokens."""
        (self._image, self._question), target = columns_of(run)
        self._shape, self._prefix = run.model.feature_shape, run.task.prefix
        self._tokenizer = tokenizer
        self._decoder = _Decoder(run, tokenizer, target, run.seq_len, "seq_len")

    def encode(self, record: Record) -> Sequence[Item]:
        """Returns the pixels, and question and answer as the decoder reads them."""
        image = pixels_in(record, self._image, self._shape)
        question = self._prefix + text_in(record, self._question)
        written, long = self._decoder.rows(
            record, self._tokenizer.encode(question), " "
        )
        return [Item({"inputs": image} | written, long)]

    def reader(self, program: Program, params: Params) -> Inference:
        """Returns what gives the loss, and what the model writes."""
        return self._decoder.reader(program, params)

    def score(self, answered: Sequence[Answered]) -> dict[str, float]:
        """Returns the share of right answers, if nothing else is asked for."""
        return self._decoder.score(answered)

    def show(self, answered: Answered) -> str:
        """Returns the question with the model's and the true answer."""
        return self._decoder.show(answered.record[self._question], answered)


class _Decoder:
    """The side of these tasks that writes."""

    def __init__(
        self,
        run: RunConfig,
        tokenizer: Tokenizer,
        target: str,
        longest: int,
        limit: str,
    ) -> None:
        """Settles what the decoder begins and ends with.

        Args:
            run: the configuration.
            tokenizer: what makes tokens of targets.
            target: field of a record.
            longest: most tokens of the decoder's row.
            limit: the setting that says so.
        """
        self._tokenizer, self._target = tokenizer, target
        self._longest, self._limit = longest, limit
        self._metrics = run.task.metrics or TASK_METRICS[run.task.name]
        frame, start = tokenizer.frame(1), run.model.start_id
        _check_special(run, {*frame.after[:1], tokenizer.end_id})
        before = [_id_of(tokenizer, x) for x in run.task.decoder_prompt] or list(
            frame.before
        )
        self._before = before if before[:1] == [start] else [start, *before]
        self._after = list(frame.after)
        self._end_ids = {*frame.after[:1], tokenizer.end_id}

    def rows(
        self,
        record: Record,
        given: Int32[np.ndarray, " _"] | None = None,
        space: str = "",
    ) -> tuple[dict[str, np.ndarray], str]:
        """Returns the decoder's inputs, targets and mask; and the setting that limits them, where they were cut.

        Args:
            record: holds the target.
            given: what the decoder reads before it writes.
            space: what parts that from the target.
        """
        target = self._tokenizer.encode(space + text_in(record, self._target))
        before = np.asarray(self._before, np.int32)
        before = before if given is None else np.concatenate([before, given])
        # The row is one longer than what the decoder reads: it ends with a target.
        room = self._longest + 1 - len(before) - len(self._after)
        row = [before, target[: max(0, room)], np.asarray(self._after, np.int32)]
        ids = np.concatenate(row)[: self._longest + 1]
        cut = self._limit if len(target) > room else ""
        mask = np.arange(1, len(ids)) >= len(before)
        return {"decoder_inputs": ids[:-1], "targets": ids[1:], "mask": mask}, cut

    def reader(self, program: Program, params: Params) -> Inference:
        """Returns what gives the loss of a batch, and the tokens that the model writes, -1 behind them."""
        writer = Writer(program, params, end_ids=tuple(self._end_ids))
        loss = program.predictor(_loss_only)

        def read(rows: Mapping[str, np.ndarray]) -> tuple[Sums, np.ndarray]:
            sums, _ = loss(params, rows)
            counts = rows["mask"].any(1)
            lengths = np.where(counts, rows["mask"].argmax(1) + 1, 1)
            prompts = [
                ids[:n] for ids, n in zip(rows["decoder_inputs"], lengths, strict=True)
            ]
            room = rows["mask"].shape[1] + 1 - int(lengths.max())
            sampling = SamplingConfig(max_new_tokens=max(1, room), temperature=0.0)
            encoded = Encoded(rows["inputs"], rows.get("segment_ids"))
            texts = writer.write(prompts, sampling, encoded=encoded)
            return sums, ragged([text.ids for text in texts])

        return read

    def score(self, answered: Sequence[Answered]) -> dict[str, float]:
        written = [self._text(one) for one in answered]
        targets = [one.record[self._target].strip() for one in answered]
        return written_scores(self._metrics, written, targets)

    def show(self, asked: str, answered: Answered) -> str:
        asked = f"{asked[:300]}\n" if asked else ""
        true = answered.record[self._target][:300]
        return f"{asked}-> {self._text(answered)}\n   (true: {true})"

    def _text(self, answered: Answered) -> str:
        ids = np.asarray(answered.outputs[0])
        return self._tokenizer.decode(ids[ids >= 0]).strip()


def _check_special(run: RunConfig, ends: set[int]) -> None:
    """Raises if the model's own special tokens are not the tokenizer's."""
    start, end, vocab = run.model.start_id, run.model.end_id, run.model.vocab_size
    if not 0 <= start < vocab:
        why = f"the model has {vocab} tokens"
        raise config_error("model.start_id", start, why, f"give 0 to {vocab - 1}")
    if end not in ends:
        right = " or ".join(map(str, sorted(ends)))
        why = f"the tokenizer ends a text with {right}"
        raise config_error("model.end_id", end, why, f"give {right}")


def ragged(rows: Sequence[Int32[np.ndarray, " _"]]) -> Int32[np.ndarray, "B T"]:
    """Returns rows of different lengths as one array, -1 behind the shorter."""
    out = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_id(token)
    if number is None:
        raise config_error(
            "task.decoder_prompt",
            token,
            "the tokenizer has no such token",
            "give its special tokens",
        )
    return number


def _loss_only(model: Any, batch: Batch) -> tuple[Sums, tuple[()]]:
    return seq2seq_loss(model, batch), ()
