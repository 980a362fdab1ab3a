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
from jaxspeed.hf import config_of, read_config
from jaxspeed.tensorfiles import read_folder
from tests.gguf_maker import D, H, K, L, N, interleaved, matrix, weights, write


gguf: Any = pytest.importorskip("gguf", reason="needs pip install 'jaxspeed[hf]'")


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
    tokenizer = Tokenizer.from_str(found.tokenizer["tokenizer.json"])
    assert tokenizer.encode("ab a", add_special_tokens=False).ids == [3, 5]
    # Llama 3 begins a text with a token of its own.
    assert tokenizer.encode("ab a").ids[:-2] == [1] * (pre == "llama-bpe")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "gemma3"}, "general.architecture='gemma3' is not done here"),
        ({"pre": "tekken"}, "pre='tekken' is not done here"),
        (
            {
                "llama__rope__scaling__type": "longrope",
                "llama__rope__scaling__factor": 4.0,
            },
            "scaling.type='longrope' is not done",
        ),
        (
            {
                "llama__rope__scaling__type": "yarn",
                "llama__rope__scaling__factor": 4.0,
                "llama__rope__scaling__yarn_log_multiplier": 0.1,
            },
            "'yarn' with yarn_log_multiplier is not done",
        ),
        (
            {"llama__attention__sliding_window": 64},
            "attention.sliding_window=64 is not",
        ),
        ({"llama__rope__dimension_count": 8}, "rope.dimension_count=8 is not done; 16"),
        ({"tokenizer__ggml__padding_token_id": 99}, "its metadata is damaged"),
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
    odd = write(tmp_path / "odd.gguf", {**weights(), "rope_freqs.weight": matrix(8)})
    more = write(tmp_path / "more.gguf", {**weights(), "blk.0.bias": matrix(H)})
    lacking = weights()
    del lacking["model.norm.weight"]
    few = write(tmp_path / "few.gguf", lacking)
    for source, message in (
        (odd, "rope_freqs.weight is not that of Llama 3.1"),
        (more, "holds blk.0.bias"),
        (few, "lacks model.norm.weight"),
    ):
        assert cli.main(["import", str(source), "--to", str(tmp_path / "hf")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("size", [0, 3, 100, 500, 900, 1500, 20_000, -100, -1])
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


def test_damaged_metadata_is_one_line_or_another_model(tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", weights())
    whole, rng = source.read_bytes(), np.random.default_rng(0)
    said: list[str] = []
    for place in rng.integers(0, 3000, 300):
        damaged = bytearray(whole)
        damaged[place] ^= rng.integers(1, 256)
        source.write_bytes(damaged)
        try:
            assert read_gguf(source).settings["model_type"] == "llama"
        except ConfigError as error:
            said.append(str(error))
    assert len(said) > 30
    assert not any("\n" in line for line in said)


SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({"type": "none", "factor": 4.0}, {}),
    "linear": (
        {"type": "linear", "factor": 4.0},
        {"rope_type": "linear", "rope_factor": 4.0},
    ),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 32, "finetuned": True},
        {"rope_type": "yarn", "rope_factor": 4.0, "rope_original_len": 32,
         "rope_attention_factor": 1 + 0.1 * np.log(4)},
    ),
    "yarn, all said": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 0.5,
         "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
        {"rope_attention_factor": 0.5 + 0.05 * np.log(4), "rope_high_turns": 16.0, "rope_low_turns": 2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SCALED))
def test_rotary_scaling_is_read(tmp_path: Path, name: str) -> None:
    said, fields = SCALED[name]
    scaling = {f"llama__rope__scaling__{key}": value for key, value in said.items()}
    found = read_gguf(write(tmp_path / "model.gguf", weights(), **scaling))
    cfg = config_of(found.settings)
    assert {f: getattr(cfg, f) for f in fields} == pytest.approx(fields)
    assert (cfg.rope_type == "default") == (name == "none")


@pytest.mark.parametrize("factor", [8.0, 32.0, 1.0])
def test_llama_3_says_its_rotary_scaling_by_a_tensor(
    tmp_path: Path, factor: float
) -> None:
    frequency = 5e4 ** -(np.arange(H // 2) / (H // 2))
    # As the converter makes them.
    turns = 8192 * frequency / (2 * np.pi)
    ramp = 1 / ((1 - (turns - 1) / 3) / factor + (turns - 1) / 3)
    divisors = np.where(turns > 4, 1.0, np.where(turns < 1, factor, ramp))
    assert len(np.unique(divisors)) == (1 if factor == 1 else 3)
    tensors = {**weights(), "rope_freqs.weight": divisors.astype(np.float32)}
    source = write(tmp_path / "model.gguf", tensors)
    assert cli.main(["import", str(source), "--to", str(tmp_path / "hf")]) == 0
    cfg = read_config(tmp_path / "hf")
    assert (cfg.rope_type, cfg.rope_factor) == (
        ("llama3", factor) if factor > 1 else ("default", 1.0)
    )


def test_attention_biases_are_read_in_their_order(tmp_path: Path) -> None:
    biases = {f"blk.{i}.attn_{x}.bias": matrix(n) for i in range(L)
              for x, n in (("q", N * H), ("k", K * H), ("v", K * H), ("output", D))}  # fmt: skip
    source = write(tmp_path / "model.gguf", {**weights(), **biases})
    assert cli.main(["import", str(source), "--to", str(tmp_path / "hf")]) == 0
    cfg = read_config(tmp_path / "hf")
    assert cfg.qkv_bias
    assert cfg.out_bias
    there = read_folder(tmp_path / "hf")
    ours = there["model.layers.1.self_attn.k_proj.bias"].view()
    theirs = interleaved(ours[:, None], K)[:, 0]
    np.testing.assert_array_equal(theirs, biases["blk.1.attn_k.bias"])
    np.testing.assert_array_equal(
        there["model.layers.1.self_attn.v_proj.bias"].view(),
        biases["blk.1.attn_v.bias"],
    )
