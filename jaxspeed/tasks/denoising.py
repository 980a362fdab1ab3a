# SPDX-License-Identifier: Apache-2.0
"""Pretraining on packed text with something hidden: masked tokens (BERT), missing spans (T5).

What is hidden follows from the seed and the place of a row in the data: another choice each
time a text comes, the same one in each run and on any number of processes. Held-out text has
one choice for good.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxspeed.config import RunConfig, config_error
from jaxspeed.data import (
    EvalSet,
    Tokenizer,
    build_tokenizer,
    open_corpus,
    train_iterator,
)
from jaxspeed.data.corrupt import hide_spans, make_continues, mask_tokens, shifted
from jaxspeed.data.loader import Packing
from jaxspeed.data.pack import PackedBatch
from jaxspeed.data.tokenize import Encoded, SubwordTokenizer
from jaxspeed.data.vocabulary import SENTINELS
from jaxspeed.losses import seq2seq_loss
from jaxspeed.metrics import perplexity
from jaxspeed.objectives import max_masked, noise_of, objective_of, span_lengths
from jaxspeed.ops import fused_cross_entropy
from jaxspeed.program import Program
from jaxspeed.step import PredictFn
from jaxspeed.tasks.base import Evaluation
from jaxspeed.types import Batch, Params, Sums


@runtime_checkable
class Noise(Protocol):
    """What is hidden in a row, and what the model makes of it."""

    raw_len: int
    """Tokens of a row before anything is hidden."""
    lead_id: int
    """The token that begins a document."""
    predict: PredictFn
    """The loss of a batch, and how many targets of each row are right, if that is known."""

    def encode(self, text: str) -> Encoded:
        """Returns the tokens of a document behind the one that begins it."""
        ...

    def hide(
        self, ids: np.ndarray, segment_ids: np.ndarray, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Returns a row's arrays with something hidden, without padding."""
        ...


