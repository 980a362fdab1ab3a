# SPDX-License-Identifier: Apache-2.0
"""The chunked loss equals log-softmax over all logits and never holds those."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxspeed.ambient import ambient
from jaxspeed.ops import cross_entropy, fused_cross_entropy


RNG = np.random.default_rng(0)
B, T, D, V = 2, 13, 8, 11

CHUNKS = {"one chunk": 10**9, "a chunk per token": 1, "ragged chunks": 4}


def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
    hidden, table = RNG.normal(size=(B, T, D)), RNG.normal(size=(V, D))
    targets = RNG.integers(0, V, (B, T))
    return (
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(table, jnp.float32),
        jnp.asarray(targets, jnp.int32),
    )


MASKS = {
    "no mask": None,
    "ragged": jnp.asarray(RNG.random((B, T)) < 0.6),
    "one row out": jnp.asarray(np.arange(B)[:, None] * np.ones((B, T), bool) > 0),
    "one token": jnp.zeros((B, T), bool).at[1, 4].set(True),
}


def ours(hidden: Any, table: Any, targets: Any, mask: Any) -> Any:
    """Returns the sums and the gradients of three times the total."""

    def loss(hidden: Any, table: Any) -> Any:
        sums = fused_cross_entropy(hidden, table, targets, mask)
        return 3.0 * sums.total, sums

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        hidden, table
    )


def oracle(
    hidden: Any, table: Any, targets: Any, mask: Any
) -> tuple[Any, Any, Any, Any]:
    """Returns total, count and the gradients of three times the total, in float64."""
    h, w, t = (
        np.asarray(hidden, np.float64),
        np.asarray(table, np.float64),
        np.asarray(targets),
    )
    m = np.ones(t.shape) if mask is None else np.asarray(mask, np.float64)
    logits = h @ w.T
    logits = logits - logits.max(-1, keepdims=True)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    hot = np.eye(len(w))[t]
    with np.errstate(divide="ignore"):
        losses = -np.where(
            hot > 0, logits - np.log(np.exp(logits).sum(-1, keepdims=True)), 0.0
        ).sum(-1)
    d_logits = 3.0 * (probs - hot) * m[..., None]
    return (
        (losses * m).sum(),
        m.sum(),
        d_logits @ w,
        np.einsum("btv,btd->vd", d_logits, h),
    )


def check(results: Any, expected: Any, tolerance: float = 1e-5) -> None:
    (_, sums), (d_hidden, d_table) = results
    for ours, theirs in zip(
        (sums.total, sums.count, d_hidden, d_table), expected, strict=True
    ):
        np.testing.assert_allclose(
            ours, theirs, rtol=tolerance, atol=tolerance * max(1, np.abs(theirs).max())
        )


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("chunks", list(CHUNKS))
def test_loss_equals_log_softmax_with_gradients(
    chunks: str, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", CHUNKS[chunks])
    args = (*arrays(), MASKS[mask])
    check(ours(*args), oracle(*args))


def test_ragged_case_is_ragged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", CHUNKS["ragged chunks"])
    chunk = cross_entropy._chunk_tokens(B * T)
    assert 1 < chunk < B * T
    assert (B * T) % chunk


def test_all_masked_batch_has_no_loss_and_no_gradient() -> None:
    (_, sums), gradients = ours(*arrays(), jnp.zeros((B, T), bool))
    assert sums.total.item() == sums.count.item() == 0.0
    assert not any(np.any(g) for g in gradients)


@pytest.mark.parametrize("target", [-100, V, 10**6])
def test_target_that_does_not_count_may_be_anything(target: int) -> None:
    hidden, table, targets = arrays()
    mask = MASKS["ragged"]
    expected = oracle(hidden, table, targets, mask)
    check(ours(hidden, table, jnp.where(mask, targets, target), mask), expected)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_huge_logits_are_exact_and_finite(scale: float) -> None:
    hidden, table, targets = arrays()
    args = (scale * hidden, table, targets, MASKS["ragged"])
    check(ours(*args), oracle(*args))


@pytest.mark.parametrize(
    ("compute", "tolerance"), [("bfloat16", 2e-2), ("float16", 3e-3)]
)
@pytest.mark.parametrize("activations", ["float32", "compute"])
def test_low_precision_is_close_and_gradients_keep_their_dtypes(
    compute: str, tolerance: float, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", CHUNKS["ragged chunks"])
    hidden, table, targets = arrays()
    hidden = hidden.astype(compute if activations == "compute" else jnp.float32)
    with ambient(compute=jnp.dtype(compute)):
        results = ours(hidden, table, targets, MASKS["ragged"])
    assert (results[1][0].dtype, results[1][1].dtype) == (hidden.dtype, jnp.float32)
    assert results[0][1].total.dtype == jnp.float32
    check(
        jax.tree.map(lambda x: x.astype(jnp.float32), results),
        oracle(hidden, table, targets, MASKS["ragged"]),
        tolerance,
    )


def shapes_of(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Yields the shape of every value that the program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_of(inner)


@pytest.mark.parametrize("gradient", [False, True])
def test_logits_of_the_whole_batch_never_exist(
    gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", 16)
    tokens, vocab = (4, 128), 1000
    hidden, table = jnp.ones((*tokens, D)), jnp.ones((vocab, D))
    loss = lambda h, w: fused_cross_entropy(h, w, jnp.zeros(tokens, jnp.int32)).total
    f = jax.jit(jax.grad(loss, argnums=(0, 1)) if gradient else loss)
    size = 4 * 128 * vocab
    shapes = [
        int(np.prod(s)) for s in shapes_of(jax.make_jaxpr(f)(hidden, table).jaxpr)
    ]
    assert max(shapes) <= size / 32
    memory = f.lower(hidden, table).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < size


def test_bias_is_added_to_the_logits() -> None:
    hidden, table, targets = arrays()
    mask, bias = MASKS["ragged"], jnp.asarray(RNG.normal(size=V), jnp.float32)

    def loss(hidden: Any, table: Any, bias: Any) -> Any:
        return fused_cross_entropy(hidden, table, targets, mask, bias).total

    def plain(hidden: Any, table: Any, bias: Any) -> Any:
        logps = jax.nn.log_softmax(hidden @ table.T + bias[None, None])
        chosen = jnp.take_along_axis(logps, targets[..., None], -1)[..., 0]
        return -jnp.sum(chosen * mask)

    both = (jax.value_and_grad(f, argnums=(0, 1, 2)) for f in (loss, plain))
    ours, theirs = (f(hidden, table, bias) for f in both)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        ours,
        theirs,
    )
