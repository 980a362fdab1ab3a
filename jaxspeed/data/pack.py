# SPDX-License-Identifier: Apache-2.0
"""Documents into rows of fixed length: concatenate, then split.

Each document is led in by the end token and ends with it as a target, so the stream

    inputs    END a  b  c  END d  e  END ...
    targets   a   b  c  END d  e  END ...

has every token, and the end of every document, as a target once, and no target from
another document. The stream is cut into rows of `seq_len`; a document that is cut goes
on in the next row as a segment of its own, so no token is lost or seen twice. Or whole
documents only are put into rows, and what is left of a row is padding. The one
decision: every process packs the whole global batch and keeps its rows, so the position
in the data is two integers, the same for all processes, batch sizes and meshes.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int32

from jaxspeed.config import ConfigError
from jaxspeed.data.tokenize import Encoded


class PackedBatch(NamedTuple):
    """One process's rows of a global batch."""

    arrays: dict[str, np.ndarray]
    """`inputs`, `targets`, `positions`, `segment_ids` (int32) and `mask` (bool)."""
    num_bytes: int
    """UTF-8 bytes of the targets of the whole global batch, if they were counted."""
    place: tuple[int, int]
    """Document, and token in it, that the global batch begins with."""


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """Which rows are made from the stream of tokens."""

    seq_len: int
    global_batch_size: int
    first_row: int
    """The rows from here on are this process's."""
    num_rows: int
    end_id: int
    document_mask: bool
    """Whether each document in a row is a segment of its own."""
    whole: bool = False
    """Whether a document that fits into a row is not cut."""


class PackedRows(grain.IterDataset):
    """Batches of packed rows; the last is padded if the documents are finite."""

    def __init__(
        self,
        documents: grain.IterDataset,
        spec: RowSpec,
        *,
        identity: dict[str, Any],
        patience: int,
    ):
        """Wraps a stream of encoded documents.

        Args:
            documents: elements are `Encoded`.
            spec: the shape of a batch.
            identity: what the order of the tokens depends on; kept in the state.
            patience: documents without a token, in a row, after which to give up.
        """
        super().__init__(documents)
        self._spec = spec
        self._identity = identity
        self._patience = patience

    def __iter__(self) -> "PackIterator":
        return PackIterator(
            self._parent.__iter__(), self._spec, self._identity, self._patience
        )


class PackIterator(grain.DatasetIterator):
    """Iterator of `PackedRows`. Its state is a document number and a token offset."""

    def __init__(
        self,
        parent: grain.DatasetIterator,
        spec: RowSpec,
        identity: dict[str, Any],
        patience: int,
    ):
        super().__init__(parent)
        self._spec = spec
        self._identity = identity
        self._patience = patience
        self._current: Encoded | None = None
        self._document = 0
        self._offset = 0

    def __next__(self) -> PackedBatch:
        spec = self._spec
        size = spec.global_batch_size * spec.seq_len
        # One slot more than inputs: the target of the last.
        stream = np.full(size + 1, spec.end_id, np.int32)
        counted, real = np.ones(size, bool), np.zeros(size, bool)
        starts: list[int] = []
        filled = num_bytes = 0
        place = (self._document, self._offset)
        while filled < size and (document := self._fetch()) is not None:
            at, slots = self._offset, len(document.ids) + 1
            left = -filled % spec.seq_len
            if spec.whole and at == 0 and left < slots <= spec.seq_len:
                filled += left
                if filled == size:
                    break
            if at == 0:
                starts.append(filled)
            end = min(at + size - filled, slots)
            # Slot k holds token k - 1, and slot 0 the end token that is there already.
            tokens = document.ids[max(at - 1, 0) : end]
            begin = filled + (at == 0)
            stream[begin : begin + len(tokens)] = tokens
            if document.num_bytes is not None:
                num_bytes += int(document.num_bytes[at:end].sum())
            part = slice(filled, filled + end - at)
            real[part] = True
            if document.counts is not None:
                counted[part] = document.counts[at:end]
            filled = part.stop
            self._advance(end, slots)
        if not filled:
            raise StopIteration
        arrays = layout(stream, starts, real, counted, spec)
        return PackedBatch(arrays, num_bytes, place)

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the next token, as plain JSON values."""
        return {
            "document": self._document,
            "offset": self._offset,
            "identity": self._identity,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position.

        Raises:
            ConfigError: it was saved with other data, weights, tokenizer or seed.
        """
        check_identity(state["identity"], self._identity)
        grain.experimental.set_next_index(self._parent, state["document"])
        self._document, self._offset = state["document"], state["offset"]
        self._current = None

    def _fetch(self) -> Encoded | None:
        """Returns the document that is being packed; None after the last."""
        skipped = 0
        while self._current is None:
            document = next(self._parent, None)
            if document is None:
                return None
            if len(document.ids):
                self._current = document
            else:
                self._document += 1
                skipped += 1
            if skipped > self._patience:
                raise ConfigError(
                    f"data.path: no token in {skipped} documents in a row; give data "
                    "that holds text, or another data.tokenizer"
                )
        return self._current

    def _advance(self, end: int, slots: int) -> None:
        self._offset = end
        if end == slots:
            self._document, self._offset, self._current = self._document + 1, 0, None


def check_identity(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError if what the order of the data depends on has changed."""
    for name in [*now, *saved]:
        if saved.get(name) != now.get(name):
            raise ConfigError(
                f"{name} was {saved.get(name)!r} when the checkpoint was saved and is {now.get(name)!r} "
                "now, so its position in the data means nothing; restore it, or "
                "start a new run from the checkpoint's parameters with --init"
            )


def layout(
    stream: Int32[np.ndarray, " S"],
    starts: list[int],
    real: Bool[np.ndarray, " N"],
    counted: Bool[np.ndarray, " N"],
    spec: RowSpec,
) -> dict[str, np.ndarray]:
    """Cuts a stream of tokens into this process's rows.

    Args:
        stream: the inputs of a global batch and the target of the last.
        starts: where documents begin.
        real: slots that are not padding.
        counted: slots whose target counts, of the real ones.
        spec: the shape of a batch.
    """
    shape = (spec.num_rows, spec.seq_len)
    low = spec.first_row * spec.seq_len
    high = low + spec.num_rows * spec.seq_len
    mask = real[low:high].reshape(shape)
    begins = np.zeros(shape, bool)
    begins[:, 0] = True
    if spec.document_mask:
        inside = [start - low for start in starts if low <= start < high]
        begins.reshape(-1)[inside] = True
    segments, positions = _segments(begins)
    return {
        "inputs": stream[low:high].reshape(shape).copy(),
        "targets": stream[low + 1 : high + 1].reshape(shape).copy(),
        "positions": positions * mask,
        "segment_ids": segments * mask,
        "mask": mask & counted[low:high].reshape(shape),
    }


def _segments(
    begins: Bool[np.ndarray, "B T"],
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """Returns each slot's segment, from 1, and its position in the segment."""
    slots = np.arange(begins.shape[1], dtype=np.int32)
    latest = np.maximum.accumulate(np.where(begins, slots, 0), axis=1)
    return np.cumsum(begins, axis=1, dtype=np.int32), slots - latest
