# SPDX-License-Identifier: Apache-2.0
"""All of a run that is settled before an array exists: mesh, placements, abstract state, compiled step.

Built from a RunConfig and devices that may be real, virtual or ahead-of-time (a TPU or GPU
topology on a machine that has none). Training, evaluation, sampling, planning and the benchmarks
start from here. Layer 3.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxspeed import nn
from jaxspeed.ambient import Ambient
from jaxspeed.batch import BatchShape
from jaxspeed.config import (
    BATCH_AXES,
    SHARD_AXES,
    ConfigError,
    LossScaleConfig,
    RunConfig,
    config_error,
    divisors,
)
from jaxspeed.context import AXIS, device_order, parts_of
from jaxspeed.lora import (
    ADAPTERS,
    find_targets,
    frozen_paths,
    init_adapters,
    with_adapters,
)
from jaxspeed.mesh import build_mesh
from jaxspeed.objectives import SPLIT_TASKS, objective_of
from jaxspeed.optim import make_optimizer
from jaxspeed.paths import matching, paths_of, subtree
from jaxspeed.pipeline import pipeline_schedule
from jaxspeed.schedules import make_schedule
from jaxspeed.sharding import is_placement, part_of, place_all, shards_of
from jaxspeed.state import make_init, master_shardings, state_shardings, with_shardings
from jaxspeed.step import (
    PredictFn,
    StepSpec,
    batch_specs,
    make_eval_fn,
    make_predict_fn,
    make_train_step,
)
from jaxspeed.topology import find_chip
from jaxspeed.types import LossFn, Params, PyTree, Sums


State = PyTree


@dataclass(frozen=True, eq=False)
class Program:
    """A run's static part. Make it with `build_program`."""

    run: RunConfig
    batch: BatchShape
    spec: StepSpec
    tx: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    abstract_state: State
    """Shapes, dtypes and shardings of the train state."""
    init: Callable[[jax.Array], State]
    """`key -> state`, not yet jitted."""

    @property
    def mesh(self) -> Mesh:
        """The device mesh."""
        return self.spec.mesh

    @functools.cached_property
    def shardings(self) -> State:
        """A NamedSharding per leaf of the state."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    def init_state(self) -> State:
        """Returns a new train state, each device making its own shards."""
        return jax.jit(self.init, out_shardings=self.shardings)(
            jax.random.key(self.run.seed)
        )

    def init_rest(self) -> State:
        """Returns a new train state whose parameters are None: to be read, not drawn."""
        shardings = {**self.shardings, "params": None}
        rest = lambda key: {**self.init(key), "params": None}
        return jax.jit(rest, out_shardings=shardings)(jax.random.key(self.run.seed))

    def draw(self, names: Collection[str]) -> dict[str, Any]:
        """Returns the nested dict of those new parameters, as they are in `init_state`.

        Args:
            names: their dotted paths.
        """
        if not names:
            return {}
        some = lambda params: subtree(params, names)
        drawn = jax.jit(
            lambda key: some(self.init(key)["params"]),
            out_shardings=some(self.shardings["params"]),
        )
        return drawn(jax.random.key(self.run.seed))

    @functools.cached_property
    def train_step(self) -> jax.stages.Wrapped:
        """The jitted step, `(state, batch) -> (state, metrics)`; it takes over (donates) the state it is given."""
        step = make_train_step(
            self.spec,
            self.tx,
            self.schedule,
            clip_norm=self.run.optim.clip_norm,
            loss_scale=_loss_scale(self.run),
        )
        whole = NamedSharding(self.mesh, P())
        chip = find_chip(self.mesh.devices.flat[0].device_kind)
        options = dict(chip.compiler_options) if chip else {}
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(self.shardings, whole),
            compiler_options=options,
        )

    @functools.cached_property
    def eval_step(self) -> Callable[[Params, Mapping[str, jax.Array]], Sums]:
        """The jitted loss of a batch (B, T) without gradients."""
        return jax.jit(make_eval_fn(self.spec))

    def predictor(
        self, predict: PredictFn
    ) -> Callable[[Params, Mapping[str, np.ndarray]], tuple[Sums, PyTree]]:
        """Returns `(params, rows) -> (sums, outputs)` for an evaluation batch, without gradients.

        Rows and outputs are NumPy arrays of the whole global batch, the same in every process.

        Args:
            predict: of each device's rows, `(model, batch) -> (sums, outputs)`; a function at the
                top of a module, since what is compiled for it is kept.
        """
        jitted = self._predictors.get(predict)
        if jitted is None:
            whole = NamedSharding(self.mesh, P())
            apply = make_predict_fn(self.spec, predict)
            jitted = self._predictors[predict] = jax.jit(apply, out_shardings=whole)
        index, count = self.process_rows

        def run(params: Params, rows: Mapping[str, np.ndarray]) -> tuple[Sums, PyTree]:
            mine = {n: np.split(x, count)[index] for n, x in rows.items()}
            return jax.device_get(jitted(params, self._put_whole(mine)))

        return run

    def _put_whole(self, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts this process's rows of an evaluation batch on its devices, sequences whole."""
        self.check_rows(rows)
        arrays = {n: np.asarray(x) for n, x in rows.items()}
        whole = dict.fromkeys(arrays, NamedSharding(self.mesh, P(BATCH_AXES)))
        return self._put_all(arrays, whole, 0)

    @functools.cached_property
    def _predictors(self) -> dict[PredictFn, Callable[..., tuple[Sums, PyTree]]]:
        return {}

    def abstract_batch(
        self, names: Sequence[str] | None = None, *, length: int | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and shardings of a training batch.

        Args:
            names: of the task's arrays; all by default.
            length: of the rows, `run.seq_len` by default.
        """
        leaves = objective_of(self.run).leaves(self.run, length or self.run.seq_len)
        rows = (self.batch.accumulate, self.batch.micro_size * self.batch.shards)
        return self._with_shardings(
            {
                n: jax.ShapeDtypeStruct(rows + leaves[n].shape, leaves[n].dtype)
                for n in names or leaves
            }
        )

    def lower_step(
        self, names: Sequence[str] | None = None, *, length: int | None = None
    ) -> jax.stages.Lowered:
        """Returns the lowered train step; `.compile()` works for devices that are not there.

        Args:
            names: of the task's arrays in a batch; all by default.
            length: of the rows, `run.seq_len` by default.
        """
        batch = self.abstract_batch(names, length=length)
        return self.train_step.lower(self.abstract_state, batch)

    def lower_step_for(self, batch: Mapping[str, Any]) -> jax.stages.Lowered:
        """Returns the lowered train step for a batch of these shapes: (A, B, ...)."""
        return self.train_step.lower(self.abstract_state, self._with_shardings(batch))

    def _with_shardings(
        self, batch: Mapping[str, Any]
    ) -> dict[str, jax.ShapeDtypeStruct]:
        shardings = self._batch_shardings(batch, training=True)
        return {
            n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[n])
            for n, x in batch.items()
        }

    @functools.cached_property
    def process_rows(self) -> tuple[int, int]:
        """Which share (index, count) of each batch's rows this process feeds.

        Processes with the same batch shards (they differ in `tensor`) feed the same rows. A
        process's shards need not be neighbours: on a TPU its devices form a block of the grid.

        Raises:
            ConfigError: processes hold parts that overlap.
        """
        held: dict[int, set[int]] = {}
        names = self.mesh.axis_names
        others = [axis for axis in names if axis not in BATCH_AXES]
        order = [names.index(axis) for axis in (*BATCH_AXES, *others)]
        groups = self.mesh.devices.transpose(order).reshape(self.batch.shards, -1)
        for shard, group in enumerate(groups):
            for device in group:
                held.setdefault(device.process_index, set()).add(shard)
        shares = sorted({tuple(sorted(part)) for part in held.values()})
        if len(set(map(len, shares))) > 1 or sum(map(len, shares)) != self.batch.shards:
            raise ConfigError(
                f"mesh {dict(self.mesh.shape)}: the devices of a process hold parts of the batch that overlap with another's; "
                "let tensor divide the devices of a process, or be a multiple of them"
            )
        return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)

    @functools.cached_property
    def micro(self) -> "Program":
        """This program with one micro-step's rows for its global batch."""
        rows = self.batch.micro_size * self.batch.shards
        return dataclasses.replace(
            self, batch=dataclasses.replace(self.batch, global_size=rows, accumulate=1)
        )

    def check_rows(self, rows: Mapping[str, np.ndarray]) -> None:
        """Checks that each array has this process's share of the global batch for its first dim.

        Raises:
            ConfigError: names the first array that does not.
        """
        if not rows:
            raise ConfigError(
                "batch is empty; give at least one array, such as {'inputs': (rows, seq_len) of int32}"
            )
        count = self.process_rows[1]
        expected = self.batch.global_size // count
        for name, array in rows.items():
            if array.dtype.kind in "OUSMm":
                raise ConfigError(
                    f"batch[{name!r}] holds {array.dtype}, which no device computes with; leave it out, or give numbers"
                )
            if array.shape[:1] != (expected,):
                raise ConfigError(
                    f"batch[{name!r}] has shape {array.shape}: its first dim must be {expected}, this process's share of "
                    f"{self.batch.global_size} rows over {count} process{'es' if count > 1 else ''}"
                )

    def arrange(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns this process's rows of a global batch by micro-step, (A, B, T), on the host, tokens in device order.

        Raises:
            ConfigError: see `check_rows`; or the devices of `context` do not divide a sequence.
        """
        self.check_rows(rows)
        arrays = {
            n: np.asarray(x).reshape(self.batch.accumulate, -1, *x.shape[1:])
            for n, x in rows.items()
        }
        return self._in_device_order(arrays, 2)

    def put_batch(
        self, rows: Mapping[str, np.ndarray], *, training: bool = True
    ) -> dict[str, jax.Array]:
        """Puts this process's rows of a global batch on its devices: (A, B, T) for training, else (B, T).

        Each device of the axis `context` gets its part of every sequence (`jaxspeed.context`).

        Raises:
            ConfigError: see `check_rows`; or the devices of `context` do not divide a sequence.
        """
        if training:
            arrays = self.arrange(rows)
        else:
            self.check_rows(rows)
            arrays = {n: np.asarray(x) for n, x in rows.items()}
            arrays = self._in_device_order(arrays, 1)
        shardings = self._batch_shardings(arrays, training=training)
        return self._put_all(arrays, shardings, int(training))

    def _put_all(
        self,
        arrays: Mapping[str, np.ndarray],
        shardings: Mapping[str, NamedSharding],
        dim: int,
    ) -> dict[str, jax.Array]:
        """Puts this process's rows, counted by `dim`, of all arrays on its devices."""
        if jax.process_count() == 1:  # half the host time of the general call
            return jax.device_put(dict(arrays), dict(shardings))
        return {n: self._put(x, shardings[n], dim) for n, x in arrays.items()}

    def _put(self, mine: np.ndarray, sharding: NamedSharding, dim: int) -> jax.Array:
        """Puts this process's rows of an array on its devices; each of these may have a part of the sequences only."""
        index, count = self.process_rows
        shape = list(mine.shape)
        begin = index * shape[dim]
        shape[dim] *= count

        def part(at: Any) -> np.ndarray:
            start, stop, _ = at[dim].indices(shape[dim])
            rows = slice(start - begin, stop - begin)
            return mine[(*at[:dim], rows, *at[dim + 1 :])]

        return jax.make_array_from_callback(tuple(shape), sharding, part)

    def _in_device_order(
        self, arrays: Mapping[str, np.ndarray], dim: int
    ) -> dict[str, np.ndarray]:
        """Returns the arrays with the tokens of each sequence, along `dim`, in the order in which devices have them."""
        size, by = self.mesh.shape[AXIS], self.run.context
        if size == 1:
            return dict(arrays)
        parts = parts_of(by, size)
        ordered = {}
        for name, x in arrays.items():
            if x.ndim > dim:
                length = x.shape[dim]
                if length % parts:
                    raise _indivisible(f"batch[{name!r}]", length, parts, size)
                x = np.take(x, device_order(length, by, size), dim)
            ordered[name] = x
        return ordered

    def _batch_shardings(
        self, arrays: Mapping[str, Any], *, training: bool
    ) -> dict[str, NamedSharding]:
        """Returns how the arrays of a batch lie, by name."""
        specs = batch_specs(arrays, (None,) if training else ())
        return {n: NamedSharding(self.mesh, spec) for n, spec in specs.items()}


def build_program(
    run: RunConfig,
    *,
    make_model: Callable[[Any], Any] | None = None,
    loss_fn: LossFn | None = None,
    devices: Sequence[Any] | None = None,
    seq_len: int | None = None,
) -> Program:
    """Returns the static part of a run.

    Args:
        run: the configuration.
        make_model: `nnx.Rngs -> model`, where it is not `run.model.build`.
        loss_fn: what to minimise, where it is not the loss of `run.task`.
        devices: to run (or only compile) on; all devices by default.
        seq_len: tokens per sequence, where it is not `run.seq_len`.

    Raises:
        ConfigError: the configuration does not fit itself or the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    batch = run.validate(len(devices))
    sizes = run.mesh.sizes(len(devices))
    mesh = build_mesh(sizes, devices)
    custom = make_model is not None
    make_model = make_model or run.model.build
    graphdef, params, dims = nn.abstract(lambda: make_model(nn.rngs(jax.random.key(0))))
    if run.mlp_tiles > 1 and not nn.goes_in_tiles(graphdef):
        why = "no part of this model goes by tiles (jaxspeed.nn.in_tiles)"
        raise config_error("mlp_tiles", run.mlp_tiles, why, "leave it out")
    targets = find_targets(run.lora, params, dims) if run.lora.rank else {}
    frozen = _frozen(run, targets, paths_of(params))
    if targets:
        params, dims = with_adapters(targets, run.lora.rank, params, dims)
    placements = place_all(params, dims, sizes, run.zero, frozen)
    if sizes["stage"] > 1:
        _check_stages(sizes["stage"], run.pipeline_chunks, placements)
    if sizes["context"] > 1 and loss_fn is None:
        _check_split(run, sizes["context"])
    platform = mesh.devices.flat[0].platform
    compute = jnp.dtype(run.dtype.compute)
    if len(devices) > sizes["tensor"]:
        _check_reduction(run, platform)
    spec = StepSpec(
        graphdef=graphdef,
        placements=placements,
        mesh=mesh,
        settings=Ambient(
            compute=compute, activations=_dtype(run.dtype.activations, compute, platform), attention=run.attention,
            platform="gpu" if platform in ("cuda", "rocm") else platform, remat=run.remat, mlp_tiles=run.mlp_tiles, tensor=sizes["tensor"],
            context=sizes["context"], context_by=run.context,
            expert=sizes["expert"], moe=run.moe, stage=sizes["stage"],
        ),
        loss_fn=loss_fn or objective_of(run).loss,
        reduce_dtype=_dtype(run.dtype.reduce, compute, platform),
        seed_scale=2.0 ** -round(math.log2(batch.global_size * (seq_len or run.seq_len))),
        dropout=custom or getattr(run.model, "dropout", 1.0) > 0.0 or run.lora.dropout > 0.0 or run.moe.draws,
        lora=run.lora,
        schedule=pipeline_schedule(run.pipeline, sizes["stage"], batch.accumulate, run.pipeline_chunks) if sizes["stage"] > 1 else None,
    )  # fmt: skip
    schedule = make_schedule(run.schedule, run.optim.lr, run.steps)
    tx = make_optimizer(
        run.optim,
        run.schedule,
        run.steps,
        part_of(dims, placements),
        placements=master_shardings(spec.trained, mesh),
    )
    stored = _dtype(run.dtype.frozen, compute, platform)

    def make_params(key: jax.Array) -> Params:
        params = nn.initialise(lambda: make_model(nn.rngs(key)))
        if targets:
            lora_key = jax.random.fold_in(key, zlib.crc32(ADAPTERS.encode()))
            params[ADAPTERS] = init_adapters(lora_key, targets, run.lora.rank)
        return jax.tree.map(
            lambda p, place: p if place.trained else p.astype(stored),
            params,
            placements,
        )

    init = make_init(make_params, tx, _loss_scale(run), placements)
    abstract = jax.eval_shape(init, jax.random.key(0))
    abstract = with_shardings(abstract, state_shardings(abstract, placements, mesh))
    return Program(run, batch, spec, tx, schedule, abstract, init)


def notices(program: Program) -> list[str]:
    """Returns what the user should be told once: settings that this hardware makes idle."""
    run, sizes = program.run, program.mesh.shape
    said = []
    shards = shards_of(sizes)
    if run.zero.stage and shards == 1:
        said.append(
            f"zero.stage={run.zero.stage} shards nothing here: mesh.fsdp is 1 (one shard holds all)"
        )
    if run.context != RunConfig.context and sizes[AXIS] == 1:
        said.append(f"context={run.context} has nothing to do here: mesh.context is 1")
    if (schedule := program.spec.schedule) is not None:
        said.append(
            f"pipeline={run.pipeline}: {schedule.stages} stages, {schedule.micros} micro-batches, {schedule.bubble(3.0):.0%} of the time idle; "
            "no text is written during training (jaxspeed generate writes with what was saved)"
        )
    elif run.pipeline != RunConfig.pipeline:
        said.append(f"pipeline={run.pipeline} has nothing to do here: mesh.stage is 1")
    if run.remat == "offload" and program.mesh.devices.flat[0].platform == "cpu":
        said.append(
            "remat=offload has nothing to do here: a CPU's memory is the host's, so it is remat=full"
        )
    if run.zero.secondary and sizes["data"] == 1:
        said.append("zero.secondary has nothing to do here: mesh.data is 1, one group")
    if run.moe.capacity_factor and sizes[AXIS] > 1:
        said.append(
            f"moe.capacity_factor={run.moe.capacity_factor:g} counts in each of the {sizes[AXIS]} parts of a row by itself: mesh.context changes who is dropped"
        )
    if run.steps < run.schedule.warmup_steps:
        said.append(
            f"schedule.warmup_steps={run.schedule.warmup_steps}: the run's {run.steps} steps end before the warm-up does"
        )
    placements = jax.tree.leaves(program.spec.placements, is_leaf=is_placement)
    odd = [p for p in placements if p.zero_dim is None]
    if odd and run.zero.stage and shards > 1:
        count = sum(math.prod(p.shape) for p in odd)
        names = [name for name in SHARD_AXES if sizes[name] > 1]
        across = " x ".join(f"mesh.{name}={sizes[name]}" for name in names)
        said.append(
            f"{len(odd)} parameters ({count:,} elements) stay whole: none of their dims divides by {across}"
        )
    split = [p for p in placements if p.tensor_dim is None and math.prod(p.shape) > 1e6]
    if sizes["tensor"] > 1 and split:
        shapes = ", ".join(str(p.shape) for p in split)
        said.append(
            f"not split over mesh.tensor={sizes['tensor']} (no dim that may be divides): {shapes}"
        )
    if run.zero.stage == 3 and shards > 1 and not any(p.stacked for p in placements):
        said.append(
            "zero.stage=3 gathers the whole model at once: it has no jaxspeed.nn.Layers, which are gathered one by one"
        )
    if run.dtype.compute != "float32" and not any(any(p.dims) for p in placements):
        said.append(
            f"dtype.compute={run.dtype.compute}: the parameters hold values of that precision, but products are float32 except by jaxspeed.ops, "
            "which no parameter of this model is made for (jaxspeed.nn.param)"
        )
    return said


def _check_stages(stages: int, chunks: int, placements: PyTree) -> None:
    """Checks that the layers can be cut into so many parts.

    Raises:
        ConfigError: there are none, or several stacks of them, or they do not divide.
    """
    places = jax.tree.leaves(placements, is_leaf=is_placement)
    counts = sorted({place.shape[0] for place in places if place.stacked})
    if len(counts) != 1:
        raise config_error(
            "mesh.stage",
            stages,
            f"the model has {'stacks of ' + ' and '.join(map(str, counts)) if counts else 'no stack of'} layers (jaxspeed.nn.Layers), where one is cut",
            "set mesh.stage 1, and split by mesh.fsdp or mesh.tensor",
        )
    (count,) = counts
    if count % (stages * chunks):
        legal = [] if count % chunks else divisors(count // chunks)
        times = f" times pipeline_chunks={chunks}" * (chunks > 1)
        raise config_error(
            "mesh.stage",
            stages,
            f"it{times} does not divide the model's {count} layers",
            f"give one of {', '.join(map(str, legal))}"
            if legal
            else "give fewer pipeline_chunks",
        )


def _check_split(run: RunConfig, size: int) -> None:
    """Checks that the task's rows can be split over so many devices.

    Raises:
        ConfigError: they cannot.
    """
    if run.task.name not in SPLIT_TASKS:
        raise config_error(
            "mesh.context",
            size,
            f"task.name={run.task.name!r} reads rows whole",
            f"give 1; {', '.join(sorted(SPLIT_TASKS))} can be split",
        )
    parts = parts_of(run.context, size)
    objective = objective_of(run)
    for length in (*run.task.buckets, run.seq_len):
        for name, leaf in objective.leaves(run, length).items():
            if leaf.shape and leaf.shape[0] % parts:
                raise _indivisible(
                    f"{name} of seq_len={length}", leaf.shape[0], parts, size
                )


def _indivisible(what: str, length: int, parts: int, size: int) -> ConfigError:
    low = length // parts * parts
    nearest = f"{low} or {low + parts}" if low else str(parts)
    return ConfigError(
        f"mesh.context={size}: {what} has {length} tokens, which do not divide into {parts} parts; nearest legal: {nearest}"
    )


def _frozen(
    run: RunConfig, targets: Collection[str], paths: Collection[str]
) -> set[str]:
    """Returns the paths of the model's parameters that are not trained."""
    if targets:
        return frozen_paths(run.lora, targets, paths)
    frozen = {p for pattern in run.freeze for p in matching("freeze", pattern, paths)}
    if frozen == set(paths):
        raise config_error(
            "freeze",
            run.freeze,
            "nothing is left to train",
            "leave a pattern out",
        )
    return frozen


def _dtype(choice: str, compute: Any, platform: str) -> Any:
    """Returns float32 where that is chosen, or auto on a CPU; else the compute dtype."""
    wide = choice == "float32" or (choice == "auto" and platform == "cpu")
    return jnp.dtype(jnp.float32) if wide else compute


def _check_reduction(run: RunConfig, platform: str) -> None:
    if (platform, run.dtype.compute, run.dtype.reduce) == (
        "cpu",
        "bfloat16",
        "compute",
    ):
        raise config_error(
            "dtype.reduce",
            "compute",
            "XLA dies of a bfloat16 reduction on CPU (jaxlib 0.10)",
            "give float32",
        )


def _loss_scale(run: RunConfig) -> LossScaleConfig | None:
    return run.loss_scale if run.dtype.compute == "float16" else None
