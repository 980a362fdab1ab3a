# SPDX-License-Identifier: Apache-2.0
"""Text, JSON lines and parquet: every document is read, and bad files are named."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from jaxspeed.config import ConfigError
from jaxspeed.data import textfiles
from jaxspeed.data.documents import Source
from jaxspeed.data.sources import open_source


Texts = Callable[[Source], list[str]]
Prose = Callable[[int], str]


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Source]:
    """Returns `opened(path, text_field="text")`."""

    def open_one(path: Path, text_field: str = "text") -> Source:
        source, _ = open_source(
            str(path),
            field="data.path",
            text_field=text_field,
            cache_dir=tmp_path / "cache",
        )
        return source

    return open_one


def write_jsonl(path: Path, texts: Sequence[str | None], **fields: object) -> Path:
    lines = [json.dumps({"text": text} | fields) for text in texts]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_parquet(path: Path, texts: Sequence[str | None], **columns: list) -> Path:
    table = pa.table({"text": pa.array(texts, pa.string())} | columns)
    parquet.write_table(table, path, row_group_size=7)
    return path


# .txt ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [64, 1000, 1 << 23])
@pytest.mark.parametrize("size", [1, 100, 5000, 60_000])
def test_pieces_of_a_text_join_to_it(
    tmp_path: Path,
    opened: Callable[..., Source],
    texts: Texts,
    prose: Prose,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    chunk: int,
) -> None:
    monkeypatch.setattr(textfiles, "_CHUNK", chunk)
    text = prose(size)
    (tmp_path / "a.txt").write_text(text)
    source = opened(tmp_path / "a.txt")
    assert "".join(texts(source)) == text
    assert source.num_bytes == len(text.encode())
    assert len(source) >= len(text.encode()) // (4 * 4096)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 100_000,
        "\u20ac" * 40_000,
        "\U0001f600" * 30_000,
        "word " * 20_000,
        "line\n" * 20_000,
        "\n" * 50_000,
        " \t\n" * 30_000,
        ("x" * 16_383 + "\r\n") * 5,
        ("x" * 4095 + "\r\n\r\n") * 20,
    ],
    ids=[
        "one word",
        "3-byte characters",
        "4-byte characters",
        "one line",
        "no blank line",
        "newlines",
        "white space",
        "CRLF at the cut",
        "CRLF",
    ],
)
def test_text_without_blank_lines_is_cut_between_characters(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts, text: str
) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = texts(opened(tmp_path / "a.txt"))
    assert "".join(pieces) == text.replace("\r\n", "\n")
    assert len(pieces) > 2
    assert all(pieces)


def test_text_is_cut_at_blank_lines(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts, prose: Prose
) -> None:
    (tmp_path / "a.txt").write_text(prose(60_000))
    assert all(piece.endswith(".\n\n") for piece in texts(opened(tmp_path / "a.txt")))


def test_byte_order_mark_and_carriage_returns_are_dropped(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts
) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert texts(opened(tmp_path / "a.txt")) == ["one\ntwo\n"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds nothing to read"),
        (b"\xef\xbb\xbf", "holds nothing to read"),
        (b"abc\xff\xfeabc", "byte 0xff at offset 3, invalid start byte"),
        (b"a" * 70 + b"\xc3", "byte 0xc3 at offset 70, unexpected end of data"),
        (b"a" * 63 + b"\xe2\x82(", "byte 0xe2 at offset 63, invalid continuation"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"binary file \(offset 0\)"),
        (b"fine until\0here", r"binary file \(offset 10\)"),
        ("text".encode("utf-16"), "UTF-16 text"),
    ],
)
@pytest.mark.parametrize("chunk", [64, 1 << 23])
def test_what_is_no_text_is_named(
    tmp_path: Path,
    opened: Callable[..., Source],
    monkeypatch: pytest.MonkeyPatch,
    data: bytes,
    message: str,
    chunk: int,
) -> None:
    monkeypatch.setattr(textfiles, "_CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        opened(tmp_path / "a.txt")
    assert str(caught.value).startswith(f"data.path='{tmp_path}/a.txt': ")
    assert "\n" not in str(caught.value)


def test_file_that_shrinks_during_the_run_is_named(
    tmp_path: Path, opened: Callable[..., Source], prose: Prose
) -> None:
    (tmp_path / "a.txt").write_text(prose(20_000))
    source = opened(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ConfigError, match="changed while it was in use"):
        source[len(source) - 1]


# .jsonl -------------------------------------------------------------------------------


def test_json_lines_give_their_texts(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts
) -> None:
    wanted = ["one", "two\nlines", "\u00e9\u20ac\U0001f600", "last"]
    path = write_jsonl(tmp_path / "a.jsonl", ["", *wanted, None, ""], id=3)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n"))
    source = opened(path)
    assert texts(source) == wanted
    assert source.num_bytes == sum(len(text.encode()) for text in wanted)


def test_last_json_line_needs_no_newline(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    assert texts(opened(tmp_path / "a.jsonl")) == ["a", "b"]


def test_half_a_surrogate_pair_becomes_a_replacement_character(
    tmp_path: Path,
    opened: Callable[..., Source],
    texts: Texts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = [r'{"text": "cut \ud83d"}', r'{"text": "whole \ud83d\ude00"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = opened(tmp_path / "a.jsonl")
    assert texts(source) == ["cut \ufffd", "whole \U0001f600"]
    assert source.num_bytes == len("cut \ufffdwhole \U0001f600".encode())
    assert "1 documents hold half a surrogate pair" in caplog.text


def test_thousands_of_empty_documents_are_left_out(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [""] * 5000 + ["a"] + [""] * 5000)
    assert texts(opened(tmp_path / "a.jsonl")) == ["a"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"", "holds nothing to read"),
        (b"\n\n\n", "holds nothing to read"),
        (b'{"text": ""}\n', "holds nothing to read"),
        (b'{"text": "a"}\n{"te', "line 2, the last, is cut off"),
        (b'{"text": "a"}\nplain\n', r"line 2 is not JSON \(Expecting value"),
        (b'[{"text": "a"}]\n', "line 1 is a list, not an object"),
        (b'{"txt": "a", "id": 1}\n', r"no field 'text', only \['txt', 'id'\].*'txt'\?"),
        (b'{"text": ["a"]}\n', "field 'text' of line 1 is a list, not text"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8.* at offset 24"),
    ],
)
def test_bad_json_lines_are_named(
    tmp_path: Path, opened: Callable[..., Source], lines: bytes, message: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(ConfigError, match=message) as caught:
        opened(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


# .parquet -----------------------------------------------------------------------------


def test_parquet_gives_its_texts(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts
) -> None:
    wanted = [f"text {i} \u20ac" for i in range(50)]
    path = write_parquet(tmp_path / "a.parquet", ["", *wanted, None])
    source = opened(path)
    assert texts(source) == wanted
    assert source.num_bytes == sum(len(text.encode()) for text in wanted)


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.binary(), pa.dictionary(pa.int8(), pa.string())],
    ids=str,
)
def test_parquet_text_may_be_stored_in_other_types(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts, kind: pa.DataType
) -> None:
    column = pa.array(["a", "b", "a"]).cast(kind)
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts(opened(tmp_path / "a.parquet")) == ["a", "b", "a"]


def test_parquet_is_unpacked_once(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts
) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a", "b"])
    opened(path)
    (unpacked,) = (tmp_path / "cache").rglob("*.txt")
    before = unpacked.stat().st_mtime_ns
    assert texts(opened(path)) == ["a", "b"]
    assert unpacked.stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["text", "index"])
def test_broken_unpacking_is_redone(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts, damage: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a", "b"])
    opened(path)
    (kept,) = (tmp_path / "cache").rglob("*.txt" if damage == "text" else "*.npy")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert texts(opened(path)) == ["a", "b"]


def test_changed_parquet_is_unpacked_again(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts
) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a", "b"])
    before = opened(path).fingerprint
    write_parquet(path, ["c", "d"])
    os.utime(path, ns=(1, 1))
    assert texts(opened(path)) == ["c", "d"]
    assert opened(path).fingerprint != before


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_truncated_parquet_is_named(
    tmp_path: Path, opened: Callable[..., Source], keep: int
) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a"] * 100)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="is not a whole parquet file"):
        opened(path)


def test_parquet_with_damaged_pages_is_named(
    tmp_path: Path, opened: Callable[..., Source]
) -> None:
    path = write_parquet(tmp_path / "a.parquet", [f"text {i}" * 9 for i in range(5000)])
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle - 2000 : middle] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"is damaged after row \d+"):
        opened(path)


def test_bad_parquet_columns_are_named(
    tmp_path: Path, opened: Callable[..., Source]
) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a"], number=[1])
    with pytest.raises(
        ConfigError, match=r"no column 'txt', only \['text', 'number'\]"
    ):
        opened(path, "txt")
    with pytest.raises(ConfigError, match="column 'number' holds int64, not text"):
        opened(path, "number")
    offsets = pa.py_buffer(np.array([0, 1, 3], np.int32))
    buffers = [None, offsets, pa.py_buffer(b"ab\xff")]
    broken = pa.Array.from_buffers(pa.string(), 2, buffers)
    parquet.write_table(pa.table({"text": broken}), path)
    with pytest.raises(ConfigError, match="row 2 is not UTF-8 text at byte 1"):
        opened(path)


def test_unwritable_cache_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*cannot be written"):
        open_source(str(path), field="data.path", text_field="text", cache_dir=path)


# The kept index -----------------------------------------------------------------------


@pytest.fixture
def keep_every_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "_CACHED_FROM", 0)


@pytest.mark.usefixtures("keep_every_index")
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_kept_index_gives_the_same_documents(
    tmp_path: Path,
    opened: Callable[..., Source],
    texts: Texts,
    prose: Prose,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        path.write_text(prose(30_000))
    else:
        write_jsonl(path, ["a", "b"])
    first = opened(path)
    for builder in ("_index_text", "_json_text"):
        monkeypatch.setattr(textfiles, builder, lambda *_: pytest.fail("built again"))
    second = opened(path)
    assert texts(second) == texts(first)
    assert second.num_bytes == first.num_bytes
    assert second.fingerprint == first.fingerprint


@pytest.mark.usefixtures("keep_every_index")
def test_index_of_a_changed_file_is_not_used(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    before = opened(path).fingerprint
    write_jsonl(path, ["c", "d"])
    os.utime(path, ns=(1, 1))
    assert texts(opened(path)) == ["c", "d"]
    assert opened(path).fingerprint != before


@pytest.mark.usefixtures("keep_every_index")
def test_damaged_index_is_built_again(
    tmp_path: Path, opened: Callable[..., Source], texts: Texts
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    opened(path)
    (kept,) = (tmp_path / "cache").rglob("*.npy")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert texts(opened(path)) == ["a", "b"]


@pytest.mark.usefixtures("keep_every_index")
def test_text_needs_no_writable_cache(
    tmp_path: Path, texts: Texts, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    source, _ = open_source(
        str(path), field="data.path", text_field="text", cache_dir=path
    )
    assert texts(source) == ["a", "b"]
    assert "is not kept" in caplog.text
