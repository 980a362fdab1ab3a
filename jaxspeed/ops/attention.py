# SPDX-License-Identifier: Apache-2.0
"""Attention over packed documents, by the fastest kernel that device, dtype, shape and pattern allow.

While a model writes text (`jaxspeed.cache`), causal attention reads the keys and values of the
tokens before from the cache and adds its own; a model file does not know which it is.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxspeed.ambient import current
from jaxspeed.cache import Cache
from jaxspeed.config import ConfigError, config_error
from jaxspeed.ops.cpu_attention import HIDDEN_SCORE, Reach, cpu_attention
from jaxspeed.ops.splash import splash_attention
from jaxspeed.ops.split_attention import exchange, own_heads, ring_attention
from jaxspeed.sharding import key_head_copies, on_tensor, shard


logger = logging.getLogger(__name__)

Bias = Callable[[Int[Array, "T S"]], Float[Array, "N T S"]]
"""What is added to the scores, from how far each key lies behind its query (key - query, in tokens)."""


class Form(NamedTuple):
    """Which queries read which keys, and how scores are made: all of attention that is static."""

    causal: bool = True
    """Keys after the query are hidden."""
    window: int = 0
    """Keys that a query reads, itself included; 0: all."""
    biased: bool = False
    """Something is added to the scores."""
    crossed: bool = False
    """Keys belong to another sequence than queries."""

    @property
    def reach(self) -> Reach:
        """How many tokens (behind, ahead of) a query its keys may lie."""
        side = self.window - 1 if self.window else None
        return side, 0 if self.causal else side


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    key_segment_ids: Int[Array, "B S"] | None = None,
    causal: bool = True,
    window: int = 0,
    windowed: Bool[Array, ""] | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(scale q k^T + bias) v over the keys of the same segment, the earlier ones if causal.

    Grouped-query attention where K < N: query head n reads key head n // (N / K). Reference:
    arXiv 1706.03762 eq. 1, arXiv 2305.13245. A padding position (segment 0) attends to padding.

    Args:
        q: queries.
        k: keys.
        v: values.
        segment_ids: document of each token in the row; None: one document.
        key_segment_ids: the same for keys of another sequence (an encoder's); None: the queries' own.
        causal: hide keys after the query.
        window: hide keys that lie this many tokens or more from the query; 0: none.
        windowed: whether the window is in force, where the layers of a scan differ; None: it is.
        bias: from distances to what is added to the scores (T5's relative positions).
        scale: of the scores; None: 1 / sqrt(H).
    """
    T, S, cache = q.shape[1], k.shape[1], current().cache
    crossed = key_segment_ids is not None or T != S
    if crossed and (causal or window):
        raise ValueError(
            "keys of another sequence have no order here: give causal=False and no window"
        )
    if cache is not None and causal:
        return _cached(cache, q, k, v, segment_ids, window, windowed, bias, scale)
    if crossed and (segment_ids is not None or key_segment_ids is not None):
        segment_ids = _ones(q) if segment_ids is None else segment_ids
        key_segment_ids = _ones(k) if key_segment_ids is None else key_segment_ids
    form = Form(causal, window, bias is not None, crossed)
    read = _split if current().context > 1 else _whole
    return read(form, windowed, q, k, v, segment_ids, key_segment_ids, bias, scale)


def _whole(
    form: Form,
    windowed: Array | None,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    key_segment_ids: Array | None,
    bias: Bias | None,
    scale: float | None,
) -> Array:
    added = None if bias is None else bias(_distances(q.shape[1], k.shape[1]))
    return _in_form(form, windowed, q, k, v, segment_ids, key_segment_ids, added, scale)


