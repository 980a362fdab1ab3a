# SPDX-License-Identifier: Apache-2.0
"""Real data and weights that package registries hold: `jaxspeed data NAME`.

Each set is a module: where it is from, what becomes of it, its fields. The one decision: a
set has the name and fields of the TFDS set that it stands for, if there is one, so that a
recipe does not change where the public set can be had.
"""

import itertools
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn

from jaxspeed.config import ConfigError, suggest
from jaxspeed.data.documents import Record, unwritable
from jaxspeed.data.download import Downloads, progress
from jaxspeed.data.prepare import DataSet, counts_of, write_set
from jaxspeed.data.sets import (
    bigbench,
    descriptions,
    help_pages,
    prompts,
    reviews,
    shapes,
)
from jaxspeed.data.sets.weights import WEIGHTS, unpack


_ALL = (
    reviews.SET,
    bigbench.SQUAD,
    bigbench.CIFAR10,
    help_pages.SET,
    descriptions.SET,
    prompts.SET,
    shapes.SET,
)

SETS = {entry.info.name: entry for entry in _ALL}
"""Sets by name."""


class Offer(NamedTuple):
    """What a name stands for."""

    name: str
    description: str
    fetched: str
    """What is fetched for it."""
    licence: str
    ready: bool
    """It is in the cache."""

    def __str__(self) -> str:
        about = textwrap.fill(
            f"{self.description} From {self.fetched}. Licence: {self.licence}.",
            width=88,
            initial_indent="    ",
            subsequent_indent="    ",
        )
        return f"{self.name}{'  (ready)' if self.ready else ''}\n{about}"


class Fetched(NamedTuple):
    """What a name became."""

    name: str
    use: str
    """What a setting is to say: `tfds:NAME`, or where a model is."""
    path: Path
    records: dict[str, int]
    """In each split; none for a model."""

    def __str__(self) -> str:
        counts = (f"{split} {count:,}" for split, count in self.records.items())
        return f"{self.use}  {', '.join(counts)}".rstrip()


def describe(cache_dir: Path) -> list[Offer]:
    """Returns what there is to fetch.

    Args:
        cache_dir: where it is kept, `data.cache_dir`.
    """
    offers = []
    for name, (info, fetched, _) in SETS.items():
        ready = bool(counts_of(info.folder(cache_dir / "tfds")))
        offers.append(Offer(name, info.description, fetched, info.licence, ready))
    for name, model in WEIGHTS.items():
        ready = (cache_dir / "weights" / name).exists()
        about = model.description, model.fetched, model.licence
        offers.append(Offer(name, *about, ready))
    return offers


def fetch(names: Sequence[str], cache_dir: Path) -> list[Fetched]:
    """Fetches and prepares what is not there yet.

    Args:
        names: of `SETS` and of `WEIGHTS`.
        cache_dir: where all is kept, `data.cache_dir`.

    Raises:
        ConfigError: an unknown name, or it cannot be fetched or written.
    """
    known = [*SETS, *WEIGHTS]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"data={name!r}: no such data; give some of {known}.{suggest(name, known)}"
            )
    try:
        return [_fetch(name, cache_dir) for name in names]
    except OSError as err:
        raise unwritable(cache_dir, err) from err


def _fetch(name: str, cache_dir: Path) -> Fetched:
    downloads = Downloads(cache_dir / "downloads", name)
    if name in WEIGHTS:
        path = unpack(name, WEIGHTS[name], downloads, cache_dir / "weights")
        return Fetched(name, str(path), path, {})
    info = SETS[name].info
    folder = info.folder(cache_dir / "tfds")
    counts = counts_of(folder) or _prepare(SETS[name], downloads, cache_dir / "tfds")
    return Fetched(name, f"tfds:{name}", folder, counts)


def _prepare(entry: DataSet, downloads: Downloads, data_dir: Path) -> dict[str, int]:
    # A set of TFDS has no split without records.
    splits = {name: found for name, found in entry.read(downloads).items() if found}
    counts = {name: len(records) for name, records in splits.items()}
    # Not Console(stderr=True): what TFDS writes to sys.stderr is caught meanwhile.
    console, written = Console(file=sys.stderr, highlight=False), itertools.count(1)
    total = sum(counts.values())
    with progress(console, entry.info.name, total, MofNCompleteColumn()) as tell:

        def told(records: Sequence[Record]) -> Iterator[Record]:
            for record in records:
                tell(next(written))
                yield record

        write_set(entry.info, data_dir, {n: told(r) for n, r in splits.items()})
    return counts
