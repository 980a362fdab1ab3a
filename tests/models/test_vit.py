# SPDX-License-Identifier: Apache-2.0
"""What holds of models of images: ViT, and the image-text model."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from jaxspeed import nn
from jaxspeed.hf import export_params, import_params, read_config
from models import image_text, vit
from tests.models.test_family import (
    B,
    abstract,
    batch,
    dot_flops,
    mean_loss,
    parameters,
)
from tests.models.zoo import ZOO, L, T


@pytest.mark.parametrize("name", ["vit", "image text"])
def test_flops_per_token_counts_the_products_of_a_step(name: str) -> None:
    step = jax.grad(mean_loss(name, attention="xla"))
    jaxpr = jax.make_jaxpr(step)(parameters(name), batch(name)).jaxpr
    # Nobody asks for the gradient of the pixels, which linear's derivative has.
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    counted = dot_flops(jaxpr, attention=False) + dot_flops(jaxpr, attention=True)
    cfg = ZOO[name].cfg
    # Of the decoder's attention to itself the formula counts the causal half.
    hidden = 6.0 * L * T * cfg.d_model * (name == "image text")
    assert counted / (B * T) - hidden == pytest.approx(cfg.flops_per_token(T), rel=0.01)


def test_image_of_another_size_is_refused() -> None:
    graphdef, params, _ = abstract(ZOO["vit"].cfg)
    pixels = jax.ShapeDtypeStruct((B, 8, 12, 3), jnp.float32)
    message = (
        r"images of \(8, 12, 3\), the model's are \(8, 8, 3\).*set model.image_size"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p, x: nn.merge(graphdef, p)(x), params, pixels)


def test_an_image_says_the_same_to_each_of_the_texts_in_its_row() -> None:
    model = nn.merge(abstract(ZOO["image text"].cfg)[0], parameters("image text"))
    given = batch("image text")
    memory, texts = model.encode(given["inputs"]), given["decoder_inputs"]
    run = jax.jit(lambda *args: model.hidden(*args, memory=memory))
    places = np.tile([*range(6), *range(T - 6)], (B, 1)).astype(np.int32)
    parts = np.tile([1] * 6 + [2] * (T - 6), (B, 1)).astype(np.int32)
    second = run(texts, places, parts)[:, 6:]
    alone = run(np.roll(texts, -6, 1), None, None)[:, : T - 6]
    np.testing.assert_allclose(second, alone, atol=2e-5)


def test_headless_model_gives_what_the_head_reads(tmp_path: Path) -> None:
    """It is exported without the prefix and the head, as transformers has it, and read again."""
    params = dict(parameters("vit"))
    head, whole = params.pop("head"), ZOO["vit"].cfg
    cfg = dataclasses.replace(whole, head="none", num_labels=2)
    shapes = abstract(cfg)[1]
    assert cfg.num_params() == sum(x.size for x in jax.tree.leaves(shapes))
    export_params(params, cfg, tmp_path)
    assert read_config(tmp_path) == cfg
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted: Any = jax.tree.map(lambda x: x.update(sharding=here), shapes)
    again = import_params(tmp_path, cfg, wanted)
    pixels = batch("vit")["inputs"]
    hidden = nn.merge(abstract(cfg)[0], again)(pixels)
    logits = nn.merge(abstract(whole)[0], parameters("vit"))(pixels)
    expected = hidden[:, 0] @ head["w"] + head["b"][None]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (vit.Config, {"patch_size": 15}, "model.image_size=224 does not divide by model.patch_size=15; nearest legal: 210"),
        (vit.Config, {"patch_size": 0}, "model.patch_size=0: give 1 or more"),
        (vit.Config, {"num_heads": 7}, "model.d_model=768 does not divide by model.num_heads=7"),
        (vit.Config, {"num_labels": 0}, "model.num_labels=0: give 1 or more"),
        (image_text.Config, {"num_image_heads": 5}, "model.d_image=768 does not divide by model.num_image_heads=5; nearest legal: 765"),
        (image_text.Config, {"num_heads": 0}, "model.num_heads=0: give 1 or more"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(
    cls: Any, values: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**values)
