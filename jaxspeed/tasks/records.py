# SPDX-License-Identifier: Apache-2.0
"""Tasks over records: reads, encodes, batches and evaluates, whatever the task is.

What a task makes of a record, and of what the model says, is its `Kind`; there is one for
each task, and nothing here knows them. Records are encoded when their turn comes; a few are
looked at before training, so that a wrong field, label or answer is an error then.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import grain
import jax
import numpy as np
from jaxtyping import Int32

from jaxspeed.config import TASK_COLUMNS, ConfigError, RunConfig, config_error
from jaxspeed.data import ByteTokenizer, Tokenizer, build_tokenizer
from jaxspeed.data.buckets import BatchSpec, Example, bucket_of
from jaxspeed.data.corpus import open_record_corpus
from jaxspeed.data.documents import Joined, Record, RecordSource, Selected
from jaxspeed.data.loader import example_iterator, held_out_examples, share_of_rows
from jaxspeed.objectives import objective_of
from jaxspeed.program import Program
from jaxspeed.step import PredictFn
from jaxspeed.tasks.base import Evaluation
from jaxspeed.types import Params, PyTree, Sums


X = TypeVar("X")

SAMPLES = 3
"""Held-out records that are shown with what the model says of them."""

_LOOKED_AT = 128


class BadRecordError(ValueError):
    """A record that the task cannot use: what is wrong with it, and what to change."""

    def __init__(self, why: str, change: str) -> None:
        super().__init__(f"{why}; {change}")
        self.why, self.change = why, change


class Item(NamedTuple):
    """An example that a record gives."""

    arrays: dict[str, np.ndarray]
    """Without padding."""
    cut: str = ""
    """What did not fit and was cut, by the setting that limits it."""


class Answered(NamedTuple):
    """A held-out record and what the model says of each of its parts."""

    record: Record
    outputs: list[PyTree]


Inference = Callable[[Mapping[str, np.ndarray]], tuple[Sums, PyTree]]
"""From an evaluation batch, the same in every process, to its loss and arrays with a row for each of its rows."""


@runtime_checkable
class Kind(Protocol):
    """What a task makes of a record, and of what a model says."""

    @property
    def parts(self) -> Callable[[Record], int] | None:
        """How many examples a record gives; None: each gives one."""
        ...

    def encode(self, record: Record) -> Sequence[Item]:
        """Returns a record's examples.

        Raises:
            BadRecordError: the record cannot be used.
        """
        ...

    def reader(self, program: Program, params: Params) -> Inference:
        """Returns what reads an evaluation batch: its loss, and what the model says of each row."""
        ...

    def score(self, answered: Sequence[Answered]) -> dict[str, float]:
        """Returns metrics of all held-out records, by name without `eval/`."""
        ...

    def show(self, answered: Answered) -> str:
        """Returns a record and what the model says of it, as text."""
        ...


class Examples:
    """A source's records as examples, encoded when asked for."""

    def __init__(self, field: str, source: RecordSource, kind: Kind) -> None:
        """Counts the examples; a record with several parts has to be looked at for that."""
        self.name, self.fingerprint = source.name, source.fingerprint
        self.num_bytes = source.num_bytes
        self._field, self._source, self._kind = field, source, kind
        self._starts = None
        self.left_out = 0
        """Records that give no example."""
        if kind.parts is not None:
            counts = [self._of(i, kind.parts) for i in range(len(source))]
            self._starts = np.cumsum([0, *counts])
            self.left_out = counts.count(0)

    def __len__(self) -> int:
        return len(self._source) if self._starts is None else int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        record, part = index, 0
        if self._starts is not None:
            record = int(np.searchsorted(self._starts, index, side="right")) - 1
            part = index - int(self._starts[record])
        return Example((record, part), self.items(record)[part].arrays)

    def items(self, record: int) -> Sequence[Item]:
        """Returns the examples of a record.

        Raises:
            ConfigError: it cannot be used; names it.
        """
        return self._of(record, self._kind.encode)

    def _of(self, record: int, ask: Callable[[Record], X]) -> X:
        return _asked_of(self._field, self._source, record, ask)


class Encodings(Generic[X]):
    """What is made of each of a source's records, when asked for."""

    def __init__(
        self, field: str, source: RecordSource, encode: Callable[[Record], X]
    ) -> None:
        self.name, self.fingerprint = source.name, source.fingerprint
        self.num_bytes = source.num_bytes
        self._field, self._source, self._encode = field, source, encode

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> X:
        return _asked_of(self._field, self._source, index, self._encode)


