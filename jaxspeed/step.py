# SPDX-License-Identifier: Apache-2.0
"""The train step: one pure function for every ZeRO stage, mesh, precision and accumulation.

The gradient part is a `shard_map` over the ZeRO axes, so each collective is written, not hoped
for: parameters become whole through `Weight`s, gradients leave reduced or are reduced once after
the last micro-step. The update part is written as if on one device; its arrays are sharded the
same way, so the compiler adds nothing but scalar sums (for element-wise optimizers). ADR 0001.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec as P

from jaxspeed.ambient import Ambient, ambient
from jaxspeed.auxiliary import Auxiliary
from jaxspeed.config import (
    BATCH_AXES,
    TOKEN_AXES,
    ConfigError,
    LoraConfig,
    LossScaleConfig,
)
from jaxspeed.context import AXIS
from jaxspeed.lora import joined
from jaxspeed.loss_scale import update_loss_scale
from jaxspeed.nn import merge
from jaxspeed.optim import update_count
from jaxspeed.paths import with_part
from jaxspeed.pipeline import Item, Pipe, Schedule, regrouped, run_schedule
from jaxspeed.sharding import (
    Placement,
    Weight,
    all_gather,
    all_reduce,
    is_placement,
    is_weight,
    part_of,
    reduce_scatter,
    shards_of,
)
from jaxspeed.types import Batch, LossFn, Params, PyTree, Sums


@dataclass(frozen=True, kw_only=True, eq=False)
class StepSpec:
    """Everything static that a step depends on."""

    graphdef: Any
    """The model without its parameters."""
    placements: PyTree
    """A `Placement` per parameter."""
    mesh: Mesh
    """With the axes of `config.MESH_AXES`."""
    settings: Ambient
    """Precision, kernels and rematerialisation for the trace."""
    loss_fn: LossFn
    """What to minimise."""
    reduce_dtype: Any
    """Dtype of gradients on the wire."""
    seed_scale: float
    """Gradients are taken of loss * seed_scale (a power of two), to stay in float16's range where sums of losses would not."""
    dropout: bool
    """Whether the forward pass draws dropout masks in training."""
    lora: LoraConfig
    """Scale and dropout of the adapters, if there are any."""
    schedule: Schedule | None = None
    """What every stage does when, where there are several (`jaxspeed.pipeline`)."""

    @functools.cached_property
    def at_rest(self) -> Ambient:
        """The settings of everything but training."""
        return dataclasses.replace(self.settings, moe=self.settings.moe.at_rest)

    @functools.cached_property
    def whole_rows(self) -> Ambient:
        """The settings where each device of `context` has whole sequences, the same ones: all but training and its loss."""
        return dataclasses.replace(self.at_rest, context=1)

    @functools.cached_property
    def trained(self) -> PyTree:
        """The placements of those parameters that are trained."""
        return part_of(self.placements, self.placements)


PredictFn = Callable[[Any, Batch], tuple[Sums, PyTree]]
"""`(model, batch) -> (sums, outputs)`: the loss, and what the model says of each row."""

Measured = tuple[Sums, Mapping[str, Sums]]
"""The loss, and what else was measured on the way, by name."""

GradFn = Callable[[Params, Batch, jax.Array, jax.Array], tuple[PyTree, Measured]]


