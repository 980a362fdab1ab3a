# SPDX-License-Identifier: Apache-2.0
"""Tiles of an MLP: the same numbers, float32 sums of gradients, nothing of its width kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspeed import ops
from jaxspeed.ambient import ambient
from jaxspeed.cache import Cache
from jaxspeed.config import REMAT_POLICIES
from jaxspeed.nn import Layers, in_tiles, param


B, T, D, F = 2, 10, 4, 48

NORMAL = jax.nn.initializers.normal(0.5)


class MLP(nnx.Module):
    """Two products, a dropout between."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w_up = param(NORMAL, rngs, (D, F), ("embed", "mlp"))
        self.w_down = param(NORMAL, rngs, (F, D), ("mlp", "embed"))

    @in_tiles
    def __call__(self, x: jax.Array, *, rate: float = 0.0) -> jax.Array:
        up = ops.dropout(jnp.tanh(ops.linear(x, self.w_up)), rate, site=0)
        return ops.linear(up, self.w_down)


@pytest.fixture(scope="module")
def model() -> Layers:
    return Layers(MLP, 2, nnx.Rngs(0))


def step(model: Layers, x: jax.Array, **settings: Any) -> Any:
    """Returns loss and gradients."""
    graphdef, state = nnx.split(model)
    with ambient(**settings):
        loss = lambda state, x: jnp.sum(jnp.sin(nnx.merge(graphdef, state)(x)))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, x)


X: Any = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


@pytest.mark.parametrize("count", [2, 3, 10, 16])
def test_any_number_of_tiles_gives_the_same_numbers(model: Layers, count: int) -> None:
    ours, plain = (step(model, X, mlp_tiles=n) for n in (count, 1))
    for a, b in zip(*map(jax.tree.leaves, (ours, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_of_weights_are_summed_in_float32(model: Layers) -> None:
    half = {"compute": jnp.bfloat16, "activations": jnp.bfloat16}
    x = jnp.asarray(X, jnp.bfloat16)
    ours, plain = (step(model, x, mlp_tiles=n, **half) for n in (10, 1))
    for a, b in zip(
        *(jax.tree.leaves(found[1][0]) for found in (ours, plain)), strict=True
    ):
        assert a.dtype == jnp.float32
        # Products of bfloat16 numbers summed in float32, in either order.
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_no_policy_keeps_what_is_inside_a_tile(model: Layers, policy: str) -> None:
    graphdef, state = nnx.split(model)

    def inside(count: int) -> set[tuple[int, ...]]:
        with ambient(remat=policy, mlp_tiles=count):
            run = lambda state, x: jax.vjp(
                lambda *given: nnx.merge(graphdef, given[0])(given[1]), state, x
            )[1]
            kept = jax.tree.leaves(jax.eval_shape(run, state, X))
        return {x.shape for x in kept if x.shape[-2:] in {(T, F), (T // 5, F)}}

    assert not inside(5)
    assert bool(inside(1)) == (policy in ("none", "dots"))


def test_tiles_draw_their_own_masks() -> None:
    mlp = MLP(nnx.Rngs(0))
    ones = jnp.ones((1, 8, D))
    with ambient(mlp_tiles=2, dropout_key=jax.random.key(1)):
        first, second = jnp.split(mlp(ones, rate=0.5), 2, axis=1)
    assert not np.allclose(first, second)


def test_one_token_is_written_at_a_time_without_tiles(model: Layers) -> None:
    graphdef, state = nnx.split(model.block)
    mlp = nnx.merge(graphdef, jax.tree.map(lambda w: w[0], state))
    with ambient(mlp_tiles=4, cache=Cache(4, jnp.ones((B, 4), bool))):
        traced = str(jax.make_jaxpr(lambda x: mlp(x))(X[:, :1]))
    assert "scan" not in traced
