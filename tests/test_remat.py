# SPDX-License-Identifier: Apache-2.0
"""Each policy keeps what its name says; none keeps a whole weight."""

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params

from jaxspeed.ambient import ambient
from jaxspeed.config import REMAT_POLICIES
from jaxspeed.nn import Layers, param
from jaxspeed.ops import linear
from jaxspeed.remat import checkpoint_layer


B, D, F = 3, 8, 20

X = jax.ShapeDtypeStruct((B, D), jnp.float32)
SHARD = jax.ShapeDtypeStruct((D // 2, F), jnp.float32)
WHOLE = (D, F)


def layer(x: jax.Array, shard: jax.Array) -> jax.Array:
    """Returns two products by one weight, gathered from shards, an attention value between."""
    whole = (
        jnp.broadcast_to(shard, (2, *shard.shape)).reshape(WHOLE).astype(jnp.float32)
    )
    q = checkpoint_name(jnp.sin(linear(x, whole)), "q")
    return jnp.tanh(linear(jnp.exp(q), whole.T))


def kept(policy: str) -> Counter[tuple[int, ...]]:
    """Returns the shapes that the backward pass is given, the layer's inputs apart."""
    run = checkpoint_layer(layer, policy)
    residuals = jax.tree.leaves(
        jax.eval_shape(lambda x, s: jax.vjp(run, x, s)[1], X, SHARD)
    )
    return Counter(r.shape for r in residuals if r.size) - Counter(
        [X.shape, SHARD.shape]
    )


def products(jaxpr: Any) -> int:
    inner = (products(j) for e in jaxpr.eqns for j in jaxprs_in_params(e.params))
    return sum(e.primitive.name == "dot_general" for e in jaxpr.eqns) + sum(inner)


def products_of_a_step(policy: str) -> int:
    run = checkpoint_layer(layer, policy)
    return products(
        jax.make_jaxpr(jax.grad(lambda x, s: jnp.sum(run(x, s)), argnums=(0, 1)))(
            X, SHARD
        ).jaxpr
    )


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_no_policy_keeps_a_whole_weight(policy: str) -> None:
    assert not {WHOLE, WHOLE[::-1]} & set(kept(policy))


def test_full_keeps_the_inputs_only() -> None:
    assert not kept("full")


def test_attention_keeps_what_attention_reads() -> None:
    assert kept("attention") == Counter([(B, F)])


@pytest.mark.parametrize("policy", ["none", "dots"])
def test_policy_that_keeps_products_does_none_again(policy: str) -> None:
    assert products_of_a_step(policy) == 6
    assert kept(policy)[(B, F)] >= 1


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("policy", ["none", "dots"])
def test_products_are_kept_in_16_bits(policy: str, platform: str) -> None:
    """Not the float32 sums that they are rounded from."""
    half = jnp.bfloat16
    with ambient(compute=half, activations=half, platform=platform):
        # A function of its own: jax remembers traces by it, and not by the ambient settings.
        run = checkpoint_layer(lambda x, s: layer(x, s), policy)
        residuals = jax.eval_shape(lambda x, s: jax.vjp(run, x, s)[1], X, SHARD)
    kinds = {r.dtype.name for r in jax.tree.leaves(residuals) if r.shape == (B, F)}
    assert kinds <= {"bfloat16", "uint16"}
    assert kinds


@pytest.mark.parametrize("policy", ["none", "dots"])
@pytest.mark.parametrize(("rank", "keeps"), [(1, False), (2, True)])
def test_result_that_is_far_wider_than_its_operand_is_not_kept(
    policy: str, rank: int, keeps: bool
) -> None:
    """An adapter's two products beside its matrix's own: of the sum one term is kept."""

    def layer(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sin(linear(x, jnp.ones((D, F))) + linear(linear(x, a), b))

    shapes = [(B, D), (D, rank), (rank, F)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    run = checkpoint_layer(layer, policy)
    residuals = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(run, *x)[1], *arrays))
    assert sum(x.shape == (B, F) for x in residuals) == 1 + keeps


def test_full_does_the_products_of_the_forward_pass_again() -> None:
    assert products_of_a_step("full") == 8


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_policy_does_not_change_values(policy: str) -> None:
    rng = np.random.default_rng(0)
    x, shard = (jnp.asarray(rng.normal(size=s.shape), jnp.float32) for s in (X, SHARD))
    value = lambda f: jax.jit(
        jax.value_and_grad(lambda x, s: jnp.sum(f(x, s)), argnums=(0, 1))
    )(x, shard)
    for ours, plain in zip(
        jax.tree.leaves(value(checkpoint_layer(layer, policy))),
        jax.tree.leaves(value(layer)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


def test_dots_does_attention_again() -> None:
    """Products with batch dims are attention's: they grow with the square of the sequence."""

    def attend(x: jax.Array) -> jax.Array:
        return jnp.sin(jnp.einsum("btd,bsd->bts", x, x))

    x = jax.ShapeDtypeStruct((2, 5, 3), jnp.float32)
    residuals = jax.eval_shape(
        lambda x: jax.vjp(checkpoint_layer(attend, "dots"), x)[1], x
    )
    assert {r.shape for r in jax.tree.leaves(residuals)} == {(2, 5, 3)}


def test_offload_sends_what_layers_read_to_the_host_and_back() -> None:
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.w = param(
                jax.nn.initializers.normal(1.0), rngs, (D, D), ("embed", "mlp")
            )

        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.tanh(linear(x, self.w))

    model, x = Layers(Block, 3, nnx.Rngs(0)), jnp.ones((2, B, D))
    graphdef, state = nnx.split(model)
    with ambient(remat="offload"):
        loss = lambda state, x: nnx.merge(graphdef, state)(x).sum()
        lowered = (
            jax.jit(jax.grad(loss)).trace(state, x).lower(lowering_platforms=("tpu",))
        )
    placed = re.findall(
        r'_xla_buffer_placement = "(\w+)"\}.*-> tensor<(\w+)>', lowered.as_text()
    )
    assert placed == [("pinned_host", f"2x{B}x{D}xf32"), ("device", f"2x{B}x{D}xf32")]