def make_grad_fn(spec: StepSpec) -> GradFn:
    """Returns `(params, batch, loss_scale, key) -> (gradients, (sums, measured))`, in the global view.

    Batch leaves are (A, B, T): micro-steps, then sequences over the batch axes. Gradients are of
    the summed loss times loss_scale * seed_scale, and lie where the master parameters lie; a
    frozen parameter has none. The sums are per micro-step, (A,).
    """

    def local(
        params: Params, batch: Batch, loss_scale: jax.Array, key: jax.Array
    ) -> tuple[PyTree, Measured]:
        whole = compute_weights(spec, _regrouped(params, spec))
        device_key = jax.random.fold_in(key, jax.lax.axis_index(TOKEN_AXES))

        def micro_step(
            total: PyTree, xs: tuple[Batch, jax.Array]
        ) -> tuple[PyTree, Measured]:
            micro_batch, index = xs
            dropout_key = (
                jax.random.fold_in(device_key, index) if spec.dropout else None
            )

            def scaled_loss(slots: PyTree) -> tuple[jax.Array, Measured]:
                weights = with_slots(spec, whole, slots)
                (sums, measured), _ = _measured_loss(
                    spec, weights, micro_batch, dropout_key
                )
                scaled = sums.total * (loss_scale * spec.seed_scale)
                return scaled, (sums, measured)

            gradients, measured = jax.grad(scaled_loss, has_aux=True)(slots)
            return jax.tree.map(jnp.add, total, gradients), measured

        slots = jax.tree.map(
            lambda p, place: _slot(p, place, spec.mesh),
            part_of(params, spec.placements),
            spec.trained,
        )
        steps = jnp.arange(jax.tree.leaves(batch)[0].shape[0])
        if spec.schedule is None:
            gradients, measured = jax.lax.scan(micro_step, slots, (dict(batch), steps))
        else:
            scale = loss_scale * spec.seed_scale
            gradients, measured = _in_stages(
                spec, spec.schedule, whole, slots, dict(batch), scale, device_key
            )
        gradients = jax.tree.map(
            lambda g, place: _final_reduction(g, place, spec), gradients, spec.trained
        )
        gradients = _regrouped(gradients, spec, back=True)
        everyone = ("stage", *TOKEN_AXES)
        return gradients, jax.tree.map(lambda x: jax.lax.psum(x, everyone), measured)

    specs = _master_specs(spec.trained)

    def grad_fn(
        params: Params, batch: Batch, loss_scale: jax.Array, key: jax.Array
    ) -> tuple[PyTree, Measured]:
        others = (batch_specs(batch, (None,)), P(), P())
        run = on_zero_axes(spec, local, others, (specs, P()))
        return run(params, batch, loss_scale, key)

    return grad_fn


def with_slots(spec: StepSpec, whole: PyTree, slots: PyTree) -> PyTree:
    """Returns the weights with gradient slots for those that are trained."""
    trained = jax.tree.map(
        lambda w, slot: dataclasses.replace(w, slot=slot),
        part_of(whole, spec.placements),
        slots,
        is_leaf=is_weight,
    )
    return with_part(whole, trained)


def _measured_loss(
    spec: StepSpec,
    weights: PyTree,
    batch: Batch,
    dropout_key: jax.Array | None,
    pipe: Pipe | None = None,
) -> tuple[Measured, jax.Array]:
    """Returns the loss of a micro-batch and what was measured on the way, and what routers added to the loss."""
    auxiliary = Auxiliary()
    with ambient(
        spec.settings, dropout_key=dropout_key, auxiliary=auxiliary, pipe=pipe
    ):
        sums = _as_sums(spec.loss_fn(model_of(spec, weights), batch))
    _check_taken(auxiliary)
    added = jnp.zeros(()) if auxiliary.added is None else auxiliary.added
    return (sums, auxiliary.measured), added


def _loss_of_chunk(measured: Measured, added: jax.Array, last: jax.Array) -> Measured:
    """Returns a chunk's part of the loss: the loss itself is the last one's, what routers add each one's own."""
    sums, others = measured
    count = jnp.where(last, sums.count, 0.0)
    sums = Sums(jnp.where(last, sums.total - added, 0.0) + added, count)
    if "auxiliary_loss" in others:
        others = {**others, "auxiliary_loss": Sums(added, count)}
    return sums, others


