# SPDX-License-Identifier: Apache-2.0
"""Text, JSON lines and parquet files as documents that are read one at a time.

A file is not loaded. One pass over it checks it and keeps where each document begins, so
that bad data is an error before training and not in its third hour. A big file's index
is kept in the cache under its size and time of change. Parquet cannot give one row alone:
its text is unpacked into the cache.
"""

import codecs
import hashlib
import json
import logging
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple

import numpy as np
from jaxtyping import Int64

from jaxspeed.config import ConfigError
from jaxspeed.data.documents import Origin, Record, T, atomic, first_line, unwritable


_logger = logging.getLogger(__name__)

TEXT_KINDS = (".txt", ".jsonl", ".parquet")

_CHUNK = 1 << 23
_CACHED_FROM = 1 << 26
_INDEX_VERSION = 1
_BLANK_LINES = re.compile(rb"\n\s*\n")
_SURROGATE = re.compile("[\ud800-\udfff]")


class FileIndex(NamedTuple):
    """Where the documents lie in a file of text."""

    path: Path
    ranges: Int64[np.ndarray, "N 2"]
    num_bytes: int
    crc: int


class FileItems(Generic[T]):
    """Ranges of a file, read when asked for."""

    def __init__(self, origin: Origin, index: FileIndex, decode: Callable[[bytes], T]):
        self.name = origin.value
        self.num_bytes = index.num_bytes
        self.fingerprint = index.crc
        self._origin = origin
        self._path = index.path
        self._ranges = index.ranges
        self._decode = decode

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index: int) -> T:
        begin, end = self._ranges[index].tolist()
        try:
            return self._decode(_read_range(self._path, begin, end))
        except (OSError, EOFError, ValueError, KeyError, TypeError) as err:
            raise self._origin.error(
                f"changed while it was in use (item {index}: {first_line(err)})",
                "leave data alone during a run, and start again",
            ) from err


def open_text_file(
    origin: Origin, kind: str, text_field: str, cache_dir: Path
) -> FileItems[str]:
    """Checks and indexes `origin.file`, a file of one of `TEXT_KINDS`.

    Raises:
        ConfigError: damaged, not UTF-8 text, or without such a field.
    """
    assert origin.file is not None
    if kind == ".parquet":
        index = _parquet_index(origin, origin.file, text_field, cache_dir)
        return FileItems(origin, index, bytes.decode)
    if kind == ".txt":
        build, decode = _index_text, _decode_text
    else:
        build, decode = _json_indexer(text_field), _json_decoder(text_field)
    index = cached_index(origin, origin.file, f"{kind}/{text_field}", build, cache_dir)
    return FileItems(origin, index, decode)


def _read_range(path: Path, begin: int, end: int) -> bytes:
    # Opened each time: a folder may hold more files than a process may keep open.
    handle = os.open(path, os.O_RDONLY)
    try:
        parts = []
        while begin < end:
            part = os.pread(handle, end - begin, begin)
            if not part:
                raise EOFError("the file is shorter than it was")
            parts.append(part)
            begin += len(part)
        return b"".join(parts)
    finally:
        os.close(handle)


def cached_index(
    origin: Origin,
    file: Path,
    kind: str,
    build: Callable[[Origin, Path], FileIndex],
    cache_dir: Path,
) -> FileIndex:
    """Returns a file's index; a big file's is kept in the cache.

    Args:
        origin: of the file, for errors.
        file: what is indexed.
        kind: how it is read, as a part of the key.
        build: makes the index.
        cache_dir: where indices are kept.
    """
    if file.stat().st_size < _CACHED_FROM:
        return build(origin, file)
    kept = cache_key(file, kind, cache_dir).with_suffix(".npy")
    if (known := _load_index(kept, file)) is not None:
        return known
    index = build(origin, file)
    try:
        _save_index(kept, index)
    except OSError as err:
        _logger.warning("the index of %s is not kept: %s", file, err)
    return index


def cache_key(file: Path, kind: str, cache_dir: Path) -> Path:
    """Returns a path in the cache for what is made of a file that is read in this way."""
    stat = file.stat()
    key = f"{_INDEX_VERSION}|{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{kind}"
    name = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    return cache_dir / "index" / name