def _split(
    form: Form,
    windowed: Array | None,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    key_segment_ids: Array | None,
    bias: Bias | None,
    scale: float | None,
) -> Array:
    """Returns attention over sequences that the mesh axis `context` splits."""
    settings = current()

    def by_heads(q: Array, k: Array, v: Array, ids: Any, key_ids: Any) -> Array:
        own = None if bias is None else lambda x, of=bias: own_heads(of(x))
        return _whole(form, windowed, q, k, v, ids, key_ids, own, scale)

    def by_ring(q: Array, k: Array, v: Array, ids: Any, key_ids: Any) -> Array:
        attended = ring_attention(
            q, k, v, ids, key_ids, windowed, causal=form.causal, window=form.window,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            kernel=choose_for_ring(settings.attention, settings.platform, settings.compute, q.shape, form, k.shape[1])[0],
        )  # fmt: skip
        return attended.astype(settings.activations)

    if settings.context_by == "ulysses":
        attend: Any = functools.partial(exchange, by_heads)
    elif bias is None:
        attend = by_ring
    else:
        raise config_error(
            "context", "ring", "it adds no bias to the scores", "give --context ulysses"
        )
    ids = (segment_ids, key_segment_ids)
    if settings.tensor == 1:
        return attend(q, k, v, *ids)
    if bias is not None:
        raise config_error(
            "mesh.context", settings.context, "this model's bias is split over mesh.tensor",
            "set one of them to 1",
        )  # fmt: skip
    k, v = _enough_heads(q.shape[2], k, v)
    _check_heads(settings.tensor, q.shape[2], k.shape[2])
    heads = P(None, None, "tensor", None)
    specs = (heads, heads, heads, P(), P())
    return on_tensor(attend, specs, heads)(q, k, v, *ids)


def _in_form(form: Form, windowed: Array | None, q: Array, *args: Any) -> Array:
    if form.window >= q.shape[1]:
        form = form._replace(window=0)
    if windowed is None or not form.window:
        return _by_kernel(form, q, *args)
    forms = form, form._replace(window=0)
    return jax.lax.cond(windowed, *(lambda f=f: _by_kernel(f, q, *args) for f in forms))


def _by_kernel(
    form: Form,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    key_segment_ids: Array | None,
    bias: Array | None,
    scale: float | None,
) -> Array:
    settings = current()
    chosen, _ = choose_attention(
        settings.attention,
        settings.platform,
        settings.compute,
        q.shape,
        form,
        k.shape[1],
    )
    if scale is not None:  # the kernels divide by sqrt(H)
        q = q * (scale * q.shape[-1] ** 0.5)
    if chosen != "cpu":  # which casts and names its own, in the layout that it reads
        q, k, v = (
            checkpoint_name(x.astype(settings.compute), name)
            for x, name in ((q, "q"), (k, "k"), (v, "v"))
        )
    k, v = _enough_heads(q.shape[2], k, v)
    kernel = functools.partial(_KERNELS[chosen], form=form)
    divides = q.shape[2] % settings.tensor == 0 == k.shape[2] % settings.tensor
    # The compiler would split masks as well, in the middle of a loop over rows, and XLA's CPU backend then
    # has devices wait for each other for ever (`jaxspeed.pipeline.run_schedule`).
    if settings.tensor > 1 and (divides or chosen in ("splash", "cudnn")):
        kernel = _over_tensor(kernel, settings.tensor, q.shape[2], k.shape[2])
    out = kernel(q, k, v, segment_ids, key_segment_ids, bias)
    out = out.astype(settings.activations)
    # Splash and cuDNN keep their own: named here it would be kept twice.
    return out if chosen in ("splash", "cudnn") else checkpoint_name(out, "attended")


