# SPDX-License-Identifier: Apache-2.0
"""SentencePiece's tokenizer in a GGUF file joins the neighbours of the highest score, as llama.cpp does."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxspeed.config import ConfigError
from jaxspeed.gguf_tokenizers import convert_tokenizer


tokenizers: Any = pytest.importorskip("tokenizers")

BYTES = [f"<0x{i:02X}>" for i in range(256)]
LETTERS = "\u2581etaoinshrdlug12\u00e9"
JOINED = ["\u2581t", "he", "in", "er", "\u2581the", "re", "\u2581a", "ing", "\u2581\u2581", "on", "\u2581in", "ther", "\u2581other"]  # fmt: skip
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *JOINED, *LETTERS, "<|end|>"]
TYPES = [2, 3, 3, *[6] * 256, *[1] * (len(JOINED) + len(LETTERS)), 4]
SCORES = [0.0] * 259 + [-float(i) for i in range(len(JOINED) + len(LETTERS) + 1)]
TEXTS = [
    "the other",
    "there in rain",
    "  two\u00e9 spaces  ",
    "unknown: \u4e16\U0001f642 z",
    "a\nb\ttheer",
    "ininger ttherere",
    "",
]


def fields(**more: Any) -> dict[str, Any]:
    ggml = {
        "model": "llama", "tokens": TOKENS, "scores": SCORES, "token_type": TYPES,
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **more,
    }  # fmt: skip
    return {"general.architecture": "llama", "llama.context_length": 64} | {
        f"tokenizer.ggml.{name}": value for name, value in ggml.items()
    }


def by_score(text: str, *, prefix: bool = True) -> list[int]:
    """Returns ids by the definition: the best pair of neighbours is joined until none is a piece."""
    if not text:
        return []
    ids = {t: i for i, t in enumerate(TOKENS) if TYPES[i] == 1}
    parts = list(((" " if prefix else "") + text).replace(" ", "\u2581"))
    while pairs := [
        (-SCORES[ids[a + b]], i)
        for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
        if a + b in ids
    ]:
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found: list[int] = []
    for part in parts:
        spelt = [TOKENS.index(f"<0x{byte:02X}>") for byte in part.encode()]
        found += [ids[part]] if part in ids else spelt
    return found


def converted(**more: Any) -> Any:
    texts = convert_tokenizer(Path("m.gguf"), fields(**more))
    return tokenizers.Tokenizer.from_str(texts["tokenizer.json"])


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_joined_by_score_and_joined_texts_come_back(
    text: str, prefix: bool
) -> None:
    tokenizer = converted(add_space_prefix=prefix)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == by_score(text, prefix=prefix)
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_wholes_and_frame_a_text() -> None:
    end = TOKENS.index("<|end|>")
    tokenizer = converted(add_eos_token=True)
    assert tokenizer.encode("the<|end|>").ids == [1, *by_score("the"), end, 2]
    assert converted(add_bos_token=False).encode("the").ids == by_score("the")
    settings = json.loads(
        convert_tokenizer(Path("m.gguf"), fields())["tokenizer_config.json"]
    )
    assert (settings["bos_token"], settings["unk_token"]) == ("<s>", "<unk>")


@pytest.mark.parametrize("lacking", ["tokens", "scores", "token_type", "bos_token_id"])
def test_lacking_field_is_named(lacking: str) -> None:
    given = fields()
    del given[f"tokenizer.ggml.{lacking}"]
    with pytest.raises(ConfigError, match=f"m.gguf: has no tokenizer.ggml.{lacking}"):
        convert_tokenizer(Path("m.gguf"), given)
