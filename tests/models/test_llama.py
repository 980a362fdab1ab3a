# SPDX-License-Identifier: Apache-2.0
"""What holds of Llama alone."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from models import llama
from tests.models.test_family import (
    assert_trees_close,
    batch,
    gradients,
    mean_loss,
    parameters,
)
from tests.models.zoo import ZOO


def test_grouped_query_model_equals_one_with_repeated_heads() -> None:
    grouped, params = ZOO["llama"].cfg, parameters("llama")
    whole = dataclasses.replace(grouped, num_kv_heads=grouped.num_heads)
    attn = params["layers"]["block"]["attn"]
    repeated = {
        n: np.repeat(attn[n], grouped.num_heads // grouped.num_kv_heads, axis=2)
        for n in ("wk", "wv")
    }
    block = {**params["layers"]["block"], "attn": {**attn, **repeated}}
    wide = {**params, "layers": {"block": block}}
    loss = jax.jit(mean_loss("llama", whole))
    assert_trees_close(loss(wide, batch("llama")), gradients("llama")[0])


@pytest.mark.slow
def test_tied_model_equals_an_untied_one_with_the_same_matrix_twice() -> None:
    untied, params = ZOO["llama"].cfg, parameters("llama")
    tied = dataclasses.replace(untied, tie_embeddings=True)
    one = {name: x for name, x in params.items() if name != "lm_head"}
    assert tied.num_params() == sum(x.size for x in jax.tree.leaves(one))
    step = jax.jit(jax.value_and_grad(mean_loss("llama", tied)))
    loss, slopes = step(one, batch("llama"))
    two = {**params, "lm_head": params["embed"]}
    step = jax.jit(jax.value_and_grad(mean_loss("llama")))
    expected, parts = step(two, batch("llama"))
    assert_trees_close(loss, expected)
    assert_trees_close(slopes["embed"], parts["embed"] + parts["lm_head"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_heads": 4, "num_kv_heads": 3},
            "model.num_heads=4 does not divide by model.num_kv_heads=3",
        ),
        ({"head_dim": 7}, "model.head_dim=7 is odd"),
        ({"num_kv_heads": 0}, "model.num_kv_heads=0: give 1 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llama.Config(**values)
