# SPDX-License-Identifier: Apache-2.0
"""The training loop: everything around the step that touches the world.

Data in, metrics out, evaluation, samples, checkpoints, resume, signals, report. It dispatches
step i before it reads the metrics of step i - 1, so the devices never wait for the host. Layer 4.
"""

import contextlib
import dataclasses
import logging
import math
import platform
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

import jaxspeed
from jaxspeed.checkpoint import Checkpointer, restore_params
from jaxspeed.config import ConfigError, RunConfig, config_error, diff, to_dict
from jaxspeed.data import EvalSet, Tokenizer, build_tokenizer, open_corpus, train_iterator
from jaxspeed.deepspeed_json import Answer, answers_table
from jaxspeed.engine import first_nonfinite
from jaxspeed.generate import sample_tokens
from jaxspeed.ledger import Ledger, read_ledger
from jaxspeed.metrics import MetricsWriter, bits_per_byte, perplexity
from jaxspeed.program import Program, State, build_program, notices
from jaxspeed.progress import Progress, format_count, format_seconds
from jaxspeed.report import add_sample, format_bytes, report_from_run, save_run
from jaxspeed.state import bytes_per_device


logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on: one line with step, cause and data position. What was saved stays."""


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
        TrainingError: the loss is not finite, or the loss scale is exhausted.
    """
    return _Run(run, name, answers).fit()


