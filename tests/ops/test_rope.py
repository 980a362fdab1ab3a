# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding is a rotation of complex numbers, and products depend on distance only."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.ambient import ambient
from jaxspeed.ops import RopeScaling, rotate


RNG = np.random.default_rng(0)
B, T, N, H = 2, 7, 3, 8


def oracle(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Returns the halves as real and imaginary part, turned in float64."""
    half = x.shape[-1] // 2
    z = x[..., :half].astype(np.float64) + 1j * x[..., half:]
    wavelength = theta ** (2 * np.arange(half) / x.shape[-1])
    z = z * np.exp(1j * positions[:, :, None, None] / wavelength)
    return np.concatenate([z.real, z.imag], -1)


@functools.partial(jax.jit, static_argnums=2)
def turn(x: Any, positions: Any, theta: float) -> jax.Array:
    return rotate(x, positions, theta=theta)


def heads() -> np.ndarray:
    return RNG.normal(size=(B, T, N, H)).astype(np.float32)


def positions(*, start: int = 0) -> np.ndarray:
    return np.broadcast_to(np.arange(T, dtype=np.int32) + start, (B, T))


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1.5])
@pytest.mark.parametrize("start", [0, 5, 4000])
def test_rotation_equals_complex_multiplication(theta: float, start: int) -> None:
    x, at = heads(), positions(start=start)
    y = turn(x, at, theta)
    # A float32 angle of thousands of radians is good to 2e-4.
    np.testing.assert_allclose(
        y, oracle(x, at, theta), atol=1e-5 if start < 100 else 2e-3
    )


def test_gradient_is_the_inverse_rotation() -> None:
    x, at = heads(), positions(start=3)
    y, pull = jax.vjp(lambda x: turn(x, at, 100.0), jnp.asarray(x))
    np.testing.assert_allclose(pull(y)[0], x, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_halves_swapped_by_a_product_are_the_same_bits(dtype: Any) -> None:
    at, given = jnp.asarray(positions(start=3)), jnp.asarray(heads(), dtype)

    def both(x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x: rotate(x, at, theta=100.0), x)
        return y, pull(g)[0]

    found = []
    for platform in ("cpu", "tpu"):
        with ambient(platform=platform):
            found.append(both(given, given[::-1]))
    for moved, multiplied in zip(*found, strict=True):
        np.testing.assert_array_equal(moved, multiplied)


def test_position_zero_changes_nothing() -> None:
    x = jnp.asarray(heads())
    np.testing.assert_array_equal(turn(x, jnp.zeros((B, T), jnp.int32), 100.0), x)


def test_products_depend_on_distance_only() -> None:
    q, k = heads(), heads()

    def scores(start: int) -> np.ndarray:
        turned = [turn(x, positions(start=start), 100.0) for x in (q, k)]
        return np.einsum("BTNH,BSNH->BNTS", *turned)

    np.testing.assert_allclose(scores(0), scores(29), atol=1e-4)


def test_rows_may_have_positions_of_their_own() -> None:
    x = heads()
    at = RNG.integers(0, 9, (B, T)).astype(np.int32)
    np.testing.assert_allclose(turn(x, at, 10.0), oracle(x, at, 10.0), atol=1e-5)


def test_bfloat16_is_turned_in_float32_and_stays_bfloat16() -> None:
    x, at = jnp.asarray(heads(), jnp.bfloat16), jnp.asarray(positions(start=300))
    y = turn(x, at, 100.0)
    assert y.dtype == jnp.bfloat16
    exact = turn(x.astype(jnp.float32), at, 100.0)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_linear_scaling_is_a_shorter_text_and_the_attention_factor_a_multiple() -> None:
    x = jnp.asarray(heads())
    scaling = RopeScaling(
        kind="linear", factor=2.0, original=0, low_turns=0.0, high_turns=0.0,
        attention_factor=3.0,
    )  # fmt: skip
    turned = jax.jit(functools.partial(rotate, theta=100.0, scaling=scaling))
    y = turned(x, jnp.asarray(2 * positions()))
    np.testing.assert_allclose(y, 3 * turn(x, positions(), 100.0), atol=1e-5)
