# SPDX-License-Identifier: Apache-2.0
"""Classes of texts, of words and of images."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspeed.config import RunConfig, config_error
from jaxspeed.data import Tokenizer
from jaxspeed.data.documents import Record
from jaxspeed.losses import label_logits, label_sums
from jaxspeed.program import Program
from jaxspeed.tasks.features import pixels_in
from jaxspeed.tasks.records import (
    Answered,
    BadRecordError,
    Inference,
    Item,
    check_room,
    columns_of,
    fit,
    predicted,
    text_in,
)
from jaxspeed.tasks.scores import class_scores, entity_f1
from jaxspeed.types import Batch, Params, Sums


class Classification:
    """The class of a text, or of a pair of texts."""

    parts = None

    def __init__(self, run: RunConfig, tokenizer: Tokenizer) -> None:
        """Asks the tokenizer for its special tokens."""
        self._inputs, self._target = columns_of(run)
        self._labels, self._prefix = Labels(run), run.task.prefix
        self._tokenizer = tokenizer
        self._frame = tokenizer.frame(len(self._inputs))
        self._room = check_room(run, self._frame.size)

    def encode(self, record: Record) -> Sequence[Item]:
        """Returns the framed texts and the number of their class."""
        texts = [text_in(record, field) for field in self._inputs]
        texts[0] = self._prefix + texts[0]
        fitted, cut = fit([self._tokenizer.encode(t) for t in texts], self._room)
        ids, types = self._frame.around(*fitted)
        arrays = {"inputs": ids, "segment_ids": np.ones_like(ids)}
        arrays |= {"token_types": types} if len(texts) == 2 else {}
        label = self._labels.number(record[self._target], self._target)
        arrays["labels"] = np.asarray(label, np.int32)
        return [Item(arrays, "seq_len" if cut else "")]

    def reader(self, program: Program, params: Params) -> Inference:
        """Returns what gives the loss and the likeliest class of each row."""
        return predicted(program, params, _likeliest_of_rows)

    def score(self, answered: Sequence[Answered]) -> dict[str, float]:
        """Returns accuracy and F1."""
        return self._labels.score(answered, self._target)

    def show(self, answered: Answered) -> str:
        """Returns the text with the model's and the true class."""
        texts = " | ".join(answered.record[field] for field in self._inputs)
        return f"{texts[:300]}\n{self._labels.show(answered, self._target)}"


class ImageClassification:
    """The class of an image."""

    parts = None

    def __init__(self, run: RunConfig, tokenizer: Tokenizer) -> None:
        """Asks the model for the shape of an image."""
        del tokenizer
        (self._image,), self._target = columns_of(run)
        self._labels, self._shape = Labels(run), run.model.feature_shape

    def encode(self, record: Record) -> Sequence[Item]:
        """Returns the pixels and the number of their class."""
        image = pixels_in(record, self._image, self._shape)
        label = self._labels.number(record[self._target], self._target)
        return [Item({"inputs": image, "labels": np.asarray(label, np.int32)})]

    def reader(self, program: Program, params: Params) -> Inference:
        """Returns what gives the loss and the likeliest class of each image."""
        return predicted(program, params, _likeliest_of_rows)

    def score(self, answered: Sequence[Answered]) -> dict[str, float]:
        """Returns accuracy and F1."""
        return self._labels.score(answered, self._target)

    def show(self, answered: Answered) -> str:
        """Returns the model's and the true class."""
        return self._labels.show(answered, self._target)


