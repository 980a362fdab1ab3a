# SPDX-License-Identifier: Apache-2.0
"""What holds of Whisper alone."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed import nn
from jaxspeed.data.audio import RATE, log_mel
from jaxspeed.hf import export_params
from models import whisper
from tests.models.test_family import (
    B,
    abstract,
    dot_flops,
    gradients,
    mean_loss,
    parameters,
)
from tests.models.zoo import ZOO, D, L, M, S, T


CFG = ZOO["whisper"].cfg


def test_flops_per_token_counts_the_products_of_a_step() -> None:
    given = {
        name: jnp.zeros((B, T), bool if name == "mask" else jnp.int32)
        for name in ("decoder_inputs", "targets", "mask")
    }
    given["inputs"] = jnp.zeros((B, *CFG.feature_shape), jnp.float32)
    step = jax.grad(mean_loss("whisper", attention="xla"))
    jaxpr = jax.make_jaxpr(step)(parameters("whisper"), given).jaxpr
    # Of the decoder's attention to itself the formula counts the causal half.
    hidden = 6.0 * L * T * D
    counted = dot_flops(jaxpr, attention=False) + dot_flops(jaxpr, attention=True)
    assert counted / (B * T) - hidden == pytest.approx(CFG.flops_per_token(T), rel=0.01)


def test_sinusoids_are_fixed() -> None:
    assert not np.any(gradients("whisper")[1]["waves"])


def test_sinusoids_are_the_published_ones() -> None:
    made = whisper.sinusoids(None, (1500, 384), jnp.float32)
    rates = 10_000.0 ** -(np.arange(192) / 191)
    angles = np.arange(1500)[:, None] * rates[None]
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    # At position 1500 the angle has been rounded to 1e-4.
    np.testing.assert_allclose(made, waves, atol=2e-4)


@pytest.mark.hf
def test_exported_folder_says_how_sound_becomes_spectrograms(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    cfg = dataclasses.replace(CFG, max_source_len=100)
    params = {**parameters("whisper"), "waves": np.zeros((100, D), np.float32)}
    export_params(params, cfg, tmp_path)
    extract = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    sound = np.random.default_rng(0).normal(size=12_345).astype(np.float32)
    theirs = extract(sound, sampling_rate=RATE).input_features[0]
    ours = log_mel(sound, num_mel_bins=M, frames=cfg.feature_shape[0])
    np.testing.assert_allclose(ours, theirs.T, atol=1e-4)


@pytest.mark.parametrize("frames", [2 * S + 2, 2 * S - 1])
def test_sound_that_does_not_fit_is_refused(frames: int) -> None:
    graphdef, params, _ = abstract(CFG)
    sound = jax.ShapeDtypeStruct((B, frames, M), jnp.float32)
    message = f"{frames} frames; the model takes an even number of at most {2 * S}"
    encode = lambda params, x: nn.merge(graphdef, params).encode(x)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(encode, params, sound)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 33, "num_heads": 4}, "nearest legal: 32"),
        ({"num_heads": 0}, "model.num_heads=0: give 1 or more"),
        ({"d_model": 9, "num_heads": 3}, "half of it are sines"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    values: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        whisper.Config(**values)
