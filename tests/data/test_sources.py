# SPDX-License-Identifier: Apache-2.0
"""Entries of data.path: files, folders, and what is neither."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from jaxspeed.config import ConfigError
from jaxspeed.data.documents import Source
from jaxspeed.data.sources import files_of, open_source, text_reader


Texts = Callable[[Source], list[str]]


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Source]:
    def open_one(path: str | Path) -> Source:
        source, held_out = open_source(
            str(path),
            field="data.path",
            text_field="text",
            cache_dir=tmp_path / "cache",
        )
        assert held_out is None
        return source

    return open_one


def fill(folder: Path) -> None:
    """Writes one document of each kind, and what is not to be read."""
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b.txt").write_text("from text")
    (folder / "sub" / "a.jsonl").write_text(json.dumps({"text": "from json"}))
    parquet.write_table(pa.table({"text": ["from parquet"]}), folder / "c.PARQUET")
    writer = ArrayRecordWriter(str(folder / "sub" / "x.array_record-00000-of-00001"))
    writer.write(b"from records")
    writer.close()
    (folder / "empty.txt").write_text("")
    (folder / "README.md").write_text("not read")
    (folder / ".hidden" / "d.txt").write_text("not read")
    (folder / ".e.txt").write_text("not read")


def test_folder_gives_every_file_in_order(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts
) -> None:
    fill(tmp_path / "data")
    source = opened(tmp_path / "data")
    wanted = ["from text", "from parquet", "from json", "from records"]
    assert texts(source) == wanted
    assert source.num_bytes == sum(map(len, wanted))
    reader = text_reader("text", tmp_path / "cache")
    assert len(files_of(str(tmp_path / "data"), reader)) == 5


def test_folder_may_hold_more_files_than_a_process_may_open(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts
) -> None:
    for number in range(2000):
        (tmp_path / f"{number:04}.txt").write_text(str(number))
    assert texts(opened(tmp_path)) == [str(number) for number in range(2000)]


def test_fingerprint_follows_the_text(
    tmp_path: Path, opened: Callable[..., Source]
) -> None:
    seen = set()
    for first, second in [("one", "two"), ("two", "one"), ("onet", "wo"), ("one", "")]:
        (tmp_path / "a.txt").write_text(first)
        (tmp_path / "b.txt").write_text(second)
        seen.add(opened(tmp_path).fingerprint)
    assert len(seen) == 4


def test_error_in_a_folder_names_the_file(
    tmp_path: Path, opened: Callable[..., Source]
) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path)
    message = f"data.path='{tmp_path}': {tmp_path}/bad.txt is not UTF-8 text: byte 0xff"
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.txt", "no such file or folder; give a file"),
        ("noos.txt", r"no such file or folder; .* Did you mean 'nous.txt'\?"),
        ("shakespear", r"no such file or folder; .* Did you mean 'shakespeare'\?"),
        (
            "picture.png",
            "its name does not say that it is a kind of file .*; give .txt,",
        ),
        ("nothing", "the folder holds no .txt, .jsonl, .parquet or .array_record file"),
        ("blank", "holds nothing to read; give a file that is not empty"),
    ],
)
def test_path_that_gives_nothing_is_named(
    tmp_path: Path, opened: Callable[..., Source], path: str, message: str
) -> None:
    (tmp_path / "nous.txt").write_text("x")
    (tmp_path / "picture.png").write_text("x")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "notes.md").write_text("x")
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("")
    with pytest.raises(ConfigError, match=message) as caught:
        opened(tmp_path / path)
    assert str(caught.value).startswith(f"data.path='{tmp_path}/{path}'")


def test_folder_with_a_train_file_has_splits(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts
) -> None:
    names = "train-00000-of-00002.txt train-00001-of-00002.txt test.txt dev-v1.1.txt"
    for name in names.split():
        (tmp_path / name).write_text(name)
    source, held_out = open_source(
        str(tmp_path), field="data.path", text_field="text", cache_dir=tmp_path
    )
    assert texts(source) == names.split()[:2]
    assert held_out is not None
    assert texts(held_out) == ["dev-v1.1.txt"]
    assert texts(opened(f"{tmp_path}#test")) == ["test.txt"]
    with pytest.raises(ConfigError, match=r"no tset split, .* Did you mean 'test'\?"):
        opened(f"{tmp_path}#tset")
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"other\.txt does not say in which split"):
        opened(tmp_path)


def test_path_may_hold_a_number_sign(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts
) -> None:
    (tmp_path / "a#b.txt").write_text("x")
    assert texts(opened(tmp_path / "a#b.txt")) == ["x"]


def test_empty_path_is_not_the_working_directory(opened: Callable[..., Source]) -> None:
    with pytest.raises(ConfigError, match="data.path='': no such file or folder"):
        opened("")


def test_file_that_cannot_be_read_is_named(
    tmp_path: Path, opened: Callable[..., Source]
) -> None:
    (tmp_path / "broken.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(ConfigError, match="cannot be read .*broken.txt"):
        opened(tmp_path)
