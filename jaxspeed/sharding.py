# SPDX-License-Identifier: Apache-2.0
"""Where each array lives: the ZeRO stages as a table, and how a forward pass gets its parameters.

A parameter's logical dims and shape give a `Placement`: at most one dim over `tensor`, one over
`expert` for the parameters of experts, and at most one over the axes that shard the model state
(`config.SHARD_AXES`). The stage says which *kinds* of array use the latter (`SHARDED`). A parameter enters the forward pass as a `Weight`, which knows how
to become whole where it is needed and where its gradient goes. No other module knows what a stage
is. ADR 0001.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxspeed.ambient import current
from jaxspeed.config import SHARD_AXES, TOKEN_AXES, ConfigError, ZeroConfig
from jaxspeed.paths import dotted, paths_of, subtree
from jaxspeed.types import PyTree


SHARDED: Mapping[int, frozenset[str]] = {
    0: frozenset(),
    1: frozenset({"master"}),
    2: frozenset({"master", "gradient"}),
    3: frozenset({"master", "gradient", "compute"}),
}
"""ZeRO stage -> the kinds of array that are sharded over `SHARD_AXES`.

master: fp32 parameters and optimizer state. gradient: the accumulator, so it is reduced every
micro-step, as soon as a layer's gradient exists. compute: the copy that the forward and backward
pass read, gathered layer by layer.
"""

TENSOR_DIMS = frozenset({"heads", "kv_heads", "mlp", "vocab"})
"""Logical dims that the `tensor` axis splits."""


ROWS = 16
"""Fewest entries of a shard along the dim that ZeRO shards, if there is a choice.

Shards along the first dim lie one behind another in what is gathered. Along the last one they are
columns, which a TPU lays out anew: 0.2 s of a Llama-2 7B's step on 64 v5p chips by its compiler's
estimate. A 16-bit tile has 16 rows.
"""

NOT_MULTIPLIED = frozenset({"vocab", "seq", "expert", "router", "gates"})
"""Logical dims of parameters that are read in other ways than by a plain product."""


@dataclass(frozen=True)
class Placement:
    """Where one parameter and its kin live. Dims are counted from the end, so that a layer's slice of a stacked parameter has the same placement."""

    shape: tuple[int, ...]
    dims: tuple[str | None, ...]
    tensor_dim: int | None
    """Negative index of the dim over `tensor`."""
    zero_dim: int | None
    """Negative index of the dim over `shard_axes`, for the kinds in `sharded`."""
    sharded: frozenset[str]
    """Kinds of array that use `zero_dim`."""
    outer: tuple[str, ...] = ()
    """Axes that the master's shards are cut over once more, behind `shard_axes`: `data` by `zero.secondary`; `stage`, for what is not of the layers that it splits."""
    stage_dim: int | None = None
    """Negative index of the dim over `stage`, for all kinds: each stage keeps its layers to itself."""
    expert_dim: int | None = None
    """Negative index of the dim over `expert`, for all kinds: each device keeps its experts to itself."""
    trained: bool = True
    """Whether it has a gradient and an update; a frozen one is the master alone."""

    @property
    def stacked(self) -> bool:
        """Whether the leading dim counts layers."""
        return bool(self.dims) and self.dims[0] == "layers"

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """The axes that ZeRO shards it over."""
        return self._other_than_experts(SHARD_AXES)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes whose devices have a part each of its gradient."""
        outside = () if self.stage_dim is not None else ("stage",)
        return (*outside, *self._other_than_experts(TOKEN_AXES))

    def _other_than_experts(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        if self.expert_dim is None:
            return axes
        return tuple(axis for axis in axes if axis != "expert")

    def spec(self, kind: str, *, manual_only: bool = False) -> P:
        """Returns the partition of an array of this kind (master, gradient or compute).

        Args:
            kind: one of the kinds in `SHARDED`.
            manual_only: leave `tensor` out, as the specs of a shard_map over the ZeRO axes must.
        """
        axes: list[Any] = [None] * len(self.shape)
        if self.tensor_dim is not None and not manual_only:
            axes[self.tensor_dim] = "tensor"
        if self.zero_dim is not None and kind in self.sharded:
            outer = self.outer if kind == "master" else ()
            axes[self.zero_dim] = (*self.shard_axes, *outer)
        if self.expert_dim is not None:
            axes[self.expert_dim] = "expert"
        if self.stage_dim is not None:
            axes[self.stage_dim] = "stage"
        return P(*axes)

    def tensor_spec(self, ndim: int) -> P:
        """Returns the partition over `tensor` of this parameter or of one layer's slice of it."""
        axes: list[str | None] = [None] * ndim
        if self.tensor_dim is not None:
            axes[self.tensor_dim] = "tensor"
        return P(*axes)


