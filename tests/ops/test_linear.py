# SPDX-License-Identifier: Apache-2.0
"""The product equals einsum, with gradients, and sums in float32 whatever it multiplies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.ambient import ambient
from jaxspeed.config import ConfigError
from jaxspeed.ops import linear, linears
from jaxspeed.ops.linear import dot, dot_rows
from jaxspeed.sharding import Adapted
from jaxspeed.tiles import tiled


RNG = np.random.default_rng(0)

CASES = {
    "matrix": ((5, 8), (8, 3), 1),
    "batch": ((2, 5, 8), (8, 3), 1),
    "heads out": ((2, 5, 8), (8, 4, 2), 1),
    "heads in": ((2, 5, 4, 2), (4, 2, 8), 2),
    "vector": ((8,), (8, 3), 1),
    "one feature": ((2, 5, 8), (8, 1), 1),
}
COMPUTE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}


def arrays(case: str) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, int]:
    """Returns x, w, bias, a cotangent of the result, and the number of contracted dims."""
    x, w, contract = CASES[case]
    out = x[: len(x) - contract] + w[contract:]
    normal = lambda shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    return normal(x), normal(w), normal(w[contract:]), normal(out), contract


def oracle(x: Any, w: Any, bias: Any, g: Any, contract: int) -> list[np.ndarray]:
    """Returns the result and the gradients of x, w and bias, in float64."""
    x, w, bias, g = (np.asarray(a, np.float64) for a in (x, w, bias, g))
    lead, outer = x.ndim - contract, w.ndim - contract
    dx = np.tensordot(g, np.moveaxis(w, range(contract), range(-contract, 0)), outer)
    dw = np.tensordot(x, g, axes=(range(lead), range(lead)))
    return [np.tensordot(x, w, contract) + bias, dx, dw, g.sum(tuple(range(lead)))]


@pytest.mark.parametrize(
    ("case", "biased", "compute"),
    [(case, biased, "float32") for case in CASES for biased in (False, True)]
    + [
        (case, True, compute)
        for case in ("heads out", "heads in")
        for compute in ("bfloat16", "float16")
    ],
)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_linear_equals_tensordot_with_gradients(
    platform: str, case: str, biased: bool, compute: str
) -> None:
    x, w, bias, g, contract = arrays(case)
    args = (x, w, bias) if biased else (x, w)

    @jax.jit
    def ours(*args: jax.Array) -> list[jax.Array]:
        y, pull = jax.vjp(lambda x, w, *b: linear(x, w, *b, contract=contract), *args)
        return [y, *pull(g)]

    with ambient(compute=jnp.dtype(compute), platform=platform):
        results = ours(*args)
    expected = oracle(x, w, bias if biased else np.zeros_like(bias), g, contract)
    for result, exact in zip(results, expected, strict=False):
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(
            result, exact, rtol=0, atol=COMPUTE[compute] * np.abs(exact).max()
        )


@pytest.mark.parametrize("biased", [False, True])
def test_dtypes_follow_the_ambient_settings_and_weights_keep_float32_gradients(
    biased: bool,
) -> None:
    x, w, bias, _, contract = arrays("batch")
    x = x.astype(jnp.bfloat16)
    args = (x, w, bias) if biased else (x, w)
    with ambient(compute=jnp.bfloat16, activations=jnp.bfloat16):
        y, pull = jax.vjp(lambda x, w, *b: linear(x, w, *b, contract=contract), *args)
        dx, *rest = pull(y)
    assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert {d.dtype for d in rest} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_sums_do_not_stop_growing(compute: str) -> None:
    x, w, bias = jnp.ones((4096, 1)), jnp.ones((1, 1)), jnp.zeros((1,))
    with ambient(compute=jnp.dtype(compute)):
        forward = linear(x.T, x)
        _, pull = jax.vjp(linear, x, w, bias)
        _, dw, db = pull(jnp.ones((4096, 1)))
    assert forward.item() == dw.item() == db.item() == 4096.0


def test_operands_are_rounded_to_the_compute_dtype() -> None:
    with ambient(compute=jnp.bfloat16):
        assert linear(jnp.full((1, 1), 257.0), jnp.ones((1, 1))).item() == 256.0


def test_inner_dims_that_differ_are_refused() -> None:
    with pytest.raises(AssertionError):
        linear(jnp.ones((2, 3)), jnp.ones((4, 3)))


def test_empty_batch_gives_an_empty_result() -> None:
    assert linear(jnp.ones((0, 3)), jnp.ones((3, 2)), jnp.ones((2,))).shape == (0, 2)


@pytest.mark.parametrize("contracting", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_dot_contracts_the_dims_it_is_told(contracting: tuple[int, int]) -> None:
    a, b = RNG.normal(size=(2, 4, 4)).astype(np.float32)
    expected = np.tensordot(a, b, axes=(contracting[0], contracting[1]))
    np.testing.assert_allclose(
        dot(jnp.asarray(a), jnp.asarray(b), contracting), expected, rtol=1e-5
    )


@pytest.mark.parametrize("widths", [(3, 8), (8, 3), (5, 5)])
@pytest.mark.parametrize("rows", [16, 33])
def test_dot_rows_sums_over_rows_in_float32(widths: tuple[int, int], rows: int) -> None:
    a, b = (jnp.asarray(RNG.normal(size=(rows, n)), jnp.bfloat16) for n in widths)
    product = jax.jit(dot_rows)(a, b)
    assert product.dtype == jnp.float32
    expected = np.asarray(a, np.float64).T @ np.asarray(b, np.float64)
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)


SCALE, R = 0.5, 2


def adapted(
    x: Any, w: Any, a: Any, b: Any, *bias: Any, contract: int, rate: float = 0
) -> Any:
    return linear(x, Adapted(w, a, b, "w", SCALE, rate), *bias, contract=contract)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("case", "compute"),
    [(case, "float32") for case in CASES]
    + [("heads out", "bfloat16"), ("heads in", "float16")],
)
def test_adapter_is_added_to_its_matrix_which_has_no_gradient(
    case: str, compute: str, biased: bool
) -> None:
    x, w, bias, g, contract = arrays(case)
    a = jnp.asarray(RNG.normal(size=(*w.shape[:contract], R)), jnp.float32)
    b = jnp.asarray(RNG.normal(size=(R, *w.shape[contract:])), jnp.float32)
    extra = (bias,) if biased else ()

    def run(product: Any) -> Any:
        y, pull = jax.vjp(
            lambda w, *args: product(args[0], w, *args[1:]), w, x, a, b, *extra
        )
        return [y, *pull(g)]

    def formed(x: Any, w: Any, a: Any, b: Any, *bias: Any) -> Any:
        whole = w + SCALE * jnp.tensordot(a, b, 1)
        return jnp.tensordot(x, whole, contract) + sum(bias)

    with ambient(compute=jnp.dtype(compute)):
        ours = jax.jit(run, static_argnums=0)(
            lambda *args: adapted(*args, contract=contract)
        )
    with jax.numpy_rank_promotion("allow"):
        exact = run(formed)
    assert not np.any(ours[1])
    for mine, theirs in zip(ours[:1] + ours[2:], exact[:1] + exact[2:], strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(
            mine, theirs, rtol=0, atol=2 * COMPUTE[compute] * np.abs(theirs).max()
        )


def test_adapter_that_is_zero_changes_no_bit() -> None:
    x, w, bias, _, contract = arrays("heads out")
    zero = jnp.zeros((R, *w.shape[contract:]))
    for compute in ("float32", "bfloat16"):
        with ambient(compute=jnp.dtype(compute), activations=jnp.dtype(compute)):
            ours = adapted(x, w, jnp.ones((8, R)), zero, bias, contract=contract)
            np.testing.assert_array_equal(ours, linear(x, w, bias, contract=contract))


def test_dropout_is_on_the_way_into_the_adapter_alone() -> None:
    x, w, *_ = arrays("matrix")
    a, b = jnp.ones((8, R)), jnp.ones((R, 3))
    run = lambda b: adapted(x, w, a, b, contract=1, rate=0.5)
    np.testing.assert_allclose(run(b), linear(x, w + SCALE * a @ b), rtol=1e-5)
    with ambient(dropout_key=jax.random.key(0)):
        np.testing.assert_array_equal(run(jnp.zeros_like(b)), linear(x, w))
        assert np.any(run(b) != linear(x, w + SCALE * a @ b))


def test_adapter_elsewhere_than_in_a_product_is_refused() -> None:
    weight: Any = Adapted(
        jnp.ones((2, 2)), jnp.ones((2, 1)), jnp.ones((1, 2)), "x.w", 1.0, 0.0
    )
    assert weight[...] is weight
    for use in (
        lambda: jnp.sum(weight),
        lambda: weight[0],
        lambda: jnp.ones((2, 2)) @ weight,
    ):
        with pytest.raises(ConfigError, match="lora.targets: x.w is used by something"):
            use()


@pytest.mark.parametrize("columns", [64, 100, 128])
@pytest.mark.parametrize("rows", [1, 3])
def test_matrix_in_tiles_is_the_matrix(rows: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, 4, 6)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(4, 6, columns)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=columns), jnp.float32)
    matrix = tiled(w, 2)
    np.testing.assert_array_equal(matrix.whole(), w)
    np.testing.assert_array_equal(jnp.asarray(matrix), w)
    np.testing.assert_array_equal(matrix[1], w[1])
    assert matrix.ndim == 3
    for b in (bias, None):
        ours = jax.jit(lambda x, w, b=b: linear(x, w, b, contract=2))(x, matrix)
        np.testing.assert_allclose(
            ours, linear(x, w, b, contract=2), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("compute", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_several_products_are_those_one_by_one(
    biased: bool, compute: Any, platform: str
) -> None:
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (4, 8, 16))
    matrices = [
        jax.random.normal(key, shape)
        for key, shape in zip(
            keys[1:4], ((16, 4, 8), (16, 2, 8), (16, 40)), strict=True
        )
    ]
    biases: list[Any] = [None] * 3
    if biased:
        biases = [
            jax.random.normal(keys[4], (4, 8)),
            None,
            jax.random.normal(keys[5], (40,)),
        ]

    def total(fn: Any, x: Any, matrices: Any, biases: Any) -> Any:
        return sum(jnp.sum(jnp.sin(y)) for y in fn(x, matrices, biases))

    def each(x: Any, matrices: Any, biases: Any) -> Any:
        return [linear(x, w, b) for w, b in zip(matrices, biases, strict=True)]

    with ambient(compute=compute, platform=platform):
        ours, theirs = (
            jax.value_and_grad(
                lambda *args, fn=fn: total(fn, *args), argnums=(0, 1, 2)
            )(x, matrices, biases)
            for fn in (linears, each)
        )
    tolerance = 1e-5 if compute == jnp.float32 else 2e-2
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
