# SPDX-License-Identifier: Apache-2.0
"""Records to a TFDS set of array_record files, and a division of them that does not leak.

TFDS itself writes the set, so that `tfds.data_source(NAME, data_dir=...)` serves it too,
and under a name that TFDS knows a recipe runs on the public set by the same path. A set is
written in a folder of its own and then renamed: a killed preparation leaves nothing that
looks whole, and processes may prepare at once.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordReader

from jaxspeed.data.documents import Record, T
from jaxspeed.data.download import Downloads


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """What TFDS is to know of a set."""

    name: str
    """Under which it is found."""
    version: str
    """Part of the path: changed records need a new version."""
    features: Callable[[], dict[str, Any]]
    """Gives the TFDS feature of each field."""
    description: str
    """What it is, and how it differs from a public set of that name."""
    config: str = ""
    """The variant, where the public set has several."""
    licence: str = ""
    """Of the records."""

    def folder(self, data_dir: Path) -> Path:
        """Returns where the set lies."""
        return data_dir / self.name / self.config / self.version


class DataSet(NamedTuple):
    """A set that `jaxspeed data` can make."""

    info: SetInfo
    fetched: str
    """What is fetched for it, in words."""
    read: Callable[[Downloads], Mapping[str, Sequence[Record]]]
    """Gives the records of each split."""


def write_set(
    info: SetInfo, data_dir: Path, splits: Mapping[str, Iterable[Record]]
) -> Path:
    """Writes a set under `data_dir` in the order given; returns its folder.

    Raises:
        OSError: `data_dir` cannot be written.
    """
    final = info.folder(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".prepare-") as parts:
        # TFDS draws a bar for each step of each split.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            _builder(info, Path(parts), splits).download_and_prepare()
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists() and not counts_of(final):
            shutil.rmtree(final)
        try:
            os.rename(info.folder(Path(parts)), final)
        except OSError:
            # Another process was first.
            if not counts_of(final):
                raise
    return final


def counts_of(folder: Path) -> dict[str, int]:
    """Returns the records of each split of a prepared set; nothing if it is not whole."""
    try:
        text = (folder / "dataset_info.json").read_text(encoding="utf-8")
        splits = json.loads(text)["splits"]
        shards = {
            split["name"]: list(map(int, split["shardLengths"])) for split in splits
        }
        files = list(folder.glob("*.array_record*"))
        if len(files) != sum(map(len, shards.values())):
            return {}
        for file in files:
            ArrayRecordReader(str(file)).close()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return {}
    return {name: sum(lengths) for name, lengths in shards.items()}


def divide(
    items: Sequence[T],
    keys: Callable[[T], Iterable[str]],
    shares: Mapping[str, float],
) -> dict[str, list[T]]:
    """Returns the items by split, in an order that looks random.

    Items that have a key in common, directly or through others, are in the same split, so
    that no text is both trained on and held out. All depends on the keys alone: not on the
    order of the items, a seed, or the machine.

    Args:
        items: what is divided.
        keys: texts that may not be in two splits; compared without case and white space.
        shares: of the held-out splits, by name; the rest is `train`.
    """
    keys_of = [sorted({_plain(key) for key in keys(item)}) for item in items]
    leader: dict[str, str] = {}

    def find(key: str) -> str:
        while (above := leader.setdefault(key, key)) != key:
            leader[key] = key = leader[above]
        return key

    for names in keys_of:
        for name in names[1:]:
            # The smallest key of a group stands for it, whatever came first.
            first, second = sorted((find(names[0]), find(name)))
            leader[second] = first
    order = sorted(range(len(items)), key=lambda i: _fraction("\0".join(keys_of[i])))
    splits: dict[str, list[T]] = {"train": []} | {name: [] for name in shares}
    for index in order:
        place = _fraction(find(keys_of[index][0]))
        for name, share in shares.items():
            if (place := place - share) < 0:
                splits[name].append(items[index])
                break
        else:
            splits["train"].append(items[index])
    return splits


def _plain(key: str) -> str:
    return " ".join(key.lower().split())


def _fraction(key: str) -> float:
    """Returns a number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _builder(
    info: SetInfo, data_dir: Path, splits: Mapping[str, Iterable[Record]]
) -> Any:
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = info.name
        VERSION = tfds.core.Version(info.version)
        BUILDER_CONFIGS = (
            [tfds.core.BuilderConfig(name=info.config)] if info.config else []
        )
        # Nothing is downloaded, and there are no checksums beside the code.
        url_infos = None

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=info.description,
                license=info.licence or None,
                features=tfds.features.FeaturesDict(info.features()),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {name: self._generate_examples(name) for name in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, Any]]:
            yield from enumerate(splits[split])

    return Builder(data_dir=data_dir, file_format="array_record")
