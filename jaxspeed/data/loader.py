# SPDX-License-Identifier: Apache-2.0
"""Batches for training and evaluation: a Grain pipeline from documents to rows.

    documents -> shuffle, mix, repeat -> tokens -> packed rows -> prefetch thread

Nothing here knows devices: a batch is a dict of NumPy arrays, this process's share of
the global batch. The one decision: the stream of tokens is global. It depends on text,
tokenizer and seed, and on no batch size, mesh or number of processes; so a saved
position is the same JSON object for every process and can be restored on another number
of them. The price is that each process tokenises all of the batch (docs/data.md has the
rates).
"""

import atexit
import os
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import grain
import numpy as np

from jaxspeed.config import DataConfig, config_error
from jaxspeed.data.buckets import BatchSpec, Buckets, Example, ExampleBatch
from jaxspeed.data.corpus import Corpus
from jaxspeed.data.documents import Source
from jaxspeed.data.pack import PackedBatch, PackedRows, RowSpec
from jaxspeed.data.tokenize import ByteTokenizer, Encoded, Tokenizer


_MAX_READERS = 8
_DOCUMENTS_AHEAD = 32


@dataclass(frozen=True)
class Packing:
    """How items become rows."""

    encode: Callable[[Any], Encoded]
    """From an item to its tokens."""
    lead_id: int
    """The token that begins and ends each."""
    whole: bool = False
    """Whether an item that fits into a row is not cut."""
    finish: Callable[[PackedBatch], dict[str, np.ndarray]] = attrgetter("arrays")
    """From a batch of packed rows to its arrays."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What the rows depend on beside text, tokenizer and seed, by setting."""


def train_iterator(
    cfg: DataConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    global_batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    packing: Packing | None = None,
) -> grain.DatasetIterator:
    """Returns the endless iterator of training batches.

    Process p of P gets rows p * B / P to (p + 1) * B / P of each global batch. Every
    row is full. `get_state()` is a small JSON object, equal on all processes; after
    `set_state` the next batch begins with the next token, whatever `seq_len`,
    `global_batch_size` and `process_count` are now.

    Args:
        cfg: the data configuration.
        corpus: its text.
        tokenizer: what makes tokens of it.
        seq_len: tokens per row.
        global_batch_size: rows per batch, over all processes.
        seed: of the shuffles.
        process_index: this process.
        process_count: processes in the run.
        packing: how items become rows, where they are not texts that follow each other.

    Raises:
        ConfigError: the batch does not divide over the processes.
    """
    packing = packing or Packing(
        lambda text: Encoded(tokenizer.encode(text)), tokenizer.end_id
    )
    identity = identity_of(cfg, corpus.train, tokenizer, seed)
    rows = PackedRows(
        _read(_ordered(cfg, corpus.train, seed).map(packing.encode), tokenizer),
        _row_spec(
            cfg, packing, seq_len, global_batch_size, process_index, process_count
        ),
        identity=identity | dict(packing.identity),
        patience=10 * sum(len(source) for source in corpus.train),
    )
    return _prefetched(rows.map(packing.finish), cfg.prefetch)


def example_iterator(
    cfg: DataConfig,
    sources: Sequence[Source[Example]],
    tokenizer: Tokenizer,
    spec: BatchSpec,
    *,
    seed: int,
    identity: Mapping[str, Any],
) -> grain.DatasetIterator:
    """Returns the endless iterator of training batches of examples, padded to a few lengths.

    `get_state()` is a small JSON object, equal on all processes; it can be restored on
    another number of them.

    Args:
        cfg: the data configuration.
        sources: examples to train on, for each entry of `data.path`.
        tokenizer: what makes tokens of them.
        spec: the shapes of a batch.
        seed: of the shuffles.
        identity: what the examples and their order depend on besides, by setting.
    """
    known = identity_of(cfg, sources, tokenizer, seed) | dict(identity)
    examples = _read(_ordered(cfg, sources, seed), tokenizer)
    batches = Buckets(examples, spec, identity=known).map(attrgetter("arrays"))
    return _prefetched(batches, cfg.prefetch)


def held_out_examples(
    cfg: DataConfig, source: Source[Example], tokenizer: Tokenizer, spec: BatchSpec
) -> Iterator[ExampleBatch]:
    """Yields each held-out example once, in batches; the last is filled up with rows that do not count."""
    examples = _read(grain.MapDataset.source(source), tokenizer)
    iterator = _prefetched(Buckets(examples, spec, identity={}), cfg.prefetch)
    try:
        yield from iterator
    finally:
        iterator.close()


