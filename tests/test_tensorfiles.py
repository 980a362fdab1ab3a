# SPDX-License-Identifier: Apache-2.0
"""Safetensors folders are read and written as the format's own library does, and damage is named."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxspeed.config import ConfigError
from jaxspeed.tensorfiles import (
    INDEX,
    SINGLE,
    TensorInfo,
    read_file,
    read_folder,
    write_folder,
)
from tests.command import small_disk


RNG = np.random.default_rng(0)
TENSORS = {
    "matrix": RNG.normal(size=(3, 5)).astype(np.float32),
    "half": RNG.normal(size=(4,)).astype(np.float16),
    "brain": RNG.normal(size=(2, 2)).astype(jnp.bfloat16),
    "whole": np.arange(6, dtype=np.int64).reshape(1, 6),
    "flag": np.array([True, False]),
    "scalar": np.array(7.0, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def infos(tensors: dict[str, np.ndarray]) -> list[tuple[str, TensorInfo]]:
    return [
        (name, TensorInfo(x.shape, x.dtype, lambda x=x: x))
        for name, x in tensors.items()
    ]


def same(there: dict[str, TensorInfo], here: dict[str, np.ndarray]) -> None:
    assert set(there) == set(here)
    for name, info in there.items():
        assert (info.shape, info.dtype) == (here[name].shape, here[name].dtype)
        assert info.view().tobytes() == here[name].tobytes()


def test_file_of_the_library_is_read(tmp_path: Path) -> None:
    safetensors.numpy.save_file(TENSORS, tmp_path / SINGLE, {"format": "pt"})
    same(read_folder(tmp_path), TENSORS)


@pytest.mark.parametrize("shard_bytes", [10**6, 40, 1])
def test_what_is_written_the_library_reads(tmp_path: Path, shard_bytes: int) -> None:
    files = write_folder(tmp_path, infos(TENSORS), shard_bytes=shard_bytes)
    same(read_folder(tmp_path), TENSORS)
    theirs: dict[str, Any] = {}
    for file in files:
        if file.name != INDEX:
            theirs |= safetensors.numpy.load_file(file)
    for name, array in TENSORS.items():
        assert theirs[name].tobytes() == array.tobytes()
    assert (tmp_path / INDEX).exists() == (shard_bytes < 10**6)
    if shard_bytes == 1:
        assert len(files) == len(TENSORS) + 1


def test_view_takes_only_what_is_sliced(tmp_path: Path) -> None:
    safetensors.numpy.save_file(TENSORS, tmp_path / SINGLE)
    view = read_file(tmp_path / SINGLE)["matrix"].view()
    assert not view.flags.owndata
    assert not view.flags.writeable
    assert np.shares_memory(view, view.T[1:2])


def header(entry: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps({"x": entry}).encode()
    return len(text).to_bytes(8, "little") + text + data


FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"\x01\x02", "not a safetensors file, or truncated"),
        (b"\xff" * 64, "not a safetensors file, or truncated"),
        ((4).to_bytes(8, "little") + b"[1]]", "its header is not one of safetensors"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not one of safetensors"),
        (header(FOUR), "truncated: tensor x ends at byte"),
        (header({**FOUR, "shape": [2]}, b"1234"), r"of shape \(2,\) has 4 bytes"),
        (header({**FOUR, "dtype": "F8_E4M3"}, b"1234"), "is of F8_E4M3, which is not"),
        (header({"shape": [1]}, b"1234"), "its header is not one of safetensors"),
        (header({**FOUR, "data_offsets": [-4, 0]}, b"1234"), "truncated"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_folder(tmp_path)
    assert SINGLE in str(caught.value)


def folder_of_two(tmp_path: Path) -> dict[str, Any]:
    write_folder(tmp_path, infos({"a": np.zeros(4), "b": np.ones(4)}), shard_bytes=32)
    return json.loads((tmp_path / INDEX).read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": "../a.safetensors"}, "names '../a.safetensors', which is not in its"),
        ({"c": "model-00001-of-00002.safetensors"}, "lists c, which its file does not"),
        ({"a": "model-00002-of-00002.safetensors"}, "which its file does not hold"),
        ({"a": "gone.safetensors"}, "gone.safetensors: cannot be read"),
    ],
)
def test_index_that_disagrees_is_named(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    index = folder_of_two(tmp_path)
    index["weight_map"] |= change
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=message):
        read_folder(tmp_path)


def test_tensor_that_is_there_twice_is_named(tmp_path: Path) -> None:
    for name in ("one", "two"):
        safetensors.numpy.save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match=r"two.safetensors: tensor \w+ is in another"):
        read_folder(tmp_path)


def test_folder_without_a_model_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a folder that holds a Hugging Face"):
        read_folder(tmp_path)


def test_model_that_is_there_stays(tmp_path: Path) -> None:
    folder_of_two(tmp_path)
    with pytest.raises(ConfigError, match="holds model-00001-of-00002.safetensors"):
        write_folder(tmp_path, infos(TENSORS), shard_bytes=10**6)


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"cannot be written \(Not a directory\); free"
    ):
        write_folder(tmp_path / "file" / "x", infos(TENSORS), shard_bytes=10**6)


def test_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        if disk is None:
            pytest.skip("no small disk can be had")
        large = {"x": np.zeros(2**20, np.float32)}
        with pytest.raises(ConfigError, match="No space left on device"):
            write_folder(disk, infos(large), shard_bytes=10**9)
        assert not list(disk.iterdir())
