# SPDX-License-Identifier: Apache-2.0
"""JSON lines, CSV, parquet and SQuAD's JSON as records that are read one at a time.

As with text, one pass over a file checks it, so that bad data is an error before training.
A line of JSON or a row of CSV is read where it lies. Parquet cannot give one row alone: it
is unpacked into the cache, as an Arrow file that is mapped. SQuAD's JSON is held in memory.
"""

import csv
import functools
import io
import json
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxspeed.data.documents import (
    Origin,
    Record,
    RecordSource,
    atomic,
    first_line,
    unwritable,
)
from jaxspeed.data.records import Records
from jaxspeed.data.squad_json import flatten
from jaxspeed.data.textfiles import (
    FileIndex,
    FileItems,
    cache_key,
    cached_index,
    index_json_lines,
    open_parquet,
    whole_characters,
)


_MISSING = object()
_LONGEST_CELL = 1 << 30
_BATCH = 1024


def choose(
    origin: Origin, where: str, record: Record, fields: tuple[str, ...]
) -> Record:
    """Returns the wanted fields of a record.

    Args:
        origin: for errors.
        where: the record is, for errors.
        record: all of it.
        fields: names, with dots for a field inside another.

    Raises:
        ConfigError: a field is missing.
    """
    chosen = {name: _look_up(record, name) for name in fields}
    for name, value in chosen.items():
        if value is _MISSING:
            raise origin.no_field(f"{where} has no field", name, _names(record))
    return chosen


def as_bytes(record: Record) -> bytes:
    """Returns bytes that stand for a record, about as many as it has."""
    arrays: list[bytes] = []

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays.append(value.tobytes())
            return [str(value.dtype), value.shape]
        return repr(value)

    text = json.dumps(record, default=plain)
    return b"".join([text.encode(), *arrays])


def _look_up(record: Record, name: str) -> Any:
    if name in record:
        return record[name]
    first, dot, rest = name.partition(".")
    inner = record.get(first) if dot else None
    return _look_up(inner, rest) if isinstance(inner, dict) else _MISSING


def _names(record: Record, prefix: str = "") -> list[str]:
    """Returns the names of a record's fields, those inside others with dots."""
    names = []
    for key, value in record.items():
        names.append(prefix + key)
        if isinstance(value, dict):
            names += _names(value, f"{prefix}{key}.")
    return names


# .jsonl -------------------------------------------------------------------------------


def _open_jsonl(
    origin: Origin, file: Path, fields: tuple[str, ...], cache_dir: Path
) -> RecordSource:
    def measure(where: str, record: Record, line: bytes) -> int:
        choose(origin, where, record, fields)
        return len(line)

    def decode(line: bytes) -> Record:
        record = json.loads(line.decode("utf-8-sig"))
        return _mended(choose(origin, "the line", record, fields))

    build = functools.partial(index_json_lines, measure=measure)
    kind = f"jsonl/fields/{'/'.join(fields)}"
    return FileItems(origin, cached_index(origin, file, kind, build, cache_dir), decode)


