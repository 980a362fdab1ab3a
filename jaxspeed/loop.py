# SPDX-License-Identifier: Apache-2.0
"""The training loop: everything around the step that touches the world.

Data in, metrics out, evaluation, samples, checkpoints, resume, signals, report. It dispatches
step i before it reads the metrics of step i - 1, so the devices never wait for the host. What a
run writes depends on the configuration alone: an evaluation that a kill or a signal cut off is
made up for at the next start. Layer 4.
"""

import contextlib
import dataclasses
import fcntl
import functools
import logging
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import jaxspeed
from jaxspeed.agreement import (
    Disagreement,
    Neighbours,
    agree,
    told_of,
    what_is_read,
    what_runs,
)
from jaxspeed.checkpoint import Checkpointer
from jaxspeed.config import ConfigError, RunConfig, config_error, diff, to_dict
from jaxspeed.deepspeed_json import Answer, answers_table
from jaxspeed.engine import first_nonfinite
from jaxspeed.frozen import restore_frozen, save_frozen
from jaxspeed.ledger import Ledger, read_ledger
from jaxspeed.lora import without
from jaxspeed.metrics import MetricsWriter
from jaxspeed.paths import paths_of, with_part
from jaxspeed.peft import read_adapters
from jaxspeed.pretrained import read_params, refuse_frozen_head
from jaxspeed.program import Program, State, build_program, notices
from jaxspeed.progress import Progress, format_count
from jaxspeed.report import add_sample, format_bytes, report_from_run, save_run
from jaxspeed.sharding import part_of
from jaxspeed.state import bytes_per_device
from jaxspeed.tasks import Evaluation, open_task
from jaxspeed.types import Params, PyTree, TrainingError


logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    workdir: Path
    step: int
    metrics: Mapping[str, float]
    """The last evaluation's."""
    stopped_by: int = 0
    """The signal that ended it early, or 0."""


def fit(run: RunConfig, *, name: str, answers: Sequence[Answer] = ()) -> Result:
    """Trains as `run` says; continues where an earlier call in the same workdir left.

    `jaxspeed.launch.start(run)` comes first, in every process.

    Args:
        run: the configuration.
        name: of the recipe; the run directory is runs/NAME unless `run.workdir` says otherwise.
        answers: what became of the keys of a DeepSpeed JSON, to be shown.

    Raises:
        ConfigError: something in the configuration, the data or the run directory cannot be.
        TrainingError: the loss is not finite, the loss scale is exhausted, a device is out of
            memory, or another process of the job is gone.
    """
    neighbours = Neighbours()
    try:
        result = _Run(run, name, answers).fit()
    except Disagreement:
        neighbours.leave()
        raise
    except jax.errors.JaxRuntimeError as error:
        if words := _device_trouble(" ".join(str(error).split())[:300], neighbours):
            raise TrainingError(words) from error
        raise
    neighbours.leave()
    return result