def share_of_rows(
    global_batch_size: int, process_index: int, process_count: int
) -> tuple[int, int]:
    """Returns the first row of a global batch that is this process's, and how many are.

    Raises:
        ConfigError: the batch does not divide over the processes.
    """
    num_rows, rest = divmod(global_batch_size, process_count)
    if rest:
        raise config_error(
            "global_batch_size",
            global_batch_size,
            f"it does not divide by {process_count} processes",
            f"give a multiple of {process_count}",
        )
    return process_index * num_rows, num_rows


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """Held-out text as batches, the same each time it is gone through.

    Yields `(batch, num_bytes)`: this process's rows, and the UTF-8 bytes of the targets
    of the *global* batch. With `nats` summed over all global batches,

        loss = nats / targets          bits per byte = nats / ln 2 / bytes

    exactly: the bytes of a document's tokens add up to the document. End tokens are
    targets too (they count in `nats`) and stand for no byte. The last batch is padded:
    segment 0, mask False.
    """

    cfg: DataConfig
    corpus: Corpus
    tokenizer: Tokenizer
    seq_len: int
    global_batch_size: int
    batches: int
    """At most so many; 0 is all held-out text."""
    process_index: int = 0
    process_count: int = 1
    packing: Packing | None = None
    """How items become rows, where they are not texts that follow each other."""

    def __iter__(self) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        packing = self.packing or Packing(
            self.tokenizer.encode_with_bytes, self.tokenizer.end_id
        )
        documents = grain.MapDataset.concatenate(_datasets(self.corpus.held_out))
        # A few batches should stand for all of the text: a fixed shuffle.
        rows = PackedRows(
            _read(documents.shuffle(seed=0).map(packing.encode), self.tokenizer),
            _row_spec(
                self.cfg,
                packing,
                self.seq_len,
                self.global_batch_size,
                self.process_index,
                self.process_count,
            ),
            identity={},
            patience=len(documents),
        )
        iterator = _prefetched(rows, self.cfg.prefetch)
        try:
            for number, batch in enumerate(iterator, 1):
                yield packing.finish(batch), batch.num_bytes
                if number == self.batches:
                    return
        finally:
            iterator.close()


def _datasets(sources: Sequence[Source[Any]]) -> list[grain.MapDataset]:
    return [grain.MapDataset.source(source) for source in sources]


def _ordered(
    cfg: DataConfig, sources: Sequence[Source[Any]], seed: int
) -> grain.MapDataset:
    """Returns the documents of all epochs, in the order of training."""
    parts = _datasets(sources)
    if not cfg.weights and len(parts) > 1:
        parts = [grain.MapDataset.concatenate(parts)]
    if cfg.shuffle:
        # Grain adds the epoch to the seed; hashed, seeds 0 and 1 do not share epochs.
        parts = [
            part.shuffle(seed=zlib.crc32(f"{seed}/{number}".encode()))
            for number, part in enumerate(parts)
        ]
    parts = [part.repeat() for part in parts]
    if len(parts) == 1:
        return parts[0]
    # The weights are shares of text; Grain draws documents.
    mean_bytes = [max(source.num_bytes, 1) / len(source) for source in sources]
    draws = [w / mean for w, mean in zip(cfg.weights, mean_bytes, strict=True)]
    return grain.MapDataset.mix(parts, draws)


def _read(items: grain.MapDataset, tokenizer: Tokenizer) -> grain.IterDataset:
    # Bytes cost nothing to make. A real tokenizer releases the interpreter lock, so some
    # threads of it run at a time; the order does not depend on them.
    cores = os.cpu_count() or 1
    threads = min(_MAX_READERS, max(1, cores // 2))
    options = grain.ReadOptions(
        num_threads=0 if isinstance(tokenizer, ByteTokenizer) else threads,
        prefetch_buffer_size=_DOCUMENTS_AHEAD,
    )
    return items.to_iter_dataset(options)


def _row_spec(
    cfg: DataConfig,
    packing: Packing,
    seq_len: int,
    global_batch_size: int,
    process_index: int,
    process_count: int,
) -> RowSpec:
    first_row, num_rows = share_of_rows(global_batch_size, process_index, process_count)
    return RowSpec(
        seq_len=seq_len,
        global_batch_size=global_batch_size,
        first_row=first_row,
        num_rows=num_rows,
        end_id=packing.lead_id,
        document_mask=cfg.document_mask,
        whole=packing.whole,
    )


def identity_of(
    cfg: DataConfig, sources: Sequence[Source[Any]], tokenizer: Tokenizer, seed: int
) -> dict[str, Any]:
    """Returns what the order of the data depends on, by setting."""
    texts = [f"{source.fingerprint:x}" for source in sources]
    return {
        "data.path (its text)": texts,
        "data.clean": sorted(cfg.clean) or None,
        "data.weights": list(cfg.weights),
        "data.shuffle": cfg.shuffle,
        "data.tokenizer": tokenizer.fingerprint,
        "seed": seed if cfg.shuffle else None,
    }


def _prefetched(batches: grain.IterDataset, ahead: int) -> grain.DatasetIterator:
    iterator = iter(
        grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=ahead
        )
    )
    _open.add(iterator)
    return iterator


_open: weakref.WeakSet[grain.DatasetIterator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # A reader thread that outlives the interpreter ends the process with SIGABRT.
    for iterator in list(_open):
        iterator.close()
        # Grain closes again in __del__, when its own modules may be gone.
        iterator.close = lambda: None
