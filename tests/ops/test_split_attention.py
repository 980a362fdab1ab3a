# SPDX-License-Identifier: Apache-2.0
"""Ulysses and ring attention give what attention over whole sequences gives, gradients included."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

from jaxspeed import ops
from jaxspeed.ambient import ambient
from jaxspeed.config import ConfigError
from jaxspeed.context import AXIS, device_order, parts_of, token_places
from jaxspeed.ops import split_attention
from jaxspeed.ops.attention import Form


attention: Any = importlib.import_module("jaxspeed.ops.attention")
"""The module, whose name the function takes in `jaxspeed.ops`."""

B, T, N, K, H = 2, 32, 4, 2, 8
FORMS: dict[str, dict[str, Any]] = {
    "causal": {},
    "all": {"causal": False},
    "window": {"window": 6},
    "window of some layers": {"window": 6, "windowed": jnp.array(False)},
    "near": {"causal": False, "window": 5},
    "scaled": {"scale": 0.7},
}


def inputs(seed: int, keys: int = T, key_heads: int = K) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, keys, key_heads, H), (B, keys, key_heads, H))
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def documents(length: int = T) -> np.ndarray:
    """Returns rows of several documents, with padding behind."""
    ends = np.array([[5, 19, length - 3], [length // 2, length // 2 + 1, length - 1]])
    ids = 1 + (np.arange(length) >= ends[:, :, None]).sum(1)
    return np.where(ids > 3, 0, ids).astype(np.int32)


def split_run(by: str, size: int, arrays: tuple[Any, ...], **how: Any) -> Any:
    """Returns attention and its gradients, sequences split over `size` devices."""
    mesh = Mesh(np.array(jax.devices()[:size]), (AXIS,))
    order = lambda x: None if x is None else x[:, device_order(x.shape[1], by, size)]
    back = lambda x: np.asarray(x)[:, np.argsort(device_order(x.shape[1], by, size))]

    def local(q: Any, k: Any, v: Any, g: Any, ids: Any, key_ids: Any) -> Any:
        with ambient(context=size, context_by=by):
            attend = functools.partial(
                ops.attention, segment_ids=ids, key_segment_ids=key_ids, **how
            )
            out, pull = jax.vjp(attend, q, k, v)
        return (out, *pull(g))  # as in the step, outside of the settings

    spec = P(None, AXIS)
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(spec,) * 6, out_specs=spec, check_vma=False
    )
    return [back(x) for x in jax.jit(run)(*map(order, arrays))]


def whole_run(arrays: tuple[Any, ...], **how: Any) -> Any:
    *four, ids, key_ids = (None if x is None else jnp.asarray(x) for x in arrays)
    q, k, v, g = four
    attend = functools.partial(
        ops.attention, segment_ids=ids, key_segment_ids=key_ids, **how
    )
    out, pull = jax.vjp(attend, q, k, v)
    return [out, *pull(g)]


CASES = [
    *[("ring", 4, form, packed) for form in FORMS for packed in (False, True)],
    *[("ring", 2, form, True) for form in ("causal", "all")],
    *[("ulysses", 4, form, True) for form in FORMS],
    *[("ulysses", 2, "causal", packed) for packed in (False, True)],
]


@pytest.mark.parametrize(("by", "size", "form", "packed"), CASES)
def test_split_attention_is_attention(
    by: str, size: int, form: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks of scores a device, of unlike sizes.
    monkeypatch.setattr(split_attention, "CHUNK_QUERIES", 3)
    monkeypatch.setattr(split_attention, "CHUNK_KEYS", 4)
    ids = documents() if packed else None
    arrays = (*inputs(0), inputs(1)[0], ids, None)
    ours = split_run(by, size, arrays, **FORMS[form])
    theirs = whole_run(arrays, **FORMS[form])
    for mine, true in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, true, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("size", "how"), [(4, {}), (2, {}), (3, {"causal": False})])
def test_ring_of_splash_kernels_is_attention(
    size: int, how: dict[str, Any], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpret_splash(monkeypatch)
    length = size * (256 if how == {} else 128)
    rng = np.random.default_rng(0)
    shapes = [(2, length, n, 64) for n in (4, 2, 2, 4)]
    q, k, v, g = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    ids = documents(length) if packed else None
    arrays = (q, k, v, g, ids, None)
    ours, theirs = split_run("ring", size, arrays, **how), whole_run(arrays, **how)
    for mine, true in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_query_that_sees_no_key_in_a_ring_of_splash_kernels_hides_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interpret_splash(monkeypatch)
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=(1, 256, 1, 64)).astype(np.float32) for _ in range(4))
    ids, key_ids = np.full((1, 256), 1, np.int32), np.full((1, 256), 1, np.int32)
    ids[:, 200:] = 7
    g[:, 200:] = 0
    arrays = (q, k, v, g, ids, key_ids)
    ours = split_run("ring", 2, arrays, causal=False)
    theirs = whole_run(arrays, causal=False)
    assert all(np.isfinite(x).all() for x in ours)
    np.testing.assert_allclose(
        ours[0][:, :200], theirs[0][:, :200], rtol=1e-4, atol=1e-4
    )
    for mine, true in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-4, atol=1e-4)


def interpret_splash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the ring take the TPU's kernels here."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )

    make = functools.partial(kernels.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(kernels, "make_splash_mha_single_device", make)
    monkeypatch.setattr(attention, "choose_for_ring", lambda *_: ("splash", "a test"))


CHOICES = {
    "cpu: makes no blocks": ("auto", "tpu", (1, 256, 4, 64), Form(), "splash"),
    "needs a TPU": ("auto", "cpu", (1, 256, 4, 64), Form(), "xla"),
    "by 128, not 64": ("auto", "tpu", (1, 128, 4, 64), Form(), "xla"),
    "no windows": ("auto", "tpu", (1, 256, 4, 64), Form(window=8), "xla"),
    "asked for": ("xla", "tpu", (1, 256, 4, 64), Form(), "xla"),
}


@pytest.mark.parametrize("why", list(CHOICES))
def test_what_makes_the_blocks_of_a_ring(why: str) -> None:
    asked, platform, shape, form, chosen = CHOICES[why]
    kernel, reason = attention.choose_for_ring(
        asked, platform, jnp.dtype("bfloat16"), shape, form, shape[1]
    )
    assert kernel == chosen
    assert why in reason


@pytest.mark.parametrize(
    ("asked", "why"),
    [("cudnn", "makes no blocks of a ring"), ("splash", "needs a TPU")],
)
def test_kernel_that_a_ring_cannot_use_is_refused(asked: str, why: str) -> None:
    with pytest.raises(
        ConfigError, match=f"attention='{asked}' cannot run here: {why}"
    ):
        attention.choose_for_ring(
            asked, "cpu", jnp.dtype("bfloat16"), (1, 256, 4, 64), Form(), 256
        )


@pytest.mark.parametrize("by", ["ulysses", "ring"])
def test_keys_of_another_sequence(by: str) -> None:
    keys = 48
    arrays = (*inputs(0, keys), inputs(1)[0], documents(), documents(keys))
    ours = split_run(by, 4, arrays, causal=False)
    for mine, true in zip(ours, whole_run(arrays, causal=False), strict=True):
        np.testing.assert_allclose(mine, true, rtol=2e-5, atol=2e-5)


def test_bias_goes_with_the_heads() -> None:
    slopes = 2.0 ** -jnp.arange(1.0, N + 1)
    bias = lambda distances: slopes[:, None, None] * distances[None]
    arrays = (*inputs(0), inputs(1)[0], None, None)
    ours = split_run("ulysses", 4, arrays, bias=bias)
    for mine, true in zip(ours, whole_run(arrays, bias=bias), strict=True):
        np.testing.assert_allclose(mine, true, rtol=2e-5, atol=2e-5)
    with pytest.raises(ConfigError, match="context='ring': it adds no bias"):
        split_run("ring", 4, arrays, bias=bias)


def test_heads_that_do_not_divide_name_what_does() -> None:
    arrays = (*inputs(0), inputs(1)[0], None, None)
    with pytest.raises(
        ConfigError, match=r"mesh.context=8: .* give 4, or --context ring"
    ):
        split_run("ulysses", 8, arrays)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("by", ["ulysses", "ring"])
def test_every_device_knows_the_places_of_its_tokens(by: str, size: int) -> None:
    mesh = Mesh(np.array(jax.devices()[:size]), (AXIS,))

    def local(_: Any) -> Any:
        with ambient(context=size, context_by=by):
            return token_places(T // size)

    run = jax.shard_map(local, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
    order = device_order(T, by, size)
    np.testing.assert_array_equal(run(jnp.zeros(T)), order)
    assert sorted(order) == list(range(T))
    assert T % parts_of(by, size) == 0


@pytest.mark.parametrize("size", [2, 4])
def test_every_device_of_a_causal_ring_has_the_same_work(size: int) -> None:
    places = device_order(T, "ring", size).reshape(size, -1)
    pairs = (places[:, :, None] >= np.arange(T)).sum((1, 2))
    assert set(pairs) == {T * (T + 1) // 2 // size}


def test_documents_restart_their_places() -> None:
    ids = documents()
    mesh = Mesh(np.array(jax.devices()[:4]), (AXIS,))

    def local(ids: Any) -> Any:
        with ambient(context=4, context_by="ring"):
            return ops.document_places(ids)

    spec, order = P(None, AXIS), device_order(T, "ring", 4)
    run = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(
        run(ids[:, order]), np.asarray(ops.document_places(jnp.asarray(ids)))[:, order]
    )
