# SPDX-License-Identifier: Apache-2.0
"""What holds of GPT-2 alone."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxspeed import nn
from models import gpt2
from tests.models.zoo import ZOO, T


def test_sequence_longer_than_learned_positions_is_refused() -> None:
    cfg = ZOO["gpt2"].cfg
    graphdef, params, _ = nn.abstract(lambda: cfg.build(nn.rngs(jax.random.key(0))))
    inputs = jax.ShapeDtypeStruct((2, T + 1), jnp.int32)
    message = f"{T + 1} tokens; the model has {T} positions; raise model.max_seq_len"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p, x: nn.merge(graphdef, p)(x), params, inputs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"d_model": 33, "num_heads": 4},
            "model.d_model=33 does not divide by model.num_heads=4; nearest legal: 32",
        ),
        ({"num_heads": 0}, "model.num_heads=0: give 1 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gpt2.Config(**values)
