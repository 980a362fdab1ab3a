# SPDX-License-Identifier: Apache-2.0
"""array_record files and TFDS sets, read without TensorFlow."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from jaxspeed.config import ConfigError
from jaxspeed.data.documents import Source
from jaxspeed.data.sources import open_source


Texts = Callable[[Source], list[str]]
Opened = Callable[..., tuple[Source, Source | None]]

SPLITS = {"train": ["one", "two \u20ac", ""], "validation": ["held out"], "test": ["t"]}


class JaxspeedTestSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set under a name of its own, as a user's would be."""

    name = "jaxspeed_test_set"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None
    splits_written = SPLITS

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "text": tfds.features.Text(),
            "label": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {
            split: self._generate_examples(texts)
            for split, texts in self.splits_written.items()
        }

    def _generate_examples(self, texts: list[str]) -> Iterator[tuple[int, dict]]:
        for key, text in enumerate(texts):
            yield key, {"text": text, "label": key}


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """Returns `opened(path, text_field="text")`."""

    def open_one(
        path: str | Path, text_field: str = "text"
    ) -> tuple[Source, Source | None]:
        return open_source(
            str(path),
            field="data.path",
            text_field=text_field,
            cache_dir=tmp_path / "cache",
        )

    return open_one


def prepare(data_dir: Path, splits: dict[str, list[str]] = SPLITS) -> Path:
    """Writes the test set; returns the folder with dataset_info.json."""
    builder = JaxspeedTestSet(data_dir=data_dir, file_format="array_record")
    builder.splits_written = splits
    builder.download_and_prepare()
    return data_dir / "jaxspeed_test_set" / "1.0.0"


def write_records(path: Path, records: list[bytes]) -> Path:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


# array_record -------------------------------------------------------------------------


def test_records_of_a_folder_are_documents(
    tmp_path: Path, opened: Opened, texts: Texts
) -> None:
    write_records(tmp_path / "b.array_record", [b"three"])
    write_records(tmp_path / "a.array_record", [b"one", "\u20ac".encode()])
    source, held_out = opened(tmp_path)
    assert texts(source) == ["one", "\u20ac", "three"]
    assert source.num_bytes == 11
    assert held_out is None


def test_size_of_many_records_is_estimated_from_some(
    tmp_path: Path, opened: Opened
) -> None:
    path = write_records(tmp_path / "a.array_record", [b"0123456789"] * 3000)
    assert opened(path)[0].num_bytes == 30_000


@pytest.mark.parametrize("keep", [0, 1000, 66_000, -1])
def test_truncated_records_are_named(tmp_path: Path, opened: Opened, keep: int) -> None:
    path = write_records(tmp_path / "a.array_record", [bytes(range(128))] * 3000)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="is not a whole array_record file"):
        opened(path)


def test_records_that_are_no_text_are_named(tmp_path: Path, opened: Opened) -> None:
    path = write_records(tmp_path / "a.array_record", [b"good", b"ba\xff"])
    with pytest.raises(ConfigError, match="record 1 is not UTF-8 text at byte 2"):
        opened(path)


def test_file_without_records_holds_no_text(tmp_path: Path, opened: Opened) -> None:
    path = write_records(tmp_path / "a.array_record", [])
    with pytest.raises(ConfigError, match="holds nothing to read"):
        opened(path)


def test_tfds_records_alone_are_not_taken_for_text(
    tmp_path: Path, opened: Opened
) -> None:
    folder = prepare(tmp_path, {"train": ["a" * 10, "b" * 300]})
    (records,) = folder.glob("*.array_record*")
    shutil.copy(records, tmp_path / "a.array_record")
    with pytest.raises(ConfigError, match="TFDS examples without a dataset_info.json"):
        opened(tmp_path / "a.array_record")


# TFDS ---------------------------------------------------------------------------------


def test_set_prepared_in_the_cache_is_read_by_name(
    tmp_path: Path, opened: Opened, texts: Texts
) -> None:
    prepare(tmp_path / "cache" / "tfds")
    source, held_out = opened("tfds:jaxspeed_test_set")
    assert texts(source) == SPLITS["train"]
    assert held_out is not None
    assert texts(held_out) == SPLITS["validation"]