class _Run:
    """One call of `fit`: the objects that the phases of a run share."""

    def __init__(self, run: RunConfig, name: str, answers: Sequence[Answer]) -> None:
        self.run, self.name, self.answers = run, name, answers
        self.workdir = Path(run.workdir or f"runs/{name}").expanduser()
        self.began = time.strftime("%Y-%m-%d %H:%M:%S")
        self.program = build_program(run)
        self.task = open_task(run, self.program)
        self.checkpoints = Checkpointer(
            self.workdir / "checkpoints",
            keep=run.checkpoint.keep,
            asynchronous=run.checkpoint.asynchronous,
        )
        self.seen = self.evaluated = self.skipped = 0
        self.saved: int | None = None
        self.evaluation: Evaluation | None = None
        self.clock = _Clock()

    def fit(self) -> Result:
        main = jax.process_index() == 0
        if jax.process_count() > 1:
            family = type(self.run.model).__module__
            agree("the run", what_runs(to_dict(self.run), self.program.mesh, family))
        with contextlib.ExitStack() as stack:
            self._claim(stack)
            start = self._find_start()
            self.progress = stack.enter_context(
                Progress(
                    steps=self.run.steps,
                    start_step=start,
                    every=self.run.log_every,
                    process_index=jax.process_index(),
                )
            )
            if main:
                self._introduce(start)
            state = self._state_at(start)
            step_fn = self._compile(state)
            stack.enter_context(self.checkpoints)
            self.metrics = stack.enter_context(
                MetricsWriter(
                    self.workdir, resume_step=start, process_index=jax.process_index()
                )
            )
            self.stop = stack.enter_context(_signals())
            if start and self._evaluation_due(start) and self.evaluated != start:
                self._evaluate(state, start)
            state, step = self._train(step_fn, state, start)
            self._save(state, step)
            self.checkpoints.wait()
            return self._finish(step)

    def _claim(self, stack: contextlib.ExitStack) -> None:
        """Makes the run directory this run's, and opens what lies in it or is put there: tokenizer and data."""
        self.checkpoints.prepare()
        if jax.process_index() == 0:
            stack.enter_context(_locked(self.workdir))
        self.task.prepare(self.workdir)
        self.data = self.task.train_iterator()
        if jax.process_count() > 1:
            begin = self.data.get_state()
            share = self.program.process_rows[0]
            agree("the first batch", what_is_read(next(self.data), share))
            self.data.set_state(begin)

    def _find_start(self) -> int:
        """Returns the step to begin behind: of the newest whole checkpoint, or 0."""
        if self.run.resume == "never" and self.checkpoints.candidates():
            raise config_error(
                "resume",
                "never",
                f"{self.workdir} holds a run already",
                "give another --workdir, or --resume auto to continue it",
            )
        latest = self.checkpoints.latest()
        if latest is None and self.run.resume == "must":
            # It raises, and lists what there is.
            self.checkpoints.restore(None, self.program.abstract_state)
        if latest is None:
            self._refuse_to_begin_over()
        return latest or 0

    def _state_at(self, start: int) -> State:
        """Returns the state to begin with: restored, initialised, or with the parameters of `init`."""
        abstract = self.program.abstract_state
        if start:
            self.progress.phase("reading the checkpoint")
            state, meta = self.checkpoints.restore(
                start, self._without_frozen(abstract), iterator=self.data
            )
            if frozen := self._frozen(abstract):
                whole = with_part(state["params"], restore_frozen(self.workdir, frozen))
                state["params"] = whole
            self.saved, self.skipped = start, int(state["skipped"])
            self.seen, self.evaluated = meta["tokens"], meta["evaluated"]
            return state
        self.progress.phase("initialising")
        run = self.run
        if run.init:
            refuse_frozen_head(run.init, run.model, paths_of(self._frozen(abstract)))
            state, draw = self.program.init_rest(), self.program.draw
            base = without(abstract["params"])
            added = set(paths_of(abstract["params"])) - set(paths_of(base))
            read = read_params(run.init, run.model, base, fresh=draw)
            state["params"] = {**draw(added), **read}
        else:
            state = self.program.init_state()
        if run.lora.init:
            trained = part_of(
                without(abstract["params"]), without(self.program.spec.placements)
            )
            adapters = read_adapters(
                run.lora.init,
                run.model,
                run.lora,
                set(paths_of(trained)),
                abstract["params"],
            )
            state["params"] = with_part(state["params"], adapters)
        if frozen := self._frozen(state):
            self.progress.phase("saving what is frozen")
            save_frozen(self.workdir, frozen)
        return state

    def _frozen(self, state: State) -> Params:
        return part_of(state["params"], self.program.spec.placements, trained=False)

    def _without_frozen(self, state: State) -> State:
        """Returns the state as checkpoints hold it."""
        return {
            **state,
            "params": part_of(state["params"], self.program.spec.placements),
        }

    def _refuse_to_begin_over(self) -> None:
        """Raises if there are checkpoints, none of them whole; one that was being written when the run was killed does not count."""
        damaged = [
            f"{c.step} ({c.problem or 'a checksum differs'})"
            for c in self.checkpoints.candidates()
            if c.problem != "unfinished"
        ]
        if damaged:
            raise ConfigError(
                f"checkpoint: {self.checkpoints.directory} holds only damaged ones: {', '.join(damaged)}; restore them from a copy, "
                "or move the run directory away to begin again"
            )

    def _compile(self, state: State) -> "_Steps":
        """Returns the compiled step; writes what the report says of memory and collectives."""
        self.progress.phase("compiling")
        compiled = self.program.lower_step().compile()
        self.ledger = read_ledger(compiled, self.program.mesh.shape)
        held = format_bytes(bytes_per_device(self.program.abstract_state))
        self.progress.print(f"state: {held} per device; {_collectives(self.ledger)}")
        if jax.process_index() == 0:
            save_run(
                self.workdir, title=self.name, config={"family": type(self.run.model).__module__, **to_dict(self.run)}, config_diff=diff(self.run),
                memory=memory_rows(self.program, compiled), ledger=self.ledger.rows(), notes=self._notes(),
            )  # fmt: skip
        shapes = _shapes_of(self.program.abstract_batch())
        return _Steps({shapes: compiled}, self._compile_for)

    def _compile_for(self, batch: Mapping[str, Any]) -> jax.stages.Compiled:
        """Returns the step for rows of another length than the longest."""
        with self.clock.paused():
            shape = batch["inputs"].shape
            self.progress.print(f"compiling the step for inputs {shape}")
            return self.program.lower_step_for(batch).compile()

    def _train(self, step_fn: Any, state: State, start: int) -> tuple[State, int]:
        """Runs updates until the end or a signal; returns the state and its step."""
        run, step = self.run, start
        pending: _Pending | None = None
        # A compiled step takes host arrays itself, at a fraction of the host time that
        # putting them first takes; one of several processes has to put its share.
        alone = jax.process_count() == 1
        give = self.program.arrange if alone else self.program.put_batch
        self.clock.restart(start)
        while step < run.steps and not self.stop.agreed():
            rows = next(self.data)
            state, metrics = step_fn(state, give(rows))
            step += 1
            if pending:
                self._note(pending, state)
            pending = _Pending(step, rows, metrics)
            save = self._due(run.checkpoint.every, step)
            if save or self._evaluation_due(step):
                self._note(pending, state)
                pending = None
                with self.clock.paused():
                    if self._evaluation_due(step):
                        self._evaluate(state, step)
                    if save:
                        self._save(state, step)
        if pending:
            self._note(pending, state)
        return state, step

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _evaluation_due(self, step: int) -> bool:
        return step == self.run.steps or self._due(self.run.eval.every, step)

    def _note(self, pending: "_Pending", state: State) -> None:
        """Reads a finished step's metrics; shows and writes them; stops a run that cannot go on."""
        step, rows, metrics = pending
        values: dict[str, Any] = {
            n: np.asarray(x).item() for n, x in metrics.items() if x.ndim == 0
        }
        exhausted = values.pop("train/scale_exhausted", False)
        del values["train/tokens"]
        unit, amount = self.task.unit, self.task.batch_amount
        self.seen += amount
        if exhausted or not (
            math.isfinite(values["train/loss"]) or "train/loss_scale" in values
        ):
            raise self._failure(step, values, state, rows)
        if values["train/skipped"] != self.skipped:
            self._tell_of_skipped(step, values)
        values[f"data/{unit}"] = self.seen
        if step % self.run.log_every == 0 or step == self.run.steps:
            seconds = self.clock.per_step(step)
            values |= {
                "perf/step_seconds": seconds,
                f"perf/{unit}_per_second": amount / seconds,
            }
            self.metrics.write(step, values)
        self.progress.update(step, values)

    def _tell_of_skipped(self, step: int, values: Mapping[str, Any]) -> None:
        """Says at the 1st, 2nd, 4th, 8th ... time that an update was skipped; under loss scaling that is nothing special."""
        self.skipped = values["train/skipped"]
        if "train/loss_scale" not in values and self.skipped & (self.skipped - 1) == 0:
            self.progress.print(
                f"step {step}: a gradient is not finite, so the update was skipped ({self.skipped} so far)"
            )

    def _failure(
        self,
        step: int,
        values: Mapping[str, Any],
        state: State,
        rows: Mapping[str, np.ndarray],
    ) -> TrainingError:
        # With that step's number, for its dropout masks.
        then = {**state, "step": state["step"] * 0 + (step - 1)}
        leaf = first_nonfinite(self.program, then, rows)
        leaf = leaf or "none with the present parameters"
        begin = max(0, self.seen - self.task.batch_amount)
        position = f"data {self.task.unit} {begin:,} to {self.seen:,}; first non-finite gradient: {leaf}"
        kept = (
            f"the newest checkpoint is of step {self.saved}"
            if self.saved is not None
            else "there is no checkpoint yet"
        )
        if "train/loss_scale" in values:
            return TrainingError(
                f"step {step}: a gradient overflowed at the smallest loss scale (loss_scale.minimum={self.run.loss_scale.minimum:g}); "
                f"{position}; {kept}; use --dtype.compute bfloat16, or lower optim.lr"
            )
        return TrainingError(
            f"step {step}: the loss is {values['train/loss']}; {position}; {kept}; lower optim.lr, or look at the data there"
        )

    def _evaluate(self, state: State, step: int) -> None:
        """Writes what the model makes of the held-out data; a signal ends it without."""
        self.progress.phase("evaluating")
        evaluation = self.task.evaluate(
            self.program, state["params"], step=step, stopped=self.stop.agreed
        )
        if evaluation is None:
            return
        self.evaluation, self.evaluated = evaluation, step
        self.metrics.write(step, evaluation.metrics)
        self.progress.print(f"step {step}: {evaluation.summary}")
        if evaluation.samples:
            if jax.process_index() == 0:
                add_sample(self.workdir, step, evaluation.samples)
            self.progress.print(f"sample at step {step}:\n{evaluation.samples}\n")

    def _save(self, state: State, step: int) -> None:
        self.progress.phase("saving")
        meta = {
            "tokens": self.seen, "evaluated": self.evaluated, "model": to_dict(self.run.model), "mesh": dict(self.program.mesh.shape),
            "version": jaxspeed.__version__,
        }  # fmt: skip
        kept = self._without_frozen(state)
        self.checkpoints.save(step, kept, iterator=self.data, meta=meta)
        self.saved = step

    def _finish(self, step: int) -> Result:
        report = report_from_run(self.workdir) if jax.process_index() == 0 else None
        stopped_by = (
            self.stop.agreed() if step < self.run.steps or self.evaluated != step else 0
        )
        if stopped_by:
            self.progress.print(
                f"stopped by {signal.Signals(stopped_by).name} after step {step}: saved; the same command goes on from here"
            )
        elif self.evaluation:
            self.progress.print(f"done: step {step}, {self.evaluation.verdict}")
        else:
            self.progress.print(
                f"already trained to step {step}; give a larger --steps, or another --workdir"
            )
        self.progress.print(f"report: {report}")
        metrics = self.evaluation.metrics if self.evaluation else {}
        return Result(self.workdir, step, metrics, stopped_by)

    def _introduce(self, start: int) -> None:
        """Tells what is about to run."""
        run, program, show = self.run, self.program, self.progress.print
        device = program.mesh.devices.flat[0]
        params = _count(program.abstract_state["params"])
        trained = _count(
            part_of(program.abstract_state["params"], program.spec.placements)
        )
        mesh = " x ".join(f"{axis}={size}" for axis, size in program.mesh.shape.items())
        shape = program.batch
        if self.answers:
            self.progress.console.print(answers_table(list(self.answers)))
        show(
            "settings that differ from the defaults: "
            + ", ".join(f"{field}={value!r}" for field, value, _ in diff(self.run))
        )
        some = f", {format_count(trained)} of them trained" if trained < params else ""
        show(
            f"model: {type(run.model).__module__}, {format_count(params)} parameters{some}; ZeRO stage {run.zero.stage}, compute in {run.dtype.compute}"
        )
        show(f"devices: {program.mesh.size} x {device.device_kind}, mesh {mesh}")
        show(
            f"batch: {shape.global_size} sequences = {shape.micro_size} per device x {shape.shards} shards x {shape.accumulate} micro-steps, of {run.seq_len} tokens"
        )
        for line in [*self.task.describe(), *notices(program)]:
            show(line)
        show(
            f"run directory: {self.workdir}"
            + (f"; going on from step {start}" if start else "")
        )

    def _notes(self) -> dict[str, str]:
        device = self.program.mesh.devices.flat[0]
        return {
            "began": self.began, "devices": f"{self.program.mesh.size} x {device.device_kind}", "host": platform.node(),
            "jaxspeed": jaxspeed.__version__, "jax": jax.__version__, "python": platform.python_version(),
        }  # fmt: skip


