# SPDX-License-Identifier: Apache-2.0
"""A GGUF file becomes the Hugging Face folder that it was made of; what is not done is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxspeed import cli
from jaxspeed.config import ConfigError
from jaxspeed.gguf_files import read_gguf
from jaxspeed.hf import read_config
from jaxspeed.tensorfiles import read_folder


gguf: Any = pytest.importorskip("gguf", reason="needs pip install 'jaxspeed[hf]'")

L, D, N, K, H, F = 2, 64, 4, 2, 16, 96
TOKENS = ["<|end|>", "a", "b", "ab", "\u0120", "\u0120a"]
RNG = np.random.default_rng(0)


def matrix(*shape: int) -> np.ndarray:
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
    writer = gguf.GGUFWriter(path, arch)
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
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    names = {v: k for k, v in gguf_names().items()}
    for name, array in tensors.items():
        if arch == "llama" and (".q_proj" in name or ".k_proj" in name):
            array = interleaved(array, N if ".q_proj" in name else K)
        kind = gguf.GGMLQuantizationType[quantise if array.ndim > 1 else "F32"]
        data = gguf.quants.quantize(array, kind)
        writer.add_tensor(names.get(name, name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_names() -> dict[str, str]:
    """Returns Hugging Face's name for each of the file's, by the package's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, L)
    return {
        table.get_name(name.removesuffix(".weight")) + ".weight": name
        for name in weights()
    }


def test_folder_is_what_the_file_was_made_of(tmp_path: Path) -> None:
    tensors = weights()
    source = write(tmp_path / "model.gguf", tensors)
    assert cli.main(["import", str(source), "--to", str(tmp_path / "hf")]) == 0
    there = read_folder(tmp_path / "hf")
    assert set(there) == set(tensors)
    for name, info in there.items():
        np.testing.assert_array_equal(info.view(), tensors[name])
    cfg = read_config(tmp_path / "hf")
    assert (cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim) == (D, N, K, H)
    assert (cfg.rope_theta, cfg.norm_eps, cfg.max_seq_len) == (5e4, 1e-5, 128)
    assert not cfg.tie_embeddings


@pytest.mark.parametrize("quantise", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_tensors_are_the_packages(tmp_path: Path, quantise: str) -> None:
    tensors = weights()
    del tensors["lm_head.weight"]
    found = read_gguf(write(tmp_path / "model.gguf", tensors, quantise))
    assert found.settings["tie_word_embeddings"]
    kind = gguf.GGMLQuantizationType[quantise]
    for name, info in found.tensors.items():
        array = tensors[name]
        if array.ndim > 1:  # whole rows are quantised, so their order does not matter
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        np.testing.assert_array_equal(info.view(), array)


def test_tokenizer_is_the_files(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    found = read_gguf(write(tmp_path / "model.gguf", weights()))
    tokenizer = Tokenizer.from_str(found.tokenizer["tokenizer.json"])
    assert tokenizer.encode("ab a<|end|>b").ids == [3, 5, 0, 2]
    assert tokenizer.decode([3, 5, 2]) == "ab ab"
    settings = json.loads(found.tokenizer["tokenizer_config.json"])
    assert (settings["eos_token"], settings["chat_template"]) == (
        "<|end|>",
        "{{ messages }}",
    )


@pytest.mark.parametrize("pre", ["default", "gpt-2", "llama-bpe", "qwen2"])
def test_each_way_to_split_words_is_a_tokenizer(tmp_path: Path, pre: str) -> None:
    from tokenizers import Tokenizer

    found = read_gguf(write(tmp_path / "model.gguf", weights(), pre=pre))
    assert Tokenizer.from_str(found.tokenizer["tokenizer.json"]).encode("ab a").ids == [
        3,
        5,
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "gemma3"}, "general.architecture='gemma3' is not done here"),
        ({"pre": "tekken"}, "pre='tekken' is not done here"),
        ({"llama__rope__scaling__type": "yarn"}, "scaling.type='yarn' is not done"),
    ],
)
def test_what_is_not_done_is_named(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_gguf(write(tmp_path / "model.gguf", weights(), **fields))


def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = write(tmp_path / "odd.gguf", {**weights(), "rope_freqs.weight": matrix(H)})
    lacking = weights()
    del lacking["model.norm.weight"]
    few = write(tmp_path / "few.gguf", lacking)
    for source, message in (
        (odd, "holds rope_freqs.weight"),
        (few, "lacks model.norm.weight"),
    ):
        assert cli.main(["import", str(source), "--to", str(tmp_path / "hf")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("size", [0, 3, 100, 20_000])
def test_truncated_file_is_one_line(tmp_path: Path, size: int) -> None:
    source = write(tmp_path / "model.gguf", weights())
    source.write_bytes(source.read_bytes()[:size])
    with pytest.raises(ConfigError, match="not a GGUF file, or truncated"):
        read_gguf(source)


def test_folder_is_copied_with_its_tokenizer(tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", weights())
    arguments = ["--dtype", "bfloat16", "--shard-gb", "0.00002"]
    for given, to in ((source, "hf"), (tmp_path / "hf", "again")):
        out = str(tmp_path / to)
        assert cli.main(["import", str(given), "--to", out, *arguments]) == 0
    first, second = (read_folder(tmp_path / name) for name in ("hf", "again"))
    for name, info in first.items():
        assert second[name].view().tobytes() == info.view().tobytes()
    names = ("tokenizer.json", "tokenizer_config.json", "config.json")
    for name in names:
        texts = [json.loads((tmp_path / x / name).read_text()) for x in ("hf", "again")]
        assert texts[0] == texts[1]