def test_set_prepared_in_the_usual_place_of_tfds_is_read_by_name(
    tmp_path: Path, opened: Opened, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = "tensorflow_datasets.core.constants.DATA_DIR"
    monkeypatch.setattr(usual, str(tmp_path / "usual"))
    prepare(tmp_path / "usual")
    assert texts(opened("tfds:jaxspeed_test_set")[0]) == SPLITS["train"]


def test_folder_of_a_prepared_set_is_read(
    tmp_path: Path, opened: Opened, texts: Texts
) -> None:
    source, held_out = opened(prepare(tmp_path))
    assert texts(source) == SPLITS["train"]
    assert held_out is not None


def test_set_without_validation_split_has_none(
    tmp_path: Path, opened: Opened, texts: Texts
) -> None:
    source, held_out = opened(prepare(tmp_path, {"train": ["a", "b"], "test": ["c"]}))
    assert texts(source) == ["a", "b"]
    assert held_out is None


def test_set_of_tfds_is_prepared_where_it_is_missing(
    tmp_path: Path, opened: Opened, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def build(name: str, *, data_dir: Path | None, file_format: str) -> Any:
        asked.append((name, data_dir))
        return JaxspeedTestSet(
            data_dir=data_dir or tmp_path / "usual", file_format=file_format
        )

    monkeypatch.setattr(tfds, "builder", build)
    assert texts(opened("tfds:jaxspeed_test_set")[0]) == SPLITS["train"]
    ours = tmp_path / "cache" / "tfds"
    assert asked == [("jaxspeed_test_set", ours), ("jaxspeed_test_set", None)]
    assert (ours / "jaxspeed_test_set").exists()


@pytest.mark.parametrize(
    ("splits", "text_field", "message"),
    [
        (SPLITS, "label", r"no text feature 'label', only \['text'\]"),
        (SPLITS, "txet", r"no text feature 'txet', .* Did you mean 'text'\?"),
        ({"test": ["a"]}, "text", r"no train split, only \['test'\]"),
    ],
)
def test_set_without_such_a_text_is_named(
    tmp_path: Path,
    opened: Opened,
    splits: dict[str, list[str]],
    text_field: str,
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(prepare(tmp_path, splits), text_field)


def test_truncated_set_is_named(tmp_path: Path, opened: Opened) -> None:
    folder = prepare(tmp_path)
    (records,) = folder.glob("*train*")
    records.write_bytes(records.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="train.* is not a whole array_record file"):
        opened(folder)


def test_set_in_another_format_is_named(tmp_path: Path, opened: Opened) -> None:
    folder = prepare(tmp_path)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ConfigError, match="prepared as tfrecord, which needs Tensor"):
        opened(folder)


def test_unknown_set_is_named(opened: Opened) -> None:
    with pytest.raises(ConfigError, match=r"no such set.* Did you mean 'imdb_reviews'"):
        opened("tfds:imdb_review")


def test_set_that_a_command_makes_is_said_so(opened: Opened) -> None:
    with pytest.raises(ConfigError, match="run `jaxspeed data jaxspeed_prompts`$"):
        opened("tfds:jaxspeed_prompts")


def test_unknown_variant_of_a_set_is_named(opened: Opened) -> None:
    with pytest.raises(ConfigError, match="cannot prepare it here .*; prepare it else"):
        opened("tfds:imdb_reviews/no_such_config")


@pytest.mark.parametrize("reason", [OSError, ImportError, RuntimeError])
def test_set_that_cannot_be_prepared_is_named(
    tmp_path: Path,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
    reason: type[Exception],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise reason("no network\nand more")

    builder = JaxspeedTestSet(data_dir=tmp_path / "usual", file_format="array_record")
    monkeypatch.setattr(builder, "download_and_prepare", fail)
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: builder)
    with pytest.raises(ConfigError, match=rf"\({reason.__name__}: no network\)"):
        opened("tfds:jaxspeed_test_set")
