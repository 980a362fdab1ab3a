# SPDX-License-Identifier: Apache-2.0
"""The text of a run: what is trained on, and what is held out from it.

Whole documents are held out, spread evenly and by position alone, so that the split
does not change with the seed, the tokenizer or the number of processes. A set's own
validation split, or `data.eval_path`, takes the place of that.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from jaxspeed.config import ConfigError, DataConfig, config_error
from jaxspeed.data.documents import Source
from jaxspeed.data.sources import files_of, open_source


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, a source for each entry of `data.path`, and held out."""

    train: tuple[Source, ...]
    held_out: tuple[Source, ...]

    def describe(self) -> str:
        """Returns one line for the run's log."""
        names = ", ".join(source.name for source in self.train)
        train, held_out = _amount(self.train), _amount(self.held_out)
        return f"{names}: {train} to train on, {held_out} held out"


class Subset:
    """The held-out documents of a source, or all the others."""

    def __init__(self, source: Source, held: Int64[np.ndarray, " N"], *, keep: bool):
        self.name = source.name
        self._source = source
        self._held = held
        self._keep = keep
        # Held-out document k has held[k] - k others before it.
        self._others_before = held - np.arange(len(held))
        share = len(self) / len(source)
        self.num_bytes = round(source.num_bytes * share)
        self.fingerprint = source.fingerprint ^ (len(held) << 33) ^ (keep << 32)

    def __len__(self) -> int:
        held = len(self._held)
        return held if self._keep else len(self._source) - held

    def __getitem__(self, index: int) -> str:
        if self._keep:
            return self._source[int(self._held[index])]
        skipped = np.searchsorted(self._others_before, index, side="right")
        return self._source[index + int(skipped)]


def open_corpus(cfg: DataConfig) -> Corpus:
    """Opens everything that the data configuration names.

    Raises:
        ConfigError: a path is missing, empty, damaged or not text; or no document can
            be held out.
    """
    cache_dir = Path(cfg.cache_dir).expanduser()

    def opened(field: str, path: str) -> tuple[Source, Source | None]:
        return open_source(
            path, field=field, text_field=cfg.text_field, cache_dir=cache_dir
        )

    train, held_out = [], []
    for path in cfg.eval_path:
        source, valid = opened("data.eval_path", path)
        if valid is None:
            _check_unseen(path, cfg.path)
        held_out.append(source if valid is None else valid)
    if held_out:
        train = [opened("data.path", path)[0] for path in cfg.path]
        return Corpus(tuple(train), tuple(held_out))
    for path in cfg.path:
        source, valid = opened("data.path", path)
        if valid is None:
            source, valid = split(source, cfg.eval_fraction)
        train.append(source)
        held_out += [valid] if len(valid) else []
    if not held_out:
        raise config_error(
            "data.path",
            cfg.path,
            "it is a single document, so none can be held out for evaluation",
            "give data.eval_path, or more text",
        )
    return Corpus(tuple(train), tuple(held_out))


def split(source: Source, fraction: float) -> tuple[Subset, Subset]:
    """Returns the documents to train on and those held out.

    Of two documents or more at least one is held out and one is not.
    """
    count = len(source)
    wanted = min(max(round(count * fraction), 1), count - 1)
    held = (2 * np.arange(wanted, dtype=np.int64) + 1) * count // (2 * max(wanted, 1))
    return Subset(source, held, keep=False), Subset(source, held, keep=True)


def _check_unseen(path: str, trained_on: tuple[str, ...]) -> None:
    """Raises if an entry of `data.eval_path` is also in `data.path`."""
    for other in trained_on:
        shared = sorted(map(str, files_of(path) & files_of(other)))
        shared += [path] if path == other else []
        if shared:
            raise ConfigError(
                f"data.eval_path={path!r}: {shared[0]} is also in data.path={other!r}, "
                "so the evaluation would see training text; remove it from one of them"
            )


def _amount(sources: tuple[Source, ...]) -> str:
    documents = sum(len(source) for source in sources)
    size = sum(source.num_bytes for source in sources)
    power = min((len(str(size)) - 1) // 3, 4)
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    return f"{documents:,} documents ({size / 1000**power:.3g} {unit})"
