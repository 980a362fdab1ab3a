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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import jaxspeed
from jaxspeed.checkpoint import Checkpointer
from jaxspeed.config import ConfigError, RunConfig, config_error, diff, to_dict
from jaxspeed.data import (
    EvalSet,
    Tokenizer,
    build_tokenizer,
    open_corpus,
    train_iterator,
)
from jaxspeed.deepspeed_json import Answer, answers_table
from jaxspeed.engine import first_nonfinite
from jaxspeed.generate import sample_tokens
from jaxspeed.ledger import Ledger, read_ledger
from jaxspeed.metrics import MetricsWriter, bits_per_byte, perplexity
from jaxspeed.pretrained import read_params
from jaxspeed.program import Program, State, build_program, notices
from jaxspeed.progress import Progress, format_count
from jaxspeed.report import add_sample, format_bytes, report_from_run, save_run
from jaxspeed.state import bytes_per_device
from jaxspeed.types import TrainingError


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
    try:
        return _Run(run, name, answers).fit()
    except jax.errors.JaxRuntimeError as error:
        if words := _device_trouble(" ".join(str(error).split())[:300]):
            raise TrainingError(words) from error
        raise


class _Run:
    """One call of `fit`: the objects that the phases of a run share."""

    def __init__(self, run: RunConfig, name: str, answers: Sequence[Answer]) -> None:
        self.run, self.name, self.answers = run, name, answers
        self.workdir = Path(run.workdir or f"runs/{name}").expanduser()
        self.began = time.strftime("%Y-%m-%d %H:%M:%S")
        self.program = build_program(run)
        self.corpus = open_corpus(run.data)
        self.checkpoints = Checkpointer(
            self.workdir / "checkpoints",
            keep=run.checkpoint.keep,
            asynchronous=run.checkpoint.asynchronous,
        )
        self.tokens = self.evaluated = self.skipped = 0
        self.saved: int | None = None
        self.evaluation: dict[str, float] = {}
        self.clock = _Clock()

    def fit(self) -> Result:
        main = jax.process_index() == 0
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
        run = self.run
        self.checkpoints.prepare()
        if jax.process_index() == 0:
            stack.enter_context(_locked(self.workdir))
        self.tokenizer: Tokenizer = build_tokenizer(
            run.data, self.corpus, vocab_size=run.model.vocab_size, workdir=self.workdir
        )
        index, count = self.program.process_rows
        shared: dict[str, Any] = {
            "seq_len": run.seq_len, "global_batch_size": self.program.batch.global_size, "process_index": index, "process_count": count,
        }  # fmt: skip
        self.data = train_iterator(
            run.data, self.corpus, self.tokenizer, seed=run.seed, **shared
        )
        self.held_out = EvalSet(
            cfg=run.data,
            corpus=self.corpus,
            tokenizer=self.tokenizer,
            batches=run.eval.batches,
            **shared,
        )

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
            state, meta = self.checkpoints.restore(start, abstract, iterator=self.data)
            self.saved, self.skipped = start, int(state["skipped"])
            self.tokens, self.evaluated = meta["tokens"], meta["evaluated"]
            return state
        self.progress.phase("initialising")
        state = self.program.init_state()
        if self.run.init:
            state["params"] = read_params(
                self.run.init, self.run.model, abstract["params"]
            )
        return state

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

    def _compile(self, state: State) -> Any:
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
        return compiled

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
        self.tokens += int(values.pop("train/tokens"))
        if exhausted or not (
            math.isfinite(values["train/loss"]) or "train/loss_scale" in values
        ):
            raise self._failure(step, values, state, rows)
        if values["train/skipped"] != self.skipped:
            self._tell_of_skipped(step, values)
        values["data/tokens"] = self.tokens
        if step % self.run.log_every == 0 or step == self.run.steps:
            seconds = self.clock.per_step(step)
            batch_tokens = self.program.batch.global_size * self.run.seq_len
            values |= {
                "perf/step_seconds": seconds,
                "perf/tokens_per_second": batch_tokens / seconds,
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
        batch_tokens = self.program.batch.global_size * self.run.seq_len
        position = f"data tokens {max(0, self.tokens - batch_tokens):,} to {self.tokens:,}; first non-finite gradient: {leaf}"
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
        """Writes the held-out loss and a sample of what the model says; a signal ends it without either."""
        self.progress.phase("evaluating")
        nats = targets = num_bytes = 0.0
        for rows, size in self.held_out:
            if self.stop.agreed():
                return
            sums = jax.device_get(
                self.program.eval_step(
                    state["params"], self.program.put_batch(rows, training=False)
                )
            )
            nats, targets, num_bytes = (
                nats + float(sums.total),
                targets + float(sums.count),
                num_bytes + size,
            )
        loss = nats / max(targets, 1.0)
        bits = bits_per_byte(loss, num_tokens=targets, num_bytes=num_bytes)
        self.evaluation = {
            "eval/loss": loss,
            "eval/perplexity": perplexity(loss),
            "eval/bits_per_byte": bits,
        }
        self.metrics.write(step, self.evaluation)
        self.progress.print(
            f"step {step}: held-out loss {loss:.4f} nats/token, perplexity {self.evaluation['eval/perplexity']:.2f}, {bits:.3f} bits/byte"
        )
        if self.run.eval.sample_tokens:
            self._sample(state, step)
        self.evaluated = step

    def _sample(self, state: State, step: int) -> None:
        cfg = self.run.eval
        prompt = self.tokenizer.encode(cfg.prompt)
        if not len(prompt):
            prompt = np.asarray([self.tokenizer.end_id], np.int32)
        ids = sample_tokens(
            self.program, state["params"], prompt, num_tokens=cfg.sample_tokens, temperature=cfg.temperature,
            key=jax.random.fold_in(jax.random.key(self.run.seed), step),
        )  # fmt: skip
        text = self.tokenizer.decode(ids)
        if jax.process_index() == 0:
            add_sample(self.workdir, step, text)
        self.progress.print(f"sample at step {step}:\n{text}\n")

    def _save(self, state: State, step: int) -> None:
        self.progress.phase("saving")
        meta = {
            "tokens": self.tokens, "evaluated": self.evaluated, "model": to_dict(self.run.model), "mesh": dict(self.program.mesh.shape),
            "version": jaxspeed.__version__,
        }  # fmt: skip
        self.checkpoints.save(step, state, iterator=self.data, meta=meta)
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
            bits = self.evaluation["eval/bits_per_byte"]
            self.progress.print(
                f"done: step {step}, held-out loss {self.evaluation['eval/loss']:.4f} nats/token ({bits * math.log(2):.4f} nats/byte)"
            )
        else:
            self.progress.print(
                f"already trained to step {step}; give a larger --steps, or another --workdir"
            )
        self.progress.print(f"report: {report}")
        return Result(self.workdir, step, self.evaluation, stopped_by)

    def _introduce(self, start: int) -> None:
        """Tells what is about to run."""
        run, program, show = self.run, self.program, self.progress.print
        device = program.mesh.devices.flat[0]
        params = sum(
            math.prod(p.shape)
            for p in jax.tree.leaves(program.abstract_state["params"])
        )
        mesh = " x ".join(f"{axis}={size}" for axis, size in program.mesh.shape.items())
        shape = program.batch
        if self.answers:
            self.progress.console.print(answers_table(list(self.answers)))
        show(
            "settings that differ from the defaults: "
            + ", ".join(f"{field}={value!r}" for field, value, _ in diff(self.run))
        )
        show(
            f"model: {type(run.model).__module__}, {format_count(params)} parameters; ZeRO stage {run.zero.stage}, compute in {run.dtype.compute}"
        )
        show(f"devices: {program.mesh.size} x {device.device_kind}, mesh {mesh}")
        show(
            f"batch: {shape.global_size} sequences = {shape.micro_size} per device x {shape.shards} shards x {shape.accumulate} micro-steps, of {run.seq_len} tokens"
        )
        show(f"data: {self.corpus.describe()}")
        for line in notices(program):
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
    state = program.abstract_state
    rows = [
        ("parameters (float32)", bytes_per_device(state["params"])),
        ("optimizer state", bytes_per_device(state["opt"])),
        ("batch", bytes_per_device(program.abstract_batch())),
    ]
    analysis = compiled.memory_analysis()
    if analysis is not None:
        rows.append(
            (
                "temporaries (activations, gradients, gathered weights)",
                int(analysis.temp_size_in_bytes),
            )
        )
    return rows


def _collectives(ledger: Ledger) -> str:
    """Returns one line: the payload of the step's collectives by kind and mesh axis."""
    parts = [
        f"{kind} {format_bytes(group.total())} over {'+'.join(axes)}"
        for (kind, axes), group in ledger.by_kind_and_axis().items()
        if axes and group.total() > 1024
    ]
    return "collectives per device and step: " + (", ".join(parts) or "none")


def _device_trouble(said: str) -> str:
    """Returns what a failure of the runtime means to the user, or "" if nobody knows."""
    if "RESOURCE_EXHAUSTED" in said or "Out of memory" in said:
        change = "lower micro_batch_size (accumulate makes up for it), or set remat full, a higher zero.stage or more devices"
        return f"out of memory on a device ({said}); {change}"
    if jax.process_count() > 1 and any(sign in said for sign in _SIGNS_OF_LOSS):
        return f"another process of the job is gone, or the link to it ({said}); start all of them again: the run goes on from its newest checkpoint"
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
