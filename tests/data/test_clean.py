# SPDX-License-Identifier: Apache-2.0
"""Text cleaning, and items that occur twice, for documents and for records."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxspeed.config import ConfigError, DataConfig
from jaxspeed.data import build_tokenizer, clean, open_corpus, train_iterator
from jaxspeed.data.clean import STEPS, Seen, make_cleaner
from jaxspeed.data.corpus import open_record_corpus
from jaxspeed.data.documents import Source


MakeConfig = Callable[..., DataConfig]
Texts = Callable[[Source], list[str]]


class Items:
    """A source of the given items."""

    name = "items"
    fingerprint = 1

    def __init__(self, *items: Any):
        self.items = items
        self.num_bytes = len(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def kept(near: bool, *items: Any) -> list[Any]:
    source = Seen(near=near).unseen(Items(*items))
    return [source[index] for index in range(len(source))]


# Steps --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "text", "wanted"),
    [
        ("html", "one<br /><br>two", "one\n\ntwo"),
        ("html", "<p class='x'>a <B>b</B> &amp; &lt;c&gt;</p>", "\na b & <c>\n"),
        ("html", "a<!-- <b> -->b<script>if (a<b) x</script>c", "abc"),
        ("html", "<td>1</td><td>2</td>", " 1  2 "),
        ("html", "1 < 2 and x <3, a<b", "1 < 2 and x <3, a<b"),
        ("html", "caf&eacute; &#8364;", "caf\u00e9 \u20ac"),
        ("nfc", "cafe\u0301 \u2460", "caf\u00e9 \u2460"),
        ("nfkc", "cafe\u0301 \u2460 \ufb01", "caf\u00e9 1 fi"),
        ("control", "a\0b\x1b[0mc\u200bd\ufeff\u202ee\u00ad", "ab[0mcde"),
        ("control", "a\r\nb\rc\u2028d\te\u200d", "a\nb\nc\nd\te\u200d"),
        ("whitespace", "  a \t\u00a0 b \n  \n\n\n c ", "a b\n\nc"),
        ("stop_words", "The cat is on THE mat, don't", "cat mat, don't"),
    ],
)
def test_step_changes_what_it_should(step: str, text: str, wanted: str) -> None:
    assert make_cleaner([step])(text) == wanted


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("text", ["", "a plain line.\n\nAnother, caf\u00e9 \u20ac."])
def test_step_leaves_clean_text_alone_and_can_be_repeated(step: str, text: str) -> None:
    once = make_cleaner([step])(text)
    assert make_cleaner([step])(once) == once
    if step != "stop_words":
        assert once == text


def test_steps_have_an_order_of_their_own() -> None:
    text = "&nbsp;<b>the  end</b>"
    for names in (["whitespace", "html"], ["html", "whitespace"]):
        assert make_cleaner(names)(text) == "the end"
    assert make_cleaner([])(text) == text


@pytest.mark.parametrize(
    ("step", "module"), [("stop_words", "sklearn"), ("near_duplicates", "datasketch")]
)
def test_missing_package_is_named(
    step: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "sklearn.feature_extraction.text" if module == "sklearn" else module
    monkeypatch.setitem(sys.modules, name, None)
    clean._stop_words.cache_clear()
    ask = make_cleaner if step == "stop_words" else lambda _: Seen(near=True)
    with pytest.raises(ConfigError, match=rf"data.clean='{step}': .* pip install"):
        ask([step])
    clean._stop_words.cache_clear()


# Items that occur twice ---------------------------------------------------------------


def test_repeated_texts_are_left_out() -> None:
    assert kept(False, "a b", "c", "A  b\n", "c", "d") == ["a b", "c", "d"]


def test_records_are_compared_as_a_whole() -> None:
    image, other = np.zeros((2, 2)), np.ones((2, 2))
    same = {"text": "a", "image": image, "n": 1}
    different = [same | {"image": other}, same | {"n": 2}, same | {"text": "b"}]
    assert len(kept(False, same, dict(same), *different)) == 4


def test_nearly_the_same_texts_are_left_out() -> None:
    words = [f"w{number}" for number in range(200)]
    text, other = " ".join(words), " ".join(reversed(words))
    near = " ".join(["x", *words[1:]])
    assert kept(True, text, near, other) == [text, other]
    assert kept(False, text, near, other) == [text, near, other]
    a, b = ({"text": t, "n": n} for t, n in ((text, 1), (near, 2)))
    assert kept(True, a, b) == [a, b]


# Configuration ------------------------------------------------------------------------


def test_documents_are_cleaned_and_held_out_ones_are_not_trained_on(
    tmp_path: Path, make_config: MakeConfig, texts: Texts
) -> None:
    train = write(
        tmp_path / "a.jsonl", *({"text": f"<b>{n}</b>"} for n in (1, 2, 1, 3))
    )
    held = write(tmp_path / "b.jsonl", {"text": "3"}, {"text": "4"}, {"text": " 4"})
    config = make_config(
        train, eval_path=(str(held),), clean=("whitespace", "html", "duplicates")
    )
    corpus = open_corpus(config)
    assert texts(corpus.train[0]) == ["1", "2"]
    assert texts(corpus.held_out[0]) == ["3", "4"]
    before = open_corpus(make_config(train, eval_path=(str(held),)))
    assert before.train[0].num_bytes == 32
    assert corpus.train[0].num_bytes < 16


def test_nothing_left_to_train_on_is_named(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    train = write(tmp_path / "a.jsonl", {"text": "1"})
    held = write(tmp_path / "b.jsonl", {"text": "1"})
    config = make_config(train, eval_path=(str(held),), clean=("duplicates",))
    with pytest.raises(ConfigError, match=r"each document of .*a\.jsonl is held out"):
        open_corpus(config)


def test_strings_of_records_are_cleaned_and_targets_keep_their_words(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    record = {
        "a": "<i>the</i> cat",
        "b": ["the &amp;", 1],
        "c": {"d": "the <b>"},
        "n": 2,
    }
    path = write(tmp_path / "a.jsonl", record, record)
    config = make_config(path, clean=("html", "stop_words"))
    corpus = open_record_corpus(config, ("a", "b", "c", "n"), targets=("c",))
    assert corpus.train[0][0] == {"a": "cat", "b": ["&", 1], "c": {"d": "the "}, "n": 2}


def test_text_that_answers_point_into_is_not_cleaned(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    record = {"context": "a b", "answers": {"text": ["b"], "answer_start": [2]}}
    path = write(tmp_path / "a.jsonl", record, record | {"context": "c b"})
    fields = ("context", "answers")
    with pytest.raises(
        ConfigError, match=r"'answers' says where .* leave out \['html'\]"
    ):
        open_record_corpus(make_config(path, clean=("html", "duplicates")), fields)
    corpus = open_record_corpus(make_config(path, clean=("duplicates",)), fields)
    assert len(corpus.train[0]) == 1


def test_packed_rows_hold_cleaned_text_and_do_not_resume_with_other(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": f"<b>{n}</b>"} for n in range(40)))

    def iterator(*steps: str) -> Any:
        config = make_config(path, clean=steps)
        corpus = open_corpus(config)
        tokenizer = build_tokenizer(
            config, corpus.train, vocab_size=257, workdir=tmp_path
        )
        return train_iterator(
            config, corpus, tokenizer, seq_len=32, global_batch_size=1, seed=0
        )

    plain, cleaned = iterator(), iterator("html")
    assert ord("<") in next(plain)["inputs"]
    assert ord("<") not in next(cleaned)["inputs"]
    iterator("html").set_state(cleaned.get_state())
    with pytest.raises(ConfigError, match=r"data\.clean was \['html'\] when"):
        iterator().set_state(cleaned.get_state())


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (("nfc", "nfkc"), "'nfkc' does what 'nfc' does, and more; leave out 'nfc'"),
        (("duplicates", "near_duplicates"), "leave out 'duplicates'"),
    ],
)
def test_bad_setting_is_named(
    make_config: MakeConfig, steps: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("shakespeare", clean=steps)