def _load_index(kept: Path, text: Path) -> FileIndex | None:
    """Returns a kept index; None if there is no whole one."""
    try:
        rows = np.load(kept, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return FileIndex(text, rows[1:], int(rows[0, 0]), int(rows[0, 1]))


def _save_index(kept: Path, index: FileIndex) -> None:
    first = np.array([[index.num_bytes, index.crc]], np.int64)
    with atomic(kept) as file:
        np.save(file, np.concatenate([first, index.ranges]))


# .txt ---------------------------------------------------------------------------------


def _decode_text(data: bytes) -> str:
    return data.decode().replace("\r\n", "\n")


def _index_text(origin: Origin, file: Path) -> FileIndex:
    """Cuts a text file into documents at blank lines, some KiB apart.

    A piece is about a thousandth of the file, from 4 KiB to 64 KiB, so that a large
    file can be shuffled; the pieces join to the whole text.
    """
    size = file.stat().st_size
    target = min(max(size // 1024, 4096), 65536)
    crc, base, buffer = 0, 0, b""
    with open(file, "rb") as stream:
        # A byte order mark is no text.
        begin = 3 if stream.read(3) == codecs.BOM_UTF8 else 0
        stream.seek(0)
        bounds = array("q", [begin])
        for chunk, last in _chunks(origin, stream):
            crc = zlib.crc32(chunk, crc)
            buffer += chunk
            while end := _cut(buffer, begin - base, target, last):
                begin = base + end
                bounds.append(begin)
            buffer, base = buffer[begin - base :], begin
    edges = np.array(bounds, np.int64)
    ranges = np.stack([edges[:-1], edges[1:]], axis=1)
    return FileIndex(file, ranges, int(edges[-1] - edges[0]), crc)


def _chunks(origin: Origin, stream: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Yields a file's chunks and whether each is the last, having checked the text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    chunk = stream.read(_CHUNK)
    while chunk:
        following = stream.read(_CHUNK)
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(chunk, final=not following)
        except UnicodeDecodeError as err:
            raise _not_utf8(origin, chunk, done - pending + err.start, err) from err
        if b"\0" in chunk:
            raise _binary(origin, done + chunk.index(b"\0"))
        done += len(chunk)
        yield chunk, not following
        chunk = following


def _not_utf8(
    origin: Origin, chunk: bytes, offset: int, err: UnicodeDecodeError
) -> ConfigError:
    if err.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        change = "convert it (iconv -f utf-16 -t utf-8)"
        return origin.error("is UTF-16 text, not UTF-8", change)
    if b"\0" in chunk:
        return _binary(origin, offset)
    byte = err.object[err.start]
    return origin.error(
        f"is not UTF-8 text: byte 0x{byte:02x} at offset {offset}, {err.reason}",
        "convert it (iconv -t utf-8), or leave it out",
    )


def _binary(origin: Origin, offset: int) -> ConfigError:
    return origin.error(
        f"is a binary file (offset {offset}), not text", "give UTF-8 text"
    )


def _cut(buffer: bytes, begin: int, target: int, last: bool) -> int | None:
    """Returns where the piece from `begin` ends, or None: read on, or nothing left."""
    limit = begin + 4 * target
    if begin >= len(buffer) or (len(buffer) <= limit and not last):
        return None
    if blank := _BLANK_LINES.search(buffer, begin + target, limit):
        return blank.end()
    if len(buffer) <= limit:
        return len(buffer)
    if newline := buffer.rfind(b"\n", begin + target, limit) + 1:
        return newline
    # No line ends within reach: cut between characters, and not inside a CRLF.
    while buffer[limit] & 0xC0 == 0x80 or buffer[limit - 1] == 0x0D:
        limit -= 1
    return limit


# .jsonl -------------------------------------------------------------------------------


def index_json_lines(
    origin: Origin, file: Path, measure: Callable[[str, Record, bytes], int]
) -> FileIndex:
    """Checks a file of one JSON object per line, and finds its lines.

    Args:
        origin: of the file, for errors.
        file: the file.
        measure: given where a line is, its object and the line, returns the bytes it
            counts for, 0 to leave it out, or raises what is wrong with it.

    Raises:
        ConfigError: a line is not UTF-8, not JSON, not an object, or not as measured.
    """
    ranges = array("q")
    crc, end, num_bytes = 0, 0, 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            crc = zlib.crc32(line, crc)
            begin, end = end, end + len(line)
            if not line.strip():
                continue
            record = _json_object(origin, line, number, begin)
            if size := measure(f"line {number}", record, line):
                ranges.extend((begin, end))
                num_bytes += size
    rows = np.frombuffer(ranges, np.int64).reshape(-1, 2)
    return FileIndex(file, rows, num_bytes, crc)


def whole_characters(text: str) -> str:
    """Returns the text with each half of a surrogate pair as U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text


def _json_decoder(text_field: str) -> Callable[[bytes], str]:
    def decode(line: bytes) -> str:
        text = json.loads(line.decode("utf-8-sig"))[text_field]
        if not isinstance(text, str):
            raise ValueError("there is no text now")
        return whole_characters(text)

    return decode


def _json_indexer(text_field: str) -> Callable[[Origin, Path], FileIndex]:
    def build(origin: Origin, file: Path) -> FileIndex:
        broken = 0

        def measure(where: str, record: Record, line: bytes) -> int:
            nonlocal broken
            del line
            raw = _json_text(origin, record, where, text_field)
            text = whole_characters(raw)
            broken += text is not raw
            return len(text) if text.isascii() else len(text.encode())

        index = index_json_lines(origin, file, measure)
        if broken:
            _logger.warning(
                "%s: %d documents hold half a surrogate pair, read as U+FFFD",
                file,
                broken,
            )
        return index

    return build


def _json_object(origin: Origin, line: bytes, number: int, begin: int) -> Record:
    """Returns the object of one JSON line, or raises what is wrong with it."""
    where = f"line {number}"
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as err:
        byte, offset = line[err.start], begin + err.start
        why = f"{where} is not UTF-8 text: byte 0x{byte:02x} at offset {offset}"
        raise origin.error(why, "convert it (iconv -t utf-8)") from err
    except ValueError as err:
        if not line.endswith(b"\n"):
            why = f"{where}, the last, is cut off ({err})"
            raise origin.error(why, "get the file again, or remove that line") from err
        why = f"{where} is not JSON ({err})"
        raise origin.error(why, "give one JSON object per line") from err
    if not isinstance(record, dict):
        why = f"{where} is a {type(record).__name__}, not an object"
        raise origin.error(why, "give one JSON object per line")
    return record


def _json_text(origin: Origin, record: Record, where: str, text_field: str) -> str:
    """Returns the text of a JSON object; null is the empty text."""
    if text_field not in record:
        raise origin.no_field(f"{where} has no field", text_field, list(record))
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        why = f"field {text_field!r} of {where} is a {type(text).__name__}, not text"
        raise origin.error(why, f"set {origin.fields} to a field of text")
    return text or ""


# .parquet -----------------------------------------------------------------------------


def open_parquet(origin: Origin, file: Path) -> Any:
    """Returns an open `pyarrow.parquet.ParquetFile`.

    Raises:
        ConfigError: it is not whole.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as err:
        why = f"is not a whole parquet file ({first_line(err)})"
        raise origin.error(why, "get the file again") from err


def _parquet_index(
    origin: Origin, file: Path, text_field: str, cache_dir: Path
) -> FileIndex:
    """Unpacks the text column into the cache once; a row cannot be read alone."""
    kept = cache_key(file, f"parquet/{text_field}", cache_dir).with_suffix(".npy")
    text = kept.with_suffix(".txt")
    known = _load_index(kept, text)
    if known and text.exists() and text.stat().st_size == known.num_bytes:
        return known
    rows = _parquet_texts(origin, file, text_field)
    try:
        ranges, crc, end = array("q"), 0, 0
        with atomic(text) as out:
            for data in rows:
                begin, end = end, end + len(data)
                ranges.extend((begin, end))
                crc = zlib.crc32(data, crc)
                out.write(data)
        bounds = np.frombuffer(ranges, np.int64).reshape(-1, 2)
        index = FileIndex(text, bounds, end, crc)
        _save_index(kept, index)
    except OSError as err:
        raise unwritable(cache_dir, err) from err
    return index


def _parquet_texts(origin: Origin, file: Path, text_field: str) -> Iterator[bytes]:
    """Yields the texts that are not empty, as UTF-8."""
    import pyarrow as pa

    row = 0
    with open_parquet(origin, file) as table:
        names = table.schema_arrow.names
        if text_field not in names:
            raise origin.no_field("has no column", text_field, names)
        batches = table.iter_batches(batch_size=1024, columns=[text_field])
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as err:
                why = f"is damaged after row {row} ({first_line(err)})"
                raise origin.error(why, "get the file again") from err
            if batch is None:
                return
            for value in batch.column(0):
                row += 1
                if data := _parquet_text(origin, value, row, text_field):
                    yield data


def _parquet_text(origin: Origin, value: Any, row: int, text_field: str) -> bytes:
    try:
        text = value.as_py()
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as err:
        why = f"row {row} is not UTF-8 text at byte {err.start}"
        raise origin.error(why, "write the column as UTF-8 text") from err
    if text is not None and not isinstance(text, str):
        why = f"column {text_field!r} holds {value.type}, not text"
        raise origin.error(why, f"set {origin.fields} to a column of text")
    return (text or "").encode()