def _in_stages(
    spec: StepSpec,
    schedule: Schedule,
    whole: PyTree,
    slots: PyTree,
    batch: Batch,
    scale: jax.Array,
    key: jax.Array,
) -> tuple[PyTree, Measured]:
    """Returns the gradients of all micro-batches, and what was measured of each, by a schedule."""
    p, v = schedule.stages, schedule.chunks
    me = jax.lax.axis_index("stage")
    (size,) = {
        place.shape[0] // (p * v)
        for place in jax.tree.leaves(spec.placements, is_leaf=is_placement)
        if place.stage_dim is not None
    }

    def run(
        item: Item, slots: PyTree | None, received: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array], Measured]:
        """Returns what a chunk gives and its part of the loss, and what was measured."""
        weights = _chunk(whole, spec.placements, item.chunk, v)
        weights = weights if slots is None else with_slots(spec, weights, slots)
        dropout_key = jax.random.fold_in(key, item.micro) if spec.dropout else None
        pipe = Pipe(received, item.first, (item.chunk * p + me) * size)
        micro_batch = jax.tree.map(lambda x: x[item.micro], batch)
        measured = _measured_loss(spec, weights, micro_batch, dropout_key, pipe)
        if pipe.given is None:
            raise ConfigError(
                f"mesh.stage={p}: the model has no stack of layers (jaxspeed.nn.Layers) to split; set mesh.stage 1"
            )
        sums, others = _loss_of_chunk(*measured, item.last)
        return (pipe.given, sums.total * scale), (sums, others)

    def forward(item: Item, received: jax.Array) -> jax.Array:
        return run(item, None, received)[0][0]

    def backward(
        item: Item, received: jax.Array, returned: jax.Array, sums: PyTree
    ) -> tuple[PyTree, jax.Array]:
        gradients, measured = sums
        own = _chunk(gradients, spec.trained, item.chunk, v)
        of = lambda slots, received: run(item, slots, received)
        _, back, found = jax.vjp(of, own, received, has_aux=True)
        wanted = item.real & ~item.last
        returned = jnp.where(wanted, returned, jnp.zeros((), returned.dtype))
        slopes, gradient = back((returned, item.real.astype(jnp.float32)))
        own = jax.tree.map(jnp.add, own, slopes)
        gradients = _with_chunk(gradients, own, spec.trained, item.chunk, v)
        measured = jax.tree.map(
            lambda x, y: x.at[item.micro].add(jnp.where(item.real, y, 0.0)),
            measured,
            found,
        )
        return (gradients, measured), gradient

    number, flag = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    (like, _), measured = jax.eval_shape(
        lambda: run(Item(number, number, flag, flag, flag), None, None)
    )
    rooms = jax.tree.map(
        lambda x: jnp.zeros((schedule.micros, *x.shape), x.dtype), measured
    )
    in_order, sums = spec.settings.platform == "cpu", (slots, rooms)
    return run_schedule(schedule, forward, backward, like, sums, in_order=in_order)


def _chunk(tree: PyTree, placements: PyTree, number: jax.Array, chunks: int) -> PyTree:
    """Returns what one of a stage's chunks has of each array: its own layers, and all that is of no layer."""

    def one(place: Placement, x: PyTree) -> PyTree:
        if chunks == 1 or place.stage_dim is None:
            return x
        size = jax.tree.leaves(x)[0].shape[0] // chunks
        begin = number * size
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size), x)

    return jax.tree.map(one, placements, tree)


def _with_chunk(
    tree: PyTree, part: PyTree, placements: PyTree, number: jax.Array, chunks: int
) -> PyTree:
    """Returns the arrays with what `_chunk` cut out of them replaced by `part`."""

    def one(place: Placement, x: jax.Array, new: jax.Array) -> jax.Array:
        if chunks == 1 or place.stage_dim is None:
            return new
        begin = number * new.shape[0]
        return jax.lax.dynamic_update_slice_in_dim(x, new, begin, 0)

    return jax.tree.map(one, placements, tree, part)


def _regrouped(tree: PyTree, spec: StepSpec, *, back: bool = False) -> PyTree:
    """Returns parameters' shards with the layers where the schedule wants them, in the compute dtype; back: gradients, where they are stored."""
    if spec.schedule is None or spec.schedule.chunks == 1:
        return tree
    p, v = spec.schedule.stages, spec.schedule.chunks

    def one(place: Placement, x: jax.Array) -> jax.Array:
        if place.stage_dim is None:
            return x
        x = x if back else x.astype(spec.settings.compute)
        return regrouped(x, p, v, back=back)

    return jax.tree.map(one, spec.trained if back else spec.placements, tree)


def batch_specs(batch: Mapping[str, Any], lead: tuple[None, ...] = ()) -> dict[str, P]:
    """Returns how each array of a batch lies: rows over `BATCH_AXES`, and what the rows hold over `context`.

    Args:
        batch: arrays or their shapes.
        lead: dims before the rows.
    """

    def one(x: Any) -> P:
        along = (AXIS,) if len(x.shape) > len(lead) + 1 else ()
        return P(*lead, BATCH_AXES, *along)

    return {name: one(x) for name, x in batch.items()}


def manual_axes(mesh: Mesh) -> set[str]:
    """Returns the axes that a `shard_map` around the model has in hand: those of ZeRO, and `tensor` where it is idle.

    An axis left to the compiler, even of size 1, bars attention kernels, which it cannot partition.
    """
    return {"stage", *TOKEN_AXES} | ({"tensor"} if mesh.shape["tensor"] == 1 else set())