def _asked_of(
    field: str, source: RecordSource, record: int, ask: Callable[[Record], X]
) -> X:
    """Returns what is made of a record; an error names the record."""
    try:
        return ask(source[record])
    except BadRecordError as err:
        why = f"record {record} {err.why}"
        raise config_error(field, source.name, why, err.change) from err


class Texts:
    """The strings of a source's records, to train a vocabulary on."""

    def __init__(self, source: RecordSource) -> None:
        self.name, self.fingerprint = source.name, source.fingerprint
        self.num_bytes = source.num_bytes
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:
        return "\n".join(_strings(self._source[index]))


class RecordTask:
    """A task whose data are records with several fields."""

    unit = "examples"
    kind: Kind
    tokenizer: Tokenizer

    def __init__(
        self,
        run: RunConfig,
        program: Program,
        make_kind: Callable[[RunConfig, Tokenizer], Kind],
        *,
        reads_text: bool = True,
    ) -> None:
        """Opens the records.

        Args:
            run: the configuration.
            program: its static part.
            make_kind: what the task makes of a record, given the tokenizer.
            reads_text: without, there is no tokenizer to read or train; bytes stand in.
        """
        self.run, self._make_kind, self._reads_text = run, make_kind, reads_text
        self.columns = columns_of(run)
        inputs, target = self.columns
        self.corpus = open_record_corpus(run.data, [*inputs, target])
        self.batch_amount = program.batch.global_size
        first, count = share_of_rows(self.batch_amount, *program.process_rows)
        lengths = (*run.task.buckets, run.seq_len)
        self._spec = BatchSpec(
            shapes=tuple(objective_of(run).leaves(run, length) for length in lengths),
            global_batch_size=self.batch_amount,
            first_row=first,
            num_rows=count,
            pool_batches=run.task.pool_batches,
            seed=run.seed if run.data.shuffle else None,
        )

    def prepare(self, workdir: Path) -> None:
        """Reads or trains the tokenizer, and looks at some records."""
        self.tokenizer = ByteTokenizer()
        if self._reads_text:
            self.tokenizer = build_tokenizer(
                self.run.data,
                [Texts(source) for source in self.corpus.train],
                vocab_size=self.run.model.vocab_size,
                workdir=workdir,
                init=self.run.init,
                leads=jax.process_index() == 0,
            )
        self.kind = self._make_kind(self.run, self.tokenizer)
        self._examples = [
            Examples("data.path", source, self.kind) for source in self.corpus.train
        ]
        self._seen = self._look()

    def describe(self) -> list[str]:
        """Returns what is read and learnt, and what does not fit."""
        inputs, target = self.columns
        name = self.run.task.name.replace("_", " ")
        return [
            f"data: {self.corpus.describe()}",
            f"task: {name}, {target} from {' and '.join(inputs)}",
            *self._seen,
        ]

    def train_iterator(self) -> grain.DatasetIterator:
        """Returns the endless iterator of batches."""
        run, task = self.run, self.run.task
        identity = {
            "task.name": task.name,
            "task's fields": [list(self.columns[0]), self.columns[1]],
            "seq_len": run.seq_len,
            "global_batch_size": self.batch_amount,
            "task.buckets": list(task.buckets),
            "task.pool_batches": task.pool_batches,
            "task.stride": task.stride,
        }
        return example_iterator(
            run.data, self._examples, self.tokenizer, self._spec, seed=run.seed, identity=identity,
        )  # fmt: skip

    def evaluate(
        self,
        program: Program,
        params: Params,
        *,
        step: int,
        stopped: Callable[[], int] = lambda: 0,
    ) -> Evaluation | None:
        """Returns the loss and the task's metrics over `eval.batches` batches of records, and the first few with what the model says."""
        del step
        records = self._held_out()
        answered = [Answered(records[i], []) for i in range(len(records))]
        total = count = 0.0
        read = self.kind.reader(program, params)
        for batch in self._batches(records):
            if stopped():
                return None
            sums, outputs = read(batch.arrays)
            total, count = total + float(sums.total), count + float(sums.count)
            # The parts of a record need not come in order.
            for row, (record, part) in enumerate(batch.keys):
                output = jax.tree.map(lambda x, row=row: x[row], outputs)
                answered[record].outputs.append((part, output))
        answered = [one for one in answered if one.outputs]
        for one in answered:
            one.outputs[:] = [
                x for _, x in sorted(one.outputs, key=lambda pair: pair[0])
            ]
        scores = {"loss": total / max(count, 1.0)} | self.kind.score(answered)
        summary = f"{len(answered):,} {self.run.data.evaluated} records: " + ", ".join(
            f"{name} {value:.4g}" for name, value in scores.items()
        )
        shown = "\n\n".join(self.kind.show(one) for one in answered[:SAMPLES])
        metrics = {f"eval/{name}": value for name, value in scores.items()}
        return Evaluation(metrics, summary, summary, shown)

    def _held_out(self) -> RecordSource:
        parts = list(self.corpus.held_out)
        source = parts[0] if len(parts) == 1 else Joined("data.eval_path", parts)
        wanted = self.run.eval.batches * self.batch_amount or len(source)
        # A few batches should stand for all records: a fixed shuffle.
        order = np.random.default_rng(0).permutation(len(source))[:wanted]
        return Selected(source, order)

    def _batches(self, records: RecordSource) -> Any:
        field = "data.eval_path" if self.run.data.eval_path else "data.path"
        examples = Examples(field, records, self.kind)
        # Whole: what is written of it must be the same in every process.
        spec = dataclasses.replace(
            self._spec, first_row=0, num_rows=self.batch_amount, seed=None
        )
        return held_out_examples(self.run.data, examples, self.tokenizer, spec)

    def _look(self) -> list[str]:
        """Encodes some records, spread over the data; returns what there is to say of them."""
        cut: dict[str, int] = {}
        lengths, looked = [0] * len(self._spec.shapes), 0
        for examples, source in zip(self._examples, self.corpus.train, strict=True):
            for record in looked_at(source):
                for item in examples.items(record):
                    lengths[
                        bucket_of(Example((0, 0), item.arrays), self._spec.shapes)
                    ] += 1
                    cut[item.cut] = cut.get(item.cut, 0) + 1
                    looked += 1
        left_out = sum(examples.left_out for examples in self._examples)
        records = sum(map(len, self.corpus.train))
        said = [
            f"{left_out} of {records} records are left out: too long for the model"
        ] * bool(left_out)
        said += [
            f"{number} of {looked} examples looked at are longer than {setting} and are cut"
            for setting, number in cut.items()
            if setting
        ]
        if self.run.task.buckets:
            tokens = (*self.run.task.buckets, self.run.seq_len)
            shares = ", ".join(
                f"{number / looked:.0%} to {length}"
                for length, number in zip(tokens, lengths, strict=True)
            )
            said.append(f"rows are padded: {shares} tokens")
        return said


