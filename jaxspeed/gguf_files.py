# SPDX-License-Identifier: Apache-2.0
"""GGUF files (llama.cpp's) as the Hugging Face model that they were made of: settings, tensors, tokenizer.

The `gguf` package reads the file and undoes its quantisation, a tensor at a time. What is done
here is the way back: names, the order of rotary rows, config.json, tokenizer.json.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspeed.config import ConfigError
from jaxspeed.tensorfiles import TensorInfo


ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Values of `general.architecture` done here: those of models/llama.py."""

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""`blk.N.KEY.weight` is `model.layers.N.VALUE.weight` (gguf-py's `tensor_mapping.py`)."""

LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

CONTROL, USER_DEFINED = 3, 4
"""Token types that are matched as a whole in the text."""


class GGUF(NamedTuple):
    """What a file holds, as Hugging Face would have it."""

    settings: dict[str, Any]
    """config.json."""
    tensors: dict[str, TensorInfo]
    """By Hugging Face's names, as float32; a quantised one is dequantised when it is viewed."""
    tokenizer: dict[str, str]
    """The text of tokenizer.json, and of tokenizer_config.json (special tokens and the chat template)."""


def read_gguf(path: str | Path) -> GGUF:
    """Returns what a GGUF file holds.

    Raises:
        ConfigError: it is damaged, of an architecture or a tokenizer not done here, or the
            package `gguf` is missing.
    """
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            f"{path}: reading GGUF needs a package: pip install 'jaxspeed[hf]', or gguf alone"
        ) from None
    path = Path(path).expanduser()
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: f.contents() for name, f in reader.fields.items()}
    except Exception as error:  # the package raises all kinds of a damaged file
        raise ConfigError(
            f"{path}: not a GGUF file, or truncated ({type(error).__name__}: {error})"
        ) from None
    settings = _settings(path, fields)
    names = {t.name for t in reader.tensors}
    settings["tie_word_embeddings"] = "output.weight" not in names
    tensors: dict[str, TensorInfo] = {}
    for tensor in reader.tensors:
        name = _name(path, tensor.name)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        view = functools.partial(
            gguf.quants.dequantize, tensor.data, tensor.tensor_type
        )
        tensors[name] = TensorInfo(
            shape, np.dtype(np.float32), _unpermuted(view, name, shape, settings)
        )
    return GGUF(settings, tensors, _tokenizer(path, fields))


def _settings(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"{path}: general.architecture={kind!r} is not done here; {', '.join(ARCHITECTURES)} are"
        )
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        raise ConfigError(f"{path}: {kind}.rope.scaling.type={scaling!r} is not done")

    def get(name: str, default: Any = None) -> Any:
        value = fields.get(f"{kind}.{name}", default)
        if value is None:
            raise ConfigError(f"{path}: has no {kind}.{name}")
        return value

    heads, width = get("attention.head_count"), get("embedding_length")
    return {
        "model_type": kind,
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", ())),
        "max_position_embeddings": get("context_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "hidden_size": width,
        "head_dim": get("attention.key_length", width // heads),
        "intermediate_size": get("feed_forward_length"),
        "rope_theta": float(get("rope.freq_base", 10_000.0)),
        # Kept as float32 there: 1e-5 comes as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
    }


def _name(path: Path, name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    match name.split("."):
        case ["blk", layer, inner, kind] if inner in INSIDE:
            return f"model.layers.{layer}.{INSIDE[inner]}.{kind}"
    raise ConfigError(f"{path}: holds {name}, which no family here has a place for")


def _unpermuted(
    view: Callable[[], np.ndarray],
    name: str,
    shape: tuple[int, ...],
    settings: Mapping[str, Any],
) -> Callable[[], np.ndarray]:
    """Returns the view with a Llama's query and key rows in Hugging Face's order.

    llama.cpp rotates neighbours, Hugging Face halves; its converter interleaves the rows of a
    head (`LlamaModel.permute` in convert_hf_to_gguf.py), for this architecture only.
    """
    heads = {
        "self_attn.q_proj.weight": settings["num_attention_heads"],
        "self_attn.k_proj.weight": settings["num_key_value_heads"],
    }.get(name.partition("layers.")[2].partition(".")[2])
    if settings["model_type"] != "llama" or heads is None:
        return view
    apart = (heads, shape[0] // heads // 2, 2, *shape[1:])
    return lambda: view().reshape(apart).swapaxes(1, 2).reshape(shape)


def _tokenizer(path: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
    )

    def ggml(name: str) -> Any:
        return fields.get(f"tokenizer.ggml.{name}")

    kind, words = ggml("model"), ggml("pre") or "default"
    split = lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated")
    before = {
        "default": [],
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [split(LLAMA3_WORDS)],
        "qwen2": [split(QWEN2_WORDS)],
    }
    if kind != "gpt2" or words not in before:
        raise ConfigError(
            f"{path}: tokenizer.ggml.model={kind!r} with pre={words!r} is not done here; gpt2 with {', '.join(before)} is"
        )
    tokens, types = ggml("tokens"), ggml("token_type")
    merges = [tuple(merge.split(" ")) for merge in ggml("merges")]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    )
    own = words in ("llama-bpe", "qwen2")  # they have split the words already
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *before[words],
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not own),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields[f"{fields['general.architecture']}.context_length"],
    }
    for name in ("bos", "eos", "padding", "unknown"):
        if (number := ggml(f"{name}_token_id")) is not None:
            short = {"padding": "pad", "unknown": "unk"}.get(name, name)
            settings[f"{short}_token"] = tokens[number]
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }
