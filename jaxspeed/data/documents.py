# SPDX-License-Identifier: Apache-2.0
"""What a source is, and what the sources of this package share.

A source has a length and gives item i: a document as a string, or a record with several
fields as a dict. Nothing here knows a format.
"""

import contextlib
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import (
    Any,
    BinaryIO,
    Generic,
    NamedTuple,
    Protocol,
    TypeVar,
    runtime_checkable,
)

import numpy as np
from jaxtyping import Int64

from jaxspeed.config import ConfigError, config_error, suggest


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class Source(Protocol[T_co]):
    """Documents or records by index."""

    name: str
    """What the configuration calls it."""
    num_bytes: int
    """UTF-8 bytes of documents (where only reading all would tell, an estimate); of records, as they are stored."""
    fingerprint: int
    """Changes when the items or their order do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> T_co: ...


Record = dict[str, Any]
"""A record's fields: strings, numbers, NumPy arrays, lists, and dicts of those."""

RecordSource = Source[Record]


class Origin(NamedTuple):
    """The setting, and the file under it, that an error is about."""

    field: str
    value: str
    file: Path | None = None
    fields: str = "data.text_field"
    """The setting that names what is read of each record."""

    def error(self, why: str, change: str) -> ConfigError:
        """Returns the one-line error."""
        if self.file is not None and self.file != Path(self.value).expanduser():
            why = f"{self.file} {why}"
        return config_error(self.field, self.value, why, change)

    def no_field(self, what: str, field: str, known: list[str]) -> ConfigError:
        """Returns the error for a field under another name, with the names there are."""
        return self.error(
            f"{what} {field!r}, only {known}",
            f"set {self.fields} to one of them.{suggest(field, known)}",
        )


class Joined(Generic[T]):
    """Several sources one after the other."""

    def __init__(self, name: str, parts: Sequence[Source[T]]):
        self.name = name
        self.num_bytes = sum(part.num_bytes for part in parts)
        self.fingerprint = combine(part.fingerprint for part in parts)
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> T:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]


class Selected(Generic[T]):
    """The items of a source at some indices, in the order of those."""

    def __init__(self, source: Source[T], indices: Int64[np.ndarray, " N"]):
        self.name = source.name
        self.num_bytes = round(source.num_bytes * len(indices) / max(len(source), 1))
        self.fingerprint = combine([source.fingerprint, zlib.crc32(indices.tobytes())])
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> T:
        return self._source[int(self._indices[index])]


@contextlib.contextmanager
def atomic(target: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears under its name only when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(part, target)
    except BaseException:
        os.unlink(part)
        raise


def unwritable(cache_dir: Path, err: OSError) -> ConfigError:
    """Returns the error for a cache folder that cannot be written."""
    why = f"cannot be written ({first_line(err)})"
    return config_error("data.cache_dir", str(cache_dir), why, "give a writable folder")


def combine(values: Iterable[int]) -> int:
    """Returns one number for several, in their order."""
    return zlib.crc32(",".join(map(str, values)).encode())


def first_line(err: BaseException) -> str:
    """Returns the first line of an error's message, or its kind."""
    return (str(err).splitlines() or [type(err).__name__])[0]