def place(
    shape: tuple[int, ...],
    dims: tuple[str | None, ...] | None,
    sizes: Mapping[str, int],
    zero: ZeroConfig,
) -> Placement:
    """Returns where a parameter lives.

    The dim that ZeRO shards is the first one that divides into parts of `ROWS` or more, or the largest
    one that divides, other than `layers` (which a scan slices) and those over `tensor` and `expert`.
    A parameter without such a dim is replicated, at every stage.

    Args:
        shape: of the whole parameter.
        dims: its logical dims; None for a parameter that has no names.
        sizes: of the mesh axes.
        zero: stage and persistence threshold.
    """
    dims = dims or (None,) * len(shape)
    assert len(dims) == len(shape), (dims, shape)
    free = [i for i, name in enumerate(dims) if name != "layers"]
    tensor = tensor_dim(shape, dims, sizes["tensor"])
    staged = sizes["stage"] == 1 or dims[:1] == ("layers",)
    expert = dims.index("expert") if "expert" in dims and sizes["expert"] > 1 else None
    negative = lambda i: None if i is None else i - len(shape)
    kept = Placement(
        shape,
        dims,
        negative(tensor),
        None,
        SHARDED[zero.stage],
        (*(("data",) if zero.secondary else ()), *(() if staged else ("stage",))),
        -len(shape) if staged and sizes["stage"] > 1 else None,
        negative(expert),
    )
    shards = shards_of(sizes, (*kept.shard_axes, *kept.outer))
    whole = [i for i in free if i not in (tensor, expert) and shape[i] % shards == 0]
    best = None
    if shards > 1:
        largest = max(whole, key=lambda i: shape[i], default=None)
        rows = (i for i in whole if shape[i] >= ROWS * shards)
        best = next(rows, largest)
    sharded = kept.sharded
    if math.prod(shape[i] for i in free) < zero.param_persistence_threshold:
        sharded -= {"compute"}
    return dataclasses.replace(kept, zero_dim=negative(best), sharded=sharded)


def tensor_dim(
    shape: tuple[int, ...], dims: tuple[str | None, ...], size: int
) -> int | None:
    """Returns which dim of a parameter the axis `tensor` splits: the first one of `TENSOR_DIMS` that this size of the axis divides."""
    divides = (
        i for i, name in enumerate(dims) if name in TENSOR_DIMS and shape[i] % size == 0
    )
    return next(divides, None) if size > 1 else None


def opened(parameter: Any) -> tuple[Any, int | None]:
    """Returns what a model's parameter holds, and which dim of it the axis `tensor` splits.

    Args:
        parameter: with `dims`, as `jaxspeed.nn.param` makes it; of anything else nothing is known.
    """
    dims = getattr(parameter, "dims", None)
    if dims is None:
        return parameter, None
    held = parameter[...]
    known = isinstance(held, jax.Array) and held.ndim == len(dims)
    return held, tensor_dim(held.shape, dims, current().tensor) if known else None


