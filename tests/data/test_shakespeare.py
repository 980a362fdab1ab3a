# SPDX-License-Identifier: Apache-2.0
"""The bundled text and its preparation as a TFDS set."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxspeed.config import ConfigError, DataConfig
from jaxspeed.data import open_corpus, shakespeare


MakeConfig = Callable[..., DataConfig]


def test_a_changed_text_needs_a_new_version() -> None:
    text = "\f".join(shakespeare.documents()).encode()
    assert (shakespeare.INFO.version, hashlib.sha256(text).hexdigest()) == (
        "1.0.0",
        "515a0fccd29297db3a62484aaa4a234ed21d5b3d306cba0b52d2e9bd58bbaaf0",
    )


def test_text_is_plain_and_free_of_gutenberg_matter() -> None:
    documents = shakespeare.documents()
    text = "".join(documents)
    assert len(documents) == 323
    assert text.isascii()
    assert not {"\r", "\t", "\f"} & set(text)
    assert "gutenberg" not in text.lower()
    assert documents[0].startswith("HAMLET. ACT I. SCENE I.\n\nElsinore.")
    assert documents[-1].startswith("SONNET CLIV.\n\nThe little Love-god")


def test_splits_are_disjoint_and_complete(make_config: MakeConfig, texts) -> None:
    corpus = open_corpus(make_config("shakespeare"))
    train, held_out = texts(corpus.train[0]), texts(corpus.held_out[0])
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(shakespeare.documents())
    assert 0.03 < corpus.held_out[0].num_bytes / corpus.train[0].num_bytes < 0.07


def test_a_preparation_is_found_again(tmp_path: Path) -> None:
    shakespeare.prepare(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    shakespeare.prepare(tmp_path)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


@pytest.mark.parametrize("damage", ["truncated", "missing file", "no info"])
def test_a_broken_preparation_is_redone(
    make_config: MakeConfig, tmp_path: Path, damage: str
) -> None:
    root = shakespeare.prepare(tmp_path / "cache" / "tfds")
    folder = shakespeare.INFO.folder(root)
    records = sorted(folder.glob("*train*"))[0]
    if damage == "truncated":
        records.write_bytes(records.read_bytes()[:-500])
    elif damage == "missing file":
        records.unlink()
    else:
        (folder / "dataset_info.json").unlink()
    corpus = open_corpus(make_config("shakespeare"))
    assert len(corpus.train[0]) + len(corpus.held_out[0]) == 323


def test_leftovers_of_a_killed_preparation_do_no_harm(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    left = tmp_path / "cache" / "tfds" / ".prepare-x" / shakespeare.INFO.name / "1.0.0"
    left.mkdir(parents=True)
    (left / "dataset_info.json").write_text("{")
    assert len(open_corpus(make_config("shakespeare")).train[0]) == 307


def test_a_cache_that_cannot_be_written_is_named(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    config = make_config("shakespeare", cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*cannot be written"):
        open_corpus(config)
