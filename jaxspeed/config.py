# SPDX-License-Identifier: Apache-2.0
"""The run configuration: one tree of frozen dataclasses, the only home of defaults.

A recipe is a Python file with `config() -> RunConfig`; the command line overrides its fields by
name (`jaxspeed.cli`); a DeepSpeed JSON is translated into it (`jaxspeed.deepspeed_json`). The
string under a field is its documentation, on the command line and on the API page alike.
`__post_init__` checks one class; `RunConfig.validate` checks across classes and against the
devices. Layer 0: standard library only. ADR 0002.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args

from jaxspeed.batch import BatchShape, resolve_batch
from jaxspeed.checks import (
    ConfigError,
    check_types,
    config_error,
    divisors as divisors,
    no_negatives,
    positive,
    reject_unread,
    suggest as suggest,
)
from jaxspeed.config_moe import MoeConfig as MoeConfig
from jaxspeed.config_task import (
    TASK_COLUMNS as TASK_COLUMNS,
    TASK_FIELDS as TASK_FIELDS,
    TASK_METRICS as TASK_METRICS,
    TASK_SETTINGS,
    TaskConfig,
    TaskName as TaskName,
)


M = TypeVar("M")

MESH_AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
"""Mesh axes, outermost (slowest link) first."""

BATCH_AXES = ("data", "fsdp", "expert")
"""The axes over which the rows of a batch are split."""

SHARD_AXES = ("fsdp", "expert", "context")
"""The axes over which ZeRO shards the model state; `data` replicates it. Parameters of experts, which `expert` splits anyway, over the others."""

TOKEN_AXES = ("data", "fsdp", "expert", "context")
"""The axes over which tokens are split: rows over BATCH_AXES, each row over `context`. Sums over tokens are sums over these."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged. The sizes multiply to the number of devices."""

    stage: int = 1
    """Stages of the layers (pipeline parallelism): each device has a part of them, and micro-batches go from one to the next. DeepSpeed: pipeline.stages."""
    data: int = 1
    """Replicas of the (possibly sharded) model state; the batch is split over them. With fsdp > 1 this is hybrid sharding (MiCS)."""
    fsdp: int = -1
    """ZeRO shards of the model state; the batch is split over them too. -1 takes the devices that are left."""
    expert: int = 1
    """Shares of the experts of a mixture (expert parallelism): tokens travel to them. For all else it is as fsdp. DeepSpeed: ep_size."""
    context: int = 1
    """Parts of each sequence (sequence parallelism), for what is too long for one device. The model state is sharded over it too. DeepSpeed: sequence_parallel_size."""
    tensor: int = 1
    """Shards of each matrix product (Megatron's tensor parallelism)."""

    def __post_init__(self) -> None:
        check_types(self, "mesh")
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
    secondary: bool = False
    """At stage 3, shard the master parameters and the optimizer state over `data` too, and keep a second, compute-precision copy sharded over fsdp alone: layers are gathered inside a group, and between groups parameters travel once a step (ZeRO++ hpZ). DeepSpeed: zero_hpz_partition_size."""

    def __post_init__(self) -> None:
        check_types(self, "zero")
        positive(
            "zero.param_persistence_threshold",
            self.param_persistence_threshold,
            allow_zero=True,
        )
        if self.secondary and self.stage != 3:
            raise ConfigError(
                f"zero.secondary has no effect at zero.stage={self.stage}, which gathers parameters once a step anyway; remove it, or set zero.stage 3"
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
    frozen: Literal["auto", "float32", "compute"] = "auto"
    """How parameters that are not trained (`freeze`, `lora`) are stored. auto: as float32 on CPU (which slices no 16-bit numbers), in compute elsewhere."""

    def __post_init__(self) -> None:
        check_types(self, "dtype")


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
        check_types(self, "loss_scale")
        positive("loss_scale.static", self.static, allow_zero=True)
        positive("loss_scale.window", self.window)
        positive("loss_scale.hysteresis", self.hysteresis)
        positive("loss_scale.minimum", self.minimum)
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
"""What each optimizer reads, beyond lr, weight_decay, decay, the groups and clip_norm."""


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
    lr_groups: tuple[tuple[str, float], ...] = ()
    """(pattern over parameter paths, factor on the learning rate), as in ("head.*", 10.0); of several that match, the last decides."""
    decay_groups: tuple[tuple[str, float], ...] = ()
    """(pattern, weight decay) in place of weight_decay and of what `decay` chooses; of several that match, the last decides."""
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
        check_types(self, "optim")
        for name in (
            "lr",
            "weight_decay",
            "clip_norm",
            "eps",
            "muon_lr",
            "min_coeff",
            "max_coeff",
        ):
            positive(f"optim.{name}", getattr(self, name), allow_zero=True)
        positive("optim.ns_steps", self.ns_steps)
        for pattern, factor in self.lr_groups:
            positive(f"optim.lr_groups: {pattern}", factor)
        for pattern, decay in self.decay_groups:
            positive(f"optim.decay_groups: {pattern}", decay, allow_zero=True)
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise config_error(
                    f"optim.{name}",
                    getattr(self, name),
                    "a decay lies in [0, 1)",
                    "give 0 <= value < 1",
                )
        always = {"name", "lr", "weight_decay", "decay", "clip_norm"}
        always |= {"lr_groups", "decay_groups"}
        reject_unread(self, "optim", always, OPTIMIZER_FIELDS)


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
        check_types(self, "schedule")
        no_negatives(self, "schedule")
        reject_unread(self, "schedule", {"name"}, SCHEDULE_FIELDS)


CleaningStep = Literal[
    "html",
    "nfc",
    "nfkc",
    "control",
    "stop_words",
    "whitespace",
    "duplicates",
    "near_duplicates",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    path: tuple[str, ...] = ("shakespeare",)
    """One or more of: `shakespeare` (bundled), a .txt, .jsonl or .parquet file, a folder of those or of array_record files, `tfds:NAME`. Tasks with records read .csv, .tsv and SQuAD's .json too, and no .txt. `#SPLIT` after one names a split."""
    weights: tuple[float, ...] = ()
    """Share of each path in the mixture; empty means in proportion to size."""
    eval_path: tuple[str, ...] = ()
    """Held-out text or records; empty holds out `eval_fraction` of those of `path` (or takes the set's validation split; of records, else its test split)."""
    eval_fraction: float = 0.05
    """Share of documents held out when there is no eval_path and no validation split."""
    eval_on: Literal["held_out", "train"] = "held_out"
    """What evaluations read: what is held out, or what is trained on, to see how much was learnt by heart."""
    text_field: str = "text"
    """The column or key that holds the text."""
    clean: tuple[CleaningStep, ...] = ()
    """What is done to texts: `html` (tags and entities), `nfc` or `nfkc` (Unicode forms), `control` (characters without a shape), `stop_words` (English ones removed), `whitespace`, in this order; `duplicates` or `near_duplicates` leaves out repeated items, and those that are held out."""
    tokenizer: str = "auto"
    """`auto`: the one of `init`, or bytes; `byte`; `bpe`, `wordpiece` or `unigram` (trained on the training text to model.vocab_size, kept in the run directory); or the path of a tokenizer.json."""
    document_mask: bool = True
    """Attention stays inside a document where several share a row."""
    shuffle: bool = True
    """Shuffle documents, differently in each epoch, by the run's seed."""
    cache_dir: str = "~/.cache/jaxspeed"
    """Where prepared data sets are kept."""
    prefetch: int = 2
    """Batches prepared ahead of the devices."""

    def __post_init__(self) -> None:
        check_types(self, "data")
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
            positive("data.weights", weight)
        if not 0 < self.eval_fraction < 1:
            raise config_error(
                "data.eval_fraction",
                self.eval_fraction,
                "a share lies between 0 and 1",
                "give for instance 0.05",
            )
        if self.eval_on == "train" and self.eval_path:
            why = f"data.eval_path={self.eval_path} is not evaluated on then"
            change = "leave one of them out"
            raise config_error("data.eval_on", self.eval_on, why, change)
        for pair in (("nfc", "nfkc"), ("duplicates", "near_duplicates")):
            if set(pair) <= set(self.clean):
                why = f"{pair[1]!r} does what {pair[0]!r} does, and more"
                change = f"leave out {pair[0]!r}"
                raise config_error("data.clean", self.clean, why, change)
        positive("data.prefetch", self.prefetch)

    @property
    def evaluated(self) -> str:
        """What evaluations read, in words."""
        return "held-out" if self.eval_on == "held_out" else "training"


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
        check_types(self, "checkpoint")
        positive("checkpoint.every", self.every, allow_zero=True)
        positive("checkpoint.keep", self.keep, allow_zero=True)


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
        check_types(self, "eval")
        for name in ("every", "batches", "sample_tokens", "temperature"):
            positive(f"eval.{name}", getattr(self, name), allow_zero=True)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): y = x W + scale (x A) B, with A and B trained and W frozen."""

    rank: int = 0
    """Columns of A and rows of B (R); 0 trains the model itself."""
    alpha: float = 16.0
    """scale is alpha / rank."""
    rslora: bool = False
    """scale is alpha / sqrt(rank) (arXiv 2312.03732)."""
    dropout: float = 0.0
    """Share of x dropped on its way to A, in training."""
    targets: tuple[str, ...] = ("*.block.*",)
    """Patterns over parameter paths; of what they match, each matrix gets an adapter (embeddings, biases and norms are none)."""
    trained: tuple[str, ...] = ()
    """Patterns of parameters to train whole beside the adapters, a new head for instance. PEFT: modules_to_save."""
    init: str = ""
    """Start from the adapters in this folder, in PEFT's format; empty: A is drawn, B is 0."""

    def __post_init__(self) -> None:
        check_types(self, "lora")
        positive("lora.rank", self.rank, allow_zero=True)
        positive("lora.alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise config_error(
                "lora.dropout",
                self.dropout,
                "a share lies in [0, 1)",
                "give 0 <= value < 1",
            )
        for f in dataclasses.fields(self):
            if self.rank == 0 and getattr(self, f.name) != f.default:
                raise ConfigError(
                    f"lora.{f.name}={getattr(self, f.name)!r} has no effect with lora.rank=0; give lora.rank too"
                )


RematPolicy = Literal["none", "full", "dots", "attention", "offload"]

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
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: patterns over dotted paths, as in embed, "layers.*", "*.bias"; `*` stands for any characters."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters in place of the model's own parameters."""
    dtype: DTypeConfig = field(default_factory=DTypeConfig)
    """Precision."""
    pipeline: Literal["1f1b", "gpipe"] = "1f1b"
    """Order of the work where mesh.stage splits the layers. 1f1b keeps the inputs of at most 2 stages - 1 micro-batches, gpipe those of all."""
    pipeline_chunks: int = 1
    """Parts of the layers that each stage has (interleaved schedule): the idle share of m micro-batches is (stages - 1) / (chunks m + stages - 1)."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    """Experts: what is dropped, drawn and added to the loss."""
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    """Loss scaling for float16."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over time."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text and tokens."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is learnt from it."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Held-out evaluation and samples."""
    remat: RematPolicy = "none"
    """What is computed again in the backward pass: none; full (keep only each layer's input); dots (keep matrix products); attention (keep what attention reads and gives); offload (keep each layer's input, in the host's memory)."""
    mlp_tiles: int = 1
    """Parts of each device's tokens that MLPs work on one after another: of very long sequences the inner activations of an MLP are most of a layer's memory. They are computed again in the backward pass, whatever remat says."""
    context: Literal["ulysses", "ring"] = "ulysses"
    """How attention reads a sequence that mesh.context splits. ulysses: each device takes whole sequences for its share of the heads (4 all-to-all a layer and pass). ring: keys and values go around, for any number of heads and the longest sequences."""
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
        check_types(self, "")
        for name in ("steps", "seq_len", "log_every", "mlp_tiles"):
            positive(name, getattr(self, name))
        for name in ("global_batch_size", "micro_batch_size", "accumulate"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        positive("virtual_devices", self.virtual_devices, allow_zero=True)

    def validate(self, device_count: int) -> BatchShape:
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
        if self.lora.rank and self.freeze:
            raise config_error(
                "freeze",
                self.freeze,
                f"lora.rank={self.lora.rank} freezes all but the adapters",
                "remove it; lora.trained names what is trained beside them",
            )
        if self.dtype.frozen != "auto" and not (self.freeze or self.lora.rank):
            raise ConfigError(
                f"dtype.frozen={self.dtype.frozen!r} has no effect: all parameters are trained; remove it, or name some in freeze"
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
        self._validate_task()
        self._validate_experts(sizes["expert"])
        batch = self._batch_shape(sizes)
        if sizes["stage"] > batch.accumulate:
            raise config_error(
                "accumulate",
                batch.accumulate,
                f"mesh.stage={sizes['stage']} stages would wait for fewer micro-batches than there are of them",
                f"give --accumulate {sizes['stage']} or more (4 x the stages leaves a fifth of the time idle), or a smaller --micro_batch_size",
            )
        self._validate_chunks(sizes["stage"], batch.accumulate)
        return batch

    def _validate_chunks(self, stages: int, micros: int) -> None:
        positive("pipeline_chunks", self.pipeline_chunks)
        if self.pipeline_chunks == 1:
            return
        if stages == 1:
            raise config_error(
                "pipeline_chunks",
                self.pipeline_chunks,
                "it has no effect without stages",
                "remove it, or set mesh.stage",
            )
        if micros % stages:
            raise config_error(
                "accumulate",
                micros,
                f"with pipeline_chunks={self.pipeline_chunks} micro-batches go round in groups of mesh.stage={stages}",
                f"give --accumulate {micros // stages * stages} or {(micros // stages + 1) * stages}",
            )

    def _batch_shape(self, sizes: Mapping[str, int]) -> BatchShape:
        return resolve_batch(
            self.global_batch_size,
            self.micro_batch_size,
            self.accumulate,
            math.prod(sizes[axis] for axis in BATCH_AXES),
        )

    def _validate_experts(self, devices: int) -> None:
        experts = getattr(self.model, "num_experts", 0)
        if not experts:
            if self.moe != MoeConfig():
                name, value, _ = diff(self.moe)[0]
                raise ConfigError(
                    f"moe.{name}={value!r} has no effect: the model has no experts; remove it"
                )
            if devices > 1:
                raise config_error(
                    "mesh.expert",
                    devices,
                    "the model has no experts to split",
                    "give 1; mesh.fsdp is for these devices",
                )
        elif experts % devices:
            raise config_error(
                "mesh.expert",
                devices,
                f"it does not divide the model's {experts} experts",
                f"give one of {', '.join(map(str, divisors(experts)))}",
            )
        each = getattr(self.model, "experts_per_token", 2)
        if self.moe.sample_second and each != 2:
            raise ConfigError(
                f"moe.sample_second=True has no effect with model.experts_per_token={each}; remove it"
            )

    def _validate_task(self) -> None:
        name = self.task.name
        for setting, tasks in TASK_SETTINGS.items():
            section, _, leaf = setting.partition(".")
            config = getattr(self, section)
            default = getattr(type(config), leaf)
            if name not in tasks and getattr(config, leaf) != default:
                raise ConfigError(
                    f"{setting}={getattr(config, leaf)!r} has no effect with task.name={name!r} "
                    f"(it is read by {', '.join(sorted(tasks))}); remove it or change task.name"
                )
        if self.task.buckets and self.task.buckets[-1] >= self.seq_len:
            raise config_error(
                "task.buckets",
                self.task.buckets,
                f"rows of seq_len={self.seq_len} are there anyway",
                f"give lengths below {self.seq_len}",
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
