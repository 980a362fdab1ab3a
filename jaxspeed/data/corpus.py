# SPDX-License-Identifier: Apache-2.0
"""The data of a run: what is trained on, and what is held out from it.

Whole documents or records are held out, spread evenly and by position alone, so that the
split does not change with the seed, the tokenizer or the number of processes. A set's own
held-out split, or `data.eval_path`, takes the place of that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import numpy as np
from jaxtyping import Int64

from jaxspeed.config import ConfigError, DataConfig, config_error
from jaxspeed.data.documents import Record, Source, T
from jaxspeed.data.examples import record_reader
from jaxspeed.data.sources import Reader, canonical, files_of, open_path, text_reader


@dataclass(frozen=True)
class Corpus(Generic[T]):
    """Items to train on, a source for each entry of `data.path`, and those held out."""

    train: tuple[Source[T], ...]
    held_out: tuple[Source[T], ...]
    noun: str
    """What an item is called."""

    def describe(self) -> str:
        """Returns one line for the run's log."""
        names = ", ".join(source.name for source in self.train)
        train, held_out = (self._amount(part) for part in (self.train, self.held_out))
        return f"{names}: {train} to train on, {held_out} held out"

    def _amount(self, sources: tuple[Source[T], ...]) -> str:
        count = sum(len(source) for source in sources)
        size = sum(source.num_bytes for source in sources)
        power = min((len(str(size)) - 1) // 3, 4)
        unit = ("B", "kB", "MB", "GB", "TB")[power]
        return f"{count:,} {self.noun}s ({size / 1000**power:.3g} {unit})"


class Subset(Generic[T]):
    """The held-out items of a source, or all the others."""

    def __init__(self, source: Source[T], held: Int64[np.ndarray, " N"], *, keep: bool):
        self.name = source.name
        self._source = source
        self._held = held
        self._keep = keep
        # Held-out item k has held[k] - k others before it.
        self._others_before = held - np.arange(len(held))
        share = len(self) / len(source)
        self.num_bytes = round(source.num_bytes * share)
        self.fingerprint = source.fingerprint ^ (len(held) << 33) ^ (keep << 32)

    def __len__(self) -> int:
        held = len(self._held)
        return held if self._keep else len(self._source) - held

    def __getitem__(self, index: int) -> T:
        if self._keep:
            return self._source[int(self._held[index])]
        skipped = np.searchsorted(self._others_before, index, side="right")
        return self._source[index + int(skipped)]


def open_corpus(cfg: DataConfig) -> Corpus[str]:
    """Opens everything that the data configuration names, as documents.

    Raises:
        ConfigError: a path is missing, empty, damaged or not text; or no document can
            be held out.
    """
    cache_dir = Path(cfg.cache_dir).expanduser()
    return _open(cfg, text_reader(cfg.text_field, cache_dir), "document")


def open_record_corpus(cfg: DataConfig, fields: Sequence[str]) -> Corpus[Record]:
    """Opens everything that the data configuration names, as records.

    A set that has no validation split holds out its test split.

    Args:
        cfg: the data configuration.
        fields: what is wanted of each record, as in `examples.open_examples`.

    Raises:
        ConfigError: a path is missing, empty, damaged or has no such field; or no record
            can be held out.
    """
    cache_dir = Path(cfg.cache_dir).expanduser()
    return _open(cfg, record_reader(fields, cache_dir), "record")


def split(source: Source[T], fraction: float) -> tuple[Subset[T], Subset[T]]:
    """Returns the items to train on and those held out.

    Of two items or more at least one is held out and one is not.
    """
    count = len(source)
    wanted = min(max(round(count * fraction), 1), count - 1)
    held = (2 * np.arange(wanted, dtype=np.int64) + 1) * count // (2 * max(wanted, 1))
    return Subset(source, held, keep=False), Subset(source, held, keep=True)


def _open(cfg: DataConfig, reader: Reader[T], noun: str) -> Corpus[T]:
    train, held_out = [], []
    for path in cfg.eval_path:
        source, valid = open_path(path, reader, field="data.eval_path")
        if valid is None:
            _check_unseen(path, cfg.path, reader)
        held_out.append(source if valid is None else valid)
    if held_out:
        train = [open_path(path, reader, field="data.path")[0] for path in cfg.path]
        return Corpus(tuple(train), tuple(held_out), noun)
    for path in cfg.path:
        source, valid = open_path(path, reader, field="data.path")
        if valid is None:
            source, valid = split(source, cfg.eval_fraction)
        train.append(source)
        held_out += [valid] if len(valid) else []
    if not held_out:
        raise config_error(
            "data.path",
            cfg.path,
            f"it is a single {noun}, so none can be held out for evaluation",
            "give data.eval_path, or more text",
        )
    return Corpus(tuple(train), tuple(held_out), noun)


def _check_unseen(path: str, trained_on: tuple[str, ...], reader: Reader[T]) -> None:
    """Raises if an entry of `data.eval_path` is also in `data.path`."""
    for other in trained_on:
        shared = sorted(map(str, files_of(path, reader) & files_of(other, reader)))
        shared += [path] if canonical(path) == canonical(other) else []
        if shared:
            raise ConfigError(
                f"data.eval_path={path!r}: {shared[0]} is also in data.path={other!r}, "
                "so the evaluation would see what is trained on; remove it from one of them"
            )
