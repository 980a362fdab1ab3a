# SPDX-License-Identifier: Apache-2.0
"""The matrix product of every layer, with its own derivative.

Operands are cast to the ambient compute dtype, sums are float32 on every backend. On CPU all three
products (forward, dx, dw) are flat two-dimensional ones, 1.2 to 1.5 times as fast as what autodiff
makes of an einsum; elsewhere they have the dims of their operands, since a TPU lays out flat ones
anew (a tenth of a Llama's step by the compiler's estimate, libtpu 0.0.42). The weight's gradient
leaves in float32 whatever the compute dtype.
"""

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxspeed.ambient import current
from jaxspeed.ops.pointwise import dropout
from jaxspeed.remat import EXPANSION, PRODUCT_NAME
from jaxspeed.sharding import (
    Adapted,
    key_head_copies,
    on_tensor,
    opened,
    shard,
    splits_sequence,
)
from jaxspeed.tiles import Tiled, dot_tiled
from jaxspeed.types import Parameter


def linear(
    x: Float[Array, "..."],
    w: Parameter,
    bias: Float[Array, "..."] | None = None,
    *,
    contract: int = 1,
) -> Float[Array, "..."]:
    """Returns x times w, plus bias, in the ambient activation dtype.

    y[..., n...] = sum_k x[..., k...] w[k..., n...] + bias[n...]

    Args:
        x: activations; its last `contract` dims are summed over.
        w: weight; its first `contract` dims are summed over. With an adapter, x W + scale (x A) B
            is computed so: neither A B nor a gradient of W exists. One in tiles has no gradient.
        bias: one value per output feature.
        contract: number of dims summed over.
    """
    w, split = opened(w)
    if isinstance(w, Adapted):
        return _adapted_linear(x, w, bias, contract)
    lead, inner, outer = (
        x.shape[: x.ndim - contract],
        w.shape[:contract],
        w.shape[contract:],
    )
    assert x.shape[x.ndim - contract :] == inner, (x.shape, w.shape, contract)
    settings = current()
    if isinstance(w, Tiled):
        flat = x.reshape(-1, math.prod(inner)).astype(settings.compute)
        y: Any = dot_tiled(flat, w)
        y = y if bias is None else y + bias.reshape(1, -1)
        return y.astype(settings.activations).reshape(*lead, *outer)
    if split is not None and len(lead) == 2 and splits_sequence(lead[1]):
        if split >= contract:
            return _gathered(x, [(w, bias)], [split], contract)[0]
        return _scattered(x, w, bias, split, contract)
    made: Any = _products(_plan(contract, (False,)), x, [(w, bias)])
    return made[0]


def linears(
    x: Float[Array, "..."],
    matrices: Sequence[Parameter],
    biases: Sequence[Float[Array, "..."] | None] = (),
) -> tuple[Float[Array, "..."], ...]:
    """Returns the products of the same activations with several matrices, as `linear` would one by one.

    Their gradients of x are added up before they are summed over the mesh axis `tensor`: one
    reduction, where the products one by one have one each (Megatron's f, arXiv 1909.08053
    section 3). Key and value heads that `tensor` does not divide are made more than once, each
    device those that its queries read.

    Args:
        x: activations, (..., D).
        matrices: (D, ...).
        biases: one for each, or None; empty: none at all.
    """
    biases = biases or (None,) * len(matrices)
    held, splits = map(list, zip(*map(opened, matrices), strict=True))
    if any(isinstance(w, Adapted | Tiled) for w in held):
        return tuple(map(functools.partial(linear, x), matrices, biases))
    given: Given = list(zip(held, biases, strict=True))
    lead = (None,) * (x.ndim - 1)
    if any(splits) and len(lead) == 2 and splits_sequence(x.shape[1]):
        for i, matrix in enumerate(matrices):
            dims = getattr(matrix, "dims", ())
            if splits[i] is None and dims[1:2] == ("kv_heads",):
                given[i], splits[i] = _one_each(*given[i]), 1
        return _gathered(x, given, splits, 1)
    split = tuple(dim == 1 for dim in splits)
    made: Any = _products(_plan(1, split), x, given)
    return tuple(shard(y, *lead, "heads", *(None,) * (y.ndim - x.ndim)) for y in made)