def _cached(
    cache: Cache,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    window: int,
    windowed: Array | None,
    bias: Bias | None,
    scale: float | None,
) -> Array:
    """Returns attention over the tokens in the cache and these, which it keeps there.

    Keys and values lie (B, K, S, H): as the products of a single query read them.
    """
    settings = current()
    # XLA's CPU backend updates no 16-bit floats in place (jaxlib 0.10): there they are
    # rounded and kept wide.
    wide = settings.platform == "cpu"
    kept_dtype = jnp.float32 if wide else settings.compute

    def turned(x: Array) -> Array:
        x = x.astype(settings.compute).astype(kept_dtype).swapaxes(1, 2)
        return shard(x, "batch", "kv_heads", "seq", "head_dim")

    T, before = q.shape[1], cache.take()
    if before is None:
        room = [(0, 0), (0, 0), (0, cache.size - T), (0, 0)]
        cache.keep(tuple(jnp.pad(turned(x), room) for x in (k, v)))
        form = Form(True, window, bias is not None)
        added = None if bias is None else bias(_distances(T, T))
        return _in_form(form, windowed, q, k, v, segment_ids, None, added, scale)
    assert cache.start is not None
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, turned(new), cache.start, 2)
        for old, new in zip(before, (k, v), strict=True)
    )
    cache.keep((keys, values))
    B, _, N, H = q.shape
    K, S = keys.shape[1], keys.shape[2]
    distance = _distances(T, S) - cache.start
    seen = distance <= 0
    if window:
        near = distance > -window
        seen &= near if windowed is None else near | ~windowed
    q = (q * (H**-0.5 if scale is None else scale)).astype(settings.compute)
    q = q.astype(kept_dtype).reshape(B, T, K, N // K, H)
    scores = jnp.einsum(
        "BTKGH,BKSH->BKGTS", q, keys, preferred_element_type=jnp.float32
    )
    if bias is not None:
        scores += bias(distance).reshape(1, K, N // K, T, S)
    hidden = ~(seen[None] & cache.visible[:, None])
    scores = jnp.where(hidden[:, None, None], HIDDEN_SCORE, scores)
    weights = jax.nn.softmax(scores, -1).astype(settings.compute).astype(kept_dtype)
    out = jnp.einsum(
        "BKGTS,BKSH->BTKGH", weights, values, preferred_element_type=jnp.float32
    )
    return out.reshape(B, T, N, H).astype(settings.activations)


def _distances(queries: int, keys: int) -> Int[Array, "T S"]:
    return jnp.arange(keys)[None] - jnp.arange(queries)[:, None]


def _ones(x: Array) -> Int[Array, "B T"]:
    return jnp.ones(x.shape[:2], jnp.int32)


@functools.cache
def choose_attention(
    asked: str,
    platform: str,
    compute: Any,
    q_shape: tuple[int, ...],
    form: Form = Form(),  # noqa: B008 - it is immutable
    num_keys: int | None = None,
) -> tuple[str, str]:
    """Returns (kernel, why) for this device, dtype, shape and form; says so once in the log.

    There are as many keys as queries where `num_keys` is None.

    Raises:
        ConfigError: the kernel asked for cannot run here.
    """
    lengths = q_shape[1], q_shape[1] if num_keys is None else num_keys
    case = _Case(platform, jnp.dtype(compute).name, *lengths, q_shape[3], form)
    refusals = {name: refuse(case) for name, refuse in _REFUSALS.items()}
    return _choose(asked, refusals, "attention kernel")


@functools.cache
def choose_for_ring(
    asked: str,
    platform: str,
    compute: Any,
    q_shape: tuple[int, ...],
    form: Form,
    num_keys: int,
) -> tuple[str, str]:
    """Returns what makes the blocks of a ring, and why: splash, or xla (`jaxspeed.ops.split_attention`'s own products).

    Args:
        asked: as in `choose_attention`, and so are the others.
        platform: of the devices.
        compute: dtype.
        q_shape: of one device's queries.
        form: of the attention.
        num_keys: of one device.

    Raises:
        ConfigError: the kernel asked for makes no blocks, or cannot run here.
    """
    parts = 2 if form.causal else 1  # of a sequence, which meet others one by one
    lengths = q_shape[1] // parts, num_keys // parts
    case = _Case(platform, jnp.dtype(compute).name, *lengths, q_shape[3], form)
    windows = "has no windows in a ring" if form.window else ""
    none = "makes no blocks of a ring"
    splash = _refuse_splash(case) or windows
    refusals = {"splash": splash, "cudnn": none, "cpu": none, "xla": ""}
    return _choose(asked, refusals, "attention kernel in the ring")


def _choose(asked: str, refusals: Mapping[str, str], what: str) -> tuple[str, str]:
    if asked != "auto":
        if refusals[asked]:
            raise ConfigError(
                f"attention={asked!r} cannot run here: {refusals[asked]}; give auto"
            )
        return asked, "asked for"
    chosen = next(name for name, why_not in refusals.items() if not why_not)
    why = (
        "; ".join(f"{name}: {why_not}" for name, why_not in refusals.items() if why_not)
        or "first choice"
    )
    logger.info("%s: %s (%s)", what, chosen, why)
    return chosen, why


def _enough_heads(query_heads: int, k: Array, v: Array) -> tuple[Array, Array]:
    """Returns keys and values with their heads repeated until the devices of `tensor` divide them; nothing travels for it but their gradients."""
    key_heads = k.shape[2]
    times = key_head_copies(key_heads)
    if times == 1 or query_heads % (times * key_heads):
        return k, v
    dims = ("batch", "seq", "kv_heads", "head_dim")
    k, v = (shard(jnp.repeat(x, times, 2), *dims) for x in (k, v))
    return k, v


def _over_tensor(
    kernel: Callable[..., Array], size: int, query_heads: int, key_heads: int
) -> Callable[..., Array]:
    """Returns the kernel run on each device's own heads: the compiler cannot partition it."""
    _check_heads(size, query_heads, key_heads)
    heads = P(None, None, "tensor", None)
    return on_tensor(kernel, (heads, heads, heads, P(), P(), P("tensor")), heads)


def _check_heads(size: int, query_heads: int, key_heads: int) -> None:
    if query_heads % size or key_heads % size:
        raise ConfigError(
            f"mesh.tensor={size}: does not divide {query_heads} query and {key_heads} key heads, which this attention kernel needs; "
            "give a divisor of both, or --attention xla"
        )


class _Case(NamedTuple):
    """What a kernel is chosen by."""

    platform: str
    dtype: str
    queries: int
    keys: int
    head_dim: int
    form: Form


def _refuse_splash(case: _Case) -> str:
    if case.platform != "tpu":
        return "needs a TPU"
    for length in (case.queries, case.keys):
        if length % 128:
            return f"needs a sequence that divides by 128, not {length}"
    if case.head_dim % 64:
        return f"needs a head_dim that divides by 64, not {case.head_dim}"
    return "adds no bias" if case.form.biased else ""


def _refuse_cudnn(case: _Case) -> str:
    if case.platform != "gpu":
        return "needs an NVIDIA GPU"
    if case.dtype == "float32":
        return "needs bfloat16 or float16"
    if case.head_dim % 8 or case.head_dim > 128:
        return f"needs a head_dim of at most 128 that divides by 8, not {case.head_dim}"
    for length in (case.queries, case.keys):
        if length % 2:  # where there is a bias; and segments are one, to it
            return f"needs an even sequence, not {length}"
    if case.form.window and not case.form.causal:
        return "has windows in causal attention only"
    return ""


def _refuse_cpu(case: _Case) -> str:
    return "" if case.platform == "cpu" else "is for CPUs"


def _refuse_xla(case: _Case) -> str:
    wide = case.platform != "cpu" or case.dtype != "float16"
    return "" if wide else "has no float16 products on a CPU"


_REFUSALS = {
    "splash": _refuse_splash,
    "cudnn": _refuse_cudnn,
    "cpu": _refuse_cpu,
    "xla": _refuse_xla,
}


def _mask(segment_ids: Array | None, key_segment_ids: Array | None) -> Array | None:
    if segment_ids is None:
        return None
    keys = segment_ids if key_segment_ids is None else key_segment_ids
    return (segment_ids[:, :, None] == keys[:, None, :])[:, None]


def _xla(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    key_segment_ids: Array | None,
    bias: Array | None,
    *,
    form: Form,
    implementation: Any = "xla",
) -> Array:
    window: Any = form.reach if form.window else None
    if bias is not None:
        bias = bias[None] if implementation == "xla" else bias[None].astype(q.dtype)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias,
        _mask(segment_ids, key_segment_ids),
        is_causal=form.causal,
        local_window_size=window,
        implementation=implementation,
    )


def _cpu(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    key_segment_ids: Array | None,
    bias: Array | None,
    *,
    form: Form,
) -> Array:
    return cpu_attention(q, k, v, segment_ids, key_segment_ids, bias, reach=form.reach)


def _splash(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    key_segment_ids: Array | None = None,
    bias: Array | None = None,
    *,
    form: Form,
) -> Array:
    del bias  # refused
    return splash_attention(q, k, v, segment_ids, key_segment_ids, form.reach)


_KERNELS: dict[str, Callable[..., Array]] = {
    "splash": _splash,
    "cudnn": functools.partial(_xla, implementation="cudnn"),
    "cpu": _cpu,
    "xla": _xla,
}
