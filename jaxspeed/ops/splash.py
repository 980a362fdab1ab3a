# SPDX-License-Identifier: Apache-2.0
"""TPU attention by jax's splash kernels: of whole sequences, and of a part of the pairs for a ring.

The kernels, their masks and their derivative are jax's (`jax.experimental.pallas.ops.tpu.splash_attention`;
arXiv 2205.14135). `part` and `part_gradients` call the same kernels for some queries and some keys of a
longer softmax: what the forward pass gives is then added up (`jaxspeed.ops.split_attention`), and the backward
pass is given the normaliser of the whole. jax has no public name for the latter two kernels.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from jaxspeed.ops.cpu_attention import Reach
from jaxspeed.remat import NORMALISER_NAME


BLOCKS = (1024, 512, 256, 128)
"""Sizes of blocks of scores, the largest that divides being the best."""

EVERYONE: Reach = (None, None)
"""Nothing is hidden by its place."""

EARLIER: Reach = (None, 0)
"""Keys after the query are hidden."""


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B T"] | None,
    key_segment_ids: Int[Array, "B S"] | None,
    reach: Reach,
) -> Float[Array, "B T N H"]:
    """Returns attention with its derivative; lengths divide by 128, H by 64."""
    name = {"residual_checkpoint_name": NORMALISER_NAME}  # of what it gives, too
    run = _kernel(q.shape[2], q.shape[1], k.shape[1], reach, **name)
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    out: Any = jax.vmap(run)(q, k, v, _segments(segment_ids, key_segment_ids))
    return out.swapaxes(1, 2)


def part(
    q: Float[Array, "B N t H"],
    k: Float[Array, "B K s H"],
    v: Float[Array, "B K s H"],
    segment_ids: Int[Array, "B t"] | None,
    key_segment_ids: Int[Array, "B s"] | None,
    reach: Reach,
) -> tuple[Float[Array, "B N t H"], Float[Array, "B N t"]]:
    """Returns attention of scaled queries to these keys alone, and the log of what its weights were divided by; without derivative."""
    run = _kernel(q.shape[1], q.shape[2], k.shape[2], reach, save_residuals=True)
    made: Any = jax.vmap(run)(q, k, v, _segments(segment_ids, key_segment_ids))
    out, (normaliser,) = made
    return out, normaliser


def part_gradients(
    q: Float[Array, "B N t H"],
    k: Float[Array, "B K s H"],
    v: Float[Array, "B K s H"],
    segment_ids: Int[Array, "B t"] | None,
    key_segment_ids: Int[Array, "B s"] | None,
    reach: Reach,
    normaliser: Float[Array, "B N t"],
    g: Float[Array, "B N t H"],
    delta: Float[Array, "B N t"],
) -> tuple[Array, Array, Array]:
    """Returns what these pairs give to the gradients of q, k and v, where their softmax goes on elsewhere.

    Args:
        q: scaled queries.
        k: keys.
        v: values.
        segment_ids: of the queries.
        key_segment_ids: of the keys.
        reach: as in `part`.
        normaliser: of each query's whole softmax.
        g: the gradient of what the whole softmax gave.
        delta: its product with what that was, summed over H.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )

    run = _kernel(q.shape[1], q.shape[2], k.shape[2], reach)
    sizes, settings = run.kwargs["block_sizes"], run.kwargs
    how = {
        name: settings[name]
        for name in (
            "is_mqa",
            "mask_value",
            "attn_logits_soft_cap",
            "mask_function",
            "interpret",
        )
    } | {f"{name}_layout": getattr(sizes, f"{name}_layout") for name in "qkv"}

    def one(
        q: Array,
        k: Array,
        v: Array,
        segments: Any,
        normaliser: Array,
        g: Array,
        delta: Array,
    ) -> tuple[Array, Array, Array]:
        given = (q, k, v, segments, None, normaliser, g, delta)
        _, d_k, d_v = kernels._splash_attention_bwd_dkv(
            *given, bq=sizes.block_q_dkv, bkv=sizes.block_kv_dkv, bkv_compute=sizes.block_kv_dkv_compute,
            mask_info=run.dkv_mask_info, use_fused_bwd_kernel=False, **how,
        )  # fmt: skip
        d_q = kernels._splash_attention_bwd_dq(
            *given, bq=sizes.block_q_dq, bkv=sizes.block_kv_dq, mask_info=run.dq_mask_info, **how
        )  # fmt: skip
        return d_q, d_k, d_v

    segments = _segments(segment_ids, key_segment_ids)
    return jax.vmap(one)(q, k, v, segments, normaliser, g, delta)


def _kernel(heads: int, queries: int, keys: int, reach: Reach, **how: Any) -> Any:
    """Returns the kernel of one row of a batch: (N, T, H), (K, S, H) twice, and documents."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
        splash_attention_mask as masks,
    )

    shape = (queries, keys)
    mask: Any
    if reach == EVERYONE:
        mask = masks.FullMask(shape)
    elif reach == EARLIER:
        mask = masks.CausalMask(shape)
    else:
        mask = masks.LocalMask(shape, reach, 0)
    t, s = (
        next(size for size in BLOCKS if length % size == 0)
        for length in (queries, keys)
    )
    sizes = kernels.BlockSizes(
        block_q=t, block_kv=s, block_kv_compute=s, block_q_dkv=t, block_kv_dkv=s,
        block_kv_dkv_compute=s, block_q_dq=t, block_kv_dq=s,
    )  # fmt: skip
    make: Callable[..., Any] = kernels.make_splash_mha_single_device
    return make(masks.MultiHeadMask([mask] * heads), block_sizes=sizes, **how)


def _segments(segment_ids: Array | None, key_segment_ids: Array | None) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )

    if segment_ids is None:
        return None
    theirs = segment_ids if key_segment_ids is None else key_segment_ids
    return kernels.SegmentIds(segment_ids, theirs)
