# SPDX-License-Identifier: Apache-2.0
"""The norms equal their formulas in float64, values and gradients, whatever dtype comes in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.ambient import ambient
from jaxspeed.ops import layer_norm, rms_norm


RNG = np.random.default_rng(0)
EPS = 1e-5


def rms(x: Any, scale: Any, bias: Any) -> Any:
    del bias
    return (
        x
        / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPS)
        * jnp.broadcast_to(scale, x.shape)
    )


def layer(x: Any, scale: Any, bias: Any) -> Any:
    mean = jnp.mean(x, -1, keepdims=True)
    var = jnp.mean(x * x, -1, keepdims=True) - mean * mean
    y = (x - mean) / jnp.sqrt(var + EPS)
    return y * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


NORMS = {
    "rms": (lambda x, scale, bias: rms_norm(x, scale, eps=EPS), rms),
    "layer": (lambda x, scale, bias: layer_norm(x, scale, bias, eps=EPS), layer),
}


def arrays(shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    normal = lambda shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    return 3 * normal(shape) + 1, normal(shape[-1:]), normal(shape[-1:]), normal(shape)


def with_gradients(f: Any, args: Any, g: jax.Array) -> Any:
    def run(*args: jax.Array) -> Any:
        y, pull = jax.vjp(f, *args)
        return y, pull(g)

    return jax.jit(run)(*args)


@pytest.mark.parametrize("shape", [(7,), (3, 8), (2, 3, 5)])
@pytest.mark.parametrize("norm", list(NORMS))
def test_norm_equals_its_formula_with_gradients(
    norm: str, shape: tuple[int, ...]
) -> None:
    ours_fn, theirs_fn = NORMS[norm]
    *args, g = arrays(shape)
    ours, our_gradients = with_gradients(ours_fn, args, g)
    theirs, gradients = with_gradients(theirs_fn, args, g)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(our_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("norm", list(NORMS))
def test_norm_computes_in_float32_and_returns_the_activation_dtype(norm: str) -> None:
    x, scale, bias, _ = arrays((4, 16))
    x = x.astype(jnp.bfloat16)
    with ambient(compute=jnp.bfloat16, activations=jnp.bfloat16):
        y = jax.jit(lambda *args: NORMS[norm][0](*args))(x, scale, bias)
    assert y.dtype == jnp.bfloat16
    exact = jax.jit(NORMS[norm][1])(x.astype(jnp.float32), scale, bias)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_layer_norm_ignores_shift_and_scale_of_its_input() -> None:
    x, scale, bias, _ = arrays((4, 64))
    norm = jax.jit(lambda x: layer_norm(x, scale, bias, eps=EPS))
    np.testing.assert_allclose(norm(1e3 * x + 1e4), norm(x), atol=5e-4)


@pytest.mark.parametrize("norm", list(NORMS))
def test_norm_of_zeros_is_finite_with_gradient(norm: str) -> None:
    args = (jnp.zeros((2, 4)), jnp.ones((4,)), jnp.zeros((4,)))
    y, gradients = with_gradients(NORMS[norm][0], args, jnp.ones((2, 4)))
    assert not np.any(y)
    assert all(np.all(np.isfinite(d)) for d in gradients)


def test_rms_norm_of_huge_bfloat16_values_is_finite() -> None:
    y = rms_norm(jnp.full((1, 4), 1e18, jnp.bfloat16), jnp.ones((4,)), eps=EPS)
    np.testing.assert_allclose(y, 1.0, rtol=1e-5)