def looked_at(source: RecordSource) -> list[int]:
    """Returns some records, spread over a source, to be looked at before training."""
    number = min(len(source), _LOOKED_AT)
    return np.linspace(0, len(source) - 1, number, dtype=int).tolist()


def predicted(program: Program, params: Params, predict: PredictFn) -> Inference:
    """Returns what reads a batch by one pass of the model.

    Args:
        program: of the model.
        params: its parameters.
        predict: see `Program.predictor`.
    """
    return functools.partial(program.predictor(predict), params)


def columns_of(run: RunConfig) -> tuple[tuple[str, ...], str]:
    """Returns the fields of a record that hold a task's inputs and its target.

    Raises:
        ConfigError: the task has another number of inputs.
    """
    inputs, target = TASK_COLUMNS[run.task.name]
    given = run.task.input_fields
    most = 2 if run.task.name in ("classification", "speech") else len(inputs)
    if given and not len(inputs) <= len(given) <= most:
        raise config_error(
            "task.input_fields",
            given,
            f"task.name={run.task.name!r} reads {' and '.join(inputs)}",
            f"name {len(inputs)} field{'s' if len(inputs) > 1 else ''}",
        )
    return given or inputs, run.task.target_field or target


def text_in(record: Record, field: str) -> str:
    """Returns a field's text.

    Raises:
        BadRecordError: there is none, or it is empty.
    """
    text = record[field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise BadRecordError(
            f"has a {kind} as {field!r}, where text is due", "name another field"
        )
    if not text.strip():
        raise BadRecordError(
            f"has an empty {field!r}", "remove it, or name another field"
        )
    return text


def fit(
    texts: Sequence[Int32[np.ndarray, " _"]], room: int
) -> tuple[list[Int32[np.ndarray, " _"]], bool]:
    """Returns one or two texts cut to `room` tokens, the longer of two first; and whether they were."""
    first, *rest = map(len, texts)
    if first + sum(rest) <= room:
        return list(texts), False
    if not rest:
        return [texts[0][:room]], True
    keep = max(room - rest[0], room // 2)
    return [texts[0][:keep], texts[1][: room - min(first, keep)]], True


def check_room(run: RunConfig, special: int) -> int:
    """Returns the tokens that are left for text in a row beside the special ones.

    Raises:
        ConfigError: there are none.
    """
    if run.seq_len <= special:
        raise ConfigError(
            f"seq_len={run.seq_len}: the tokenizer's special tokens alone are {special}; give more"
        )
    return run.seq_len - special


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [s for x in value for s in _strings(x)] if isinstance(value, list) else []