class TokenClassification:
    """The class of each word of a text; a word is told by its first token."""

    parts = None

    def __init__(self, run: RunConfig, tokenizer: Tokenizer) -> None:
        """Asks the tokenizer for its special tokens."""
        (self._words,), self._target = columns_of(run)
        self._labels, self._tokenizer = Labels(run), tokenizer
        self._frame = tokenizer.frame(1)
        self._room = check_room(run, self._frame.size)

    def encode(self, record: Record) -> Sequence[Item]:
        """Returns the framed words, and the class of each at its first token."""
        numbers = self._numbers(record)
        ids, firsts = self._tokens(record[self._words])
        inputs, _ = self._frame.around(ids)
        labels, mask = np.zeros_like(inputs), np.zeros(len(inputs), bool)
        labels[firsts] = numbers[: len(firsts)]
        mask[firsts] = True
        arrays = {"inputs": inputs, "segment_ids": np.ones_like(inputs)}
        arrays |= {"labels": labels, "mask": mask}
        return [Item(arrays, "seq_len" if len(firsts) < len(numbers) else "")]

    def reader(self, program: Program, params: Params) -> Inference:
        """Returns what gives the loss and the likeliest class of each token."""
        return predicted(program, params, _likeliest_of_tokens)

    def score(self, answered: Sequence[Answered]) -> dict[str, float]:
        """Returns accuracy and F1 over words, and over entities where the classes are B-, I- and O."""
        gold, predicted = [], []
        for one in answered:
            says = self._says(one)
            predicted.append(says)
            gold.append(self._numbers(one.record)[: len(says)])
        flat = [[x for row in rows for x in row] for rows in (gold, predicted)]
        scores = class_scores(flat[0], flat[1], self._labels.count)
        names = {name.partition("-")[0] for name in self._labels.names}
        if names and names <= {"B", "I", "O"}:
            pair = [
                [[*map(self._labels.name, row)] for row in rows]
                for rows in (gold, predicted)
            ]
            scores["entity_f1"] = entity_f1(pair[0], pair[1])
        return scores

    def show(self, answered: Answered) -> str:
        """Returns the words, each with the model's class."""
        words, says = answered.record[self._words], self._says(answered)
        tagged = zip(words, map(self._labels.name, says), strict=False)
        return " ".join(f"{word}/{name}" for word, name in tagged)

    def _numbers(self, record: Record) -> list[int]:
        words, labels = record[self._words], record[self._target]
        if not isinstance(words, list) or not words:
            why = f"has no list of words in {self._words!r}"
            raise BadRecordError(why, "remove it, or set task.input_fields")
        labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
        if not isinstance(labels, list) or len(labels) != len(words):
            found = len(labels) if isinstance(labels, list) else type(labels).__name__
            why = f"has {len(words)} words but {found} labels in {self._target!r}"
            raise BadRecordError(why, "mend it")
        return [self._labels.number(label, self._target) for label in labels]

    def _tokens(self, words: list[str]) -> tuple[np.ndarray, list[int]]:
        """Returns the ids of the words, and where the first token of each stands in the framed row; words that do not fit have none."""
        ends = np.cumsum([len(word) + 1 for word in words])
        begins = ends - [len(word) + 1 for word in words]
        ids, spans = self._tokenizer.pieces(" ".join(words))
        ids, spans = ids[: self._room], spans[: self._room]
        # A token that takes a space along belongs to the word behind it.
        word_of = (
            np.searchsorted(begins, np.maximum(spans[:, 1] - 1, spans[:, 0]), "right")
            - 1
        )
        firsts = np.searchsorted(word_of, np.arange(len(words)))
        known = [
            int(first) + len(self._frame.before)
            for word, first in enumerate(firsts)
            if first < len(ids) and word_of[first] == word
        ]
        return ids, known

    def _says(self, answered: Answered) -> list[int]:
        _, firsts = self._tokens(answered.record[self._words])
        return np.asarray(answered.outputs[0])[firsts].tolist()


class Labels:
    """The classes of a run: their number is the model's, their names the task's, or those that the model has."""

    def __init__(self, run: RunConfig) -> None:
        """Checks the names against the model."""
        self.count: int = run.model.num_labels
        self.names: tuple[str, ...] = run.task.labels or run.model.labels
        if self.names and len(self.names) != self.count:
            raise config_error(
                "task.labels",
                self.names,
                f"the model has {self.count} classes",
                f"give {self.count} names, or set model.num_labels to {len(self.names)}",
            )

    def number(self, label: Any, field: str) -> int:
        """Returns the number of a class.

        Raises:
            BadRecordError: there is no such class.
        """
        if isinstance(label, str):
            if label in self.names:
                return self.names.index(label)
            known = (
                f"only {', '.join(self.names)}"
                if self.names
                else "and classes have no names"
            )
            raise BadRecordError(
                f"has {label!r} as {field!r}, {known}", "set task.labels"
            )
        if isinstance(label, (int, np.integer)) and 0 <= label < self.count:
            return int(label)
        raise BadRecordError(
            f"has {label!r} as {field!r}, which is no class of the model (0 to {self.count - 1})",
            "set model.num_labels, or mend the record",
        )

    def name(self, number: int) -> str:
        """Returns the name of a class, or its number."""
        return self.names[number] if self.names else str(number)

    def score(self, answered: Sequence[Answered], field: str) -> dict[str, float]:
        """Returns accuracy and F1 of records that have one class each, in this field."""
        gold = [self.number(one.record[field], field) for one in answered]
        says = [int(one.outputs[0]) for one in answered]
        return class_scores(gold, says, self.count)

    def show(self, answered: Answered, field: str) -> str:
        """Returns the class that the model gives such a record, and the true one."""
        true = self.name(self.number(answered.record[field], field))
        return f"-> {self.name(int(answered.outputs[0]))} (true: {true})"


def _likeliest_of_rows(model: Any, batch: Batch) -> tuple[Sums, jax.Array]:
    logits, labels = label_logits(model, batch), batch["labels"]
    return label_sums(logits, labels, labels >= 0), jnp.argmax(logits, -1)


def _likeliest_of_tokens(model: Any, batch: Batch) -> tuple[Sums, jax.Array]:
    logits = label_logits(model, batch)
    sums = label_sums(logits, batch["labels"], batch["mask"])
    return sums, jnp.argmax(logits, -1)