def opened_last(parameter: Any, x: Array) -> tuple[Array, Any, int | None]:
    """Returns x, and what `opened` does of a parameter of which this is the last use, and the only one of its array.

    If so, its gradient is whole as soon as there is one, and is reduced before that of x goes on: otherwise
    a compiler keeps it so until all layers are done. If something has read it before, nothing is ordered.
    """
    weight = getattr(parameter, "unread", None)
    if weight is None or weight.slot is None:
        return x, *opened(parameter)
    made: Any = _reduced_first(x, weight.slot)
    x, slot = made
    held = dataclasses.replace(weight, slot=slot).materialise()
    return x, held, tensor_dim(held.shape, parameter.dims, current().tensor)


@jax.custom_vjp
def _reduced_first(x: Array, slot: Array) -> tuple[Array, Array]:
    return x, slot


def _reduced_first_fwd(x: Array, slot: Array) -> tuple[tuple[Array, Array], None]:
    return (x, slot), None


def _reduced_first_bwd(_: None, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
    return jax.lax.optimization_barrier(gradients)


_reduced_first.defvjp(_reduced_first_fwd, _reduced_first_bwd)


def splits_sequence(length: int) -> bool:
    """Whether the devices of `tensor` share the tokens of a sequence between its products (Megatron's sequence parallelism, arXiv 2205.05198 section 4.2.2).

    They do wherever they divide it, but not while text is written, a token at a time.
    """
    settings = current()
    return (
        settings.tensor > 1 and settings.cache is None and not length % settings.tensor
    )


def on_tensor(
    local: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Returns `local` run on what each device of the axis `tensor` has, with that axis in hand; elsewhere it is left to the compiler.

    Args:
        local: what each device does.
        in_specs: the partitions over `tensor` of its arguments, a prefix of their tree.
        out_specs: those of its results.
    """
    return jax.shard_map(
        local,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={"tensor"},
        check_vma=False,
    )


def key_head_copies(heads: int) -> int:
    """Returns how often key and value heads are repeated until the devices of `tensor` divide them: each then has those that its queries read."""
    return math.lcm(heads, current().tensor) // heads


def matrix_inputs(dims: tuple[str | None, ...]) -> int:
    """Returns how many dims a matrix is summed over, or 0 for what is none."""
    inner = dims[1:] if dims[:1] == ("layers",) else dims
    if len(inner) < 2 or NOT_MULTIPLIED & set(inner):
        return 0
    if inner[0] == "embed":
        return 1
    return len(inner) - 1 if inner[-1] == "embed" else 0


def shards_of(sizes: Mapping[str, int], axes: tuple[str, ...] = SHARD_AXES) -> int:
    """Returns into how many shards ZeRO cuts an array over these axes of a mesh of these sizes."""
    return math.prod(sizes[axis] for axis in axes)


def place_all(
    params: PyTree,
    dims: PyTree,
    sizes: Mapping[str, int],
    zero: ZeroConfig,
    frozen: Collection[str] = (),
) -> PyTree:
    """Returns a tree of `Placement`s for a tree of (abstract) parameters, those at `frozen` paths not trained."""

    def one(path: Any, param: Any, dims: Any) -> Placement:
        placement = place(param.shape, dims, sizes, zero)
        return dataclasses.replace(placement, trained=dotted(path) not in frozen)

    return jax.tree_util.tree_map_with_path(
        one, params, dims, is_leaf=lambda x: x is None
    )


def part_of(
    tree: Mapping[str, Any], placements: Mapping[str, Any], *, trained: bool = True
) -> dict[str, Any]:
    """Returns the part of a nested dict that belongs to trained parameters, or to frozen ones.

    Args:
        tree: of the parameters' form; anything may stand where a parameter does.
        placements: a `Placement` per parameter.
        trained: which part.
    """
    places = paths_of(placements)
    return subtree(tree, {p for p, place in places.items() if place.trained == trained})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weight:
    """A parameter on its way into the forward pass, on one device of the ZeRO axes.

    `copy` is what the stage keeps of it for computing (whole, or this device's shard). `slot` has
    the shape and dtype of its gradient as it leaves the layer (whole and not yet reduced, or
    reduced to this device's shard). The slot's value is never read: differentiating with respect
    to it is how a float32 gradient comes out of a bfloat16 copy, reduced on the spot.
    """

    copy: Array
    slot: Array | None
    placement: Placement = dataclasses.field(metadata={"static": True})
    reduce_dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def reduces(self) -> bool:
        """Whether a gradient is reduced as soon as it exists."""
        place = self.placement
        trained = self.slot is not None and place.zero_dim is not None
        return trained and "gradient" in place.sharded

    def __getitem__(self, index: Any) -> Array:
        """Returns part of the whole parameter, so that a loss may read it as it reads an array."""
        return self.materialise()[index]

    def materialise(self) -> Float[Array, "..."]:
        """Returns the whole parameter (up to `tensor`), as float32 whose value is the compute copy's.

        The dtype carries the gradient, not memory: the products cast back to the compute dtype,
        and the compiler drops the pair of casts.
        """
        plan = _Plan(
            gather=self.placement.zero_dim
            if "compute" in self.placement.sharded
            else None,
            scatter=self.placement.zero_dim
            if "gradient" in self.placement.sharded
            else None,
            axes=self.placement.shard_axes,
            spec=self.placement.tensor_spec(self.copy.ndim),
            compute=current().compute,
            reduce_dtype=self.reduce_dtype,
            constrain=current().tensor > 1,
            ndim=self.copy.ndim,
            apart=current().platform == "tpu",
        )
        slot = jnp.zeros((), jnp.float32) if self.slot is None else self.slot
        return _materialise(plan, self.copy, slot)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """A frozen matrix with a low-rank adapter: W + scale A B, which `jaxspeed.ops.linear` applies without forming it.

    It takes the parameter's place in the model, holding first `Weight`s and then arrays.
    """

    w: Any
    a: Any
    """The input dims of W, and the rank."""
    b: Any
    """The rank, and the output dims of W."""
    path: str = dataclasses.field(metadata={"static": True})
    """The parameter's."""
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})
    """Share of the input dropped on its way to A."""

    def __getitem__(self, index: Any) -> "Adapted":
        """Returns itself for `[...]`, by which a model reads its parameters."""
        if index is not Ellipsis:
            self.__jax_array__()
        return self

    def __jax_array__(self) -> Array:
        """Raises: only a matrix product knows what to do with it."""
        raise ConfigError(
            f"lora.targets: {self.path} is used by something else than jaxspeed.ops.linear, which alone applies adapters; "
            "let the patterns leave it out"
        )


def materialise(weight: Any) -> Any:
    """Returns the array of a `Weight`; anything else is returned as it is."""
    return weight.materialise() if isinstance(weight, Weight) else weight


def is_weight(x: Any) -> bool:
    """Whether x is a `Weight`, for `is_leaf`."""
    return isinstance(x, Weight)


def is_placement(x: Any) -> bool:
    """Whether x is a `Placement`, for `is_leaf`."""
    return isinstance(x, Placement)


def shard(x: Array, *dims: str | None) -> Array:
    """Constrains an activation: logical dims in `TENSOR_DIMS` go over `tensor`; in the residual stream, whose last dim is `embed`, `seq` does.

    Rows, and sequences over `context`, are split outside (those axes are manual): `batch` says nothing here.
    """
    settings = current()
    if settings.tensor == 1:
        return x
    axes = [
        "tensor" if d in TENSOR_DIMS and n % settings.tensor == 0 else None
        for d, n in zip(dims, x.shape, strict=True)
    ]
    if dims[-1] == "embed" and "seq" in dims and not any(axes):
        place = dims.index("seq")
        axes[place] = "tensor" if splits_sequence(x.shape[place]) else None
    return jax.lax.with_sharding_constraint(x, P(*axes))


@dataclass(frozen=True)
class _Plan:
    gather: int | None
    scatter: int | None
    axes: tuple[str, ...]
    spec: P
    compute: Any
    reduce_dtype: Any
    constrain: bool
    ndim: int
    apart: bool
    """Whether a layer's shard is laid out for itself: as it lies in its stack, a TPU may pad what is gathered to twice its size."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _materialise(plan: _Plan, copy: Array, slot: Array) -> Array:
    del slot
    return _whole(plan, copy)


def _whole(plan: _Plan, copy: Array) -> Array:
    tensor = plan.spec if plan.constrain else None
    if plan.gather is not None:
        dim = plan.gather % plan.ndim
        if plan.apart:
            copy = jax.lax.optimization_barrier(copy)
        copy = all_gather(copy, dim, plan.axes, plan.compute, tensor)
    elif tensor is not None:
        copy = jax.lax.with_sharding_constraint(copy, tensor)
    return copy.astype(jnp.float32)


def _materialise_fwd(plan: _Plan, copy: Array, slot: Array) -> tuple[Array, None]:
    # Not _materialise: a custom_vjp call within a custom_vjp rule is opaque to rematerialisation.
    return _whole(plan, copy), None


def _materialise_bwd(plan: _Plan, _: None, gradient: Array) -> tuple[None, Array]:
    if plan.constrain:
        gradient = jax.lax.with_sharding_constraint(gradient, plan.spec)
    if plan.scatter is not None:
        gradient = reduce_scatter(
            gradient,
            plan.scatter % plan.ndim,
            plan.axes,
            plan.reduce_dtype,
            plan.spec if plan.constrain else None,
        )
    return None, gradient


_materialise.defvjp(_materialise_fwd, _materialise_bwd)


def all_gather(
    shard: Array, dim: int, axes: tuple[str, ...], dtype: Any, tensor: P | None
) -> Array:
    """Returns the whole of an array that is sharded along `dim` over these axes, sent as `dtype`.

    Args:
        shard: this device's part.
        dim: which dim is sharded.
        axes: of the mesh.
        dtype: of the result.
        tensor: its partition over `tensor`; None where that axis has size 1.
    """
    gather = functools.partial(jax.lax.all_gather, axis_name=axes, axis=dim, tiled=True)
    return _with_tensor_manual(gather, tensor)(shard.astype(dtype))


def reduce_scatter(
    gradient: Array, dim: int, axes: tuple[str, ...], dtype: Any, tensor: P | None
) -> Array:
    """Returns this device's float32 shard, along `dim`, of the sum over these axes, sent as `dtype`; see `all_gather`."""
    scatter = functools.partial(
        jax.lax.psum_scatter, axis_name=axes, scatter_dimension=dim, tiled=True
    )
    return _with_tensor_manual(scatter, tensor)(gradient.astype(dtype)).astype(
        jnp.float32
    )


def all_reduce(
    gradient: Array, axes: str | tuple[str, ...], dtype: Any, tensor: P | None
) -> Array:
    """Returns the float32 sum over these axes, sent as `dtype`; see `all_gather`."""
    add = functools.partial(jax.lax.psum, axis_name=axes)
    return _with_tensor_manual(add, tensor)(gradient.astype(dtype)).astype(jnp.float32)


def _with_tensor_manual(
    collective: Callable[[Array], Array], tensor: P | None
) -> Callable[[Array], Array]:
    """Returns the collective, each device of the `tensor` axis doing its own part of it.

    Where that axis is left to the compiler it gathers the operand over `tensor` first, twice the
    bytes on both axes (jax 0.10, whatever the sharding constraints around say).
    """
    if tensor is None:
        return collective
    return on_tensor(collective, tensor, tensor)