def memory_rows(
    program: Program, compiled: jax.stages.Compiled
) -> list[tuple[str, int]]:
    """Returns (class of arrays, bytes per device) of the train step; temporaries as the compiler counts them."""
    state, placements = program.abstract_state, program.spec.placements
    frozen = part_of(state["params"], placements, trained=False)
    rows = [
        (
            "parameters (float32)",
            bytes_per_device(part_of(state["params"], placements)),
        ),
        ("optimizer state", bytes_per_device(state["opt"])),
        ("batch", bytes_per_device(program.abstract_batch())),
    ]
    if frozen:
        dtype = jax.tree.leaves(frozen)[0].dtype
        rows.insert(1, (f"frozen parameters ({dtype})", bytes_per_device(frozen)))
    analysis = compiled.memory_analysis()
    if analysis is not None:
        rows.append(
            (
                "temporaries (activations, gradients, gathered weights)",
                int(analysis.temp_size_in_bytes),
            )
        )
    return rows


def _count(abstract: PyTree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract))


def _collectives(ledger: Ledger) -> str:
    """Returns one line: the payload of the step's collectives by kind and mesh axis."""
    parts = [
        f"{kind} {format_bytes(group.total())} over {'+'.join(axes)}"
        for (kind, axes), group in ledger.by_kind_and_axis().items()
        if axes and group.total() > 1024
    ]
    return "collectives per device and step: " + (", ".join(parts) or "none")


