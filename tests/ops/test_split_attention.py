# SPDX-License-Identifier: Apache-2.0
"""Ulysses and ring attention give what attention over whole sequences gives, gradients included."""

import functools
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
