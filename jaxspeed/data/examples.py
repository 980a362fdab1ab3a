# SPDX-License-Identifier: Apache-2.0
"""Records with several fields, for tasks: a review and its label, a question and answers.

    records = open_examples("tfds:imdb_reviews#test", field="data.path",
                            fields=("text", "label"), cache_dir=..., split="train")
    records[0]     {"text": "...", "label": 1}

From TFDS sets and from files alike a field is plain: str, int, float, a NumPy array
(images, audio), a list or dict of those, None. A field inside another is named with dots
(`translation.de`). What a field means, and whether it may be None, is the task's affair.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxspeed.data.documents import Origin, Record, RecordSource
from jaxspeed.data.records import Records, check_shards, quiet
from jaxspeed.data.sources import Reader, open_split
from jaxspeed.data.textfiles import (
    FileItems,
    cached_index,
    index_json_lines,
    whole_characters,
)


__all__ = ["Record", "RecordSource", "open_examples", "record_reader"]

_MISSING = object()


def open_examples(
    path: str, *, field: str, fields: Sequence[str], cache_dir: Path, split: str
) -> RecordSource:
    """Opens one split of a set, or files, as records.

    Args:
        path: `tfds:NAME`, the folder of a TFDS set, a .jsonl file, or a folder of those;
            and `#SPLIT` after it for another split than `split`.
        field: the setting the path came from, for errors.
        fields: what is wanted of each record; other fields are not given.
        cache_dir: where prepared sets and indices are kept.
        split: which split; plain files are `train`.

    Raises:
        ConfigError: missing, empty, damaged, no such split, or a field is missing.
    """
    reader = record_reader(fields, cache_dir)
    return open_split(path, reader, field=field, split=split)


def record_reader(fields: Sequence[str], cache_dir: Path) -> Reader[Record]:
    """Returns the reader of records that have these fields."""
    openers = {".jsonl": _open_jsonl}

    def open_file(
        opener: Callable[..., RecordSource], origin: Origin, file: Path
    ) -> RecordSource:
        return opener(origin._replace(file=file), file, tuple(fields), cache_dir)

    return Reader(
        kinds={kind: functools.partial(open_file, f) for kind, f in openers.items()},
        open_split=lambda origin, records: _open_tfds(origin, records, tuple(fields)),
        held_out=("validation", "valid", "dev", "test"),
        fields="the task's fields",
        cache_dir=cache_dir,
    )


def _choose(
    origin: Origin, where: str, record: Record, fields: tuple[str, ...]
) -> Record:
    """Returns the wanted fields of a record, or raises which is missing."""
    chosen = {name: _look_up(record, name) for name in fields}
    for name, value in chosen.items():
        if value is _MISSING:
            raise origin.no_field(f"{where} has no field", name, _names(record))
    return chosen


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


def _as_bytes(record: Record) -> bytes:
    """Returns bytes that stand for a record, about as many as it has."""
    arrays: list[bytes] = []

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays.append(value.tobytes())
            return [str(value.dtype), value.shape]
        return repr(value)

    text = json.dumps(record, default=plain)
    return b"".join([text.encode(), *arrays])


# .jsonl -------------------------------------------------------------------------------


def _open_jsonl(
    origin: Origin, file: Path, fields: tuple[str, ...], cache_dir: Path
) -> RecordSource:
    def measure(where: str, record: Record, line: bytes) -> int:
        _choose(origin, where, record, fields)
        return len(line)

    def decode(line: bytes) -> Record:
        record = json.loads(line.decode("utf-8-sig"))
        return _mended(_choose(origin, "the line", record, fields))

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


# TFDS ---------------------------------------------------------------------------------


def _open_tfds(
    origin: Origin, records: Any, fields: tuple[str, ...]
) -> Records[Record]:
    features = records.dataset_info.features
    check_shards(origin, records)

    def decode(record: Record) -> Record:
        return _choose(origin, "the set", _plain(features, record), fields)

    # Decoding its first image, TFDS recommends another library.
    with quiet():
        return Records(origin, records, decode, _as_bytes)


def _plain(feature: Any, value: Any) -> Any:
    """Returns what TFDS gives for a feature as plain Python or a NumPy array."""
    from tensorflow_datasets import features

    if isinstance(feature, features.FeaturesDict):
        return {name: _plain(feature[name], value[name]) for name in feature}
    if isinstance(feature, features.Sequence):
        return _listed(feature.feature, value)
    if isinstance(value, bytes):
        return value.decode()
    value = np.asarray(value)
    if value.dtype == object:
        return [item.decode() for item in value.tolist()]
    return value if value.ndim else value.item()


def _listed(feature: Any, values: Any) -> Any:
    """Returns a sequence as a list; one of dicts, as TFDS has it, as a dict of lists."""
    from tensorflow_datasets import features

    if isinstance(feature, features.FeaturesDict):
        return {name: _listed(feature[name], values[name]) for name in feature}
    return [_plain(feature, value) for value in values]