def _device_trouble(said: str, neighbours: Neighbours) -> str:
    """Returns what a failure of the runtime means to the user, or "" if nobody knows."""
    if "RESOURCE_EXHAUSTED" in said or "Out of memory" in said:
        change = "lower micro_batch_size (accumulate makes up for it), or set remat full, a higher zero.stage or more devices"
        return f"out of memory on a device ({said}); {change}"
    if jax.process_count() > 1 and any(sign in said for sign in _SIGNS_OF_LOSS):
        return told_of(neighbours.gone(), said)
    return ""


_SIGNS_OF_LOSS = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "reset by peer", "heartbeat")  # fmt: skip
"""What the runtimes say when a partner does not answer."""


class _Clock:
    """Seconds per step since it was last asked, pauses left out."""

    def restart(self, step: int) -> None:
        self._since, self._step, self._paused = time.perf_counter(), step, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    def per_step(self, step: int) -> float:
        seconds = (time.perf_counter() - self._since - self._paused) / max(
            1, step - self._step
        )
        self.restart(step)
        return seconds


class _Pending(NamedTuple):
    """A step that was dispatched and whose metrics nobody has read."""

    step: int
    rows: Mapping[str, np.ndarray]
    metrics: Mapping[str, jax.Array]


class _Steps:
    """The compiled step for each shape of a batch; those not known yet are compiled when they come up."""

    def __init__(
        self,
        known: dict["_Shapes", Any],
        compile_for: Callable[[Mapping[str, Any]], Any],
    ) -> None:
        self._known, self._compile_for = known, compile_for

    def __call__(self, state: State, batch: Mapping[str, Any]) -> Any:
        shapes = _shapes_of(batch)
        if shapes not in self._known:
            self._known[shapes] = self._compile_for(batch)
        return self._known[shapes](state, batch)


