# SPDX-License-Identifier: Apache-2.0
"""Llama's config.json: what each kind's keys mean, the defaults of those that are missing, what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jaxspeed.config import ConfigError
from jaxspeed.hf import read_config
from models import llama
from models.llama import EXCHANGE, Config


BARE = {
    "vocab_size": 8,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "hidden_size": 128,
    "intermediate_size": 8,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def read(kind: str = "llama", **settings: Any) -> Config:
    return EXCHANGE.read_config({"model_type": kind, **BARE, **settings})


@pytest.mark.hf
@pytest.mark.parametrize("kind", list(EXCHANGE.architectures))
def test_missing_keys_mean_what_transformers_takes(kind: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    whole = transformers.AutoConfig.for_model(kind, **BARE).to_dict()
    assert read(kind) == EXCHANGE.read_config(whole)


@pytest.mark.parametrize(
    ("kind", "settings", "fields"),
    [
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}},
         {"rope_type": "linear", "rope_factor": 2.0}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 1.0}}, {}),
        ("llama", {"rope_scaling": LLAMA3, "rope_theta": 5e5},
         {"rope_type": "llama3", "rope_factor": 8.0, "rope_original_len": 64, "rope_theta": 5e5}),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
         {"rope_type": "llama3", "rope_factor": 8.0, "rope_original_len": 64, "rope_theta": 5e5}),
        ("llama", {"rope_scaling": YARN | {"attention_factor": 1.5}},
         {"rope_type": "yarn", "rope_factor": 4.0, "rope_original_len": 32, "rope_high_turns": 32.0,
          "rope_attention_factor": 1.5}),
        ("llama", {"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
        ("llama", {"sliding_window": 7}, {}),  # LlamaModel knows none
        ("mistral", {"sliding_window": 7}, {"sliding_window": 7}),
        ("mistral", {"sliding_window": None}, {"sliding_window": 0}),
        ("qwen2", {"sliding_window": 7}, {"sliding_window": 0}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7}, {"sliding_window": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4},
         {"sliding_window": 7, "num_full_layers": 4}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": [FULL, FULL, *[SLIDING] * 4]},
         {"sliding_window": 7, "num_full_layers": 2}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0, 1, 1]}, {"no_rope_interval": 4}),
    ],
)  # fmt: skip
def test_settings_are_read_as_transformers_means_them(
    kind: str, settings: dict[str, Any], fields: dict[str, Any]
) -> None:
    cfg = read(kind, **settings)
    assert {name: getattr(cfg, name) for name in fields} == fields
    if not fields:
        assert cfg == read(kind)
    assert EXCHANGE.read_config(EXCHANGE.write_config(cfg)) == cfg


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no low_freq_factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "no factor"),
        ("llama", {"rope_scaling": YARN | {"truncate": False}}, "truncate=False"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("qwen2", {"use_sliding_window": True, "layer_types": [SLIDING, FULL] * 3}, "full_attention in its first layers"),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1, 1, 1]}, "every no_rope_layer_interval-th"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window=True"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], message: str
) -> None:
    folder = {"model_type": kind, **BARE, **settings}
    (tmp_path / "config.json").write_text(json.dumps(folder))
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


@pytest.mark.hf
@pytest.mark.parametrize(
    "rope",
    [
        YARN,
        YARN | {"attention_factor": 1.5},
        YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
        YARN | {"beta_fast": 8, "beta_slow": 0.5},
        YARN | {"factor": 40.0, "original_max_position_embeddings": 4096},
        LLAMA3,
        LLAMA3 | {"original_max_position_embeddings": 8192},
        {"rope_type": "linear", "factor": 3.0},
    ],
)
@pytest.mark.parametrize("theta", [100.0, 5e5])
def test_rotary_frequencies_are_those_of_transformers(
    rope: dict[str, Any], theta: float
) -> None:
    import numpy as np

    from jaxspeed.ops.rope import rope_frequencies

    rules: Any = pytest.importorskip("transformers.modeling_rope_utils")
    transformers: Any = pytest.importorskip("transformers")
    settings = {
        **BARE,
        "head_dim": 64,
        "rope_parameters": {**rope, "rope_theta": theta},
    }
    peer = transformers.LlamaConfig(**settings)
    theirs, factor = rules.ROPE_INIT_FUNCTIONS[rope["rope_type"]](peer, "cpu")
    cfg = EXCHANGE.read_config({"model_type": "llama", **settings})
    ours = rope_frequencies(32, theta, cfg.rope_scaling())
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)
    assert cfg.rope_attention_factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qkv_bias": True, "qk_norm": True}, "model.qkv_bias=True cannot be exported"),
        ({"out_bias": True}, "model.qkv_bias=False cannot be exported"),
        ({"sliding_window": 8, "num_full_layers": 1}, "model.num_full_layers=1 cannot"),
        ({"sliding_window": 8, "no_rope_interval": 2}, "model.sliding_window=8 cannot"),
    ],
)
def test_settings_that_no_kind_has_are_not_exported(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        EXCHANGE.write_config(Config(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "linear"}, "model.rope_factor=1.0 with rope_type='linear'"),
        ({"rope_factor": 2.0}, "model.rope_factor=2.0 with rope_type='default'"),
        ({"rope_type": "yarn", "rope_factor": 2.0}, "needs rope_original_len, not 0"),
        ({"rope_type": "yarn", "rope_factor": 2.0, "rope_original_len": 8, "rope_low_turns": 4.0},
         "rope_low_turns=4.0 below rope_high_turns=4.0"),
        ({"num_full_layers": 1}, "model.num_full_layers=1: with sliding_window=0"),
        ({"sliding_window": 8, "num_full_layers": 32}, "model.num_full_layers=32"),
        ({"sliding_window": -1}, "model.sliding_window=-1"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_rope_type_that_is_none_is_refused() -> None:
    cfg = Config()
    object.__setattr__(
        cfg, "rope_type", "longrope"
    )  # the tests' hook stops a plain one
    with pytest.raises(ValueError, match="model.rope_type='longrope': give one of"):
        cfg.__post_init__()


def test_flops_count_the_keys_within_the_window() -> None:
    full = dataclasses.replace(llama.MISTRAL_7B, sliding_window=0)
    flops = lambda cfg: cfg.flops_per_token(8192)
    attention = flops(full) - full.flops_per_token(1)
    keys = sum(min(t, 4096) for t in range(8192)) / 8192
    saved = (flops(full) - flops(llama.MISTRAL_7B)) / attention
    assert saved == pytest.approx(1 - keys / 4096, rel=1e-3)
    some = dataclasses.replace(llama.MISTRAL_7B, num_full_layers=8)
    expected = (3 * flops(llama.MISTRAL_7B) + flops(full)) / 4
    assert flops(some) == pytest.approx(expected)
    assert full.flops_per_token(4096) == llama.MISTRAL_7B.flops_per_token(4096)
