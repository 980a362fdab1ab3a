# SPDX-License-Identifier: Apache-2.0
"""GGUF files (llama.cpp's) as the Hugging Face model that they were made of: settings, tensors, tokenizer.

The `gguf` package reads the file and undoes its quantisation, a tensor at a time. What is done
here is the way back: names, the order of rotary rows, config.json; the tokenizer is
`jaxspeed.gguf_tokenizers`' business.
"""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspeed.config import ConfigError
from jaxspeed.gguf_tokenizers import convert_tokenizer
from jaxspeed.ops.rope import RopeScaling, rope_frequencies
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

ROPE_FACTORS = "rope_freqs.weight"
"""What rotary frequencies are divided by."""

YARN = {
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "attn_factor": "attention_factor",
    "yarn_attn_factor": "attention_factor",
}
"""`ARCH.rope.scaling.KEY`, which may be missing, is `rope_scaling.VALUE`."""

View = Callable[[], np.ndarray]


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
            f"{path}: not a GGUF file, or truncated ({_first_line(error)})"
        ) from None
    views = {
        t.name: functools.partial(gguf.quants.dequantize, t.data, t.tensor_type)
        for t in reader.tensors
    }
    try:
        settings = _settings(path, fields, views)
        tokenizer = convert_tokenizer(path, fields)
    except ConfigError:
        raise
    except Exception as error:  # metadata of any other type than it should have
        raise ConfigError(
            f"{path}: its metadata is damaged ({_first_line(error)})"
        ) from None
    tensors: dict[str, TensorInfo] = {}
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        name = _name(path, tensor.name)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        view = _unpermuted(views[tensor.name], name, shape, settings)
        tensors[name] = TensorInfo(shape, np.dtype(np.float32), view)
    return GGUF(settings, tensors, tokenizer)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _settings(
    path: Path, fields: Mapping[str, Any], views: Mapping[str, View]
) -> dict[str, Any]:
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"{path}: general.architecture={kind!r} is not done here; {', '.join(ARCHITECTURES)} are"
        )

    def get(name: str, default: Any = None) -> Any:
        value = fields.get(f"{kind}.{name}", default)
        if value is None:
            raise ConfigError(f"{path}: has no {kind}.{name}")
        return value

    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    for name, only in (("rope.dimension_count", head_dim), ("attention.sliding_window", 0)):  # fmt: skip
        if get(name, only) != only:
            raise ConfigError(
                f"{path}: {kind}.{name}={get(name)} is not done; {only} is"
            )
    theta = float(get("rope.freq_base", 10_000.0))
    settings = {
        "model_type": kind,
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", ())),
        "max_position_embeddings": get("context_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "hidden_size": width,
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length"),
        "rope_theta": theta,
        # Kept as float32 there: 1e-5 comes as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": "output.weight" not in views,
        "attention_bias": "blk.0.attn_output.bias" in views,
    }
    if ROPE_FACTORS in views:
        scaling = _llama3_scaling(path, views[ROPE_FACTORS](), head_dim // 2, theta)
    else:
        scaling = _rope_scaling(path, kind, fields, get)
    return settings | ({"rope_scaling": scaling} if scaling else {})


def _rope_scaling(
    path: Path, kind: str, fields: Mapping[str, Any], get: Callable[..., Any]
) -> dict[str, Any]:
    """Returns what the metadata says of long contexts, in config.json's terms."""
    prefix = f"{kind}.rope.scaling."
    said = {n.removeprefix(prefix): x for n, x in fields.items() if prefix in n}
    rope_type, factor = said.pop("type", "none"), said.pop("factor", 1.0)
    said.pop("finetuned", None)
    if rope_type == "none" or factor == 1:
        return {}
    rope = {"rope_type": rope_type, "factor": float(factor)}
    if rope_type == "yarn":
        whole = get("context_length")
        original = said.pop("original_context_length", whole)
        rope["original_max_position_embeddings"] = original
        for there, here in YARN.items():
            if there in said:
                rope[here] = float(said.pop(there))
        if "attention_factor" in rope:  # there it multiplies the paper's
            rope["attention_factor"] *= 0.1 * math.log(factor) + 1
    if rope_type not in ("linear", "yarn") or set(said) - {"original_context_length"}:
        raise ConfigError(
            f"{path}: {prefix}type={rope_type!r}{' with ' if said else ''}{', '.join(said)} is not done"
        )
    return rope


def _llama3_scaling(
    path: Path, divisors: np.ndarray, pairs: int, theta: float
) -> dict[str, Any]:
    """Returns the scaling whose divisors of the rotary frequencies a file holds instead of its name.

    llama.cpp's converter writes those of Llama 3.1 and later (`LlamaModel.generate_extra_tensors`),
    which were all made for 8192 tokens at first and differ in their factor alone.
    """
    factor = float(np.max(divisors))
    scaling = RopeScaling(
        kind="llama3", factor=factor, original=8192, low_turns=1.0, high_turns=4.0,
        attention_factor=1.0,
    )  # fmt: skip
    plain, scaled = (rope_frequencies(pairs, theta, s) for s in (None, scaling))
    if divisors.shape != (pairs,) or not np.allclose(divisors, plain / scaled, 1e-3):
        raise ConfigError(
            f"{path}: {ROPE_FACTORS} is not that of Llama 3.1 with any factor, and so is not done"
        )
    if factor == 1:
        return {}
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": scaling.low_turns,
        "high_freq_factor": scaling.high_turns,
        "original_max_position_embeddings": scaling.original,
    }


def _name(path: Path, name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    match name.split("."):
        case ["blk", layer, inner, kind] if inner in INSIDE:
            return f"model.layers.{layer}.{INSIDE[inner]}.{kind}"
    raise ConfigError(f"{path}: holds {name}, which no family here has a place for")


def _unpermuted(
    view: View,
    name: str,
    shape: tuple[int, ...],
    settings: Mapping[str, Any],
) -> View:
    """Returns the view with a Llama's query and key rows in Hugging Face's order.

    llama.cpp rotates neighbours, Hugging Face halves; its converter interleaves the rows of a
    head (`LlamaModel.permute` in convert_hf_to_gguf.py), for this architecture only.
    """
    inner = name.partition("layers.")[2].partition(".")[2]
    heads = {
        "self_attn.q_proj.weight": settings["num_attention_heads"],
        "self_attn.k_proj.weight": settings["num_key_value_heads"],
    }.get(inner.replace(".bias", ".weight"))
    if settings["model_type"] != "llama" or heads is None:
        return view
    apart = (heads, shape[0] // heads // 2, 2, *shape[1:])
    return lambda: view().reshape(apart).swapaxes(1, 2).reshape(shape)
