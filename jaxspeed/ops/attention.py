# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention over packed documents, by the fastest kernel that device, dtype and shape allow."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxspeed.ambient import current
from jaxspeed.config import ConfigError
from jaxspeed.ops.cpu_attention import cpu_attention


logger = logging.getLogger(__name__)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k^T / sqrt(H)) v over earlier positions of the same segment.

    Grouped-query attention where K < N: query head n reads key head n // (N / K). Reference:
    arXiv 1706.03762 eq. 1, arXiv 2305.13245. A padding position (segment 0) attends to padding.

    Args:
        q: queries.
        k: keys.
        v: values.
        segment_ids: document of each token in the row; None: one document.
    """
    settings = current()
    chosen, _ = choose_attention(
        settings.attention,
        settings.platform,
        settings.compute,
        q.shape,
    )
    if chosen != "cpu":  # which casts and names its own, in the layout that it reads
        q, k, v = (
            checkpoint_name(x.astype(settings.compute), name)
            for x, name in ((q, "q"), (k, "k"), (v, "v"))
        )
    kernel = _KERNELS[chosen]
    if settings.tensor > 1 and chosen in ("splash", "cudnn"):
        kernel = _over_tensor(kernel, settings.tensor, q.shape[2], k.shape[2])
    out = kernel(q, k, v, segment_ids)
    return checkpoint_name(out.astype(settings.activations), "attended")


@functools.cache
def choose_attention(
    asked: str,
    platform: str,
    compute: Any,
    q_shape: tuple[int, ...],
) -> tuple[str, str]:
    """Returns (kernel, why) for this device, dtype and shape; says so once in the log.

    Raises:
        ConfigError: the kernel asked for cannot run here.
    """
    refusals = {
        name: refuse(platform, jnp.dtype(compute).name, q_shape)
        for name, refuse in _REFUSALS.items()
    }
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
    logger.info("attention kernel: %s (%s)", chosen, why)
    return chosen, why


def _over_tensor(
    kernel: Callable[..., Array], size: int, query_heads: int, key_heads: int
) -> Callable[..., Array]:
    """Returns the kernel run on each device's own heads: the compiler cannot partition it."""
    if query_heads % size or key_heads % size:
        raise ConfigError(
            f"mesh.tensor={size}: does not divide {query_heads} query and {key_heads} key heads, which this attention kernel needs; "
            "give a divisor of both, or --attention xla"
        )
    heads = P(None, None, "tensor", None)

    def run(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        return jax.shard_map(
            kernel,
            in_specs=(heads, heads, heads, P()),
            out_specs=heads,
            axis_names={"tensor"},
            check_vma=False,
        )(q, k, v, segment_ids)

    return run


def _refuse_splash(platform: str, dtype: str, q_shape: tuple[int, ...]) -> str:
    if platform != "tpu":
        return "needs a TPU"
    if q_shape[1] % 128:
        return f"needs a sequence that divides by 128, not {q_shape[1]}"
    if q_shape[3] % 64:
        return f"needs a head_dim that divides by 64, not {q_shape[3]}"
    return ""


def _refuse_cudnn(platform: str, dtype: str, q_shape: tuple[int, ...]) -> str:
    if platform != "gpu":
        return "needs an NVIDIA GPU"
    if dtype == "float32":
        return "needs bfloat16 or float16"
    if q_shape[3] % 8 or q_shape[3] > 128:
        return f"needs a head_dim of at most 128 that divides by 8, not {q_shape[3]}"
    return ""


def _refuse_cpu(platform: str, dtype: str, q_shape: tuple[int, ...]) -> str:
    return "" if platform == "cpu" else "is for CPUs"


def _refuse_xla(platform: str, dtype: str, q_shape: tuple[int, ...]) -> str:
    wide = platform != "cpu" or dtype != "float16"
    return "" if wide else "has no float16 products on a CPU"


_REFUSALS = {
    "splash": _refuse_splash,
    "cudnn": _refuse_cudnn,
    "cpu": _refuse_cpu,
    "xla": _refuse_xla,
}


def _mask(segment_ids: Array | None) -> Array | None:
    return (
        None
        if segment_ids is None
        else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    )


def _xla(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, mask=_mask(segment_ids), is_causal=True, implementation="xla"
    )


def _cudnn(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, mask=_mask(segment_ids), is_causal=True, implementation="cudnn"
    )


def _splash(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
        splash_attention_mask as masks,
    )

    T, N, K = q.shape[1], q.shape[2], k.shape[2]
    mask = masks.MultiHeadMask([masks.CausalMask((T, T)) for _ in range(N)])
    block = next(b for b in (1024, 512, 256, 128) if T % b == 0)
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    run = kernel.make_splash_mha_single_device(mask, block_sizes=sizes)
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    segments = (
        None if segment_ids is None else kernel.SegmentIds(segment_ids, segment_ids)
    )
    attended: Any = jax.vmap(run)(q, k, v, segments)
    return attended.swapaxes(1, 2)


_KERNELS = {"splash": _splash, "cudnn": _cudnn, "cpu": cpu_attention, "xla": _xla}