def _one_each(w: Array, bias: Array | None) -> tuple[Array, Array | None]:
    """Returns key or value heads repeated until the devices of `tensor` divide them."""
    times = key_head_copies(w.shape[1])
    again = None if bias is None else jnp.repeat(bias, times, 0)
    return jnp.repeat(w, times, 1), again


def _gathered(
    x: Array, given: "Given", splits: Sequence[int | None], contract: int
) -> tuple[Array, ...]:
    """Returns products of a sequence that `tensor` splits with matrices whose columns it splits: x is gathered, the results are split by columns."""

    def along(split: int | None, dims: int) -> P:
        return (
            P() if split is None else P(*(None,) * (split - contract + dims), "tensor")
        )

    plan = _plan(contract, (False,) * len(given), "gather")
    product = on_tensor(
        lambda x, given: _products(plan, x, given),
        (P(None, "tensor"), [(along(s, contract), along(s, 0)) for s in splits]),
        tuple(along(s, 2) for s in splits),
    )
    return product(x, list(given))


def _scattered(
    x: Array, w: Array, bias: Array | None, split: int, contract: int
) -> Array:
    """Returns the product over a dim that `tensor` splits, each device with the sum of its own part of the sequence."""
    plan = _plan(contract, (False,), "scatter")
    before = (None,) * split

    def product(x: Array, w: Array) -> Array:
        made: Any = _products(plan, x, [(w, None)])
        return made[0]

    specs = P(None, None, *before, "tensor"), P(*before, "tensor")
    y = on_tensor(product, specs, P(None, "tensor"))(x, w)
    return y if bias is None else y + bias.astype(y.dtype)[None, None]


class _Plan(NamedTuple):
    """What is static of several products."""

    compute: Any
    out: Any
    contract: int
    """Dims that are summed over."""
    flat: bool
    """Whether matrices are two-dimensional, whatever their operands are."""
    split: tuple[bool, ...]
    """Whether `tensor`, left to the compiler, splits the columns of each."""
    moves: str
    """Where `tensor` is in hand: gather the sequence of the operand, or scatter that of the result."""


def _plan(contract: int, split: tuple[bool, ...], moves: str = "") -> _Plan:
    settings = current()
    flat = settings.platform == "cpu"
    return _Plan(settings.compute, settings.activations, contract, flat, split, moves)


def gather_sequence(x: Float[Array, "B t ..."]) -> Float[Array, "B T ..."]:
    """Returns whole sequences of which each device of `tensor` has a part, from inside a `shard_map` over it."""
    return jax.lax.all_gather(x, "tensor", axis=1, tiled=True)


def scatter_sequence(x: Float[Array, "B T ..."]) -> Float[Array, "B t ..."]:
    """Returns this device's part of the sum over `tensor`."""
    return jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)


def _adapted_linear(x: Array, w: Adapted, bias: Array | None, contract: int) -> Array:
    lead, outer = x.shape[: x.ndim - contract], w.b.shape[1:]
    assert x.shape[x.ndim - contract :] == w.a.shape[:-1], (x.shape, w.a.shape, w.path)
    inner, rank, settings = math.prod(w.a.shape[:-1]), w.a.shape[-1], current()
    into = dropout(x, w.dropout, site=zlib.crc32(w.path.encode()))
    y: Any = _adapted_product(
        settings.compute,
        jnp.dtype(jnp.float32) if bias is not None else settings.activations,
        w.scale,
        x.reshape(-1, inner),
        into.reshape(-1, inner),
        w.w.reshape(inner, -1),
        w.a.reshape(inner, rank),
        w.b.reshape(rank, -1),
    )
    if bias is not None:
        y = (y + bias.reshape(1, -1)).astype(settings.activations)
    return y.reshape(*lead, *outer)


