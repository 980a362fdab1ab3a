# SPDX-License-Identifier: Apache-2.0
"""An entry of `data.path` to items: what kind of thing it is, and what is in it.

A path names a set with splits or plain files. A `Reader` says what becomes of either:
documents here, records with several fields in `examples`. The one decision: a split is
opened when it is chosen, so that a damaged test file does not stop training.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from jaxspeed.config import ConfigError, suggest
from jaxspeed.data.documents import Joined, Origin, Source, T
from jaxspeed.data.records import (
    BUNDLED,
    TFDS_PREFIX,
    bundled_splits,
    folder_splits,
    open_array_records,
    open_texts,
    tfds_splits,
)
from jaxspeed.data.textfiles import TEXT_KINDS, open_text_file


_RECORDS = ".array_record"

_SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
_FILE_OF_SPLIT = re.compile(r"([a-z]+)([-_]v?\d.*)?")


@dataclass(frozen=True, kw_only=True)
class Reader(Generic[T]):
    """What becomes of the things that a path may name."""

    kinds: Mapping[str, Callable[[Origin, Path], Source[T]]]
    """What opens a file, by the end of its name."""
    open_split: Callable[[Origin, Any], Source[T]]
    """What opens a split of a TFDS set."""
    held_out: tuple[str, ...]
    """Names of splits that are held out from training; the first that a set has is."""
    fields: str
    """The setting that names what is read of each record."""
    cache_dir: Path
    """Where prepared sets and indices are kept."""


def open_path(
    path: str, reader: Reader[T], *, field: str
) -> tuple[Source[T], Source[T] | None]:
    """Opens one entry of `data.path` or `data.eval_path`.

    Args:
        path: `shakespeare`, `tfds:NAME`, a file or a folder; and `#SPLIT` after it for
            one split alone.
        reader: how it is read.
        field: the setting it came from, for errors.

    Returns:
        The items to train on, and those that the set itself holds out, if it does.

    Raises:
        ConfigError: missing, empty, damaged, or no such split.
    """
    origin = Origin(field, path, fields=reader.fields)
    place, chosen = _place_and_split(path)
    with _readable(origin):
        splits = _splits(origin, place, reader)
        if chosen or "train" not in splits:
            return _chosen(origin, splits, chosen or "train"), None
        held_out = next((name for name in reader.held_out if name in splits), None)
        return splits["train"](), splits[held_out]() if held_out else None


def open_split(path: str, reader: Reader[T], *, field: str, split: str) -> Source[T]:
    """Opens one split of what a path names.

    Args:
        path: as in `open_path`; a split that it names itself is taken.
        reader: how it is read.
        field: the setting it came from, for errors.
        split: the split, `train` for plain files.

    Raises:
        ConfigError: missing, empty, damaged, or no such split.
    """
    origin = Origin(field, path, fields=reader.fields)
    place, chosen = _place_and_split(path)
    with _readable(origin):
        return _chosen(origin, _splits(origin, place, reader), chosen or split)


def open_source(
    path: str, *, field: str, text_field: str, cache_dir: Path
) -> tuple[Source[str], Source[str] | None]:
    """Opens a path as documents.

    Args:
        path: as in `open_path`.
        field: the setting it came from, for errors.
        text_field: key or column that holds the text.
        cache_dir: where prepared sets and indices are kept.

    Returns:
        The documents, and the set's own validation split if it has one.

    Raises:
        ConfigError: missing, empty, damaged or not text.
    """
    return open_path(path, text_reader(text_field, cache_dir), field=field)


def text_reader(text_field: str, cache_dir: Path) -> Reader[str]:
    """Returns the reader of documents: one field of each record, or plain text."""

    def open_file(kind: str, origin: Origin, file: Path) -> Source[str]:
        return open_text_file(origin._replace(file=file), kind, text_field, cache_dir)

    kinds = {kind: functools.partial(open_file, kind) for kind in TEXT_KINDS}
    return Reader(
        kinds={**kinds, _RECORDS: open_array_records},
        open_split=lambda origin, records: open_texts(origin, records, text_field),
        held_out=("validation", "valid"),
        fields="data.text_field",
        cache_dir=cache_dir,
    )


def files_of(path: str, reader: Reader[T]) -> frozenset[Path]:
    """Returns the files that an entry of `data.path` reads; none for named sets."""
    place, chosen = _place_and_split(path)
    if place == BUNDLED or place.startswith(TFDS_PREFIX):
        return frozenset()
    found = Path(os.path.expanduser(place))
    files = _walk(found, reader) if found.is_dir() else [found]
    files = _by_split(found, files).get(chosen or "train", [])
    return frozenset(file.resolve() for file in files)


def canonical(path: str) -> str:
    """Returns a path without the name of the split that it has anyway."""
    place, chosen = _place_and_split(path)
    return place if chosen == "train" else path


def _place_and_split(path: str) -> tuple[str, str]:
    """Returns a path in its two parts; the second is empty where it names no split."""
    place, mark, split = path.rpartition("#")
    if not mark or Path(os.path.expanduser(path)).exists():
        return path, ""
    return place, split


def _splits(
    origin: Origin, place: str, reader: Reader[T]
) -> dict[str, Callable[[], Source[T]]]:
    """Returns what opens each split; plain files are one split, train."""
    found = Path(os.path.expanduser(place))
    if place == BUNDLED:
        sets = bundled_splits(reader.cache_dir)
    elif place.startswith(TFDS_PREFIX):
        name = place.removeprefix(TFDS_PREFIX)
        sets = tfds_splits(origin, name, reader.cache_dir)
    elif not place or not found.exists():
        raise _missing(origin, found)
    elif (found / "dataset_info.json").exists():
        sets = folder_splits(origin, found)
    else:
        groups = _by_split(found, _files(origin, found, reader))
        for file in groups.get("", []):
            why = f"{file} does not say in which split it is, as others do"
            raise origin.error(why, "name it train, validation or test, or move it")
        return {
            name: functools.partial(_open_files, origin, files, reader)
            for name, files in groups.items()
        }
    return {
        name: functools.partial(_open_split, origin, records, name, reader)
        for name, records in sets.items()
    }


def _chosen(
    origin: Origin, splits: dict[str, Callable[[], Source[T]]], name: str
) -> Source[T]:
    if name not in splits:
        raise origin.error(
            f"there is no {name} split, only {list(splits)}",
            f"name one of them after a #.{suggest(name, splits)}",
        )
    return splits[name]()


@contextlib.contextmanager
def _readable(origin: Origin) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        why = f"cannot be read ({err})"
        raise origin.error(why, "check that the file is there and readable") from err


def _open_split(
    origin: Origin, records: Any, name: str, reader: Reader[T]
) -> Source[T]:
    if not len(records):
        raise origin.error(f"the {name} split is empty", "give another set")
    return reader.open_split(origin, records)


def _open_files(origin: Origin, files: list[Path], reader: Reader[T]) -> Source[T]:
    parts = [reader.kinds[str(_kind(file, reader))](origin, file) for file in files]
    source = parts[0] if len(parts) == 1 else Joined(origin.value, parts)
    if not len(source):
        raise origin.error("holds nothing to read", "give a file that is not empty")
    return source


def _by_split(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Returns files by the split that their names say, or all of them as train.

    A folder has splits if a file or folder in it is named train, with a number or version
    after that at most (train-00000-of-00002.parquet, train-v1.1.json).
    """
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_split_of(root, file), []).append(file)
    return groups if "train" in groups and root.is_dir() else {"train": files}


