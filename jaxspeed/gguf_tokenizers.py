# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a GGUF file as Hugging Face's tokenizer.json and tokenizer_config.json.

llama.cpp knows two kinds that models here have: byte-level BPE with its merges ("gpt2"), and
SentencePiece's BPE ("llama"), which has scores for merges: of all neighbours that make a piece it
joins those of the highest score, and spells what it does not know in bytes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxspeed.config import ConfigError


NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Token types; those of the last two are matched as a whole in the text."""

LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
WORDS = {
    "default": "",
    "gpt-2": "",
    "smollm": "",
    "llama-bpe": LLAMA3_WORDS,
    "qwen2": QWEN2_WORDS,
}
"""How `tokenizer.ggml.pre` splits a text into words; empty: as GPT-2 does (smollm: after each digit, too)."""

SPACE = "\u2581"
"""What stands for a space in SentencePiece's pieces."""


def convert_tokenizer(path: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts of tokenizer.json and of tokenizer_config.json (special tokens, chat template).

    Args:
        path: the file, for messages.
        fields: its metadata.

    Raises:
        ConfigError: the tokenizer is none that is done here, or incomplete.
    """
    from tokenizers import AddedToken, processors

    def ggml(name: str, default: Any = None) -> Any:
        value = fields.get(f"tokenizer.ggml.{name}", default)
        if value is None:
            raise ConfigError(f"{path}: has no tokenizer.ggml.{name}")
        return value

    kind, words = ggml("model"), ggml("pre", "default")
    if kind == "gpt2" and words in WORDS:
        tokenizer = _byte_level(ggml, words)
    elif kind == "llama":
        tokenizer = _sentence_pieces(ggml)
    else:
        raise ConfigError(
            f"{path}: tokenizer.ggml.model={kind!r} with pre={words!r} is not done here; gpt2 with {', '.join(WORDS)} is, and llama"
        )
    tokens: Sequence[str] = ggml("tokens")
    tokenizer.add_tokens(
        [
            AddedToken(token, special=type_ == CONTROL, normalized=False)
            for token, type_ in zip(tokens, ggml("token_type"), strict=True)
            if type_ in (CONTROL, USER_DEFINED)
        ]
    )
    # llama.cpp's defaults.
    begins = ggml("add_bos_token", kind == "llama" or words == "llama-bpe")
    ends = ggml("add_eos_token", False)
    if begins or ends:
        before = [ggml("bos_token_id")] if begins else []
        after = [ggml("eos_token_id")] if ends else []
        named = lambda ids: [tokens[i] for i in ids]
        around = lambda text: [*named(before), text, *named(after)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around("$A"),
            pair=[*around("$A"), *around("$B")],
            special_tokens=[(tokens[i], i) for i in {*before, *after}],
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields[f"{fields['general.architecture']}.context_length"],
    }
    for name, short in {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}.items():  # fmt: skip
        number = fields.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None:
            settings[f"{short}_token"] = tokens[number]
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }


def _byte_level(ggml: Callable[..., Any], words: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in ggml("merges")]
    vocab = {token: i for i, token in enumerate(ggml("tokens"))}
    # Llama 3 takes a word that is a token as it is.
    whole = words == "llama-bpe"
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=whole))
    before: list[Any] = []
    if words == "smollm":
        before.append(pre_tokenizers.Digits(individual_digits=True))
    if WORDS[words]:
        before.append(pre_tokenizers.Split(Regex(WORDS[words]), "isolated"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not WORDS[words])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_pieces(ggml: Callable[..., Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, types = ggml("tokens"), ggml("token_type")
    vocab = {token: i for i, token in enumerate(tokens)}
    scored = zip(tokens, ggml("scores"), types, strict=True)
    pieces = {token: score for token, score, type_ in scored if type_ == NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces, key=lambda piece: -pieces[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    unknown = tokens[ggml("unknown_token_id", 0)]
    model = models.BPE(
        vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer, spaces = Tokenizer(model), normalizers.Replace(" ", SPACE)
    after: list[Any] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if ggml("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), spaces]
        )
        after.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(after)
    return tokenizer
