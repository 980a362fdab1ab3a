# SPDX-License-Identifier: Apache-2.0
"""Attention equals its formula, values and gradients; the choice of kernel says why."""

import functools
import logging
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.ambient import ambient
from jaxspeed.cache import Cache
from jaxspeed.config import ConfigError
from jaxspeed.ops import attention, cpu_attention
from jaxspeed.ops.attention import (
    _REFUSALS,
    Form,
    _Case,
    _splash,
    _xla,
    choose_attention,
)
from jaxspeed.remat import checkpoint_layer


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
    if not refuse(_Case("cpu", "float32", T, T, H, Form()))
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


S = 7
KEY_SEGMENTS = np.array([[1, 1, 2, 3, 0, 2, 3], [4, 5, 5, 0, 5, 0, 0]], np.int32)
"""Of another sequence, with some for each document of "packed"."""

FORMS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 3},
    "both ways": {"causal": False},
    "both ways, window": {"causal": False, "window": 3},
    "scale": {"scale": 0.5},
    "bias": {"bias": True},
    "bias both ways": {"bias": True, "causal": False},
    "cross": {"keys": S, "causal": False},
    "cross, bias": {"keys": S, "causal": False, "bias": True},
    "cross, segments": {"keys": S, "causal": False, "key_segment_ids": KEY_SEGMENTS},
}


def formula(
    q: Any,
    k: Any,
    v: Any,
    segments: Any,
    key_segments: Any = None,
    *,
    causal: bool = True,
    window: int = 0,
    bias: Any = None,
    scale: float | None = None,
) -> Any:
    """Returns attention by its definition, for every form."""
    T, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    distance = np.arange(S)[None] - np.arange(T)[:, None]
    allowed = np.ones((1, T, S), bool)
    if causal:
        allowed = allowed & (distance <= 0)[None]
    if window:
        allowed = allowed & (np.abs(distance) < window)[None]
    if segments is not None:
        theirs = segments if key_segments is None else key_segments
        allowed = allowed & (segments[:, :, None] == theirs[:, None, :])
    k, v = (jnp.repeat(x, G, axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores += bias(distance)[None]
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), -1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v)


def in_form(f: Any, form: dict[str, Any], segments: Any) -> Any:
    """Returns `(q, k, v, table) -> f's attention`, where the table holds the bias of each distance."""
    fixed = {n: x for n, x in form.items() if n not in ("bias", "keys")}
    fixed, segments = jax.tree.map(_array, (fixed, segments))

    def run(q: Any, k: Any, v: Any, table: Any) -> Any:
        bias = (lambda d: table[:, d + T]) if form.get("bias") else None
        return f(q, k, v, segments, bias=bias, **fixed)

    return run


def peers(f: Any, form: dict[str, Any], segments: Any) -> Any:
    fixed = {n: x for n, x in form.items() if n != "key_segment_ids"}
    keys = form.get("key_segment_ids")
    g = lambda q, k, v, _, **more: f(q, k, v, segments, keys, **more)
    return in_form(g, fixed, segments)


def values_and_gradients(f: Any, args: Any, g: jax.Array) -> list[Any]:
    @jax.jit
    def run(*args: jax.Array) -> list[jax.Array]:
        y, pull = jax.vjp(f, *args)
        return [y, *pull(g.astype(y.dtype))]

    return run(*args)


def of_form(form: dict[str, Any], num_kv_heads: int = 2) -> tuple[jax.Array, ...]:
    """Returns q, k, v, the table of the bias, and a cotangent of the result."""
    keys, rng = form.get("keys", T), np.random.default_rng(0)
    shapes = [(B, T, N, H), *[(B, keys, num_kv_heads, H)] * 2, (N, 2 * T), (B, T, N, H)]
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


@functools.cache
def by_the_formula(name: str) -> list[Any]:
    form = FORMS[name]
    *args, g = of_form(form)
    return values_and_gradients(peers(formula, form, segments_of(name)), args, g)


def segments_of(name: str) -> Any:
    whole = "cross" in name and "segments" not in name
    return None if whole else SEGMENTS["packed"]


