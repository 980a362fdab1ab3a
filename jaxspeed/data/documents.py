# SPDX-License-Identifier: Apache-2.0
"""What a source of text is, and what the sources of this package share.

A source has a length and gives document i as a string. Nothing here knows a format.
"""

import contextlib
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxspeed.config import ConfigError, config_error, suggest


@runtime_checkable
class Source(Protocol):
    """Documents by index."""

    name: str
    """What the configuration calls it."""
    num_bytes: int
    """UTF-8 bytes of text; where only reading all would tell, an estimate."""
    fingerprint: int
    """Changes when the documents or their order do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


class Origin(NamedTuple):
    """The setting, and the file under it, that an error is about."""

    field: str
    value: str
    file: Path | None = None

    def error(self, why: str, change: str) -> ConfigError:
        """Returns the one-line error."""
        if self.file is not None and self.file != Path(self.value).expanduser():
            why = f"{self.file} {why}"
        return config_error(self.field, self.value, why, change)

    def no_field(self, what: str, field: str, known: list[str]) -> ConfigError:
        """Returns the error for text under another name, with the names there are."""
        return self.error(
            f"{what} {field!r}, only {known}",
            f"set data.text_field to one of them.{suggest(field, known)}",
        )


class Joined:
    """Several sources one after the other."""

    def __init__(self, name: str, parts: list[Source]):
        self.name = name
        self.num_bytes = sum(part.num_bytes for part in parts)
        self.fingerprint = combine(part.fingerprint for part in parts)
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> str:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]


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
