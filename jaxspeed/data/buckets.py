# SPDX-License-Identifier: Apache-2.0
"""Examples of any length into batches of a few shapes.

A pool of consecutive examples is sorted by the smallest length that holds each, cut into
batches, and the batches are shuffled; each is padded to the length of its longest row.
So there is little padding, a handful of shapes to compile for, and every example comes
once an epoch. The one decision: as with packed rows, every process makes the whole global
batch and keeps its rows, so the position in the data is two integers, the same for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxspeed.data.pack import check_identity
from jaxspeed.objectives import Leaves


class Example(NamedTuple):
    """One example, its arrays as long as they are."""

    key: tuple[int, int]
    """Its record, and which part of it."""
    arrays: dict[str, np.ndarray]


class ExampleBatch(NamedTuple):
    """One process's rows of a global batch, padded."""

    arrays: dict[str, np.ndarray]
    keys: list[tuple[int, int]]
    """Of the rows of the whole global batch, without those that only fill it up."""


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """Which batches are made of the stream of examples."""

    shapes: tuple[Leaves, ...]
    """A batch's arrays for each length of a row, shortest first."""
    global_batch_size: int
    first_row: int
    """The rows from here on are this process's."""
    num_rows: int
    pool_batches: int
    """Batches that are sorted together."""
    seed: int | None
    """Of the order of a pool's batches; None leaves them in ascending length."""

    @property
    def pool(self) -> int:
        """Examples that are sorted together; with one length there is nothing to sort."""
        batches = self.pool_batches if len(self.shapes) > 1 else 1
        return batches * self.global_batch_size


class Buckets(grain.IterDataset):
    """Batches of padded rows; the last is filled up if the examples are finite."""

    def __init__(
        self, examples: grain.IterDataset, spec: BatchSpec, *, identity: dict[str, Any]
    ):
        """Wraps a stream of `Example`s.

        Args:
            examples: in the order of training.
            spec: the shapes of a batch.
            identity: what the order of the batches depends on; kept in the state.
        """
        super().__init__(examples)
        self._spec = spec
        self._identity = identity

    def __iter__(self) -> "BucketIterator":
        return BucketIterator(self._parent.__iter__(), self._spec, self._identity)


class BucketIterator(grain.DatasetIterator):
    """Iterator of `Buckets`. Its state is the number of a pool's first example, and of a batch in it."""

    def __init__(
        self,
        parent: grain.DatasetIterator,
        spec: BatchSpec,
        identity: dict[str, Any],
    ):
        super().__init__(parent)
        self._spec = spec
        self._identity = identity
        self._batches: list[list[Example]] | None = None
        self._first = 0
        self._batch = 0

    def __next__(self) -> ExampleBatch:
        if self._batches is None:
            self._batches = self._read_pool()
        rows = self._batches[self._batch]
        self._batch += 1
        if self._batch == len(self._batches):
            self._first, self._batch = self._first + self._spec.pool, 0
            self._batches = None
        return ExampleBatch(padded(rows, self._spec), [row.key for row in rows])

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the next batch, as plain JSON values."""
        return {"first": self._first, "batch": self._batch, "identity": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position.

        Raises:
            ConfigError: it was saved with other data, batches, tokenizer or seed.
        """
        check_identity(state["identity"], self._identity)
        grain.experimental.set_next_index(self._parent, state["first"])
        self._first, self._batch, self._batches = state["first"], state["batch"], None

    def _read_pool(self) -> list[list[Example]]:
        spec, pool = self._spec, []
        for example in self._parent:
            pool.append(example)
            if len(pool) == spec.pool:
                break
        if not pool:
            raise StopIteration
        pool.sort(key=lambda example: bucket_of(example, spec.shapes))
        size = spec.global_batch_size
        batches = [pool[at : at + size] for at in range(0, len(pool), size)]
        if spec.seed is not None:
            order = np.random.default_rng((spec.seed, self._first))
            batches = [batches[i] for i in order.permutation(len(batches))]
        return batches


def bucket_of(example: Example, shapes: Sequence[Leaves]) -> int:
    """Returns the number of the shortest rows that hold an example."""
    for number, leaves in enumerate(shapes):
        pairs = ((x.shape, leaves[name].shape) for name, x in example.arrays.items())
        if all(
            n <= room
            for shape, most in pairs
            for n, room in zip(shape, most, strict=True)
        ):
            return number
    raise AssertionError(f"example {example.key} is longer than the longest rows")


def padded(rows: Sequence[Example], spec: BatchSpec) -> dict[str, np.ndarray]:
    """Returns this process's rows of a batch, padded to the length that holds the longest of all its rows."""
    leaves = spec.shapes[max(bucket_of(row, spec.shapes) for row in rows)]
    mine = rows[spec.first_row : spec.first_row + spec.num_rows]
    arrays = {}
    for name, leaf in leaves.items():
        out = np.full((spec.num_rows, *leaf.shape), leaf.fill, leaf.dtype)
        for at, row in enumerate(mine):
            x = row.arrays[name]
            out[(at, *map(slice, x.shape))] = x
        arrays[name] = out
    return arrays
