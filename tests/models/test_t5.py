# SPDX-License-Identifier: Apache-2.0
"""What holds of T5 alone."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxspeed.hf import export_params, import_params
from models import t5
from tests.models.test_family import (
    B,
    dot_flops,
    init,
    mean_loss,
    parameters,
)
from tests.models.zoo import ZOO, L, T


def test_flops_per_token_counts_the_products_of_a_step() -> None:
    # With the fewest buckets: the formula leaves the choice of their values out.
    cfg = dataclasses.replace(ZOO["t5"].cfg, num_buckets=4)
    params = {**parameters("t5")}
    for stack in ("encoder", "decoder"):
        params[f"{stack}_bias"] = params[f"{stack}_bias"][:4]
    given = {
        name: jnp.zeros((B, T), bool if name == "mask" else jnp.int32)
        for name in ("inputs", "decoder_inputs", "targets", "mask")
    }
    step = jax.grad(mean_loss("t5", cfg, attention="xla"))
    jaxpr = jax.make_jaxpr(step)(params, given).jaxpr
    # Of the decoder's attention to itself the formula counts the causal half.
    hidden = 6.0 * L * T * cfg.num_heads * cfg.head_dim
    counted = dot_flops(jaxpr, attention=False) + dot_flops(jaxpr, attention=True)
    assert counted / (B * T) - hidden == pytest.approx(cfg.flops_per_token(T), rel=0.02)


COPIES = ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")


@pytest.mark.parametrize("name", ["t5", "t5, gated and untied"])
def test_copies_of_the_embedding_are_passed_over(name: str, tmp_path: Path) -> None:
    """Files of every age hold some; the head of an untied model is none."""
    cfg, params = ZOO[name].cfg, init(name)
    export_params(params, cfg, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    copies = {f"{copy}.weight": tensors["shared.weight"] for copy in COPIES}
    safetensors.numpy.save_file({**copies, **tensors}, file)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.eval_shape(lambda: params)
    abstract = jax.tree.map(lambda x: x.update(sharding=one), abstract)
    jax.tree.map(
        np.testing.assert_array_equal, import_params(tmp_path, cfg, abstract), params
    )


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("sizes", [(32, 128), (8, 20), (16, 1000)])
def test_bucket_is_that_of_the_published_code(
    bidirectional: bool, sizes: tuple[int, int]
) -> None:
    buckets, max_distance = sizes
    distances = np.arange(-1500, 1500, dtype=np.int32)[None]
    table = np.arange(buckets, dtype=np.float32)[:, None]
    got = t5.relative_bias(
        jnp.asarray(table),
        jnp.asarray(distances),
        bidirectional=bidirectional,
        max_distance=max_distance,
    )
    side = buckets // 2 if bidirectional else buckets
    away = np.abs(distances) if bidirectional else np.maximum(-distances, 0)
    exact = side // 2
    # The epsilon lets powers of the base begin a bucket, as they do there.
    ratio = np.log(np.maximum(away, 1) / exact + 1e-7) / np.log(max_distance / exact)
    large = np.minimum(exact + (ratio * (side - exact)).astype(int), side - 1)
    expected = np.where(away < exact, away, large) + side * (
        bidirectional & (distances > 0)
    )
    np.testing.assert_array_equal(got[0], expected)
