# SPDX-License-Identifier: Apache-2.0
"""What holds of BART and its kin alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.config import DTypeConfig, RunConfig
from jaxspeed.generate import Encoded, Writer
from jaxspeed.program import build_program
from jaxspeed.sampling import SamplingConfig
from models import bart
from tests.models.test_family import (
    B,
    batch,
    dot_flops,
    gradients,
    loss_and_slopes,
    mean_loss,
    parameters,
)
from tests.models.zoo import ZOO, D, L, T, V


CFG = ZOO["bart"].cfg


def test_flops_per_token_counts_the_products_of_a_step() -> None:
    given = {
        name: jnp.zeros((B, T), bool if name == "mask" else jnp.int32)
        for name in ("inputs", "decoder_inputs", "targets", "mask")
    }
    step = jax.grad(mean_loss("bart", attention="xla"))
    jaxpr = jax.make_jaxpr(step)(parameters("bart"), given).jaxpr
    # Of the decoder's attention to itself the formula counts the causal half.
    hidden = 6.0 * L * T * D
    counted = dot_flops(jaxpr, attention=False) + dot_flops(jaxpr, attention=True)
    expected = pytest.approx(CFG.flops_per_token(T), rel=0.01)
    assert counted / (B * T) - hidden == expected


def test_bias_of_the_logits_counts_in_loss_and_text_and_is_not_trained() -> None:
    assert not np.any(gradients("bart")[1]["bias"])
    favoured = jnp.zeros(V).at[5].set(100.0)
    params = {**parameters("bart"), "bias": favoured}
    loss, _ = loss_and_slopes("bart")(params, batch("bart"))
    targets, mask = batch("bart")["targets"], batch("bart")["mask"]
    others = jnp.sum(mask & (targets != 5)) / jnp.sum(mask)
    assert float(loss) == pytest.approx(100 * float(others), rel=0.1)
    run = RunConfig(
        model=CFG, steps=1, seq_len=T, micro_batch_size=1,
        dtype=DTypeConfig(compute="float32"),
    )  # fmt: skip
    program = build_program(run, devices=jax.devices()[:1])
    read = Encoded(np.asarray(batch("bart")["inputs"])[:1])
    greedy = SamplingConfig(max_new_tokens=3, temperature=0.0)
    texts = Writer(program, params).write([[2]], greedy, encoded=read)
    assert texts[0].ids.tolist() == [5, 5, 5]


def test_sinusoids_are_those_of_the_paper() -> None:
    positions = np.arange(0, 512, 7, dtype=np.int32)[None]
    angles = positions[0][:, None] / 10_000 ** (2 * np.arange(16)[None] / 32)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(
        bart.sinusoids(jnp.asarray(positions), 32)[0], expected, atol=1e-4
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 33, "num_heads": 4}, "nearest legal: 32"),
        ({"num_heads": 0}, "model.num_heads=0: give 1 or more"),
        ({"d_model": 9, "num_heads": 3, "sinusoids": True}, "half of it are sines"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bart.Config(**values)


def test_mixture_that_no_published_model_is_cannot_be_exported() -> None:
    odd = dataclasses.replace(CFG, norm_first=True, embed_norm=False)
    with pytest.raises(ValueError, match="no Hugging Face model is such"):
        bart.EXCHANGE.write_config(odd)