def make_eval_fn(spec: StepSpec) -> Callable[[Params, Batch], Sums]:
    """Returns `(params, batch) -> sums` without gradients or dropout; batch leaves are (B, T)."""

    def local(params: Params, batch: Batch) -> Sums:
        with ambient(spec.at_rest):
            model = model_of(spec, compute_weights(spec, params))
            sums = _as_sums(spec.loss_fn(model, batch))
        return jax.tree.map(lambda x: jax.lax.psum(x, TOKEN_AXES), sums)

    def eval_fn(params: Params, batch: Batch) -> Sums:
        return on_zero_axes(spec, local, (batch_specs(batch),), P())(params, batch)

    return eval_fn


def make_predict_fn(
    spec: StepSpec, predict: PredictFn
) -> Callable[[Params, Batch], tuple[Sums, PyTree]]:
    """Returns `(params, batch) -> (sums, outputs)` without gradients or dropout; leaves of both are (B, ...), sequences whole."""

    def local(params: Params, batch: Batch) -> tuple[Sums, PyTree]:
        with ambient(spec.whole_rows):
            model = model_of(spec, compute_weights(spec, params))
            sums, outputs = predict(model, batch)
        total = jax.tree.map(lambda x: jax.lax.psum(x, BATCH_AXES), _as_sums(sums))
        return total, outputs

    return on_zero_axes(spec, local, (P(BATCH_AXES),), (P(), P(BATCH_AXES)))


def on_zero_axes(
    spec: StepSpec, local: Callable[..., Any], others: tuple[Any, ...], out_specs: Any
) -> Callable[..., Any]:
    """Returns `local(params, *others)` run on each device's own shards, with the ZeRO axes in hand.

    Args:
        spec: of the step whose parameters these are.
        local: what each device does with its shards of the master parameters.
        others: the partitions of its further arguments.
        out_specs: those of its results.
    """
    return jax.shard_map(
        local,
        mesh=spec.mesh,
        in_specs=(_master_specs(spec.placements), *others),
        out_specs=out_specs,
        axis_names=manual_axes(spec.mesh),
        check_vma=False,
    )


def _master_specs(placements: PyTree) -> PyTree:
    return jax.tree.map(
        lambda place: place.spec("master", manual_only=True),
        placements,
        is_leaf=is_placement,
    )


def make_train_step(
    spec: StepSpec,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    clip_norm: float,
    loss_scale: LossScaleConfig | None,
) -> Callable[[PyTree, Batch], tuple[PyTree, dict[str, jax.Array]]]:
    """Returns the pure step `(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    A step whose gradients are not finite changes nothing but the step number, the count of
    skipped steps and the loss scale.

    Args:
        spec: the static part.
        tx: the optimizer, with schedule and decay, without clipping; its update takes `finite`.
        schedule: its learning rate, for the metrics.
        clip_norm: global gradient norm above which gradients are scaled down; 0 is off.
        loss_scale: float16's dynamic scaling, None in other dtypes.
    """
    grad_fn = make_grad_fn(spec)

    def step(state: PyTree, batch: Batch) -> tuple[PyTree, dict[str, jax.Array]]:
        params, opt = state["params"], state["opt"]
        scale = state["loss_scale"].scale if loss_scale else jnp.ones((), jnp.float32)
        key = jax.random.fold_in(state["key"], state["step"])
        gradients, (sums, measured) = grad_fn(params, batch, scale, key)

        total, count = jnp.sum(sums.total), jnp.maximum(jnp.sum(sums.count), 1.0)
        divisor = scale * spec.seed_scale * count
        norm = optax.tree.norm(gradients) / divisor
        finite = jnp.isfinite(norm) & jnp.isfinite(total)
        clipped = jnp.minimum(norm, clip_norm) if clip_norm else norm
        factor = jnp.where(norm > clipped, clipped / (norm + 1e-6), 1.0) / divisor
        gradients = jax.tree.map(lambda g: g * factor, gradients)

        trained = part_of(params, spec.placements)
        updates, new_opt = tx.update(gradients, opt, trained, finite=finite)
        updated: Any = optax.apply_updates(trained, updates)
        new_state = {
            **state,
            "params": with_part(params, updated),
            "opt": new_opt,
            "step": state["step"] + 1,
            "skipped": state["skipped"] + jnp.where(finite, 0, 1),
        }
        metrics = {
            "train/loss": total / count,
            "train/micro_losses": sums.total / jnp.maximum(sums.count, 1.0),
            "train/grad_norm": norm,
            "train/grad_norm_clipped": clipped,
            "train/lr": schedule(update_count(opt)),
            "train/skipped": new_state["skipped"],
            "train/tokens": jnp.sum(sums.count),
        } | {f"train/{name}": _mean(each) for name, each in measured.items()}
        if loss_scale:
            new_state["loss_scale"] = update_loss_scale(
                loss_scale, state["loss_scale"], finite
            )
            metrics |= {
                "train/loss_scale": scale,
                "train/scale_exhausted": new_state["loss_scale"].exhausted,
            }
        return new_state, metrics

    return step