@pytest.mark.parametrize("kernel", [*KERNELS, "cpu in blocks"])
@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_equals_the_formula_with_gradients(
    name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMS[name]
    if kernel == "cpu in blocks":
        monkeypatch.setattr(cpu_attention, "_block", lambda length, reach: 5)
    *args, g = of_form(form)
    with ambient(attention=kernel.split()[0]):
        run = in_form(attention, form, segments_of(name))
        ours = values_and_gradients(run, args, g)
    for a, b in zip(ours, by_the_formula(name), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["bias both ways", "cross, segments", "window"])
def test_every_form_in_low_precision_is_close(name: str, kernel: str) -> None:
    form, low = FORMS[name], jnp.bfloat16
    *args, g = of_form(form)
    with ambient(attention=kernel, compute=low, activations=low):
        run = in_form(attention, form, segments_of(name))
        ours = values_and_gradients(run, args, g)
    for a, b in zip(ours, by_the_formula(name), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=3e-2 * scale)


@pytest.mark.parametrize("windowed", [True, False])
def test_a_layer_of_a_scan_may_have_the_window_or_not(windowed: bool) -> None:
    *args, g = of_form({})
    switched = {"window": 3, "windowed": jnp.asarray(windowed)}
    ours = values_and_gradients(in_form(attention, switched, None), args, g)
    form = {"window": 3} if windowed else {}
    theirs = values_and_gradients(in_form(formula, form, None), args, g)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_window_of_the_whole_sequence_is_none() -> None:
    program = lambda **form: str(
        jax.make_jaxpr(lambda q, k, v: attention(q, k, v, **form))(*of_form({})[:3])
    )
    assert (
        program(window=T) == program(window=T, windowed=jnp.asarray(True)) == program()
    )
    assert program(window=T - 1) != program()


def test_keys_of_another_sequence_have_no_order() -> None:
    q, k, v, *_ = of_form({"keys": S})
    for form in ({}, {"causal": False, "window": 3}):
        with pytest.raises(ValueError, match="give causal=False and no window"):
            attention(q, k, v, **form)


WRITTEN: dict[str, dict[str, Any]] = {
    name: FORMS[name] for name in ("causal", "window", "scale", "bias")
} | {
    "bias, window": {"bias": True, "window": 3},
    "windowed": {"window": 3, "windowed": jnp.asarray(True)},
    "not windowed": {"window": 3, "windowed": jnp.asarray(False)},
}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("name", list(WRITTEN))
def test_reading_the_cache_equals_the_whole_sequence(name: str, platform: str) -> None:
    """In passes of four tokens (the first), one, three and one; the second row begins with padding."""
    form, size = WRITTEN[name], T + 2
    *args, _ = of_form(form)
    padding = np.array([[1] * T, [0] * 2 + [1] * (T - 2)], np.int32)
    with ambient(attention="xla"):
        whole = jax.jit(in_form(attention, form, padding))(*args)
    kept, parts = None, []
    q, k, v, table = args
    for start, stop in ((0, 4), (4, 5), (5, 8), (8, 9)):
        visible = np.pad(padding > 0, [(0, 0), (0, size - T)])
        visible &= np.arange(size)[None] < stop

        @jax.jit
        def write(kept: Any, start: Any, visible: Any, q: Any, k: Any, v: Any) -> Any:
            first = kept is None
            cache = Cache(size, visible, None if first else start, kept)
            segments = padding[:, :4] if first else None
            with ambient(cache=cache, attention="xla", platform=platform):
                out = in_form(attention, form, segments)(q, k, v, table)
            return out, cache.kept

        now = (x[:, start:stop] for x in (q, k, v))
        part, kept = write(kept, jnp.asarray(start), jnp.asarray(visible), *now)
        parts.append(part)
    real = padding > 0
    np.testing.assert_allclose(
        np.concatenate(parts, 1)[real], whole[real], rtol=1e-5, atol=1e-5
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
        ("cudnn", "gpu", "bfloat16", (2, 201, 4, 64), "an even sequence, not 201"),
    ],
)
def test_kernel_that_cannot_run_is_refused(
    asked: str, platform: str, dtype: str, shape: Any, why: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"attention={asked!r} cannot run here: .*{why}.*; give auto"
    ):
        choose_attention(asked, platform, jnp.dtype(dtype), shape)