class Denoising:
    """A task that hides something in packed rows of text."""

    unit = "tokens"
    tokenizer: Tokenizer
    noise: Noise

    def __init__(
        self,
        run: RunConfig,
        program: Program,
        make_noise: Callable[[RunConfig, Tokenizer], Noise],
    ) -> None:
        """Opens the text.

        Args:
            run: the configuration.
            program: its static part.
            make_noise: what is hidden, given the tokenizer.
        """
        self.run, self._make_noise = run, make_noise
        self.corpus = open_corpus(run.data)
        self._rows, self._share = program.batch.global_size, program.process_rows
        self.batch_amount = self._rows * run.seq_len
        self._leaves = objective_of(run).leaves(run, run.seq_len)

    def prepare(self, workdir: Path) -> None:
        """Reads or trains the tokenizer."""
        self.tokenizer = build_tokenizer(
            self.run.data,
            self.corpus.train,
            vocab_size=self.run.model.vocab_size,
            workdir=workdir,
            init=self.run.init,
            leads=jax.process_index() == 0,
        )
        self.noise = self._make_noise(self.run, self.tokenizer)

    def describe(self) -> list[str]:
        """Returns what is read and learnt."""
        task = self.run.task
        what = f"{task.mask_rate:.0%} of the tokens hidden"
        return [
            f"data: {self.corpus.describe()}",
            f"task: {task.name.replace('_', ' ')}, {what}",
        ]

    def train_iterator(self) -> grain.DatasetIterator:
        """Returns the endless iterator of batches."""
        run, (index, count) = self.run, self._share
        first = index * self._rows // count
        finish = functools.partial(self._hidden, seed=run.seed, first_row=first)
        return train_iterator(
            run.data, self.corpus, self.tokenizer, seed=run.seed, seq_len=self.noise.raw_len,
            global_batch_size=self._rows, process_index=index, process_count=count,
            packing=self._packing(finish),
        )  # fmt: skip

    def evaluate(
        self,
        program: Program,
        params: Params,
        *,
        step: int,
        stopped: Callable[[], int] = lambda: 0,
    ) -> Evaluation | None:
        """Returns the loss of what is hidden in held-out text, and the share of masked tokens that are restored."""
        del step
        finish = functools.partial(self._hidden, seed=0, first_row=0)
        held_out = EvalSet(
            cfg=self.run.data, corpus=self.corpus, tokenizer=self.tokenizer, seq_len=self.noise.raw_len,
            global_batch_size=self._rows, batches=self.run.eval.batches, packing=self._packing(finish),
        )  # fmt: skip
        predict = program.predictor(self.noise.predict)
        nats = targets = 0.0
        right: list[int] = []
        for rows, _ in held_out:
            if stopped():
                return None
            sums, hits = predict(params, rows)
            nats, targets = nats + float(sums.total), targets + float(sums.count)
            right += jax.tree.leaves(jax.tree.map(np.sum, hits))
        loss = nats / max(targets, 1.0)
        metrics = {"eval/loss": loss, "eval/perplexity": perplexity(loss)}
        said = f"{self.run.data.evaluated} loss {loss:.4f} nats a hidden token, perplexity {perplexity(loss):.2f}"
        if right:
            metrics["eval/accuracy"] = float(sum(right)) / max(targets, 1.0)
            said += f", accuracy {metrics['eval/accuracy']:.4f}"
        return Evaluation(metrics, said, said)

    def _packing(
        self, finish: Callable[[PackedBatch], dict[str, np.ndarray]]
    ) -> Packing:
        task = self.run.task
        identity = {"task.name": task.name, "task.mask_rate": task.mask_rate}
        return Packing(
            self.noise.encode, self.noise.lead_id, finish=finish, identity=identity
        )

    def _hidden(
        self, batch: PackedBatch, *, seed: int, first_row: int
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of a batch of packed rows, with something hidden in each."""
        packed = batch.arrays
        rows = len(packed["inputs"])
        out = {
            name: np.full((rows, *leaf.shape), leaf.fill, leaf.dtype)
            for name, leaf in self._leaves.items()
        }
        for row in range(rows):
            real = packed["segment_ids"][row] > 0
            ids, segment_ids = (
                packed["inputs"][row][real],
                packed["segment_ids"][row][real],
            )
            rng = np.random.default_rng((seed, *batch.place, first_row + row))
            arrays = self.noise.hide(ids, segment_ids, rng) if len(ids) else {}
            if "positions" in out:
                arrays["positions"] = packed["positions"][row][real]
            for name, x in arrays.items():
                out[name][row, : len(x)] = x
        return out


class MaskedTokens:
    """Tokens masked where they stand. A document stands in the tokenizer's frame."""

    def __init__(self, run: RunConfig, tokenizer: Tokenizer) -> None:
        """Asks the tokenizer for its special tokens and, for whole words, its marks of words."""
        self.raw_len, self.predict = run.seq_len, _restored
        frame = tokenizer.frame(1)
        self._lead, self._after = frame.before, frame.after
        # Without a frame the end of a document begins the next.
        self.lead_id = frame.before[0] if frame.before else tokenizer.end_id
        self._tokenizer, self._rate = tokenizer, run.task.mask_rate
        self._most = max_masked(run.seq_len, run.task.mask_rate)
        self._mask_id = _mask_of(tokenizer, run.model.vocab_size)
        special = {*frame.before, *frame.after, tokenizer.end_id, tokenizer.pad_id}
        self._special = np.asarray(sorted(special), np.int32)
        self._continues = np.zeros(run.model.vocab_size, bool)
        if run.task.whole_word:
            self._continues = _word_marks(tokenizer, run.model.vocab_size)

    def encode(self, text: str) -> Encoded:
        """Returns the document in its frame, but for the token that begins it."""
        ids = self._tokenizer.encode(text)
        if not self._lead or not len(ids):
            return Encoded(ids)
        inner = [
            np.asarray(self._lead[1:], np.int32),
            ids,
            np.asarray(self._after, np.int32),
        ]
        return Encoded(np.concatenate(inner))

    def hide(
        self, ids: np.ndarray, segment_ids: np.ndarray, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Returns the row with tokens masked, and those."""
        row = mask_tokens(
            ids, ~np.isin(ids, self._special), self._continues[ids], rng,
            rate=self._rate, most=self._most, mask_id=self._mask_id, vocab_size=self._tokenizer.vocab_size,
        )  # fmt: skip
        arrays = {"inputs": row.inputs, "segment_ids": segment_ids}
        arrays |= {"slots": row.slots, "targets": row.targets}
        return arrays | {"mask": np.ones(len(row.slots), bool)}


class HiddenSpans:
    """Spans replaced by sentinels; the decoder writes them."""

    def __init__(self, run: RunConfig, tokenizer: Tokenizer) -> None:
        """Finds the sentinels."""
        task = run.task
        lengths = span_lengths(run.seq_len, task.mask_rate, task.mean_span)
        self.raw_len, self.predict = lengths.raw, _loss_of_spans
        self.lead_id, self._start = tokenizer.end_id, run.model.start_id
        self._tokenizer, self._task = tokenizer, task
        spans = noise_of(lengths.raw, task.mask_rate, task.mean_span)[1]
        self._sentinels = _sentinels(run, tokenizer, spans)

    def encode(self, text: str) -> Encoded:
        """Returns the document's tokens."""
        return Encoded(self._tokenizer.encode(text))

    def hide(
        self, ids: np.ndarray, segment_ids: np.ndarray, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Returns the row with sentinels, and what the decoder reads and writes."""
        row = hide_spans(
            ids, segment_ids, rng, rate=self._task.mask_rate, mean_span=self._task.mean_span,
            sentinels=self._sentinels, end_id=self._tokenizer.end_id,
        )  # fmt: skip
        return {
            "inputs": row.inputs,
            "segment_ids": row.segment_ids,
            "decoder_inputs": shifted(row.targets, row.target_segment_ids, self._start),
            "decoder_segment_ids": row.target_segment_ids,
            "targets": row.targets,
            "mask": np.ones(len(row.targets), bool),
        }


def _mask_of(tokenizer: Tokenizer, vocab_size: int) -> int:
    """Returns the mask's id: the tokenizer's, or the first that the model has beyond the tokenizer's."""
    named = (tokenizer.token_id(name) for name in ("[MASK]", "<mask>"))
    known = next((i for i in named if i is not None), tokenizer.vocab_size)
    if known >= vocab_size:
        why = f"the tokenizer has no mask, and its {tokenizer.vocab_size} ids leave none of the model's free"
        raise config_error("model.vocab_size", vocab_size, why, f"give {known + 1}")
    return known


def _word_marks(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    marks = None
    if isinstance(tokenizer, SubwordTokenizer):
        marks = make_continues(dict(tokenizer.vocabulary()), vocab_size)
    if marks is None:
        why = "the tokenizer does not tell which tokens begin a word"
        raise config_error(
            "task.whole_word", True, why, "give False, or data.tokenizer wordpiece"
        )
    return marks


def _sentinels(run: RunConfig, tokenizer: Tokenizer, count: int) -> list[int]:
    """Returns a token for each span: T5's by name, or the model's ids from the top that no token of the tokenizer has."""
    named = [tokenizer.token_id(name) for name in SENTINELS[:count]]
    known = [i for i in named if i is not None]
    if not known:
        known = list(range(run.model.vocab_size - 1, tokenizer.vocab_size - 1, -1))
    if len(known) < count:
        why = f"a row has {count} hidden spans, and there are {len(known)} sentinels for them"
        change = "give a lower seq_len or task.mask_rate, a larger task.mean_span, or (with a tokenizer that has none) a larger model.vocab_size"
        raise config_error("task.mean_span", run.task.mean_span, why, change)
    return known[:count]


def _restored(model: Any, batch: Batch) -> tuple[Sums, jax.Array]:
    hidden = model.hidden(
        batch["inputs"], batch["positions"], batch["segment_ids"], None
    )
    at = jnp.take_along_axis(hidden, batch["slots"][:, :, None], axis=1)
    table, bias = model.output_embedding(), model.output_bias()

    def right(row: tuple[jax.Array, ...]) -> jax.Array:
        states, targets, mask = row
        logits = states @ table.T.astype(states.dtype)
        logits = logits if bias is None else logits + bias[None].astype(states.dtype)
        return jnp.sum((jnp.argmax(logits, -1) == targets) & mask)

    hits = jax.lax.map(right, (at, batch["targets"], batch["mask"]))
    return fused_cross_entropy(at, table, batch["targets"], batch["mask"], bias), hits


def _loss_of_spans(model: Any, batch: Batch) -> tuple[Sums, tuple[()]]:
    return seq2seq_loss(model, batch), ()
