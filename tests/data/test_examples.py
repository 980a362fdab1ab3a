# SPDX-License-Identifier: Apache-2.0
"""Records with several fields from TFDS sets and from files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow_datasets as tfds
from pyarrow import parquet

from jaxspeed.config import ConfigError, DataConfig
from jaxspeed.data.corpus import open_record_corpus
from jaxspeed.data.documents import Record, RecordSource
from jaxspeed.data.examples import open_examples


MakeConfig = Callable[..., DataConfig]
Opened = Callable[..., RecordSource]

PIXELS = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)

FULL: Record = {
    "id": "q1",
    "text": "caf\u00e9",
    "label": 1,
    "score": 0.5,
    "answers": {"text": ["a", "b"], "answer_start": [3, 5]},
    "tags": ["x", "y"],
    "wave": np.arange(-2, 3, dtype=np.int16),
    "image": PIXELS,
    "translation": {"de": "ja", "en": "yes"},
}


class JaxspeedTestRecords(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set with a feature of each kind."""

    name = "jaxspeed_test_records"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        f = tfds.features
        features = {
            "id": f.Tensor(shape=(), dtype=np.str_),
            "text": f.Text(),
            "label": f.ClassLabel(names=["neg", "pos"]),
            "score": f.Scalar(np.float32),
            "answers": f.Sequence({"text": f.Text(), "answer_start": np.int32}),
            "tags": f.Sequence(f.Text()),
            "wave": f.Tensor(shape=(None,), dtype=np.int16),
            "image": f.Image(shape=(4, 4, 3), encoding_format="png"),
            "translation": f.Translation(languages=["de", "en"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=f.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {
            split: self._generate_examples(count)
            for split, count in {"train": 3, "test": 2, "unsupervised": 1}.items()
        }

    def _generate_examples(self, count: int) -> Iterator[tuple[int, Record]]:
        for key in range(count):
            yield key, FULL | {"id": f"q{key + 1}"} | {"image": as_png()}


def as_png() -> Any:
    from PIL import Image

    return Image.fromarray(PIXELS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a cache folder with the set in it."""
    cache = tmp_path_factory.mktemp("cache")
    builder = JaxspeedTestRecords(data_dir=cache / "tfds", file_format="array_record")
    builder.download_and_prepare()
    return cache


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """Returns `opened(path, *fields, split="train")`."""

    def open_one(path: str | Path, *fields: str, split: str = "train") -> RecordSource:
        return open_examples(
            str(path),
            field="data.path",
            fields=fields,
            cache_dir=tmp_path / "cache",
            split=split,
        )

    return open_one


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal in type and content, through dicts and lists."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# TFDS ---------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["name", "folder"])
def test_tfds_features_become_plain_values(prepared: Path, by: str) -> None:
    folder = prepared / "tfds" / "jaxspeed_test_records" / "1.0.0"
    path = "tfds:jaxspeed_test_records" if by == "name" else str(folder)
    source = open_examples(
        path, field="data.path", fields=tuple(FULL), cache_dir=prepared, split="train"
    )
    assert [record["id"] for record in map(source.__getitem__, range(3))] == [
        "q1",
        "q2",
        "q3",
    ]
    assert same(source[0], FULL)
    assert source.name == path


@pytest.mark.parametrize(
    ("path", "split", "count"),
    [("", "train", 3), ("", "test", 2), ("#test", "train", 2)],
)
def test_split_is_chosen_by_the_call_or_the_path(
    prepared: Path, path: str, split: str, count: int
) -> None:
    source = open_examples(
        f"tfds:jaxspeed_test_records{path}",
        field="data.path",
        fields=("translation.de",),
        cache_dir=prepared,
        split=split,
    )
    assert len(source) == count
    assert source[0] == {"translation.de": "ja"}


def test_missing_field_or_split_of_a_set_is_named(prepared: Path) -> None:
    def opened(path: str, name: str) -> RecordSource:
        return open_examples(
            path, field="data.path", fields=(name,), cache_dir=prepared, split="train"
        )

    with pytest.raises(ConfigError, match=r"no field 'lable', .* mean 'label'\?"):
        opened("tfds:jaxspeed_test_records", "lable")
    with pytest.raises(ConfigError, match=r"no tset split, .* Did you mean 'test'\?"):
        opened("tfds:jaxspeed_test_records#tset", "label")


def test_test_split_is_held_out_where_there_is_no_validation(
    prepared: Path, make_config: MakeConfig
) -> None:
    config = make_config("tfds:jaxspeed_test_records", cache_dir=str(prepared))
    corpus = open_record_corpus(config, ("text", "label"))
    assert [len(source) for source in corpus.train + corpus.held_out] == [3, 2]
    assert "3 records" in corpus.describe()


# .jsonl -------------------------------------------------------------------------------


def test_json_lines_keep_nested_values(tmp_path: Path, opened: Opened) -> None:
    record = {"a": 1, "b": [1.5, None], "c": {"d": "\u20ac", "e": {"f": True}}}
    path = write_jsonl(tmp_path / "a.jsonl", record, record | {"a": 2})
    source = opened(path, "a", "b", "c", "c.e.f")
    assert len(source) == 2
    assert same(source[0], record | {"c.e.f": True})
    assert source[1]["a"] == 2
    assert source.num_bytes == path.stat().st_size


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path, opened: Opened) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"a": {"b": ["\ud83d", "ok"]}})
    assert opened(path, "a")[0] == {"a": {"b": ["\ufffd", "ok"]}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"text": "x", "lable": 1}',
            r"line 1 has no field 'label', .* mean 'lable'\?",
        ),
        ('{"text": "x", "label": 1}\n{"text": "y"', "line 2, the last, is cut off"),
        ('{"text": "x", "label": 1}\n[]\n', "line 2 is a list, not an object"),
        ("\n\n", "holds nothing to read"),
    ],
)
def test_bad_json_lines_are_named(
    tmp_path: Path, opened: Opened, text: str, message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / "a.jsonl", "text", "label")


def test_file_without_fields_is_named(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"kind of file that is read here; give"):
        opened(tmp_path / "a.txt", "text")


# Other files --------------------------------------------------------------------------


def write_csv(
    path: Path, text: str = 'text,label\n"a, ""b""\nc",1\n\n\u20ac,2\n'
) -> Path:
    path.write_text(text.replace(",", "\t") if path.suffix == ".tsv" else text)
    return path


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
def test_csv_rows_are_records_of_text(
    tmp_path: Path, opened: Opened, kind: str
) -> None:
    source = opened(write_csv(tmp_path / f"a{kind}"), "label", "text")
    mark = "\t" if kind == ".tsv" else ","
    assert [source[index] for index in range(len(source))] == [
        {"label": "1", "text": f'a{mark} "b"\nc'},
        {"label": "2", "text": "\u20ac"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,lable\nx,1\n", r"the first line has no field 'label', .* mean 'lable'"),
        ("text,label\nx,1\ny\n", "the row to line 3 has 1 cells, not 2"),
        ('text,label\n"x,1\n', "the row from offset 11 to line 2 is not CSV"),
        ("text,text,label\n", "has several columns 'text'"),
        ("text,label\n", "holds nothing to read"),
        ("", "the first line has no field 'text', only"),
    ],
)
def test_bad_csv_is_named(
    tmp_path: Path, opened: Opened, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(write_csv(tmp_path / "a.csv", text), "text", "label")


def test_csv_that_is_not_utf8_is_named(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\nx\n\xff\n")
    with pytest.raises(ConfigError, match="line 3 is not UTF-8 text"):
        opened(tmp_path / "a.csv", "text")


NESTED = {"translation": [{"de": f"d{n}", "en": f"e{n}"} for n in range(2500)]}
COLUMNS = NESTED | {"n": list(range(2500)), "tags": [["x"]] * 2500}


def test_parquet_rows_are_records(tmp_path: Path, opened: Opened) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table(COLUMNS), path, row_group_size=700)
    source = opened(path, "n", "translation.de", "tags")
    assert len(source) == 2500
    for index in (0, 699, 700, 1999, 2499):
        wanted = {"n": index, "translation.de": f"d{index}", "tags": ["x"]}
        assert same(source[index], wanted)
    assert opened(path, "n", "translation.de", "tags").fingerprint == source.fingerprint
    with pytest.raises(ConfigError, match=r"has no column 'm', only .*'n'"):
        opened(path, "m")
    with pytest.raises(ConfigError, match=r"no field 'translation.fr', .*mean 'transl"):
        opened(path, "translation.fr")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ConfigError, match="is not a whole parquet file"):
        opened(path, "n")


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "one two",
                    "qas": [
                        {"id": "a", "question": "?", "answers": []},
                        {
                            "id": "b",
                            "question": "!",
                            "answers": [{"text": "two", "answer_start": 4}],
                        },
                    ],
                }
            ],
        }
    ],
}


def test_squad_json_gives_a_record_per_question(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "train-v2.0.json").write_text(json.dumps(SQUAD))
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(SQUAD | {"data": []}))
    source = opened(tmp_path, "id", "context", "answers")
    assert [source[0], source[1]] == [
        {"id": "a", "context": "one two", "answers": {"text": [], "answer_start": []}},
        {
            "id": "b",
            "context": "one two",
            "answers": {"text": ["two"], "answer_start": [4]},
        },
    ]
    with pytest.raises(ConfigError, match="holds nothing to read"):
        opened(tmp_path, "id", split="validation")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": [', r"is not whole JSON \("),
        (
            '{"data": [{}]}',
            r"is not in SQuAD's format \(KeyError: 'paragraphs'\); give",
        ),
        ("[1]", "is not in SQuAD's format"),
        (json.dumps(SQUAD), r"a question has no field 'answer', .* mean 'answers'"),
    ],
)
def test_bad_squad_json_is_named(
    tmp_path: Path, opened: Opened, text: str, message: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / "a.json", "answer")


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_file_that_changes_while_it_is_read_is_named(
    tmp_path: Path, opened: Opened, kind: str
) -> None:
    path = tmp_path / f"a{kind}"
    path.write_text(
        '{"text": "xxxxxxx"}\n' if kind == ".jsonl" else "text\nxxxxxxxxxx\n"
    )
    source = opened(path, "text")
    path.write_text("")
    with pytest.raises(ConfigError, match="changed while it was in use"):
        _ = source[0]


# Holding out --------------------------------------------------------------------------


def test_share_of_the_records_is_held_out(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"label": n} for n in range(40)))
    corpus = open_record_corpus(make_config(path), ("label",))
    (held_out,) = corpus.held_out
    assert [held_out[0]["label"], held_out[1]["label"]] == [10, 30]
    assert len(corpus.train[0]) == 38


def test_record_trained_on_may_not_be_evaluated_on(
    tmp_path: Path, make_config: MakeConfig, prepared: Path
) -> None:
    name = "tfds:jaxspeed_test_records"
    config = make_config(name, eval_path=(f"{name}#train",), cache_dir=str(prepared))
    with pytest.raises(ConfigError, match="would see what is trained on"):
        open_record_corpus(config, ("label",))
    config = make_config(name, eval_path=(f"{name}#test",), cache_dir=str(prepared))
    assert len(open_record_corpus(config, ("label",)).held_out[0]) == 2
