# SPDX-License-Identifier: Apache-2.0
"""Activations equal their formulas; dropout keeps the mean, and draws by key and site."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.ambient import ambient
from jaxspeed.ops import dropout, gelu, silu_gate


X = np.linspace(-6, 6, 101).astype(np.float32)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def numeric(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    h = 1e-5
    return (f(x + h) - f(x - h)) / (2 * h)


def test_gelu_equals_the_tanh_formula_with_gradient() -> None:
    x = X.astype(np.float64)
    np.testing.assert_allclose(gelu(jnp.asarray(X)), gelu_tanh(x), atol=1e-5)
    slope = jax.jit(jax.vmap(jax.grad(gelu)))(X)
    np.testing.assert_allclose(slope, numeric(gelu_tanh, x), atol=1e-5)


def test_silu_gate_equals_its_formula_with_gradients() -> None:
    silu = lambda x: x / (1 + np.exp(-x))
    up = np.flip(X) / 3
    np.testing.assert_allclose(
        silu_gate(jnp.asarray(X), jnp.asarray(up)), silu(X) * up, atol=1e-5
    )
    d_gate, d_up = jax.jit(jax.vmap(jax.grad(silu_gate, argnums=(0, 1))))(X, up)
    np.testing.assert_allclose(
        d_gate, numeric(silu, X.astype(np.float64)) * up, atol=1e-5
    )
    np.testing.assert_allclose(d_up, silu(X), atol=1e-5)


def drop(
    rate: float, key: int = 0, site: int = 0, shape: tuple[int, ...] = (64, 64)
) -> jax.Array:
    with ambient(dropout_key=jax.random.key(key)):
        return dropout(jnp.ones(shape), rate, site)


def test_dropout_without_a_key_or_a_rate_returns_its_input() -> None:
    x = jnp.ones((3,))
    assert dropout(x, 0.5, site=0) is x
    with ambient(dropout_key=jax.random.key(0)):
        assert dropout(x, 0.0, site=0) is x


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate: float) -> None:
    y = np.asarray(drop(rate))
    assert set(np.unique(y)) == {0.0, np.float32(1 / (1 - rate))}
    assert np.mean(y == 0) == pytest.approx(rate, abs=0.03)
    assert y.mean() == pytest.approx(1.0, abs=0.1)


def test_dropout_repeats_for_a_key_and_differs_between_keys_and_sites() -> None:
    same, again, other_key, other_site = (
        drop(0.5),
        drop(0.5),
        drop(0.5, key=1),
        drop(0.5, site=1),
    )
    assert jnp.array_equal(same, again)
    for other in (other_key, other_site):
        assert float(jnp.mean(same == other)) == pytest.approx(0.5, abs=0.05)


def test_dropout_gradient_has_the_mask_of_the_forward_pass() -> None:
    with ambient(dropout_key=jax.random.key(0)):
        y, pull = jax.vjp(lambda x: dropout(x, 0.5, 0), jnp.ones((64,)))
    np.testing.assert_array_equal(pull(jnp.ones((64,)))[0], y)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_keeps_the_dtype(dtype: jnp.dtype) -> None:
    with ambient(dropout_key=jax.random.key(0)):
        assert dropout(jnp.ones((4,), dtype), 0.5, 0).dtype == dtype
