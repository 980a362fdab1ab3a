# SPDX-License-Identifier: Apache-2.0
"""Safetensors folders: every tensor a view of its file, so that a reader takes only the bytes it slices.

The format is a length, a JSON header and raw bytes (huggingface/safetensors, "Format"). It is
read and written here, not by the library of that name, because that one hands out whole tensors:
a device's shard of a transposed matrix needs a view of the file. Nothing is executed. Layer 1.
"""

import contextlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxspeed.config import ConfigError


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000
"""Bytes of header that the format allows."""

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """A tensor that can be had."""

    shape: tuple[int, ...]
    dtype: np.dtype
    view: Callable[[], np.ndarray]
    """Returns it; for a file's tensor, without reading it."""


def read_folder(folder: Path) -> dict[str, TensorInfo]:
    """Returns every tensor of a folder's safetensors files, by name.

    Raises:
        ConfigError: there is no such file, an index and its files disagree, a tensor is there
            twice, or a file is damaged; the message names it.
    """
    index = folder / INDEX
    if index.is_file():
        where = _index(index)
        files = sorted(set(where.values()))
    elif (folder / SINGLE).is_file():
        where, files = None, [SINGLE]
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        where = None
        if not files:
            raise ConfigError(
                f"{folder}: no {SINGLE}, no {INDEX} and no other .safetensors file; "
                "give a folder that holds a Hugging Face model (PyTorch's .bin files run code when read: convert them)"
            )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_file(folder / file).items():
            if name in tensors:
                raise ConfigError(
                    f"{folder / file}: tensor {name} is in another file, too"
                )
            if where is not None and where.get(name) != file:
                raise ConfigError(
                    f"{folder / file}: tensor {name} is not listed there by {INDEX}"
                )
            tensors[name] = info
    missing = sorted(set(where or ()) - set(tensors))
    if missing:
        raise ConfigError(f"{index}: lists {missing[0]}, which its file does not hold")
    return tensors


def read_file(path: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of one safetensors file, as views of it.

    Raises:
        ConfigError: it is missing, truncated or not of this format.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    if len(data) < 8 or length > HEADER_LIMIT or start > len(data):
        raise ConfigError(
            f"{path}: not a safetensors file, or truncated: its header would end at byte {start:,} of {len(data):,}"
        )
    try:
        header = json.loads(data[8:start])
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        return {
            name: _entry(path, name, entry, data, start)
            for name, entry in entries.items()
        }
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: its header is not one of safetensors ({error})"
        ) from None


def _entry(
    path: Path, name: str, entry: Mapping[str, Any], data: mmap.mmap, start: int
) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise ConfigError(
            f"{path}: tensor {name} is of {entry['dtype']}, which is not read here; convert it to one of {', '.join(DTYPES)}"
        )
    shape, dtype = tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]])
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ConfigError(
            f"{path}: tensor {name} of shape {shape} has {end - begin:,} bytes"
        )
    if begin < 0 or start + end > len(data):
        raise ConfigError(
            f"{path}: truncated: tensor {name} ends at byte {start + end:,} of {len(data):,}"
        )

    def view() -> np.ndarray:
        return np.frombuffer(data, dtype, math.prod(shape), start + begin).reshape(
            shape
        )

    return TensorInfo(shape, dtype, view)


def _index(path: Path) -> dict[str, str]:
    try:
        where = json.loads(path.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not an index of safetensors ({error!r})") from None
    for file in set(where.values()):
        if Path(file).name != file:
            raise ConfigError(f"{path}: names {file!r}, which is not in its folder")
    return where


def write_folder(
    folder: Path,
    tensors: Iterable[tuple[str, TensorInfo]],
    *,
    shard_bytes: int,
    texts: Mapping[str, str] | None = None,
    single: str = SINGLE,
) -> list[Path]:
    """Writes tensors as one safetensors file, or as several and an index; returns the files.

    One tensor at a time is in memory. The folder must not hold a model yet.

    Args:
        folder: made if it is not there.
        tensors: in the order in which they are written, each in its info's dtype.
        shard_bytes: most bytes of tensors in one file; a larger tensor has a file of its own.
        texts: files to go with them, by name.
        single: name of the file, if there is one.

    Raises:
        ConfigError: a model is there already, or the folder cannot be written (then nothing new is in it).
    """
    shards = list(_shards(tensors, shard_bytes))
    there = sorted(path.name for path in folder.glob("*.safetensors*"))
    if there:
        raise ConfigError(
            f"{folder}: holds {there[0]} already; give an empty folder, or delete it"
        )
    count = len(shards)
    name_of = lambda i: (
        single if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
    )
    files, where, total, texts = [], {}, 0, dict(texts or {})
    for i, shard in enumerate(shards):
        where |= dict.fromkeys((name for name, _ in shard), name_of(i))
        total += sum(_num_bytes(info) for _, info in shard)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        texts[INDEX] = json.dumps(index, indent=2, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, shard in enumerate(shards):
            files.append(folder / name_of(i))
            _write_file(files[-1], shard)
        for name, text in texts.items():
            files.append(folder / name)
            files[-1].write_text(text)
    except OSError as error:
        for file in files:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        raise ConfigError(
            f"{(files or [folder])[-1]}: cannot be written ({error.strerror}); free some space, or give another folder"
        ) from None
    return files


def _shards(
    tensors: Iterable[tuple[str, TensorInfo]], limit: int
) -> Iterator[list[tuple[str, TensorInfo]]]:
    shard, size = [], 0
    for name, info in tensors:
        if shard and size + _num_bytes(info) > limit:
            yield shard
            shard, size = [], 0
        shard.append((name, info))
        size += _num_bytes(info)
    yield shard


def _write_file(path: Path, tensors: list[tuple[str, TensorInfo]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors:
        end = offset + _num_bytes(info)
        header[name] = {
            "dtype": NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, info in tensors:
            array = np.asarray(info.view(), info.dtype, order="C")
            assert array.shape == info.shape
            file.write(array.reshape(-1).view(np.uint8).data)


def _num_bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize
