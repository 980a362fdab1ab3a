# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts that begins as a dense model says what that says."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.ambient import Ambient, ambient
from jaxspeed.cli import main
from jaxspeed.config import ConfigError
from jaxspeed.hf import export_params, import_params, read_config
from jaxspeed.nn import merge
from jaxspeed.upcycle import upcycle
from models import llama, mixtral
from tests.dist.runs import config, program_of
from tests.models.zoo import ZOO


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    program = program_of(config("llama"), 1, "llama")
    params = program.init_state()["params"]
    export_params(params, ZOO["llama"].cfg, tmp_path / "dense")
    return tmp_path / "dense"


def logits(folder: Path) -> Any:
    cfg = read_config(folder)
    program = program_of(config("llama", model=cfg), 1, "llama")
    params = import_params(folder, cfg, program.abstract_state["params"])
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 16)))
    with ambient(Ambient()):
        return merge(program.spec.graphdef, params)(ids), params


@pytest.mark.parametrize("each", [1, 2, 3])
def test_it_says_what_the_dense_model_says(
    dense: Path, tmp_path: Path, each: int
) -> None:
    upcycle(dense, tmp_path / "grown", experts=4, each=each)
    cfg = read_config(tmp_path / "grown")
    assert (cfg.num_experts, cfg.experts_per_token) == (4, each)
    before, old = logits(dense)
    after, new = logits(tmp_path / "grown")
    np.testing.assert_allclose(after, before, rtol=2e-5, atol=2e-6)
    w_old, w_new = (p["layers"]["block"]["mlp"]["w_up"] for p in (old, new))
    for expert in range(4):
        np.testing.assert_array_equal(w_new[:, expert], w_old)
    assert float(jnp.std(new["layers"]["block"]["mlp"]["router"])) > 0.01


def test_command_writes_the_folder(dense: Path, tmp_path: Path) -> None:
    to = tmp_path / "grown"
    assert main(["upcycle", str(dense), "--experts", "4", "--to", str(to)]) == 0
    assert json.loads((to / "config.json").read_text())["model_type"] == "mixtral"


@pytest.mark.parametrize(
    ("experts", "each", "message"),
    [(4, 5, "experts_per_token=5"), (0, 1, "num_experts=0")],
)
def test_counts_that_cannot_be_are_refused(
    dense: Path, tmp_path: Path, experts: int, each: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        upcycle(dense, tmp_path / "grown", experts=experts, each=each)
    assert not (tmp_path / "grown").exists()


def test_a_family_that_none_begins_as_is_refused(tmp_path: Path) -> None:
    program = program_of(config("gpt2"), 1)
    export_params(program.init_state()["params"], ZOO["gpt2"].cfg, tmp_path / "dense")
    with pytest.raises(
        ConfigError, match="no family here with experts begins as a gpt2"
    ):
        upcycle(tmp_path / "dense", tmp_path / "grown", experts=4, each=2)


def test_grown_models_keep_what_is_special_of_attention() -> None:
    special = llama.Config(num_layers=2, sliding_window=8, rope_theta=5e5)
    grown = mixtral.EXCHANGE.grown_from["mistral"](special, 4, 2)
    assert (grown.sliding_window, grown.rope_theta) == (8, 5e5)
