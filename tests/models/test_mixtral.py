# SPDX-License-Identifier: Apache-2.0
"""What only families with experts have: their counts, and what cannot be."""

import dataclasses
from typing import Any

import pytest

from jaxspeed.config import ConfigError, MeshConfig, MoeConfig, RunConfig
from models import llama, mixtral
from tests.models.zoo import ZOO


CFG = ZOO["mixtral"].cfg


def test_flops_are_those_of_a_dense_mlp_as_wide_as_a_tokens_experts() -> None:
    fields = {f.name: getattr(CFG, f.name) for f in dataclasses.fields(llama.Config)}
    wide = CFG.experts_per_token * CFG.d_ff
    dense = llama.Config(**fields | {"d_ff": wide})
    router = 6.0 * CFG.num_layers * CFG.d_model * CFG.num_experts
    assert CFG.flops_per_token(16) == dense.flops_per_token(16) + router


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts_per_token": 9}, "model.experts_per_token=9: there are num_experts=8"),
        ({"experts_per_token": 0}, "give 1 to 8"),
        ({"residual": True, "d_shared": 8}, "model.residual: there is a shared expert"),
        ({"num_kv_heads": 3}, "model.num_kv_heads"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **fields)


def run(model: Any = CFG, **fields: Any) -> RunConfig:
    return RunConfig(model=model, steps=1, seq_len=16, global_batch_size=8, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh": MeshConfig(expert=3)}, "mesh.expert=3: it does not divide the model's 8 experts; give one of 1, 2, 4, 8"),
        ({"mesh": MeshConfig(expert=2), "model": ZOO["llama"].cfg}, "mesh.expert=2: the model has no experts to split; give 1"),
        ({"moe": MoeConfig(z_coef=0.1), "model": ZOO["llama"].cfg}, "moe.z_coef=0.1 has no effect: the model has no experts"),
        ({"moe": MoeConfig(sample_second=True), "model": ZOO["mixtral, shared"].cfg}, "no effect with model.experts_per_token=3"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_are_refused(fields: Any, message: str) -> None:
    devices = fields["mesh"].expert if "mesh" in fields else 1
    with pytest.raises(ConfigError, match=message):
        run(**fields).validate(devices)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_capacity": 8}, "moe.min_capacity=8 has no effect while nothing is dropped"),
        ({"random_priority": True}, "moe.random_priority=True has no effect"),
        ({"noise": "gumbel", "sample_second": True}, "draws both experts"),
        ({"capacity_factor": -1.0}, "moe.capacity_factor"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeConfig(**fields)


def test_a_residual_mixture_is_nobodys_over_there() -> None:
    cfg = dataclasses.replace(CFG, residual=True)
    with pytest.raises(ConfigError, match="model.residual=True cannot be exported"):
        mixtral.EXCHANGE.write_config(cfg)
