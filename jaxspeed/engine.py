# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed-shaped API: `initialize` and `Engine`, a thin object over the pure step.

`train_batch` is the step. DeepSpeed's three calls (`engine(batch)`, `backward`, `step`) are the
same compiled step, run when the accumulation is complete: until then a micro-batch is only kept,
and its loss is a handle that is computed when somebody reads it. So both ways give the same
parameters, to the last bit, at the same cost.
"""

import dataclasses
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspeed import launch, nn
from jaxspeed.checkpoint import Checkpointer
from jaxspeed.config import ConfigError, RunConfig, ScheduleConfig, to_dict
from jaxspeed.deepspeed_json import Answer, apply_deepspeed, load_deepspeed_json
from jaxspeed.lora import without
from jaxspeed.program import Program, State, build_program, notices
from jaxspeed.step import make_grad_fn
from jaxspeed.types import LossFn, Params, TrainingError


logger = logging.getLogger(__name__)

HostBatch = Mapping[str, np.ndarray | jax.Array]


def initialize(
    *,
    model: Any,
    config: str | Path | Mapping[str, Any] | RunConfig,
    loss_fn: LossFn | None = None,
    devices: Sequence[Any] | None = None,
    seed: int | None = None,
) -> "Engine":
    """Returns an engine that trains `model` as `config` says.

    Args:
        model: a family's Config (its parameters are made in their shards), a function
            `nnx.Rngs -> nnx.Module` or a class (likewise), or an nnx.Module (its parameters are copied).
        config: a DeepSpeed JSON (path or dict), or a RunConfig (`model` takes the place of its model).
        loss_fn: `(model, batch) -> (sum, count)`; by default that of the run's task, the next-token loss.
        devices: all by default.
        seed: of initialisation and dropout, with a DeepSpeed JSON (default 0); a RunConfig has its own.

    Raises:
        ConfigError: a setting cannot be, with what to change.

    Example:
        >>> import jaxspeed, numpy as np
        >>> from models.gpt2 import Config
        >>> model = Config(vocab_size=64, max_seq_len=16, num_layers=2, num_heads=2, d_model=32)
        >>> engine = jaxspeed.initialize(model=model, config={"train_batch_size": 8})
        >>> metrics = engine.train_batch({"inputs": np.zeros((8, 16), np.int32)})
        >>> bool(metrics["train/loss"] > 0)
        True
    """
    launch.quiet()
    launch.keep_freed_memory()
    answers: list[Answer] = []
    make_model, values = _maker(model)
    if isinstance(config, RunConfig):
        if seed is not None:
            raise ConfigError(
                f"seed={seed} has no effect with a RunConfig, which has its own; set RunConfig.seed"
            )
        run = dataclasses.replace(config, model=model) if make_model is None else config
    else:
        ds = config if isinstance(config, Mapping) else load_deepspeed_json(config)
        length = getattr(model, "max_seq_len", 1024)
        base = RunConfig(
            model=model,
            steps=1,
            seq_len=length,
            schedule=ScheduleConfig(name="constant"),
            seed=seed or 0,
        )
        run, answers = apply_deepspeed(base, ds)
    program = build_program(
        run, make_model=make_model, loss_fn=loss_fn, devices=devices
    )
    for notice in notices(program):
        logger.warning("%s", notice)
    state = program.init_state()
    if values is not None:
        # Copies, since the first step takes over (donates) the state.
        move = lambda x, like: jax.device_put(
            np.asarray(x, like.dtype), like.sharding, may_alias=False
        )
        shapes = without(program.abstract_state["params"])
        state["params"] |= jax.tree.map(move, values, shapes)
    return Engine(program, state, answers)


class Engine:
    """A train state and the program that advances it. Make it with `initialize`."""

    def __init__(
        self, program: Program, state: State, answers: Sequence[Answer] = ()
    ) -> None:
        """Takes over `state`: its arrays are donated to the first step."""
        self.program = program
        self.state = state
        self.config_answers = list(answers)
        """What became of each key of the DeepSpeed JSON."""
        self._micro: list[MicroLoss] = []
        self._metrics: dict[str, jax.Array] | None = None
        self._skipped_before: int | jax.Array = 0
        self._training = True

    @property
    def params(self) -> Params:
        """The float32 parameters, sharded: a nested dict of global arrays."""
        return self.state["params"]

    @property
    def global_steps(self) -> int:
        """Updates so far, skipped ones included."""
        return int(self.state["step"])

    @property
    def skipped_steps(self) -> int:
        """Updates that changed nothing because a gradient was not finite."""
        return int(self.state["skipped"])

    def train_batch(self, batch: HostBatch) -> dict[str, jax.Array]:
        """Runs one update on a global batch (of several processes: this one's rows of it).

        Args:
            batch: arrays of global_batch_size rows; see `jaxspeed.types.Batch`.

        Returns:
            Metrics, as device scalars: reading one waits for the step.

        Raises:
            ConfigError: the number of rows does not fit.
            TrainingError: an earlier update overflowed at the smallest loss scale (it is looked
                at when that update is done, so that the host does not wait for it).
        """
        device_batch = self.program.put_batch(_rows(batch))
        self._refuse_exhausted()
        # Not read here, so that the host does not wait for the last step.
        self._skipped_before = (
            self.skipped_steps
            if self._metrics is None
            else self._metrics["train/skipped"]
        )
        self.state, metrics = self.program.train_step(self.state, device_batch)
        self._metrics = metrics
        return metrics

    def __call__(self, batch: HostBatch) -> "MicroLoss":
        """Returns the loss of one micro-batch (micro_batch_size rows per batch shard) as a handle for `backward`.

        Raises:
            ConfigError: the number of rows does not fit.
        """
        rows = _rows(batch)
        self.program.micro.check_rows(rows)
        return MicroLoss(self, rows)

    forward = __call__

    def backward(self, loss: "MicroLoss") -> "MicroLoss":
        """Adds a micro-batch to the update that `step` will make.

        Raises:
            ConfigError: `loss` is not what this engine returned, was counted before, has other arrays than
                the micro-batches before it, or the accumulation is already complete.
        """
        if not isinstance(loss, MicroLoss) or loss.engine is not self:
            raise ConfigError(
                f"backward({type(loss).__name__}): takes what engine(batch) returned, unchanged; put your own loss into initialize(loss_fn=...)"
            )
        if not self._training:
            raise ConfigError(
                "backward: the engine is in evaluation mode; call engine.train() first"
            )
        if len(self._micro) == self.program.batch.accumulate:
            raise ConfigError(
                f"backward: {len(self._micro)} micro-batches are waiting already (accumulate); call engine.step() after each backward"
            )
        if loss.counted:
            raise ConfigError(
                "backward: this micro-batch was counted already; call loss = engine(batch) for each backward"
            )
        if self._micro and _form(loss.batch) != _form(self._micro[0].batch):
            raise ConfigError(
                f"backward: a micro-batch of {_form(loss.batch)} cannot join one of {_form(self._micro[0].batch)} in one update; pad them alike"
            )
        loss.counted = True
        self._micro.append(loss)
        return loss

    def step(self) -> None:
        """Updates the parameters if all micro-batches of the accumulation are there; otherwise does nothing, as in DeepSpeed."""
        if not self._micro:
            raise ConfigError(
                "step: no micro-batch is waiting; call loss = engine(batch) and engine.backward(loss) first"
            )
        if not self.is_gradient_accumulation_boundary():
            return
        done, self._micro = self._micro, []
        names = done[0].batch.keys()
        # Rows of micro-step i must land in slot i of (A, B, T).
        metrics = self.train_batch(
            {n: np.concatenate([m.batch[n] for m in done]) for n in names}
        )
        for index, handle in enumerate(done):
            handle.settle(metrics["train/micro_losses"], index)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step` will update the parameters."""
        return len(self._micro) == self.program.batch.accumulate

    def train(self, mode: bool = True) -> "Engine":
        """Allows `backward` again after `eval`, as in PyTorch; returns the engine.

        Nothing else depends on the mode: a loss that is read before `step` is computed without
        dropout and without what routers add, and an update always uses both.
        """
        self._training = mode
        return self

    def eval(self) -> "Engine":
        """Makes `backward` an error until `train` is called; returns the engine."""
        return self.train(False)

    def train_batch_size(self) -> int:
        """Returns the rows of one update over all devices."""
        return self.program.batch.global_size

    def train_micro_batch_size_per_gpu(self) -> int:
        """Returns the rows of one micro-step on one batch shard."""
        return self.program.batch.micro_size

    def gradient_accumulation_steps(self) -> int:
        """Returns the micro-steps of one update."""
        return self.program.batch.accumulate

    def zero_optimization_stage(self) -> int:
        """Returns the ZeRO stage."""
        return self.program.run.zero.stage

    def eval_batch(self, batch: HostBatch) -> float:
        """Returns the mean loss of a global batch, without dropout or gradients."""
        rows = _rows(batch)
        sums = self.program.eval_step(
            self.params, self.program.put_batch(rows, training=False)
        )
        return float(sums.total / jnp.maximum(sums.count, 1.0))

    def get_global_grad_norm(self) -> float:
        """Returns the last update's gradient norm before clipping; after clipping it is the metric `train/grad_norm_clipped`."""
        return float(self._last()["train/grad_norm"])

    def get_lr(self) -> list[float]:
        """Returns the last update's learning rate, in a list of one as in DeepSpeed: there is one group of parameters."""
        return [float(self._last()["train/lr"])]

    def was_step_applied(self) -> bool:
        """Whether the last update changed the parameters (False: a gradient was not finite)."""
        return int(self._last()["train/skipped"]) == int(self._skipped_before)

    def first_nonfinite(self, batch: HostBatch) -> str | None:
        """Returns the path of the first parameter whose gradient on this batch is not finite, or None.

        It costs a forward and backward pass; use it to find out why a step was skipped.
        """
        return first_nonfinite(self.program, self.state, _rows(batch))

    def save_checkpoint(
        self, directory: str | Path, client_state: Mapping[str, Any] | None = None
    ) -> int:
        """Saves the whole train state, to be called by every process; returns its step. Returns when it is on disk.

        Args:
            directory: holds one folder per step; older ones stay.
            client_state: anything JSON can hold; `load_checkpoint` gives it back.
        """
        step = self.global_steps
        with Checkpointer(Path(directory), keep=0, asynchronous=False) as checkpoints:
            meta = {
                "model": to_dict(self.program.run.model)
                if dataclasses.is_dataclass(self.program.run.model)
                else {}
            }
            checkpoints.save(
                step,
                self.state,
                meta={**meta, "client_state": dict(client_state or {})},
            )
        return step

    def load_checkpoint(
        self, directory: str | Path, step: int | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Restores a train state saved on any mesh and stage; returns its step and client_state.

        Args:
            directory: what `save_checkpoint` was given.
            step: which one; the newest whole one by default.

        Raises:
            ConfigError: none is there (it lists what is), it is damaged, or it is another model's.
        """
        with Checkpointer(Path(directory), keep=0, asynchronous=False) as checkpoints:
            self.state, meta = checkpoints.restore(step, self.program.abstract_state)
        self._metrics, self._micro = None, []
        return self.global_steps, meta.get("client_state", {})

    def _refuse_exhausted(self) -> None:
        scale = self.state["loss_scale"]
        if scale and scale.exhausted.is_ready() and bool(scale.exhausted):
            minimum = self.program.run.loss_scale.minimum
            raise TrainingError(
                f"a gradient overflowed at the smallest loss scale (loss_scale.minimum={minimum:g}), by step {self.global_steps}; "
                "use bfloat16 (bf16.enabled), or a lower learning rate"
            )

    def _last(self) -> dict[str, jax.Array]:
        if self._metrics is None:
            raise ConfigError(
                "no update has been made yet; call train_batch or the three calls first"
            )
        return self._metrics


class MicroLoss:
    """The loss of one micro-batch, computed when it is read.

    Before `engine.step()` reading it costs a forward pass; afterwards the step's own figure is there.
    """

    def __init__(self, engine: Engine, batch: dict[str, np.ndarray]) -> None:
        """Keeps the micro-batch for `Engine.backward`."""
        self.engine = engine
        self.batch = batch
        self.counted = False
        self._settled: tuple[jax.Array, int] | None = None
        self._value: float | None = None

    def settle(self, losses: jax.Array, index: int) -> None:
        """Takes the value from the step that trained on this micro-batch."""
        self._settled = (losses, index)

    def item(self) -> float:
        """Returns the mean loss of the micro-batch."""
        if self._settled is not None:
            return float(self._settled[0][self._settled[1]])
        if self._value is None:
            program = self.engine.program
            sums = program.eval_step(
                self.engine.params, program.micro.put_batch(self.batch, training=False)
            )
            self._value = float(sums.total / jnp.maximum(sums.count, 1.0))
        return self._value

    __float__ = item

    def __format__(self, spec: str) -> str:
        """Formats the value, so that f"{loss:.3f}" works."""
        return format(self.item(), spec)

    def __repr__(self) -> str:
        """Shows the value."""
        return f"MicroLoss({self.item():.6f})"


def first_nonfinite(
    program: Program, state: State, rows: Mapping[str, np.ndarray]
) -> str | None:
    """Returns the path of the first parameter with a gradient that is not finite on these rows, or None."""

    def probe(state: State, batch: Mapping[str, jax.Array]) -> Any:
        scale = (
            state["loss_scale"].scale
            if state["loss_scale"]
            else jnp.ones((), jnp.float32)
        )
        key = jax.random.fold_in(state["key"], state["step"])
        gradients, _ = make_grad_fn(program.spec)(state["params"], batch, scale, key)
        return jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)), gradients)

    finite = jax.jit(probe)(state, program.put_batch(rows))
    for path, ok in jax.tree_util.tree_leaves_with_path(finite):
        if not bool(ok):
            return ".".join(str(entry.key) for entry in path)
    return None


def _rows(batch: HostBatch) -> dict[str, np.ndarray]:
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"batch is a {type(batch).__name__}: give a dict of arrays, such as {{'inputs': ...}}"
        )
    return {name: np.asarray(array) for name, array in batch.items()}


def _form(batch: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns the dtype and shape of each array."""
    return {
        name: f"{array.dtype}{list(array.shape)}"
        for name, array in sorted(batch.items())
    }


def _maker(model: Any) -> tuple[Callable[[Any], Any] | None, Params | None]:
    """Returns (function of nnx.Rngs that makes the model, or None for a Config; its parameters if it exists already)."""
    if nn.is_module(model):
        graphdef, params, _ = nn.split(model)
        # The values come later: a program that held them would hold them twice.
        return lambda rngs: nn.merge(
            graphdef, jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
        ), params
    if hasattr(model, "build"):
        if not inspect.isclass(model):
            return None, None
    elif callable(model):
        make: Callable[..., Any] = model
        function = model.__init__ if inspect.isclass(model) else model
        if "rngs" in inspect.signature(function).parameters:
            return lambda rngs: make(rngs=rngs), None
        return make, None
    raise ConfigError(
        f"model={type(model).__name__}: not a model; give a family's Config (models.gpt2.Config(...)), an nnx.Module, or a function of nnx.Rngs"
    )