_Shapes = tuple[tuple[int, ...], ...]


def _shapes_of(batch: Mapping[str, Any]) -> _Shapes:
    return tuple(batch[name].shape for name in sorted(batch))


class _Stop:
    """A wish to end the run: a signal to any process, agreed on by all of them."""

    def __init__(self) -> None:
        self.number = 0
        self._several = jax.process_count() > 1
        self._told: jax.Array | None = None
        self._final = 0

    def agreed(self) -> int:
        """Returns the signal to end on or 0: at each call the same on every process.

        What the processes tell each other is read at the next call, so that none waits for it.
        """
        if not self._several:
            return self.number
        if not self._final:
            before, self._told = self._told, _largest(self.number)
            self._final = 0 if before is None else int(before)
        return self._final


def _largest(number: int) -> jax.Array:
    """Returns the largest of the processes' numbers, a scalar that is still being computed."""
    sharding, largest = _over_all_devices()
    mine = np.full(jax.local_device_count(), number, np.int32)
    return largest(jax.make_array_from_process_local_data(sharding, mine))


@functools.cache
def _over_all_devices() -> tuple[NamedSharding, Any]:
    mesh = Mesh(np.array(jax.devices()), ("all",))
    return NamedSharding(mesh, P("all")), jax.jit(
        jnp.max, out_shardings=NamedSharding(mesh, P())
    )


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """Notes the first SIGINT or SIGTERM for the loop to end on; a second one has its usual effect."""
    stop, previous = _Stop(), {}

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        stop.number = number
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of the directory. The lock is the kernel's, so a killed process leaves none behind."""
    with (workdir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise config_error(
                "workdir",
                str(workdir),
                f"{owner} is training in it",
                "wait for it, or give another --workdir",
            ) from None
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): see to it that no second run starts in it",
                workdir,
                error.strerror,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
