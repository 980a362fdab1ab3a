# SPDX-License-Identifier: Apache-2.0
"""Small GGUF files for the tests, written by the `gguf` package, which they skip without."""

from pathlib import Path
from typing import Any

import numpy as np


L, D, N, K, H, F = 2, 64, 4, 2, 16, 96
TOKENS = ["<|end|>", "a", "b", "ab", "\u0120", "\u0120a"]
RNG = np.random.default_rng(0)


def matrix(*shape: int) -> np.ndarray:
    """Returns normal numbers."""
    return RNG.normal(size=shape).astype(np.float32)


def weights() -> dict[str, np.ndarray]:
    """Returns a small Llama under Hugging Face's names."""
    tensors = {
        "model.embed_tokens.weight": matrix(len(TOKENS), D),
        "model.norm.weight": matrix(D),
        "lm_head.weight": matrix(len(TOKENS), D),
    }
    for i in range(L):
        layer = f"model.layers.{i}."
        tensors |= {
            layer + "input_layernorm.weight": matrix(D),
            layer + "self_attn.q_proj.weight": matrix(N * H, D),
            layer + "self_attn.k_proj.weight": matrix(K * H, D),
            layer + "self_attn.v_proj.weight": matrix(K * H, D),
            layer + "self_attn.o_proj.weight": matrix(D, N * H),
            layer + "post_attention_layernorm.weight": matrix(D),
            layer + "mlp.gate_proj.weight": matrix(F, D),
            layer + "mlp.up_proj.weight": matrix(F, D),
            layer + "mlp.down_proj.weight": matrix(D, F),
        }
    return tensors


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows as llama.cpp's converter orders them (`LlamaModel.permute`)."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    quantise: str = "F32",
    arch: str = "llama",
    **fields: Any,
) -> Path:
    """Writes a file of these tensors, quantised, with these fields beside its own; returns it."""
    import gguf

    writer: Any = gguf.GGUFWriter(path, arch)
    writer.add_block_count(L)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_rope_freq_base(5e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.pop("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "\u0120 a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for name, value in fields.items():
        add = {
            str: "add_string",
            float: "add_float32",
            int: "add_uint32",
            bool: "add_bool",
        }
        getattr(writer, add[type(value)])(name.replace("__", "."), value)
    names = {v: k for k, v in gguf_names().items()}
    for name, array in tensors.items():
        if arch == "llama" and (".q_proj" in name or ".k_proj" in name):
            array = interleaved(array, N if ".q_proj" in name else K)
        kind = gguf.GGMLQuantizationType[quantise if array.ndim > 1 else "F32"]
        raw = array.dtype == np.uint8
        kind = gguf.GGMLQuantizationType[quantise] if raw else kind
        data = array if raw else gguf.quants.quantize(array, kind)
        writer.add_tensor(names.get(name, name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_names() -> dict[str, str]:
    """Returns Hugging Face's name for each of the file's, by the package's own table."""
    import gguf

    table: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, L)
    return {
        table.get_name(name.removesuffix(".weight")) + ".weight": name
        for name in weights()
    }
