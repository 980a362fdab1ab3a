# SPDX-License-Identifier: Apache-2.0
"""The run configuration: one tree of frozen dataclasses, the only home of defaults.

A recipe is a Python file with `config() -> RunConfig`; the command line overrides its fields by
name (`jaxspeed.cli`); a DeepSpeed JSON is translated into it (`jaxspeed.deepspeed_json`). The
string under a field is its documentation, on the command line and on the API page alike.
`__post_init__` checks one class; `RunConfig.validate` checks across classes and against the
devices. Layer 0: standard library only. ADR 0002.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin


M = TypeVar("M")

MESH_AXES = ("data", "fsdp", "tensor")
"""Mesh axes, outermost (slowest link) first."""

BATCH_AXES = ("data", "fsdp")
"""The axes a batch is split over. `fsdp` also shards the model state; `data` replicates it."""


class ConfigError(ValueError):
    """A setting that cannot be: one line with field, value, why, and what to change."""


def config_error(where: str, value: object, why: str, change: str) -> ConfigError:
    """Returns the one-line error `where=value: why; change`."""
    return ConfigError(f"{where}={value!r}: {why}; {change}")


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def _check_types(config: Any, where: str) -> None:
    """Raises if a value is not what its field's annotation says: nothing else checks a recipe."""
    for f in dataclasses.fields(config):
        name, value = f"{where}.{f.name}".lstrip("."), getattr(config, f.name)
        if get_origin(f.type) is Literal:
            legal = get_args(f.type)
            if not any(
                value == choice and type(value) is type(choice) for choice in legal
            ):
                raise ConfigError(
                    f"{name}={value!r}: unknown; give one of {list(legal)}.{suggest(str(value), map(str, legal))}"
                )
        elif not isinstance(f.type, TypeVar) and not _is_of_type(value, f.type):
            wanted = (
                f.type.__name__
                if isinstance(f.type, type) and not get_args(f.type)
                else str(f.type)
            )
            change = (
                f"write ({value!r},)"
                if get_origin(f.type) is tuple and isinstance(value, str)
                else f"give {wanted}"
            )
            raise config_error(
                name, value, f"{type(value).__name__} where {wanted} is due", change
            )


def _is_of_type(value: Any, annotation: Any) -> bool:
    if get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(
            _is_of_type(item, get_args(annotation)[0]) for item in value
        )
    if isinstance(annotation, UnionType):
        return any(_is_of_type(value, choice) for choice in get_args(annotation))
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is int if annotation is int else isinstance(value, annotation)


