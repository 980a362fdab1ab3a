# SPDX-License-Identifier: Apache-2.0
"""Records with several fields, for tasks: a review and its label, a question and answers.

    records = open_examples("tfds:imdb_reviews#test", field="data.path",
                            fields=("text", "label"), cache_dir=..., split="train")
    records[0]     {"text": "...", "label": 1}

From TFDS sets and from files alike a field is plain: str, int, float, a NumPy array
(images, audio), a list or dict of those, None; from CSV always str. A field inside another
is named with dots (`translation.de`). What a field means, and whether it may be None, is the task's affair.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxspeed.data.documents import Origin, Record, RecordSource
from jaxspeed.data.recordfiles import RECORD_KINDS, as_bytes, choose
from jaxspeed.data.records import Records, check_shards, quiet
from jaxspeed.data.sources import Reader, open_split


__all__ = ["Record", "RecordSource", "open_examples", "record_reader"]


def open_examples(
    path: str, *, field: str, fields: Sequence[str], cache_dir: Path, split: str
) -> RecordSource:
    """Opens one split of a set, or files, as records.

    Args:
        path: `tfds:NAME`, the folder of a TFDS set, a .jsonl, .csv, .tsv, .parquet or
            SQuAD's .json file, or a folder of those; and `#SPLIT` after it for another
            split than `split`.
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

    def open_file(
        opener: Callable[..., RecordSource], origin: Origin, file: Path
    ) -> RecordSource:
        return opener(origin._replace(file=file), file, tuple(fields), cache_dir)

    return Reader(
        kinds={
            kind: functools.partial(open_file, f) for kind, f in RECORD_KINDS.items()
        },
        open_split=lambda origin, records: _open_tfds(origin, records, tuple(fields)),
        held_out=("validation", "valid", "dev", "test"),
        fields="the task's fields",
        cache_dir=cache_dir,
    )


# TFDS ---------------------------------------------------------------------------------


def _open_tfds(
    origin: Origin, records: Any, fields: tuple[str, ...]
) -> Records[Record]:
    features = records.dataset_info.features
    check_shards(origin, records)

    def decode(record: Record) -> Record:
        return choose(origin, "the set", _plain(features, record), fields)

    # Decoding its first image, TFDS recommends another library.
    with quiet():
        return Records(origin, records, decode, as_bytes)


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