def _mended(value: Any) -> Any:
    """Returns a JSON value with each half of a surrogate pair as U+FFFD."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {key: _mended(item) for key, item in value.items()}
    return value


# .csv and .tsv ------------------------------------------------------------------------


def _open_csv(
    origin: Origin,
    file: Path,
    fields: tuple[str, ...],
    cache_dir: Path,
    *,
    delimiter: str,
) -> RecordSource:
    columns = next(_csv_rows(origin, file, delimiter), (1, 0, 0, []))[-1]
    repeated = {name for name in columns if columns.count(name) > 1}
    if repeated:
        why = f"has several columns {sorted(repeated)[0]!r}"
        raise origin.error(why, "give each its own name")
    choose(origin, "the first line", dict.fromkeys(columns), fields)

    def build(origin: Origin, file: Path) -> FileIndex:
        ranges, crc, size = array("q"), 0, 0
        for number, begin, end, cells in _csv_rows(origin, file, delimiter):
            crc = zlib.crc32("\0".join(cells).encode(), crc)
            if not cells or begin == 0:
                continue
            if len(cells) != len(columns):
                why = f"the row to line {number} has {len(cells)} cells, not {len(columns)}"
                raise origin.error(why, "quote cells that hold a separator")
            ranges.extend((begin, end))
            size += end - begin
        rows = np.frombuffer(ranges, np.int64).reshape(-1, 2)
        return FileIndex(file, rows, size, crc)

    def decode(row: bytes) -> Record:
        text = io.StringIO(row.decode(), newline="")
        (cells,) = csv.reader(text, delimiter=delimiter, strict=True)
        record = dict(zip(columns, cells, strict=True))
        return {name: record[name] for name in fields}

    kind = f"csv/{delimiter}/{len(columns)}"
    return FileItems(origin, cached_index(origin, file, kind, build, cache_dir), decode)


def _csv_rows(
    origin: Origin, file: Path, delimiter: str
) -> Iterator[tuple[int, int, int, list[str]]]:
    """Yields the last line, the range of bytes and the cells of each row."""
    csv.field_size_limit(_LONGEST_CELL)
    number, begin, end = 0, 0, 0
    with open(file, "rb") as stream:

        def lines() -> Iterator[str]:
            nonlocal number, end
            for line in stream:
                number, end = number + 1, end + len(line)
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")

        try:
            for cells in csv.reader(lines(), delimiter=delimiter, strict=True):
                yield number, begin, end, cells
                begin = end
        except UnicodeDecodeError as err:
            why = f"line {number} is not UTF-8 text ({err.reason})"
            raise origin.error(why, "convert it (iconv -t utf-8)") from err
        except csv.Error as err:
            why = f"the row from offset {begin} to line {number} is not CSV ({err})"
            raise origin.error(why, "get the file again, or mend that row") from err


# .parquet -----------------------------------------------------------------------------


class _ArrowRows:
    """The rows of an Arrow file, by index."""

    def __init__(self, path: Path):
        import pyarrow as pa

        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        count = self._file.num_record_batches
        rows = [self._file.get_batch(index).num_rows for index in range(count)]
        self._starts = np.cumsum([0, *rows])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch = self._file.get_batch(part)
        return batch.slice(index - int(self._starts[part]), 1).to_pylist()[0]


def _open_parquet(
    origin: Origin, file: Path, fields: tuple[str, ...], cache_dir: Path
) -> RecordSource:
    with open_parquet(origin, file) as table:
        known = table.schema_arrow.names
        tops = [name if name in known else name.split(".")[0] for name in fields]
        for name, top in zip(fields, tops, strict=True):
            if top not in known:
                raise origin.no_field("has no column", name, known)
        key = f"parquet/fields/{'/'.join(sorted(set(tops)))}"
        kept = cache_key(file, key, cache_dir).with_suffix(".arrow")
        if not kept.exists():
            _unpack(origin, table, tops, kept, cache_dir)
    decode = functools.partial(_row, origin, fields)
    return Records(origin, _ArrowRows(kept), decode, as_bytes)


def _row(origin: Origin, fields: tuple[str, ...], row: Record) -> Record:
    return choose(origin, "a row", row, fields)


def _unpack(
    origin: Origin, table: Any, columns: list[str], kept: Path, cache_dir: Path
) -> None:
    """Writes columns of a parquet file as an Arrow file."""
    import pyarrow as pa

    schema = pa.schema(
        [table.schema_arrow.field(name) for name in dict.fromkeys(columns)]
    )
    batches = table.iter_batches(batch_size=_BATCH, columns=schema.names)
    row = 0
    try:
        with atomic(kept) as out, pa.ipc.new_file(out, schema) as writer:
            while True:
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as err:
                    why = f"is damaged after row {row} ({first_line(err)})"
                    raise origin.error(why, "get the file again") from err
                if batch is None:
                    return
                row += batch.num_rows
                writer.write_batch(batch.select(schema.names))
    except OSError as err:
        raise unwritable(cache_dir, err) from err


# SQuAD's .json ------------------------------------------------------------------------


def _open_squad(
    origin: Origin, file: Path, fields: tuple[str, ...], cache_dir: Path
) -> RecordSource:
    del cache_dir
    try:
        records = flatten(json.loads(file.read_bytes().decode("utf-8-sig")))
    except UnicodeDecodeError as err:
        why = f"is not UTF-8 text at byte {err.start}"
        raise origin.error(why, "convert it (iconv -t utf-8)") from err
    except ValueError as err:
        why = f"is not whole JSON ({first_line(err)})"
        raise origin.error(why, "get the file again") from err
    except (KeyError, TypeError) as err:
        why = f"is not in SQuAD's format ({type(err).__name__}: {first_line(err)})"
        change = "give data: [{paragraphs: [{context, qas}]}], or a .jsonl file"
        raise origin.error(why, change) from err
    decode = functools.partial(_question, origin, fields)
    return Records(origin, records, decode, as_bytes)


def _question(origin: Origin, fields: tuple[str, ...], record: Record) -> Record:
    return choose(origin, "a question", record, fields)


RECORD_KINDS = {
    ".jsonl": _open_jsonl,
    ".csv": functools.partial(_open_csv, delimiter=","),
    ".tsv": functools.partial(_open_csv, delimiter="\t"),
    ".parquet": _open_parquet,
    ".json": _open_squad,
}
"""What opens a file as records, by the end of its name."""
