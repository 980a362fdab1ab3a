# SPDX-License-Identifier: Apache-2.0
"""What is trained on and what is held out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxspeed.config import ConfigError, DataConfig
from jaxspeed.data import open_corpus
from jaxspeed.data.corpus import split
from jaxspeed.data.documents import Source


MakeConfig = Callable[..., DataConfig]
Texts = Callable[[Source], list[str]]


class Numbers:
    """Documents "0", "1", ..."""

    name = "numbers"
    fingerprint = 1

    def __init__(self, count: int):
        self.count = count
        self.num_bytes = 10 * count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        assert 0 <= index < self.count
        return str(index)


def write(path: Path, count: int, prefix: str = "") -> Path:
    lines = (json.dumps({"text": f"{prefix}{number}"}) for number in range(count))
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("count", [2, 3, 20, 101, 1000])
def test_split_takes_every_document_once(
    texts: Texts, count: int, fraction: float
) -> None:
    train, held_out = split(Numbers(count), fraction)
    assert len(train) >= 1
    assert len(held_out) == min(max(round(count * fraction), 1), count - 1)
    assert sorted(texts(train) + texts(held_out), key=int) == texts(Numbers(count))
    assert texts(train) == sorted(texts(train), key=int)
    assert train.num_bytes + held_out.num_bytes == 10 * count


def test_held_out_documents_are_spread_evenly(texts: Texts) -> None:
    _, held_out = split(Numbers(100), 0.05)
    assert texts(held_out) == ["10", "30", "50", "70", "90"]


def test_split_of_one_document_holds_out_none() -> None:
    train, held_out = split(Numbers(1), 0.05)
    assert (len(train), len(held_out)) == (1, 0)


def test_each_path_is_split_by_itself(
    tmp_path: Path, make_config: MakeConfig, texts: Texts
) -> None:
    first = write(tmp_path / "a.jsonl", 40, "a")
    second = write(tmp_path / "b.jsonl", 1, "b")
    corpus = open_corpus(make_config(first, second))
    assert [len(source) for source in corpus.train] == [38, 1]
    assert [texts(source) for source in corpus.held_out] == [["a10", "a30"]]


def test_eval_path_leaves_all_of_path_to_training(
    tmp_path: Path, make_config: MakeConfig, texts: Texts
) -> None:
    train, other = write(tmp_path / "a.jsonl", 3), write(tmp_path / "b.jsonl", 1, "b")
    corpus = open_corpus(make_config(train, eval_path=(str(other),)))
    assert texts(corpus.train[0]) == ["0", "1", "2"]
    assert texts(corpus.held_out[0]) == ["b0"]


def test_bundled_text_as_eval_path_is_its_validation_split(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    train = write(tmp_path / "a.jsonl", 3)
    corpus = open_corpus(make_config(train, eval_path=("shakespeare",)))
    assert len(corpus.held_out[0]) == 16


def test_what_is_trained_on_can_be_evaluated_on(
    tmp_path: Path, make_config: MakeConfig, texts: Texts
) -> None:
    path = write(tmp_path / "a.jsonl", 40)
    corpus = open_corpus(make_config(path, eval_on="train"))
    assert texts(corpus.held_out[0]) == texts(corpus.train[0])
    assert len(corpus.held_out[0]) == 38
    assert corpus.describe().endswith(
        "to train on, and evaluated on (data.eval_on=train)"
    )


def test_either_other_text_or_that_of_training_is_evaluated_on(
    make_config: MakeConfig,
) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval_on='train': data\.eval_path="):
        make_config("a.jsonl", eval_on="train", eval_path=("b.jsonl",))


@pytest.mark.parametrize("train", ["", "a.jsonl"])
def test_training_text_may_not_be_evaluated_on(
    tmp_path: Path, make_config: MakeConfig, train: str
) -> None:
    path = write(tmp_path / "a.jsonl", 3)
    config = make_config(tmp_path / train, eval_path=(str(path),))
    with pytest.raises(ConfigError, match=r"data\.eval_path=.*a\.jsonl is also in"):
        open_corpus(config)


def test_bundled_text_may_be_trained_and_evaluated_on(make_config: MakeConfig) -> None:
    corpus = open_corpus(make_config("shakespeare", eval_path=("shakespeare",)))
    assert (len(corpus.train[0]), len(corpus.held_out[0])) == (307, 16)


@pytest.mark.parametrize("text", ["a", "a\n", "\u20ac"])
def test_single_document_cannot_be_held_out(
    tmp_path: Path, make_config: MakeConfig, text: str
) -> None:
    (tmp_path / "a.txt").write_text(text)
    config = make_config(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match=r"data\.path=.*give data\.eval_path"):
        open_corpus(config)


def test_errors_in_eval_path_name_it(tmp_path: Path, make_config: MakeConfig) -> None:
    path = write(tmp_path / "a.jsonl", 3)
    with pytest.raises(ConfigError, match=r"^data\.eval_path='/missing': no such file"):
        open_corpus(make_config(path, eval_path=("/missing",)))


def test_description_counts_documents_and_bytes(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"text": "x" * 500})] * 2000))
    assert open_corpus(make_config(path)).describe() == (
        f"{path}: 1,900 documents (950 kB) to train on, 100 documents (50 kB) held out"
    )