def _positive(where: str, value: float, *, allow_zero: bool = False) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not allow_zero):
        bound = ">= 0" if allow_zero else "> 0"
        raise config_error(where, value, f"must be {bound}", f"give a number {bound}")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged. The sizes multiply to the number of devices."""

    data: int = 1
    """Replicas of the (possibly sharded) model state; the batch is split over them. With fsdp > 1 this is hybrid sharding (MiCS)."""
    fsdp: int = -1
    """ZeRO shards of the model state; the batch is split over them too. -1 takes the devices that are left."""
    tensor: int = 1
    """Shards of each matrix product (Megatron's tensor parallelism)."""

    def __post_init__(self) -> None:
        _check_types(self, "mesh")
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        for axis, size in sizes.items():
            if size == 0 or size < -1:
                raise config_error(
                    f"mesh.{axis}",
                    size,
                    "an axis size is at least 1",
                    "give 1 or more, or -1 for the rest",
                )
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ConfigError(
                f"mesh: {[a for a, s in sizes.items() if s == -1]} are both -1, so neither is determined; "
                "give all but one a size"
            )

    def sizes(self, device_count: int) -> dict[str, int]:
        """Returns the size of each axis, outermost first, with -1 replaced.

        Raises:
            ConfigError: the sizes do not multiply to `device_count`.
        """
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        text = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        if -1 in sizes.values():
            if device_count % fixed:
                raise ConfigError(
                    f"mesh: {text} needs a multiple of {fixed} devices but there are {device_count}; "
                    f"shrink an axis, or run with {fixed * max(1, device_count // fixed)} devices"
                )
            return {
                axis: device_count // fixed if size == -1 else size
                for axis, size in sizes.items()
            }
        if fixed != device_count:
            raise ConfigError(
                f"mesh: {text} asks for {fixed} devices but there are {device_count}; "
                "set one axis to -1 to take what is there, or use --virtual_devices on a CPU"
            )
        return sizes


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """ZeRO (arXiv 1910.02054): which kinds of array are sharded over the `fsdp` axis."""

    stage: Literal[0, 1, 2, 3] = 3
    """0: nothing. 1: fp32 master and optimizer state. 2: and accumulated gradients. 3: and parameters, gathered layer by layer."""
    param_persistence_threshold: int = 16_384
    """At stage 3, a parameter with fewer elements (per layer) is gathered once per step, not layer by layer. DeepSpeed: stage3_param_persistence_threshold (default 100,000)."""

    def __post_init__(self) -> None:
        _check_types(self, "zero")
        _positive(
            "zero.param_persistence_threshold",
            self.param_persistence_threshold,
            allow_zero=True,
        )


@dataclass(frozen=True, kw_only=True)
class DTypeConfig:
    """What numbers are stored, computed and sent in. Master parameters, optimizer state and accumulated gradients are float32."""

    compute: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Matrix products, attention and gathered parameters. float16 brings dynamic loss scaling."""
    activations: Literal["auto", "float32", "compute"] = "auto"
    """The residual stream and what is kept for the backward pass. auto: float32 on CPU (where it is faster), compute elsewhere."""
    reduce: Literal["float32", "compute"] = "float32"
    """Gradients on the wire. DeepSpeed: communication_data_type."""

    def __post_init__(self) -> None:
        _check_types(self, "dtype")


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """Dynamic loss scaling for float16, DeepSpeed's state machine. No effect in other dtypes."""

    static: float = 0.0
    """A fixed scale; 0 means dynamic. DeepSpeed: fp16.loss_scale."""
    initial_power: int = 16
    """The first scale is two to this power. DeepSpeed: fp16.initial_scale_power."""
    window: int = 1000
    """Good steps in a row after which the scale doubles. DeepSpeed: fp16.loss_scale_window."""
    hysteresis: int = 2
    """Overflows that are let pass before the scale is halved. DeepSpeed: fp16.hysteresis."""
    consecutive_hysteresis: bool = False
    """Refill the hysteresis at every good step, not only when the scale grows."""
    minimum: float = 1.0
    """An overflow at this scale ends the run. DeepSpeed: fp16.min_loss_scale."""

    def __post_init__(self) -> None:
        _check_types(self, "loss_scale")
        _positive("loss_scale.static", self.static, allow_zero=True)
        _positive("loss_scale.window", self.window)
        _positive("loss_scale.hysteresis", self.hysteresis)
        _positive("loss_scale.minimum", self.minimum)
        if not 0 <= self.initial_power <= 32:
            raise config_error(
                "loss_scale.initial_power",
                self.initial_power,
                "the scale must fit float32 with room to grow",
                "give 0 to 32",
            )


OptimizerName = Literal[
    "adam", "adamw", "sgd", "lion", "lamb", "adagrad", "adafactor", "muon"
]

OPTIMIZER_FIELDS: Mapping[str, frozenset[str]] = {
    "adam": frozenset({"b1", "b2", "eps", "bias_correction"}),
    "adamw": frozenset({"b1", "b2", "eps", "bias_correction"}),
    "sgd": frozenset({"momentum", "nesterov"}),
    "lion": frozenset({"b1", "b2"}),
    "lamb": frozenset({"b1", "b2", "eps", "bias_correction", "min_coeff", "max_coeff"}),
    "adagrad": frozenset({"eps"}),
    "adafactor": frozenset(),
    "muon": frozenset(
        {"b1", "b2", "eps", "momentum", "nesterov", "muon_lr", "ns_steps"}
    ),
}
"""What each optimizer reads, beyond lr, weight_decay, decay and clip_norm."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer. A field that the chosen optimizer does not read must keep its default."""

    name: OptimizerName = "adamw"
    """adamw decays the weights apart from the gradient; adam adds L2 to the gradient."""
    lr: float = 3e-4
    """Peak learning rate, shaped by `schedule`."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment (for lion: of the momentum)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    bias_correction: bool = True
    """Divide the moments by 1 - b**t."""
    weight_decay: float = 0.0
    """Decoupled decay; for adam, sgd and adagrad it is L2, for lamb it is inside the trust ratio."""
    decay: Literal["matrices", "all"] = "matrices"
    """What is decayed: matrices and embeddings only, or biases and norms too (DeepSpeed's way)."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 is off. DeepSpeed: gradient_clipping."""
    momentum: float = 0.9
    """For sgd and muon (muon's usual value is 0.95)."""
    nesterov: bool = False
    """For sgd and muon."""
    min_coeff: float = 0.01
    """Lower bound of LAMB's trust ratio."""
    max_coeff: float = 10.0
    """Upper bound of LAMB's trust ratio."""
    muon_lr: float = 0.0
    """Learning rate of the matrices that muon orthogonalises; 0 means lr."""
    ns_steps: int = 5
    """Newton-Schulz iterations of muon."""

    def __post_init__(self) -> None:
        _check_types(self, "optim")
        for name in (
            "lr",
            "weight_decay",
            "clip_norm",
            "eps",
            "muon_lr",
            "min_coeff",
            "max_coeff",
        ):
            _positive(f"optim.{name}", getattr(self, name), allow_zero=True)
        _positive("optim.ns_steps", self.ns_steps)
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise config_error(
                    f"optim.{name}",
                    getattr(self, name),
                    "a decay lies in [0, 1)",
                    "give 0 <= value < 1",
                )
        always = {"name", "lr", "weight_decay", "decay", "clip_norm"}
        _reject_unread(self, "optim", always | OPTIMIZER_FIELDS[self.name])


ScheduleName = Literal[
    "constant",
    "cosine",
    "warmup",
    "warmup_decay",
    "warmup_cosine",
    "one_cycle",
    "lr_range_test",
]

SCHEDULE_FIELDS: Mapping[str, frozenset[str]] = {
    "constant": frozenset({"warmup_steps"}),
    "cosine": frozenset({"warmup_steps", "total_steps", "min_ratio"}),
    "warmup": frozenset({"warmup_steps", "warmup_shape", "warmup_min_lr"}),
    "warmup_decay": frozenset(
        {"warmup_steps", "warmup_shape", "warmup_min_lr", "total_steps"}
    ),
    "warmup_cosine": frozenset(
        {"warmup_steps", "warmup_shape", "warmup_min_ratio", "total_steps", "min_ratio"}
    ),
    "one_cycle": frozenset(
        {
            "cycle_min_lr",
            "cycle_first_steps",
            "cycle_second_steps",
            "cycle_first_stairs",
            "cycle_second_stairs",
            "decay_steps",
            "decay_lr_rate",
            "cycle_momentum",
            "cycle_min_momentum",
            "cycle_max_momentum",
            "decay_momentum_rate",
        }
    ),
    "lr_range_test": frozenset(
        {"range_min_lr", "range_step_size", "range_step_rate", "range_staircase"}
    ),
}
"""What each schedule reads."""  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over updates. A field that the chosen schedule does not read must keep its default.

    warmup, warmup_decay, warmup_cosine, one_cycle and lr_range_test are DeepSpeed's WarmupLR, WarmupDecayLR,
    WarmupCosineLR, OneCycle and LRRangeTest, formula by formula; `optim.lr` is their maximum, except
    that lr_range_test does not read it.
    """

    name: ScheduleName = "cosine"
    """cosine: linear warm-up, then half a cosine to min_ratio * lr. constant: linear warm-up, then lr."""
    warmup_steps: int = 0
    """Updates until the full learning rate."""
    warmup_shape: Literal["log", "linear"] = "log"
    """DeepSpeed: warmup_type."""
    warmup_min_lr: float = 0.0
    """Learning rate at update 0."""
    warmup_min_ratio: float = 0.0
    """The same for warmup_cosine, as a share of lr."""
    total_steps: int = 0
    """Updates until the end of the decay; 0 means the run's `steps`."""
    min_ratio: float = 0.1
    """Last learning rate as a share of lr. DeepSpeed: cos_min_ratio (default 1e-4)."""
    cycle_min_lr: float = 0.0
    """Lowest learning rate of the cycle (the highest is optim.lr)."""
    cycle_first_steps: int = 2000
    """Updates of the rising half. DeepSpeed: cycle_first_step_size."""
    cycle_second_steps: int = 0
    """Updates of the falling half; 0 means the same as the first."""
    cycle_first_stairs: int = 0
    """Stairs of the rising half; 0 is smooth."""
    cycle_second_stairs: int = 0
    """Stairs of the falling half; 0 means the same as the first."""
    decay_steps: int = 0
    """Updates per unit of decay after the cycle; 0 is no decay. DeepSpeed: decay_step_size."""
    decay_lr_rate: float = 0.0
    """Decay per decay_steps after the cycle."""
    cycle_momentum: bool = True
    """Cycle b1 (momentum for sgd) inversely to the learning rate."""
    cycle_min_momentum: float = 0.8
    """DeepSpeed: cycle_min_mom."""
    cycle_max_momentum: float = 0.9
    """DeepSpeed: cycle_max_mom."""
    decay_momentum_rate: float = 0.0
    """DeepSpeed: decay_mom_rate."""
    range_min_lr: float = 1e-3
    """DeepSpeed: lr_range_test_min_lr."""
    range_step_size: int = 2000
    """DeepSpeed: lr_range_test_step_size."""
    range_step_rate: float = 1.0
    """DeepSpeed: lr_range_test_step_rate."""
    range_staircase: bool = False
    """DeepSpeed: lr_range_test_staircase."""

    def __post_init__(self) -> None:
        _check_types(self, "schedule")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                _positive(f"schedule.{f.name}", value, allow_zero=True)
        _reject_unread(self, "schedule", {"name"} | SCHEDULE_FIELDS[self.name])


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    path: tuple[str, ...] = ("shakespeare",)
    """One or more of: `shakespeare` (bundled), a .txt, .jsonl or .parquet file, a folder of those or of array_record files, `tfds:NAME`."""
    weights: tuple[float, ...] = ()
    """Share of each path in the mixture; empty means in proportion to size."""
    eval_path: tuple[str, ...] = ()
    """Held-out text; empty holds out `eval_fraction` of the documents of `path` (or takes the set's validation split)."""
    eval_fraction: float = 0.05
    """Share of documents held out when there is no eval_path and no validation split."""
    text_field: str = "text"
    """The column or key that holds the text."""
    tokenizer: str = "byte"
    """`byte`; `bpe` (trained on the training text to model.vocab_size, kept in the run directory); or the path of a tokenizer.json."""
    document_mask: bool = True
    """Attention stays inside a document where several share a row."""
    shuffle: bool = True
    """Shuffle documents, differently in each epoch, by the run's seed."""
    cache_dir: str = "~/.cache/jaxspeed"
    """Where prepared data sets are kept."""
    prefetch: int = 2
    """Batches prepared ahead of the devices."""

    def __post_init__(self) -> None:
        _check_types(self, "data")
        if not self.path:
            raise config_error(
                "data.path",
                self.path,
                "there is nothing to read",
                "give a file, a folder, tfds:NAME or shakespeare",
            )
        if self.weights and len(self.weights) != len(self.path):
            raise config_error(
                "data.weights",
                self.weights,
                f"there are {len(self.path)} paths",
                "give one weight per path, or none",
            )
        for weight in self.weights:
            _positive("data.weights", weight)
        if not 0 < self.eval_fraction < 1:
            raise config_error(
                "data.eval_fraction",
                self.eval_fraction,
                "a share lies between 0 and 1",
                "give for instance 0.05",
            )
        _positive("data.prefetch", self.prefetch)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept on disk. A run always saves when it ends or is stopped."""

    every: int = 500
    """Updates between checkpoints; 0 saves only at the end."""
    keep: int = 3
    """Newest checkpoints kept; 0 keeps all."""
    asynchronous: bool = True
    """Write in the background while training goes on."""

    def __post_init__(self) -> None:
        _check_types(self, "checkpoint")
        _positive("checkpoint.every", self.every, allow_zero=True)
        _positive("checkpoint.keep", self.keep, allow_zero=True)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out text, during the run and at its end."""

    every: int = 500
    """Updates between evaluations; 0 evaluates only at the end."""
    batches: int = 8
    """Global batches per evaluation; 0 takes all held-out text."""
    sample_tokens: int = 200
    """Length of the text sampled at each evaluation; 0 for none."""
    prompt: str = "\n"
    """What the sample starts with."""
    temperature: float = 0.8
    """Of the sample; 0 is greedy."""

    def __post_init__(self) -> None:
        _check_types(self, "eval")
        for name in ("every", "batches", "sample_tokens", "temperature"):
            _positive(f"eval.{name}", getattr(self, name), allow_zero=True)


RematPolicy = Literal["none", "full", "dots", "attention"]

REMAT_POLICIES = get_args(RematPolicy)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Generic[M]):
    """A training run."""

    model: M
    """The model family's Config."""
    steps: int
    """Updates to train for."""
    seq_len: int
    """Tokens per sequence (T)."""
    global_batch_size: int | None = None
    """Sequences per update. Of this, micro_batch_size and accumulate, give one or two; the mesh defines the rest. DeepSpeed: train_batch_size."""
    micro_batch_size: int | None = None
    """Sequences per device and micro-step. DeepSpeed: train_micro_batch_size_per_gpu."""
    accumulate: int | None = None
    """Micro-steps per update (A). DeepSpeed: gradient_accumulation_steps."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Arrangement of the devices."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """What is sharded."""
    dtype: DTypeConfig = field(default_factory=DTypeConfig)
    """Precision."""
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    """Loss scaling for float16."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over time."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text and tokens."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Held-out evaluation and samples."""
    remat: RematPolicy = "none"
    """What is computed again in the backward pass: none; full (keep only each layer's input); dots (keep matrix products); attention (keep what attention reads and gives)."""
    attention: Literal["auto", "xla", "cpu", "cudnn", "splash"] = "auto"
    """Attention kernel; auto takes the fastest that device, dtype and shape allow, and says which."""
    seed: int = 0
    """Of initialisation, dropout and data order."""
    log_every: int = 10
    """Updates between lines of metrics.jsonl."""
    workdir: str = ""
    """Run directory; empty means runs/NAME of the recipe."""
    init: str = ""
    """Start from the parameters of this run or checkpoint directory (a fresh optimizer, step 0)."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto continues the newest whole checkpoint in workdir; never refuses a workdir that has one; must fails without one."""
    virtual_devices: int = 0
    """Split the CPU into this many devices (to try a mesh on a laptop); 0 takes the machine's own."""
    compile_cache: str = "~/.cache/jaxspeed/xla"
    """Persistent compilation cache; empty turns it off."""
    coordinator: str = ""
    """host:port of process 0, for several processes outside Slurm, GKE and Cloud TPU (which are recognised)."""
    num_processes: int = 0
    """Processes in the run, with coordinator."""
    process_id: int = -1
    """This process, 0 to num_processes - 1, with coordinator."""

    def __post_init__(self) -> None:
        _check_types(self, "")
        for name in ("steps", "seq_len", "log_every"):
            _positive(name, getattr(self, name))
        for name in ("global_batch_size", "micro_batch_size", "accumulate"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        _positive("virtual_devices", self.virtual_devices, allow_zero=True)

    def validate(self, device_count: int) -> "BatchShape":
        """Checks the classes against each other and against the devices; returns the batch sizes.

        Raises:
            ConfigError: names the first setting that cannot be.
        """
        sizes = self.mesh.sizes(device_count)
        limit = getattr(self.model, "max_seq_len", self.seq_len)
        if self.seq_len > limit:
            raise config_error(
                "seq_len",
                self.seq_len,
                f"the model has {limit} positions",
                f"give --seq_len {limit} or less, or a larger model.max_seq_len",
            )
        if self.dtype.compute != "float16" and self.loss_scale != LossScaleConfig():
            raise ConfigError(
                f"loss_scale has no effect with dtype.compute={self.dtype.compute!r}; remove it, or set dtype.compute float16"
            )
        if bool(self.coordinator) != (self.num_processes > 0) or bool(
            self.coordinator
        ) != (self.process_id >= 0):
            raise ConfigError(
                "coordinator, num_processes and process_id go together; give all three or none"
            )
        if self.process_id >= max(1, self.num_processes):
            raise config_error(
                "process_id",
                self.process_id,
                f"there are num_processes={self.num_processes}",
                f"give 0 to {self.num_processes - 1}",
            )
        return resolve_batch(
            self.global_batch_size,
            self.micro_batch_size,
            self.accumulate,
            math.prod(sizes[axis] for axis in BATCH_AXES),
        )


@dataclass(frozen=True)
class BatchShape:
    """The three batch sizes of a run, which agree: global_size = micro_size * shards * accumulate."""

    global_size: int
    micro_size: int
    accumulate: int
    shards: int


def resolve_batch(
    global_size: int | None, micro: int | None, accumulate: int | None, shards: int
) -> BatchShape:
    """Derives the batch sizes that were not given.

    Args:
        global_size: sequences per update.
        micro: sequences per device and micro-step.
        accumulate: micro-steps per update.
        shards: how many ways the mesh splits a batch (data x fsdp).

    Raises:
        ConfigError: none given, or they contradict; names the divisor that fails and the nearest legal values.
    """
    if global_size is None and micro is None:
        raise ConfigError(
            "global_batch_size and micro_batch_size are both missing, so the batch is not defined; give --global_batch_size or --micro_batch_size"
        )
    if global_size is None:
        assert micro is not None
        accumulate = accumulate or 1
        return BatchShape(micro * shards * accumulate, micro, accumulate, shards)
    divisor = shards * (micro or 1) * (accumulate or 1)
    parts = [f"{shards} batch shards of the mesh"]
    parts += [f"micro_batch_size={micro}"] if micro is not None else []
    parts += [f"accumulate={accumulate}"] if accumulate is not None else []
    if micro is not None and accumulate is not None and global_size != divisor:
        raise ConfigError(
            f"global_batch_size={global_size} is not {' x '.join(parts)} = {divisor}; "
            f"set global_batch_size to {divisor}, or leave one of the three out"
        )
    if global_size % divisor:
        low = global_size // divisor * divisor
        nearest = f"{low} or {low + divisor}" if low else f"{divisor}"
        raise ConfigError(
            f"global_batch_size={global_size} does not divide by {' x '.join(parts)} = {divisor}; nearest legal: {nearest}"
        )
    rest = global_size // divisor
    if micro is not None:
        return BatchShape(global_size, micro, accumulate or rest, shards)
    return BatchShape(global_size, rest, accumulate or 1, shards)


def _reject_unread(config: Any, where: str, read: set[str] | frozenset[str]) -> None:
    """Raises if a field that `config.name` does not read differs from its default."""
    for f in dataclasses.fields(config):
        if f.name not in read and getattr(config, f.name) != f.default:
            users = [
                n
                for n, fs in {**OPTIMIZER_FIELDS, **SCHEDULE_FIELDS}.items()
                if f.name in fs
            ]
            raise ConfigError(
                f"{where}.{f.name}={getattr(config, f.name)!r} has no effect with {where}.name={config.name!r} "
                f"(it is read by {', '.join(users)}); remove it or change {where}.name"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the configuration as nested plain values, for JSON."""
    return {
        f.name: to_dict(value)
        if dataclasses.is_dataclass(value := getattr(config, f.name))
        else list(value)
        if isinstance(value, tuple)
        else value
        for f in dataclasses.fields(config)
    }


def diff(config: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Returns (field, value, default) for every leaf that is not at its default, nested fields by dotted name."""
    rows: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(config):
        value, default = (
            getattr(config, f.name),
            None if f.default is dataclasses.MISSING else f.default,
        )
        if dataclasses.is_dataclass(value):
            rows += diff(value, f"{prefix}{f.name}.")
        elif value != default:
            rows.append((prefix + f.name, value, default))
    return rows
