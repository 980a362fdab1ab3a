# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of encoder-decoders as transformers writes them: the same ids, special tokens included."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxspeed.data import SubwordTokenizer, load_tokenizer


pytestmark = pytest.mark.hf

transformers: Any = pytest.importorskip("transformers")

TEXT = "It was a dark and stormy night;  the rain fell.\n <extra_id_0> is text"


def whole(tokenizer: SubwordTokenizer, text: str) -> list[int]:
    """Returns the ids of a text with what stands around it."""
    ids, frame = tokenizer.encode(text).tolist(), tokenizer.frame(1)
    return [*frame.before, *ids, *frame.after]


def test_unigram_vocabulary_of_t5(tmp_path: Path) -> None:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581the", "ar", "\u2581night"]
    pieces += sorted(set(TEXT.lower()) - {" ", "\n"})
    theirs = transformers.T5Tokenizer(
        vocab=[(piece, -float(place)) for place, piece in enumerate(pieces)]
    )
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    plain = TEXT.replace("<extra_id_0>", "")
    assert whole(ours, plain) == theirs(plain).input_ids
    assert (ours.pad_id, ours.end_id) == (0, 1)
    # A text that quotes a sentinel is a text; a template may name it.
    sentinel = theirs.convert_tokens_to_ids("<extra_id_0>")
    assert sentinel == ours.token_id("<extra_id_0>")
    assert sentinel not in whole(ours, TEXT)
    assert sentinel in ours.encode_named(TEXT)


def test_byte_pairs_of_whisper(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    pre_tokenizer: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.pre_tokenizer = pre_tokenizer
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=letters, show_progress=False
    )
    trained.train_from_iterator([TEXT] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    theirs = transformers.WhisperTokenizer(vocab=model["vocab"], merges=merges)
    names = "endoftext startoftranscript en de translate transcribe notimestamps"
    theirs.add_tokens([f"<|{name}|>" for name in names.split()], special_tokens=True)
    theirs.set_prefix_tokens(language="en", task="transcribe")
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    assert whole(ours, TEXT) == theirs(TEXT).input_ids
    prompt = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
    assert list(ours.frame(1).before) == ours.encode_named(prompt).tolist()
    assert ours.end_id == ours.token_id("<|endoftext|>")
    assert ours.decode(whole(ours, TEXT)) == TEXT
