# SPDX-License-Identifier: Apache-2.0
"""The data of a run: what is trained on, and what is held out from it.

Whole documents or records are held out, spread evenly and by position alone, so that the
split does not change with the seed, the tokenizer or the number of processes. A set's own
held-out split, or `data.eval_path`, takes the place of that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import numpy as np
from jaxtyping import Int64

from jaxspeed.config import ConfigError, DataConfig, config_error
from jaxspeed.data.clean import STEPS, Cleaned, Seen, clean_strings, make_cleaner
from jaxspeed.data.documents import Record, Selected, Source, T
from jaxspeed.data.examples import record_reader
from jaxspeed.data.sources import Reader, canonical, files_of, open_path, text_reader


@dataclass(frozen=True)
class Corpus(Generic[T]):
    """Items to train on, a source for each entry of `data.path`, and those held out to evaluate on.

    With `data.eval_on="train"` the latter are the former.
    """

    train: tuple[Source[T], ...]
    held_out: tuple[Source[T], ...]
    noun: str
    """What an item is called."""

    def describe(self) -> str:
        """Returns one line for the run's log."""
        names = ", ".join(source.name for source in self.train)
        train, held_out = (self._amount(part) for part in (self.train, self.held_out))
        rest = f"{held_out} held out"
        if self.held_out is self.train:
            rest = "and evaluated on (data.eval_on=train)"
        return f"{names}: {train} to train on, {rest}"

    def _amount(self, sources: tuple[Source[T], ...]) -> str:
        count = sum(len(source) for source in sources)
        size = sum(source.num_bytes for source in sources)
        power = min((len(str(size)) - 1) // 3, 4)
        unit = ("B", "kB", "MB", "GB", "TB")[power]
        return f"{count:,} {self.noun}s ({size / 1000**power:.3g} {unit})"


class _Others(Generic[T]):
    """The items of a source that are not held out."""

    def __init__(self, source: Source[T], held: Int64[np.ndarray, " N"]):
        self.name = source.name
        self._source = source
        # Held-out item k has held[k] - k others before it.
        self._others_before = held - np.arange(len(held))
        self._count = len(source) - len(held)
        self.num_bytes = round(source.num_bytes * self._count / len(source))
        self.fingerprint = source.fingerprint ^ (len(held) << 33)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> T:
        skipped = np.searchsorted(self._others_before, index, side="right")
        return self._source[index + int(skipped)]


def open_corpus(cfg: DataConfig) -> Corpus[str]:
    """Opens everything that the data configuration names, as documents.

    Raises:
        ConfigError: a path is missing, empty, damaged or not text; or no document can
            be held out.
    """
    cache_dir = Path(cfg.cache_dir).expanduser()
    corpus = _open(cfg, text_reader(cfg.text_field, cache_dir), "document")
    return _cleaned(cfg, corpus, make_cleaner(cfg.clean))


def open_record_corpus(
    cfg: DataConfig, fields: Sequence[str], targets: Sequence[str] = ()
) -> Corpus[Record]:
    """Opens everything that the data configuration names, as records.

    A set that has no validation split holds out its test split.

    Args:
        cfg: the data configuration.
        fields: what is wanted of each record, as in `examples.open_examples`.
        targets: those of the fields that keep their stop words.

    Raises:
        ConfigError: a path is missing, empty, damaged or has no such field; or no record
            can be held out.
    """
    cache_dir = Path(cfg.cache_dir).expanduser()
    corpus = _open(cfg, record_reader(fields, cache_dir), "record")
    clean = make_cleaner(cfg.clean)
    clean_target = make_cleaner([name for name in cfg.clean if name != "stop_words"])

    def clean_record(record: Record) -> Record:
        return {
            name: clean_strings(value, clean_target if name in targets else clean)
            for name, value in record.items()
        }

    for source in corpus.train if set(cfg.clean) & set(STEPS) else ():
        _check_no_offsets(cfg, source[0])
    return _cleaned(cfg, corpus, clean_record)


def split(source: Source[T], fraction: float) -> tuple[Source[T], Source[T]]:
    """Returns the items to train on and those held out.

    Of two items or more at least one is held out and one is not.
    """
    count = len(source)
    wanted = min(max(round(count * fraction), 1), count - 1)
    held = (2 * np.arange(wanted, dtype=np.int64) + 1) * count // (2 * max(wanted, 1))
    return _Others(source, held), Selected(source, held)


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


def _cleaned(cfg: DataConfig, corpus: Corpus[T], clean: Callable[[T], T]) -> Corpus[T]:
    """Returns a corpus as `data.clean` has it."""
    held_out, train = corpus.held_out, corpus.train
    if set(cfg.clean) & set(STEPS):
        held_out = tuple(Cleaned(source, clean) for source in held_out)
        train = tuple(Cleaned(source, clean) for source in train)
    near = "near_duplicates" in cfg.clean
    if near or "duplicates" in cfg.clean:
        seen = Seen(near=near)
        held_out = tuple(seen.unseen(source) for source in held_out)
        train = tuple(seen.unseen(source) for source in train)
    for source in train:
        if not len(source):
            why = f"each {corpus.noun} of {source.name} is held out, or another's repetition"
            raise config_error("data.clean", cfg.clean, why, "leave out that path")
    if cfg.eval_on == "train":
        return Corpus(train, train, corpus.noun)
    return Corpus(train, tuple(filter(len, held_out)), corpus.noun)


def _check_no_offsets(cfg: DataConfig, record: Record) -> None:
    """Raises if cleaning would shift what a record points to."""
    for name, value in record.items():
        if isinstance(value, dict) and "answer_start" in value:
            raise config_error(
                "data.clean",
                cfg.clean,
                f"field {name!r} says where in another an answer begins, which cleaning shifts",
                f"leave out {sorted(set(cfg.clean) & set(STEPS))}",
            )


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