def _split_of(root: Path, file: Path) -> str:
    """Returns the split that a file's name, or a folder's above it, says; or ""."""
    for part in reversed(file.relative_to(root).parts):
        said = _FILE_OF_SPLIT.fullmatch(part.split(".")[0].lower())
        for split, names in _SPLIT_NAMES.items():
            if said and said[1] in names:
                return split
    return ""


def _missing(origin: Origin, found: Path) -> ConfigError:
    beside = [p.name for p in found.parent.iterdir()] if found.parent.is_dir() else []
    return origin.error(
        "no such file or folder",
        f"give a file, a folder, {BUNDLED} or {TFDS_PREFIX}NAME."
        + suggest(found.name, [*beside, BUNDLED]),
    )


def _kind(file: Path, reader: Reader[T]) -> str | None:
    # TFDS and others name shards x.array_record-00000-of-00004.
    kind = _RECORDS if _RECORDS in file.name else file.suffix.lower()
    return kind if kind in reader.kinds else None


def _walk(folder: Path, reader: Reader[T]) -> list[Path]:
    """Returns the readable files below a folder, sorted, without hidden ones."""
    files: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += (Path(root, name) for name in names if not name.startswith("."))
    return sorted(file for file in files if _kind(file, reader))


def _files(origin: Origin, found: Path, reader: Reader[T]) -> list[Path]:
    """Returns the files of a path, at least one."""
    files = _walk(found, reader) if found.is_dir() else [found]
    *others, last = reader.kinds
    known = f"{', '.join(others)} or {last}"
    if not files:
        raise origin.error(f"the folder holds no {known} file", "give another folder")
    if found.is_file() and _kind(found, reader) is None:
        why = "its name does not say that it is a kind of file that is read here"
        raise origin.error(why, f"give {known}")
    return files