def compute_weights(spec: StepSpec, params: Params) -> PyTree:
    """Returns the parameters as `Weight`s without gradient slots, from inside a shard_map over the ZeRO axes."""
    return jax.tree.map(
        lambda p, place: Weight(
            _compute_copy(p, place, spec), None, place, spec.reduce_dtype
        ),
        params,
        spec.placements,
    )


def model_of(spec: StepSpec, weights: PyTree) -> Any:
    """Returns the model with these weights (or arrays), its adapters where they belong."""
    return merge(spec.graphdef, joined(weights, spec.lora))


def _compute_copy(master: jax.Array, place: Placement, spec: StepSpec) -> jax.Array:
    """Returns what the stage keeps of a parameter for this step's forward and backward passes.

    Where it needs a gather now, the shard is cast first (half the bytes). Where the master is
    whole already it is used as it is and cast at each use, so that no second copy exists.
    """
    if place.zero_dim is None or "master" not in place.sharded:
        return master
    inner = () if "compute" in place.sharded else place.shard_axes
    axes = (*inner, *place.outer)
    if not axes:
        return master
    return all_gather(
        master,
        place.zero_dim % master.ndim,
        axes,
        spec.settings.compute,
        _tensor(place, spec),
    )


def _slot(master: jax.Array, place: Placement, mesh: Mesh) -> jax.Array:
    """Returns zeros of the shape in which a parameter's gradient is accumulated."""
    shape = list(master.shape)
    if place.zero_dim is not None and "master" in place.sharded:
        inner = () if "gradient" in place.sharded else place.shard_axes
        shape[place.zero_dim] *= shards_of(mesh.shape, (*inner, *place.outer))
    zeros = jnp.zeros(shape, jnp.float32)
    return (
        jax.lax.with_sharding_constraint(zeros, place.tensor_spec(len(shape)))
        if mesh.shape["tensor"] > 1
        else zeros
    )


def _final_reduction(
    gradient: jax.Array, place: Placement, spec: StepSpec
) -> jax.Array:
    """Sums an accumulated gradient over what it has not been summed over yet, and leaves the master's shard."""
    tensor = _tensor(place, spec)
    if place.zero_dim is None or "master" not in place.sharded:
        return all_reduce(gradient, place.token_axes, spec.reduce_dtype, tensor)
    dim = place.zero_dim % gradient.ndim
    if "gradient" not in place.sharded:
        gradient = reduce_scatter(
            gradient, dim, place.shard_axes, spec.reduce_dtype, tensor
        )
    if place.outer:
        gradient = reduce_scatter(gradient, dim, place.outer, spec.reduce_dtype, tensor)
    if spec.mesh.shape["data"] > 1 and "data" not in place.outer:
        gradient = all_reduce(gradient, "data", spec.reduce_dtype, tensor)
    return gradient


def _tensor(place: Placement, spec: StepSpec) -> P | None:
    """Returns a parameter's partition over `tensor`; None where that axis has size 1."""
    return (
        place.tensor_spec(len(place.shape)) if spec.mesh.shape["tensor"] > 1 else None
    )


def _mean(sums: Sums) -> jax.Array:
    """Returns the mean over all micro-steps."""
    return jnp.sum(sums.total) / jnp.maximum(jnp.sum(sums.count), 1.0)


def _check_taken(auxiliary: Auxiliary) -> None:
    if auxiliary.rows is not None and auxiliary.added is None:
        raise ConfigError(
            "loss_fn leaves out what the model's routers add to the loss: end it with jaxspeed.auxiliary.with_auxiliary(sums, targets), "
            "targets being how many each row has; or set moe.balance_coef and moe.z_coef to 0"
        )


def _as_sums(returned: Any) -> Sums:
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ConfigError(
            f"loss_fn returned {type(returned).__name__}; it must return (sum, count), "
            "for a mean over B things: (mean * B, B)"
        )
    return Sums(*(jnp.asarray(x, jnp.float32) for x in returned))
