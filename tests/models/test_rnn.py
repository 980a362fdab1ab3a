# SPDX-License-Identifier: Apache-2.0
"""The recurrent language model is torch's of the same layers: logits, loss, gradients, and its state_dict."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.config import ConfigError, RunConfig
from jaxspeed.hf import export_params, import_params, read_config
from jaxspeed.losses import next_token_loss
from jaxspeed.nn import merge
from jaxspeed.program import Program, build_program
from models import rnn


B, T, V = 2, 12, 48
SIZES = rnn.Config(vocab_size=V, num_layers=3, d_model=20)
CONFIGS = {
    "lstm": SIZES,
    "lstm, projected": dataclasses.replace(SIZES, d_embed=12, tie_embeddings=True),
    "gru": dataclasses.replace(SIZES, cell="gru"),
}


class Case(NamedTuple):
    """A model, its parameters, and the folder that holds them."""

    program: Program
    params: Any
    folder: Path


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Case:
    run = RunConfig(
        model=CONFIGS[request.param], steps=1, seq_len=T, global_batch_size=8
    )
    program = build_program(run, devices=jax.devices()[:1])
    leaves, tree = jax.tree.flatten(program.init_state()["params"])
    rng = np.random.default_rng(0)
    noisy = [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    params = jax.tree.unflatten(tree, noisy)
    folder = tmp_path_factory.mktemp("rnn")
    export_params(params, run.model, folder)
    return Case(program, params, folder)


def inputs() -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (B, T), np.int32)


@pytest.mark.hf
def test_exported_folder_is_the_state_dict_of_the_torch_module_in_the_docs(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module is taken from docs/families.md, so that what is shown there is what works."""
    torch: Any = pytest.importorskip("torch")
    safetensors: Any = pytest.importorskip("safetensors.torch")
    page = Path(__file__).parents[2] / "docs" / "families.md"
    shown = page.read_text().split("```python\nimport torch\n")[1].split("```")[0]
    (tmp_path / "shown_module.py").write_text(f"import torch\n{shown}")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = case.program.run.model
    module = importlib.import_module("shown_module").LanguageModel(
        cfg.cell, V, cfg.num_layers, cfg.d_model, cfg.embed_width, cfg.tie_embeddings
    )
    stored = safetensors.load_file(case.folder / "model.safetensors")
    assert not module.load_state_dict(stored, strict=False).unexpected_keys

    tokens = torch.from_numpy(inputs()).long()
    theirs = module(tokens)
    graphdef = case.program.spec.graphdef
    ours = jax.jit(lambda p, x: merge(graphdef, p)(x))(case.params, inputs())
    scale = float(theirs.detach().abs().max())
    np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=1e-4 * scale)

    flat = theirs[:, :-1].reshape(-1, V)
    loss = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1))
    loss.backward()

    @jax.jit
    @jax.value_and_grad
    def loss_of(params: Any, inputs: Any) -> jax.Array:
        sums = next_token_loss(merge(graphdef, params), {"inputs": inputs})
        return sums.total / sums.count

    value, slopes = loss_of(case.params, jnp.asarray(inputs()))
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    # The gradients as a folder of our own, to compare tensor by tensor in torch's layout.
    export_params(slopes, cfg, case.folder / "gradients")
    got = safetensors.load_file(case.folder / "gradients" / "model.safetensors")
    assert set(got) == set(stored)
    for name, parameter in module.named_parameters():
        if name in got:
            want = parameter.grad
            limit = 1e-3 * float(want.abs().max())
            np.testing.assert_allclose(got[name], want, rtol=0, atol=limit)


def test_import_export_import_is_the_same_to_the_bit(case: Case) -> None:
    cfg = case.program.run.model
    assert read_config(case.folder) == cfg
    again = import_params(case.folder, cfg, case.program.abstract_state["params"])
    jax.tree.map(np.testing.assert_array_equal, again, case.params)


def test_unknown_cell_is_refused() -> None:
    settings = rnn.EXCHANGE.write_config(SIZES) | {"cell": "elman"}
    with pytest.raises(ConfigError, match="cell='elman' is not done here"):
        rnn.EXCHANGE.read_config(settings)
