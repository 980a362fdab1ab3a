# SPDX-License-Identifier: Apache-2.0
"""Attention equals its formula, values and gradients; the choice of kernel says why."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.ambient import ambient
from jaxspeed.config import ConfigError
from jaxspeed.ops import attention
from jaxspeed.ops.attention import _REFUSALS, Form, _splash, choose_attention


RNG = np.random.default_rng(0)
B, T, N, H = 2, 9, 4, 8

SEGMENTS = {
    "one document": None,
    "packed": np.array(
        [[1, 1, 1, 2, 2, 2, 2, 3, 3], [5, 5, 5, 5, 5, 5, 5, 5, 5]], np.int32
    ),
    "padded": np.array(
        [[1, 1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0]], np.int32
    ),
}
KERNELS = [
    name
    for name, refuse in _REFUSALS.items()
    if not refuse("cpu", "float32", (B, T, N, H), Form())
]
HEADS = {"multi-head": 4, "grouped": 2, "multi-query": 1}


def arrays(num_kv_heads: int = N) -> tuple[jax.Array, ...]:
    """Returns q, k, v and a cotangent of the result."""
    shapes = [(B, T, n, H) for n in (N, num_kv_heads, num_kv_heads, N)]
    return tuple(jnp.asarray(RNG.normal(size=s), jnp.float32) for s in shapes)


def oracle(q: Any, k: Any, v: Any, segments: np.ndarray | None) -> Any:
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(H)
    allowed = np.tril(np.ones((T, T), bool))[None]
    if segments is not None:
        allowed = allowed & (segments[:, :, None] == segments[:, None, :])
    allowed = jnp.broadcast_to(allowed[:, None], scores.shape)
    weights = jnp.where(
        allowed, jnp.exp(scores - jnp.max(scores, -1, keepdims=True)), 0.0
    )
    return jnp.einsum(
        "BNTS,BSNH->BTNH", weights / jnp.sum(weights, -1, keepdims=True), v
    )


def with_gradients(f: Any, segments: Any, args: Any, g: jax.Array) -> list[Any]:
    @jax.jit
    def run(*args: jax.Array) -> list[jax.Array]:
        y, pull = jax.vjp(lambda q, k, v: f(q, k, v, segments), *args)
        return [y, *pull(g.astype(y.dtype))]

    return run(*args)


def test_kernels_of_this_machine_are_tested() -> None:
    assert "xla" in KERNELS
    assert choose_attention("auto", "cpu", jnp.float32, (B, T, N, H))[0] in KERNELS


@pytest.mark.parametrize("segments", list(SEGMENTS))
@pytest.mark.parametrize("heads", list(HEADS))
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_equals_the_formula_with_gradients(
    kernel: str, heads: str, segments: str
) -> None:
    *args, g = arrays(HEADS[heads])
    with ambient(attention=kernel):
        ours = with_gradients(attention, _ids(segments), args, g)
    theirs = with_gradients(oracle, SEGMENTS[segments], args, g)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "compute"),
    [*((name, "bfloat16") for name in KERNELS), ("auto", "float16")],
)
def test_low_precision_is_close_and_returns_the_activation_dtype(
    kernel: str, compute: str
) -> None:
    *args, g = arrays(HEADS["grouped"])
    with ambient(
        attention=kernel, compute=jnp.dtype(compute), activations=jnp.dtype(compute)
    ):
        ours = with_gradients(attention, _ids("packed"), args, g)
    assert ours[0].dtype == jnp.dtype(compute)
    for a, b in zip(
        ours, with_gradients(oracle, SEGMENTS["packed"], args, g), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), b, atol=5e-2 if compute == "bfloat16" else 1e-2
        )


@pytest.mark.parametrize("heads", ["grouped", "multi-query"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_grouped_query_attention_equals_repeated_heads(kernel: str, heads: str) -> None:
    q, k, v, _ = arrays(HEADS[heads])
    run = jax.jit(
        lambda *args: attention(*args)
    )  # not attention itself: jit would keep another kernel's trace
    repeated = [np.repeat(x, N // HEADS[heads], axis=2) for x in (k, v)]
    with ambient(attention=kernel):
        np.testing.assert_allclose(
            run(q, k, v), run(q, *repeated), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_result_at_t_ignores_keys_and_values_after_t(kernel: str) -> None:
    q, k, v, _ = arrays()
    slope = jax.jit(
        jax.grad(lambda k, v: jnp.sum(attention(q, k, v)[:, 4]), argnums=(0, 1))
    )
    with ambient(attention=kernel):
        gradients = slope(k, v)
    for gradient in gradients:
        assert not np.any(gradient[:, 5:])
        assert np.all(np.any(gradient[:, :5] != 0, axis=(0, 2, 3)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_documents_do_not_see_each_other(kernel: str) -> None:
    q, k, v, _ = arrays()
    ids = SEGMENTS["packed"]
    with ambient(attention=kernel):
        grads = jax.jit(
            jax.grad(lambda v: jnp.sum(attention(q, k, v, _ids("packed"))[0, 4]))
        )(v)[0]
    seen = np.any(grads != 0, axis=(1, 2))
    np.testing.assert_array_equal(seen, (ids[0] == ids[0, 4]) & (np.arange(T) <= 4))


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_rows_are_finite(kernel: str) -> None:
    q, k, v, g = arrays()
    with ambient(attention=kernel):
        results = with_gradients(attention, _ids("padded"), (q, k, v), g)
    for x in results:
        assert np.all(np.isfinite(x))


CHOICES = [
    (
        "auto",
        "tpu",
        "bfloat16",
        (2, 256, 4, 64),
        "splash",
        "cudnn: needs an NVIDIA GPU",
    ),
    ("auto", "tpu", "float32", (2, 256, 4, 128), "splash", "cudnn"),
    ("auto", "tpu", "bfloat16", (2, 200, 4, 64), "xla", "divides by 128, not 200"),
    ("auto", "tpu", "bfloat16", (2, 256, 4, 48), "xla", "divides by 64, not 48"),
    ("auto", "gpu", "bfloat16", (2, 200, 4, 64), "cudnn", "splash: needs a TPU"),
    ("auto", "gpu", "float16", (2, 200, 4, 128), "cudnn", "splash: needs a TPU"),
    ("auto", "gpu", "float32", (2, 200, 4, 64), "xla", "needs bfloat16 or float16"),
    ("auto", "gpu", "bfloat16", (2, 200, 4, 256), "xla", "not 256"),
    ("auto", "gpu", "bfloat16", (2, 200, 4, 60), "xla", "not 60"),
    ("xla", "gpu", "bfloat16", (2, 200, 4, 64), "xla", "asked for"),
    ("cudnn", "gpu", "bfloat16", (2, 200, 4, 64), "cudnn", "asked for"),
]


@pytest.mark.parametrize(
    ("asked", "platform", "dtype", "shape", "chosen", "why"), CHOICES
)
def test_kernel_is_chosen_by_device_dtype_and_shape(
    asked: str, platform: str, dtype: str, shape: Any, chosen: str, why: str
) -> None:
    kernel, reason = choose_attention(asked, platform, jnp.dtype(dtype), shape)
    assert kernel == chosen
    assert why in reason


@pytest.mark.parametrize(
    ("asked", "platform", "dtype", "shape", "why"),
    [
        ("splash", "cpu", "float32", (2, 256, 4, 64), "needs a TPU"),
        ("cudnn", "cpu", "bfloat16", (2, 256, 4, 64), "needs an NVIDIA GPU"),
        ("cudnn", "gpu", "float32", (2, 256, 4, 64), "needs bfloat16 or float16"),
        ("xla", "cpu", "float16", (2, 256, 4, 64), "float16"),
        ("splash", "tpu", "float32", (2, 100, 4, 64), "divides by 128, not 100"),
    ],
)
def test_kernel_that_cannot_run_is_refused(
    asked: str, platform: str, dtype: str, shape: Any, why: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"attention={asked!r} cannot run here: .*{why}.*; give auto"
    ):
        choose_attention(asked, platform, jnp.dtype(dtype), shape)


def test_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    choose_attention.cache_clear()
    with caplog.at_level(logging.INFO, "jaxspeed"):
        for _ in range(3):
            jax.eval_shape(lambda *args: attention(*args), *arrays()[:3])
    chosen, why = choose_attention("auto", "cpu", jnp.float32, (B, T, N, H))
    assert [r.getMessage() for r in caplog.records] == [
        f"attention kernel: {chosen} ({why})"
    ]
    assert "splash: needs a TPU; cudnn: needs an NVIDIA GPU" in why


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_splash_kernel_lowers_for_a_tpu(packed: bool, num_kv_heads: int) -> None:
    shape = lambda n: jax.ShapeDtypeStruct((2, 256, n, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32) if packed else None

    def loss(q: Any, k: Any, v: Any, ids: Any) -> jax.Array:
        return jnp.sum(_splash(q, k, v, ids, form=Form()).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(
        shape(4), shape(num_kv_heads), shape(num_kv_heads), ids
    )
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def _ids(segments: str) -> jax.Array | None:
    ids = SEGMENTS[segments]
    return None if ids is None else jnp.asarray(ids)