def dot(
    a: Float[Array, "..."], b: Float[Array, "..."], contracting: tuple[int, int]
) -> Float[Array, "..."]:
    """Returns the two-dimensional product over one dim of each operand, summed in float32."""
    dims = (((contracting[0],), (contracting[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def dot_rows(a: Float[Array, "M K"], b: Float[Array, "M N"]) -> Float[Array, "K N"]:
    """Returns a^T b of 16-bit operands, summed in float32, as CPUs do it fast.

    XLA's CPU backend has a fast 16-bit product only where the left operand is summed over its
    last dim, as written: half the time, with the transpose of the narrower operand paid for. It
    folds a plain transpose into the product, but not one that goes through three dims, nor one
    behind a barrier (jaxlib 0.10).
    """
    rows = a.shape[0]
    blocks = math.gcd(rows, 8)
    if blocks == 1:
        return dot(a, b, (0, 0))

    def turned(x: Array) -> Array:
        thirds = x.reshape(blocks, rows // blocks, -1).transpose(2, 0, 1)
        return thirds.reshape(-1, rows)

    if a.shape[1] <= b.shape[1]:
        return dot(turned(a), b, (1, 0))
    return jax.lax.optimization_barrier(dot(turned(b), a, (1, 0))).T


def pack(x: Array) -> Array:
    """Returns x as a scan over layers should keep it: 16-bit floats as integers on CPU.

    XLA's CPU backend slices no 16-bit floats: it would widen all layers' residuals to float32 at
    once (jaxlib 0.10).
    """
    if (
        current().platform == "cpu"
        and x.dtype.itemsize == 2
        and jnp.issubdtype(x.dtype, jnp.floating)
    ):
        return jax.lax.bitcast_convert_type(x, jnp.uint16)
    return x


def rows_product(kept: Array) -> Callable[[Array, Array], Array]:
    """Returns the product a^T b for a derivative, where the ambient settings are no longer in force: that x is packed says it is a CPU."""
    if kept.dtype == jnp.uint16:
        return dot_rows
    return functools.partial(dot, contracting=(0, 0))


def unpack(x: Array, dtype: Any) -> Array:
    """Undoes `pack`."""
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def to_keep(x: Array) -> Array:
    """Returns x, a product that layers keep as it is: in its own dtype, where the sum it was rounded from is float32."""
    return unpack(checkpoint_name(pack(x), PRODUCT_NAME), x.dtype)


Given = list[tuple[Array, Array | None]]
"""A matrix and its bias, of each product."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(plan: _Plan, x: Array, given: Given) -> tuple[Array, ...]:
    return _products_fwd(plan, x, given)[0]


def _products_fwd(
    plan: _Plan, x: Array, given: Given
) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    xc, made, kept = x.astype(plan.compute), [], []
    whole = gather_sequence(xc) if plan.moves == "gather" else xc
    for w, b in given:
        wc = w.astype(plan.compute)
        y = _product(plan, whole, wc)
        if b is not None:
            y += b.reshape((1,) * (y.ndim - b.ndim) + b.shape)
        y = y.astype(plan.out)
        y = scatter_sequence(y) if plan.moves == "scatter" else y
        # What is far wider than what it is made of costs more room than work.
        inner = math.prod(w.shape[: plan.contract])
        made.append(y if w.size >= EXPANSION * inner**2 else to_keep(y))
        kept.append((wc, None if b is None else b[:0]))
    return tuple(made), (pack(xc), kept, jnp.zeros((0,), x.dtype))


def _products_bwd(
    plan: _Plan, residuals: tuple[Any, ...], gradients: tuple[Array, ...]
) -> tuple[Array, Given]:
    kept, matrices, like = residuals
    gs, x = [g.astype(plan.compute) for g in gradients], unpack(kept, plan.compute)
    lead, rows = tuple(range(x.ndim - plan.contract)), rows_product(kept)
    if plan.moves == "gather":
        x = gather_sequence(x)
    elif plan.moves == "scatter":
        gs = list(map(gather_sequence, gs))
    given = [
        # Sum what the products read: on CPU a second, float32 copy of g costs a pass over memory.
        (
            _weight_gradient(plan, rows, x, g),
            None if b is None else jnp.sum(g, lead, dtype=jnp.float32),
        )
        for g, (_, b) in zip(gs, matrices, strict=True)
    ]
    if not plan.flat:
        # Else a TPU's compiler puts them off, with all that they read, until after the layer's attention.
        gs, given = jax.lax.optimization_barrier((gs, given))
    parts = list(zip(gs, [w for w, _ in matrices], plan.split, strict=True))
    whole = [_input_gradient(plan, g, w) for g, w, split in parts if not split]
    halves = [(g, w) for g, w, split in parts if split]
    if halves:
        whole.append(_reduced_once(plan, halves, like.dtype))
    gradient = functools.reduce(jnp.add, whole).astype(like.dtype)
    return scatter_sequence(gradient) if plan.moves == "gather" else gradient, given


def _product(plan: _Plan, x: Array, w: Array) -> Array:
    """Returns x w, in float32."""
    c = plan.contract
    lead, outer = x.shape[: x.ndim - c], w.shape[c:]
    if not plan.flat:
        return _summed(x, w, (range(x.ndim - c, x.ndim), range(c)))
    flat = x.reshape(-1, math.prod(w.shape[:c]))
    y = dot(flat, w.reshape(flat.shape[1], -1), (1, 0))
    return y.reshape(*lead, *outer)


def _weight_gradient(
    plan: _Plan, rows: Callable[[Array, Array], Array], x: Array, g: Array
) -> Array:
    """Returns x^T g, in float32; flat ones by `rows`."""
    lead = x.ndim - plan.contract
    if not plan.flat:
        return _summed(x, g, (range(lead), range(lead)))
    M = math.prod(x.shape[:lead])
    product = rows(x.reshape(M, -1), g.reshape(M, -1))
    return product.reshape(*x.shape[lead:], *g.shape[lead:])


def _input_gradient(plan: _Plan, g: Array, w: Array) -> Array:
    """Returns g w^T, in float32."""
    c, lead = plan.contract, g.ndim - (w.ndim - plan.contract)
    if not plan.flat:
        return _summed(g, w, (range(lead, g.ndim), range(c, w.ndim)))
    inner, outer = w.shape[:c], math.prod(w.shape[c:])
    product = dot(g.reshape(-1, outer), w.reshape(-1, outer), (1, 1))
    return product.reshape(*g.shape[:lead], *inner)


def _summed(a: Array, b: Array, contracting: tuple[Sequence[int], ...]) -> Array:
    dims = (tuple(map(tuple, contracting)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)  # pyright: ignore[reportArgumentType]


def _reduced_once(plan: _Plan, pairs: list[tuple[Array, Array]], dtype: Any) -> Array:
    """Returns the sum of g w^T over pairs whose columns `tensor` splits, added up on each device first."""

    def local(pairs: list[tuple[Array, Array]]) -> Array:
        parts = [_input_gradient(plan, g, w) for g, w in pairs]
        return jax.lax.psum(functools.reduce(jnp.add, parts).astype(dtype), "tensor")

    lead = pairs[0][0].ndim - (pairs[0][1].ndim - plan.contract)
    specs = (P(*(None,) * lead, "tensor"), P(None, "tensor"))
    total = on_tensor(local, ([specs] * len(pairs),), P())(pairs)
    return total.astype(jnp.float32)


_products.defvjp(_products_fwd, _products_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _adapted_product(
    compute: Any,
    out: Any,
    scale: float,
    x: Array,
    into: Array,
    w: Array,
    a: Array,
    b: Array,
) -> Array:
    return _adapted_fwd(compute, out, scale, x, into, w, a, b)[0]


def _adapted_fwd(
    compute: Any,
    out: Any,
    scale: float,
    x: Array,
    into: Array,
    w: Array,
    a: Array,
    b: Array,
) -> tuple[Array, tuple[Array, ...]]:
    xc, ic, wc, ac, bc = (v.astype(compute) for v in (x, into, w, a, b))
    low = dot(ic, ac, (1, 0)).astype(compute)
    y = dot(xc, wc, (1, 0)) + scale * dot(low, bc, (1, 0))
    like = jnp.zeros((0,), x.dtype)
    return to_keep(y.astype(out)), (pack(ic), pack(low), wc, ac, bc, like)


def _adapted_bwd(
    compute: Any, out: Any, scale: float, residuals: tuple[Array, ...], g: Array
) -> tuple[Array | None, ...]:
    into, low, w, a, b, like = residuals
    rows = rows_product(into)
    g, into, low = g.astype(compute), unpack(into, compute), unpack(low, compute)
    d_low = (scale * dot(g, b, (1, 1))).astype(compute)
    dx, d_into = dot(g, w, (1, 1)), dot(d_low, a, (1, 1))
    return (
        dx.astype(like.dtype),
        d_into.astype(like.dtype),
        None,
        rows(into, d_low),
        scale * rows(low, g),
    )


_adapted_product.defvjp(_adapted_fwd, _adapted_bwd)
