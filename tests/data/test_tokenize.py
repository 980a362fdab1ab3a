# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: text survives, bytes add up, and a run gets the same one again."""

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxspeed.config import ConfigError, DataConfig
from jaxspeed.data import (
    ByteTokenizer,
    Corpus,
    SubwordTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
    open_corpus,
    vocabulary as module,
)
from jaxspeed.data.tokenize import Frame
from jaxspeed.data.vocabulary import SENTINELS, TRAINERS, train_tokenizer


MakeConfig = Callable[..., DataConfig]

TEXTS = [
    "",
    "a",
    "To be, or not to be: that is the question.\n",
    "caf\u00e9 \u20ac5 \U0001f600\U0001f1e9\U0001f1ea e\u0301 \u0000 \ufffd",
    " \t\r\n  spaces   \n\n\n",
    "<|endoftext|> and </s> are text here",
    "".join(map(chr, random.Random(0).choices(range(0x20, 0xD000), k=2000))),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    cache = str(tmp_path_factory.mktemp("cache"))
    return open_corpus(DataConfig(cache_dir=cache))


@pytest.fixture(scope="module")
def bpe(corpus: Corpus) -> SubwordTokenizer:
    return train_tokenizer("bpe", corpus.train, 600)


@pytest.fixture(scope="module", params=["byte", "bpe", "word piece"])
def tokenizer(
    request: pytest.FixtureRequest,
    bpe: SubwordTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizer:
    if request.param == "byte":
        return ByteTokenizer()
    if request.param == "bpe":
        return bpe
    path = tmp_path_factory.mktemp("word_piece") / "tokenizer.json"
    write_word_piece(path)
    return load_tokenizer(path)


def write_word_piece(path: Path) -> None:
    """Writes a tokenizer that drops white space, lowers case and frames its output."""
    words = ["[UNK]", "[CLS]", "[SEP]", "be", "to", "the", "##s", "text", "a"]
    vocab = {word: number for number, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", 2), ("[CLS]", 1)
    )
    made.add_special_tokens(["[CLS]", "[SEP]"])
    made.enable_truncation(3)
    made.enable_padding()
    made.save(str(path))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_in_the_vocabulary_and_never_the_end(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
    assert tokenizer.end_id not in ids
    assert 0 <= tokenizer.end_id < tokenizer.vocab_size


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_the_tokens_add_up_to_the_text(
    tokenizer: Tokenizer, text: str
) -> None:
    ids, num_bytes = tokenizer.encode_with_bytes(text)[:2]
    assert num_bytes is not None
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert len(num_bytes) == len(ids) + 1
    assert (num_bytes >= 0).all()
    assert num_bytes.sum() == len(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(bpe: SubwordTokenizer, text: str) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        ended = np.append(ids, tokenizer.end_id)
        assert tokenizer.decode(ended) == text


def test_decoding_stands_any_ids() -> None:
    assert ByteTokenizer().decode([256, 0xE2, 0x82, 256, 65]) == "\ufffdA"
    assert ByteTokenizer().decode(jnp.array([[65], [66]])) == "AB"
    assert ByteTokenizer().decode(np.array([], np.int32)) == ""


def test_bytes_are_counted_where_their_token_is(bpe: SubwordTokenizer) -> None:
    text = "the question \u20ac the"
    ids, num_bytes = bpe.encode_with_bytes(text)[:2]
    assert num_bytes is not None
    spelled = [len(bpe.decode([i]).encode()) for i in ids[:5].tolist()]
    np.testing.assert_array_equal(num_bytes[:5], spelled)


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_keeps_to_its_size(corpus: Corpus, kind: str) -> None:
    sizes = [train_tokenizer(kind, corpus.held_out, n).vocab_size for n in (400, 401)]
    assert sizes == [400, 401]


def test_process_that_does_not_lead_waits_for_the_vocabulary(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(leads: bool) -> Tokenizer:
        return build_tokenizer(
            DataConfig(tokenizer="wordpiece"), corpus.held_out, vocab_size=300, workdir=tmp_path, leads=leads,
        )  # fmt: skip

    with ThreadPoolExecutor() as pool:
        second, first = pool.submit(build, False), pool.submit(build, True)
    assert first.result().fingerprint == second.result().fingerprint
    (tmp_path / "tokenizer.json").unlink()
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0)
    with pytest.raises(ConfigError, match="no tokenizer.json in it after 0 s"):
        build(False)


def test_trained_vocabularies_have_the_tokens_of_their_kind(corpus: Corpus) -> None:
    word = train_tokenizer("wordpiece", corpus.held_out, 400)
    cls, sep = (word.token_id(name) for name in ("[CLS]", "[SEP]"))
    assert (cls, sep, word.token_id("[MASK]")) == (2, word.end_id, 4)
    assert (word.pad_id, word.frame(2).second_type) == (0, 1)
    assert word.decode(word.encode("The KING of kings")) == "the king of kings"
    t5 = train_tokenizer("unigram", corpus.held_out, 400)
    assert t5.frame(1) == Frame((), (), (t5.end_id,), 0)
    assert [t5.token_id(name) for name in SENTINELS[:2]] == [399, 398]
    assert t5.decode(t5.encode("the King of kings")) == "the King of kings"


def test_training_reads_no_more_than_it_says(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TRAIN_BYTES", corpus.train[0].num_bytes // 10)
    count = len(list(module._sample(corpus.train)))
    assert count == -(-len(corpus.train[0]) // 11)


def test_trained_tokenizer_is_kept_and_read_again(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = DataConfig(tokenizer="bpe")
    first = build_tokenizer(cfg, corpus.train, vocab_size=400, workdir=tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").exists()
    monkeypatch.setattr(
        module, "train_tokenizer", lambda *_: pytest.fail("trained again")
    )
    second = build_tokenizer(
        cfg, corpus.train, vocab_size=400, workdir=tmp_path / "run"
    )
    assert first.fingerprint == second.fingerprint
    assert first.end_id == second.end_id


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "message"),
    [
        ("byte", 256, "it has 257 ids but the model only 256; set model.vocab_size to"),
        ("bpe", 256, "it needs at least 257 ids"),
        ("unigram", 256, "it needs at least 300 ids"),
        ("words.json", 8, "it has 9 ids but the model only 8"),
        ("missing.json", 512, "no such file; give auto, byte, bpe,"),
        ("bytes", 512, "no such file; give auto, byte, bpe,"),
        ("broken.json", 512, "is not a tokenizer.json"),
        ("other.json", 512, "is not a tokenizer.json"),
        ("endless.json", 512, "no end-of-text token in it"),
    ],
)
def test_tokenizer_that_does_not_fit_is_named(
    corpus: Corpus, tmp_path: Path, tokenizer: str, vocab_size: int, message: str
) -> None:
    write_word_piece(tmp_path / "words.json")
    (tmp_path / "broken.json").write_text('{"model": {"ty')
    (tmp_path / "other.json").write_text('{"name": "x"}')
    endless = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    endless.save(str(tmp_path / "endless.json"))
    path = tokenizer if "." not in tokenizer else str(tmp_path / tokenizer)
    cfg = DataConfig(tokenizer=path)
    with pytest.raises(ConfigError, match=message) as caught:
        build_tokenizer(cfg, corpus.train, vocab_size=vocab_size, workdir=tmp_path)
    assert str(caught.value).startswith(f"data.tokenizer={path!r}: ")


def test_run_directory_that_cannot_be_written_is_named(
    corpus: Corpus, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    cfg = DataConfig(tokenizer="bpe")
    with pytest.raises(ConfigError, match="^workdir=.*cannot be written"):
        build_tokenizer(cfg, corpus.train, vocab_size=300, workdir=tmp_path / "file")


@pytest.mark.parametrize("named", ["[CLS]", {"content": "[CLS]"}])
def test_end_token_may_be_named_beside_the_tokenizer(
    tmp_path: Path, named: object
) -> None:
    write_word_piece(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").end_id == 2
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": named}))
    assert load_tokenizer(tmp_path / "tokenizer.json").end_id == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"eos_token": "</end>"}', r"\(looked for </end>\)"),
        ('{"eos_tok', "tokenizer_config.json beside it is not JSON"),
    ],
)
def test_end_token_that_is_not_there_is_named(
    tmp_path: Path, config: str, message: str
) -> None:
    write_word_piece(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_kept_vocabulary_that_is_too_large_says_where_it_is(
    corpus: Corpus, bpe: SubwordTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bpe.to_json())
    cfg = DataConfig(tokenizer="bpe")
    with pytest.raises(ConfigError, match=f"or remove {tmp_path}/tokenizer.json to tr"):
        build_tokenizer(cfg, corpus.train, vocab_size=400, workdir=tmp_path)


# Special tokens -----------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_say_where_their_tokens_stand(tokenizer: Tokenizer, text: str) -> None:
    ids, spans = tokenizer.pieces(text)
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert spans.shape == (len(ids), 2)
    assert ((spans[:, 0] <= spans[:, 1]) & (spans[:, 1] <= len(text))).all()
    assert (np.diff(spans[:, 0]) >= 0).all()


def test_piece_of_a_character_is_the_whole_character() -> None:
    spans = ByteTokenizer().pieces("a\u20acb").spans
    assert spans.tolist() == [[0, 1], [1, 2], [1, 2], [1, 2], [2, 3]]


def test_frame_is_what_the_file_puts_around(
    tmp_path: Path, bpe: SubwordTokenizer
) -> None:
    write_word_piece(tmp_path / "tokenizer.json")
    word = load_tokenizer(tmp_path / "tokenizer.json")
    assert word.frame(1) == Frame((1,), (), (2,), 0)
    assert word.frame(2) == Frame((1,), (2,), (2,), 1)
    end = bpe.end_id
    assert bpe.frame(2) == Frame((), (end,), (end,), 1)
    first, second = np.array([7, 8], np.int32), np.array([9], np.int32)
    ids, types = word.frame(2).around(first, second)
    assert (ids.tolist(), types.tolist()) == ([1, 7, 8, 2, 9, 2], [0, 0, 0, 0, 1, 1])
    ids, types = word.frame(1).around(first)
    assert (ids.tolist(), types.tolist()) == ([1, 7, 8, 2], [0, 0, 0, 0])


# The model's own ----------------------------------------------------------------------


def test_tokenizer_is_that_of_the_model_to_begin_with(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    init, workdir = tmp_path / "model", tmp_path / "run"
    init.mkdir()
    write_word_piece(init / "tokenizer.json")
    (init / "tokenizer_config.json").write_text('{"eos_token": "[CLS]"}')

    def build(
        init: Path | str, tokenizer: str = "auto", workdir: Path = workdir
    ) -> Tokenizer:
        return build_tokenizer(
            DataConfig(tokenizer=tokenizer), corpus.held_out, vocab_size=300, workdir=workdir, init=str(init),
        )  # fmt: skip

    assert isinstance(build(""), ByteTokenizer)
    first = build(init)
    assert f"tokenizer: {init}/tokenizer.json, 9 ids" in caplog.text
    # It goes with the run, which then needs the folder no more.
    assert (build("").fingerprint, build("").end_id) == (first.fingerprint, 1)
    message = "data.tokenizer='byte': the model to begin with was trained with another"
    with pytest.raises(ConfigError, match=message):
        build(init, "byte")
    with pytest.raises(ConfigError, match="was trained with another vocabulary"):
        build(init, "bpe", tmp_path / "another")
    build(init, str(init / "tokenizer.json"))


def test_model_without_its_tokenizer_is_named(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="has no tokenizer.json, so what its token"):
        build_tokenizer(
            DataConfig(), corpus.train, vocab_size=300, workdir=tmp_path / "run", init=str(tmp_path),
        )  # fmt: skip