@pytest.mark.parametrize(
    ("platform", "form", "keys", "chosen", "why"),
    [
        ("tpu", Form(causal=False, window=64), None, "splash", "cudnn: needs"),
        ("tpu", Form(causal=False, crossed=True), 384, "splash", "cudnn: needs"),
        ("tpu", Form(causal=False, crossed=True), 100, "xla", "by 128, not 100"),
        ("tpu", Form(biased=True), None, "xla", "splash: adds no bias"),
        ("gpu", Form(window=64, biased=True), None, "cudnn", "splash: needs a TPU"),
        ("gpu", Form(causal=False, crossed=True), 101, "xla", "sequence, not 101"),
        ("gpu", Form(causal=False, window=64), None, "xla", "in causal attention only"),
        ("cpu", Form(causal=False, window=64, biased=True), None, "cpu", "splash"),
    ],
)
def test_kernel_is_chosen_by_form(
    platform: str, form: Form, keys: int | None, chosen: str, why: str
) -> None:
    case = ("auto", platform, jnp.dtype("bfloat16"), (2, 256, 4, 64), form, keys)
    kernel, reason = choose_attention(*case)
    assert kernel == chosen
    assert why in reason


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


SPLASH = {
    "causal": Form(),
    "window": Form(window=100),
    "both ways": Form(causal=False),
    "both ways, window": Form(causal=False, window=100),
    "cross": Form(causal=False, crossed=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", list(SPLASH))
def test_splash_kernel_interpreted_equals_the_formula_with_gradients(
    name: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )

    make = functools.partial(kernel.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(kernel, "make_splash_mha_single_device", make)
    form, T = SPLASH[name], 256
    keys = 128 if form.crossed else T
    shapes = [(1, T, 2, 64), (1, keys, 1, 64), (1, keys, 1, 64), (1, T, 2, 64)]
    q, k, v, g = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in shapes)
    ids = theirs = None
    if packed:
        ids = jnp.repeat(jnp.asarray([[1, 2]]), T // 2, axis=1)
        theirs = ids[:, ::-2] if form.crossed else None
    splash = lambda q, k, v: _splash(q, k, v, ids, theirs, form=form)
    plain = lambda q, k, v: formula(
        q, k, v, ids, theirs, causal=form.causal, window=form.window
    )
    ours = values_and_gradients(splash, (q, k, v), g)
    for a, b in zip(ours, values_and_gradients(plain, (q, k, v), g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


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


CUDNN = SPLASH | {
    "bias": Form(biased=True),
    "cross, bias": Form(causal=False, biased=True, crossed=True),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [n for n in CUDNN if n != "both ways, window"])
def test_cudnn_kernel_lowers_for_a_gpu(
    name: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    form, B, T, N = CUDNN[name], 2, 256, 4
    keys = 128 if form.crossed else T
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
    q, k = shape(B, T, N, 64), shape(B, keys, 2, 64)
    bias = shape(N, T, keys, dtype=jnp.float32) if form.biased else None
    ids = shape(B, T, dtype=jnp.int32) if packed else None
    theirs = shape(B, keys, dtype=jnp.int32) if packed and form.crossed else None

    def loss(q: Any, k: Any, v: Any, bias: Any, ids: Any, theirs: Any) -> jax.Array:
        out = _xla(q, k, v, ids, theirs, bias, form=form, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32))

    argnums = (0, 1, 2, 3) if form.biased else (0, 1, 2)
    traced = jax.jit(jax.grad(loss, argnums)).trace(q, k, k, bias, ids, theirs)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "fmha" in text
    assert "SoftmaxBackward" in text


@pytest.mark.parametrize("policy", ["none", "attention", "dots", "full"])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_result_and_normaliser_of_a_kernel_are_kept_once_or_not_at_all(
    platform: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    B, T, N, H = 2, 256, 4, 64
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)
    # Nobody else keeps what attention reads.
    layer = lambda q, k, v: jnp.tanh(attention(jnp.sin(q), jnp.sin(k), jnp.sin(v)))
    names = {"platform": platform, "compute": jnp.bfloat16}
    with ambient(activations=jnp.bfloat16, **names):
        run = checkpoint_layer(layer, policy)
        pull = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], x, x, x)
    large = Counter(r.shape for r in jax.tree.leaves(pull) if r.size >= B * T * N)
    inputs, result = {(B, T, N, H): 3}, (B, N, T, H) if platform == "tpu" else x.shape
    if policy in ("none", "attention"):
        inputs = Counter({x.shape: 6}) + Counter({result: 1, (B, N, T): 1})
    assert large == Counter(inputs)


def _array(x: Any) -> Any:
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _ids(segments: str) -> jax.Array | None:
    ids = SEGMENTS[segments]
    return None if ids is None else jnp.asarray(ids)