class _Run:
    """One call of `fit`: the objects that the phases of a run share."""

    def __init__(self, run: RunConfig, name: str, answers: Sequence[Answer]) -> None:
        self.run, self.name, self.answers = run, name, answers
        self.workdir = Path(run.workdir or f"runs/{name}").expanduser()
        self.began = time.strftime("%Y-%m-%d %H:%M:%S")
        self.program = build_program(run)
        self.corpus = open_corpus(run.data)
        index, count = self.program.process_rows
        shared: dict[str, Any] = {
            "seq_len": run.seq_len, "global_batch_size": self.program.batch.global_size, "process_index": index, "process_count": count,
        }  # fmt: skip
        self.checkpoints = Checkpointer(self.workdir / "checkpoints", keep=run.checkpoint.keep, asynchronous=run.checkpoint.asynchronous)
        self.checkpoints.prepare()
        self.tokenizer: Tokenizer = build_tokenizer(run.data, self.corpus, vocab_size=run.model.vocab_size, workdir=self.workdir)
        self.data = train_iterator(run.data, self.corpus, self.tokenizer, seed=run.seed, **shared)
        self.held_out = EvalSet(cfg=run.data, corpus=self.corpus, tokenizer=self.tokenizer, batches=run.eval.batches, **shared)
        self.tokens = 0
        self.evaluation: dict[str, float] = {}
        self.clock = _Clock()

    def fit(self) -> Result:
        state, start = self._start()
        step_fn = self._compile(state)
        shown = {"process_index": jax.process_index()}
        with (
            self.checkpoints,
            MetricsWriter(self.workdir, resume_step=start, **shown) as self.metrics,
            Progress(steps=self.run.steps, start_step=start, every=self.run.log_every, **shown) as self.progress,
            _signals() as stop,
        ):
            self._introduce(start)
            if start >= self.run.steps:
                self.progress.print(f"already trained to step {start}; give a larger --steps, or another --workdir")
            state, step = self._train(step_fn, state, start, stop)
            if not stop.number and step > start:
                self._evaluate(state, step)
            self._save(state, step)
            self.checkpoints.wait()
            return self._finish(state, step, stop.number)

    def _start(self) -> tuple[State, int]:
        """Returns the state to begin from and its step: resumed, initialised, or taken from `init`."""
        run, program = self.run, self.program
        latest = None if run.resume == "never" else self.checkpoints.latest()
        if run.resume == "never" and self.checkpoints.candidates():
            raise config_error("resume", "never", f"{self.workdir} holds a run already", "give another --workdir, or --resume auto to continue it")
        if latest is None and run.resume == "must":
            self.checkpoints.restore(None, program.abstract_state)  # raises, and lists what is there
        if latest is not None:
            state, meta = self.checkpoints.restore(latest, program.abstract_state, iterator=self.data)
            self.tokens = meta["tokens"]
            return state, latest
        state = program.init_state()
        if run.init:
            state["params"] = restore_params(run.init, program.abstract_state["params"])
        return state, 0

    def _compile(self, state: State) -> Any:
        """Returns the compiled step; writes what the report says of memory and collectives."""
        names = ["inputs", "targets", "mask", "positions", "segment_ids"]
        compiled = self.program.lower_step(names).compile()
        self.ledger = read_ledger(compiled, self.program.mesh.shape)
        if jax.process_index() == 0:
            save_run(
                self.workdir, title=self.name, config=to_dict(self.run), config_diff=diff(self.run),
                memory=memory_rows(self.program, compiled), ledger=self.ledger.rows(), notes=self._notes(),
            )  # fmt: skip
        return compiled

    def _train(self, step_fn: Any, state: State, start: int, stop: "_Stop") -> tuple[State, int]:
        """Runs updates until the end or a signal; returns the state and its step."""
        run, step = self.run, start
        pending: tuple[int, dict[str, jax.Array]] | None = None
        self.clock.restart(start)
        while step < run.steps and not stop.number:
            rows = next(self.data)
            with jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, self.program.put_batch(rows))
            step += 1
            if pending:
                self._note(*pending, state, rows)
            pending = (step, metrics)
            if self._due(run.eval.every, step) or self._due(run.checkpoint.every, step):
                self._note(*pending, state, rows)
                pending = None
                with self.clock.paused():
                    if self._due(run.eval.every, step) and step < run.steps:
                        self._evaluate(state, step)
                    if self._due(run.checkpoint.every, step):
                        self._save(state, step)
        if pending:
            self._note(*pending, state, rows)
        return state, step

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _note(self, step: int, metrics: dict[str, jax.Array], state: State, rows: Mapping[str, np.ndarray]) -> None:
        """Reads a finished step's metrics; shows and writes them; stops a run that cannot go on."""
        values = {n: float(x) for n, x in jax.device_get(metrics).items() if x.ndim == 0}
        exhausted = values.pop("train/scale_exhausted", 0.0)
        self.tokens += int(values.pop("train/tokens"))
        values["train/skipped"] = int(values["train/skipped"])
        scaled = "train/loss_scale" in values
        if exhausted or not (math.isfinite(values["train/loss"]) or scaled):
            raise self._failure(step, values, state, rows)
        values["data/tokens"] = self.tokens
        if step % self.run.log_every == 0 or step == self.run.steps:
            seconds = self.clock.per_step(step)
            batch_tokens = self.program.batch.global_size * self.run.seq_len
            values |= {"perf/step_seconds": seconds, "perf/tokens_per_second": batch_tokens / seconds}
            self.metrics.write(step, values)
        self.progress.update(step, values)

    def _failure(self, step: int, values: Mapping[str, float], state: State, rows: Mapping[str, np.ndarray]) -> TrainingError:
        leaf = first_nonfinite(self.program, state, rows) or "none on this batch with the present parameters"
        position = f"{self.tokens:,} tokens into the data"
        if "train/loss_scale" in values:
            return TrainingError(
                f"step {step}: a gradient overflowed at the smallest loss scale ({self.run.loss_scale.minimum:g}), {position}; first "
                f"non-finite gradient: {leaf}; use dtype.compute bfloat16, or lower optim.lr"
            )
        return TrainingError(
            f"step {step}: the loss is {values['train/loss']}, {position}; first non-finite gradient: {leaf}; "
            f"the parameters before that step are intact; lower optim.lr, or look at the data there"
        )

    def _evaluate(self, state: State, step: int) -> None:
        """Writes the held-out loss, and a sample of what the model says."""
        self.progress.phase("evaluating")
        nats = targets = num_bytes = 0.0
        for rows, size in self.held_out:
            sums = jax.device_get(self.program.eval_step(state["params"], self.program.put_batch(rows, training=False)))
            nats, targets, num_bytes = nats + float(sums.total), targets + float(sums.count), num_bytes + size
        loss = nats / max(targets, 1.0)
        self.evaluation = {"eval/loss": loss, "eval/perplexity": perplexity(loss), "eval/bits_per_byte": bits_per_byte(loss, num_tokens=targets, num_bytes=num_bytes)}
        self.metrics.write(step, self.evaluation)
        self.progress.print(
            f"step {step}: held-out loss {loss:.4f} nats/token, perplexity {self.evaluation['eval/perplexity']:.2f}, "
            f"{self.evaluation['eval/bits_per_byte']:.3f} bits/byte"
        )
        if self.run.eval.sample_tokens:
            self._sample(state, step)

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
        meta = {"tokens": self.tokens, "model": to_dict(self.run.model), "mesh": dict(self.program.mesh.shape), "version": jaxspeed.__version__}
        self.checkpoints.save(step, state, iterator=self.data, meta=meta)

    def _finish(self, state: State, step: int, stopped_by: int) -> Result:
        report = report_from_run(self.workdir) if jax.process_index() == 0 else None
        if stopped_by:
            self.progress.print(f"stopped by {signal.Signals(stopped_by).name} after step {step}: saved; the same command goes on from here")
        elif self.evaluation:
            bits = self.evaluation["eval/bits_per_byte"]
            self.progress.print(f"done: step {step}, held-out loss {self.evaluation['eval/loss']:.4f} nats/token ({bits * math.log(2):.4f} nats/byte)")
        self.progress.print(f"report: {report}")
        return Result(self.workdir, step, self.evaluation, stopped_by)

    def _introduce(self, start: int) -> None:
        """Tells what is about to run, once."""
        run, program, show = self.run, self.program, self.progress.print
        device = program.mesh.devices.flat[0]
        params = sum(math.prod(p.shape) for p in jax.tree.leaves(program.abstract_state["params"]))
        mesh = " x ".join(f"{axis}={size}" for axis, size in program.mesh.shape.items())
        shape = program.batch
        if self.answers and jax.process_index() == 0:
            self.progress.console.print(answers_table(self.answers))
        show("settings that differ from the defaults: " + ", ".join(f"{field}={value!r}" for field, value, _ in diff(self.run)))
        show(f"model: {type(run.model).__module__}, {format_count(params)} parameters; ZeRO stage {run.zero.stage}, compute in {run.dtype.compute}")
        show(f"devices: {program.mesh.size} x {device.device_kind}, mesh {mesh}")
        show(f"batch: {shape.global_size} sequences = {shape.micro_size} per device x {shape.shards} shards x {shape.accumulate} micro-steps, of {run.seq_len} tokens")
        show(f"data: {self.corpus.describe()}")
        show(f"state: {format_bytes(bytes_per_device(program.abstract_state))} per device; {_collectives(self.ledger)}")
        for line in notices(program):
            show(line)
        show(f"run directory: {self.workdir}" + (f"; going on from step {start}" if start else ""))

    def _notes(self) -> dict[str, str]:
        device = self.program.mesh.devices.flat[0]
        return {
            "began": self.began, "devices": f"{self.program.mesh.size} x {device.device_kind}", "host": platform.node(),
            "jaxspeed": jaxspeed.__version__, "jax": jax.__version__, "python": platform.python_version(),
        }  # fmt: skip


def memory_rows(program: Program, compiled: jax.stages.Compiled) -> list[tuple[str, int]]:
    """Returns (class of arrays, bytes per device) of the train step; temporaries as the compiler counts them."""
    state = program.abstract_state
    rows = [
        ("parameters (float32)", bytes_per_device(state["params"])),
        ("optimizer state", bytes_per_device(state["opt"])),
        ("batch", bytes_per_device(program.abstract_batch())),
    ]
    analysis = compiled.memory_analysis()
    if analysis is not None:
        rows.append(("temporaries (activations, gradients, gathered weights)", int(analysis.temp_size_in_bytes)))
    return rows


def _collectives(ledger: Ledger) -> str:
    """Returns one line: the payload of the step's collectives by kind and mesh axis."""
    parts = [
        f"{kind} {format_bytes(group.total())} over {'+'.join(axes)}" for (kind, axes), group in ledger.by_kind_and_axis().items() if axes and group.total() > 1024
    ]
    return "collectives per device and step: " + (", ".join(parts) or "none")


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
        seconds = (time.perf_counter() - self._since - self._paused) / max(1, step - self._step)
        self.restart(step)
        return seconds


class _Stop:
    number = 0


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
