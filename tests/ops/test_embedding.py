# SPDX-License-Identifier: Apache-2.0
"""Table lookup equals indexing, and its gradient a float32 sum over the tokens that looked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.ambient import ambient
from jaxspeed.ops import embed


RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(11, 4)).astype(np.float32)


@pytest.mark.parametrize("shape", [(), (5,), (2, 6)])
def test_embed_equals_indexing_with_gradient(shape: tuple[int, ...]) -> None:
    ids = RNG.integers(0, 11, shape).astype(np.int32)
    g = RNG.normal(size=(*shape, 4)).astype(np.float32)
    rows, pull = jax.vjp(
        lambda table: embed(table, jnp.asarray(ids)), jnp.asarray(TABLE)
    )
    np.testing.assert_array_equal(rows, TABLE[ids])
    expected = np.zeros_like(TABLE)
    np.add.at(expected, ids, g)
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], expected, rtol=1e-5, atol=1e-6)


def test_rows_are_rounded_to_compute_and_returned_as_activations() -> None:
    ids = jnp.arange(11)
    with ambient(compute=jnp.bfloat16, activations=jnp.float32):
        rows = embed(jnp.asarray(TABLE), ids)
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, TABLE.astype(jnp.bfloat16).astype(np.float32))


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_gradient_of_a_frequent_token_does_not_stop_growing(compute: str) -> None:
    ids = jnp.zeros((4096,), jnp.int32)
    with ambient(compute=jnp.dtype(compute)):
        _, pull = jax.vjp(lambda table: embed(table, ids), jnp.ones((3, 2)))
        gradient = pull(jnp.ones((4096, 2)))[0]
    np.testing.assert_array_equal(gradient, [[4096.0] * 2, [0.0] * 2, [0.0] * 2])
