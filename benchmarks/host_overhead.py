# SPDX-License-Identifier: Apache-2.0
"""Measures what the training loop costs the host: CPU time of the main thread per step. One JSON line.

The real loop runs (data, transfer, dispatch, metrics, progress), but its compiled step is one that
hands the state back and does nothing, so all that is measured is outside the compiled program. CPU
time, not wall time: on a busy machine the latter measures the other users.

    python benchmarks/host_overhead.py [--devices 8] [--layers 12]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jaxspeed import launch
from jaxspeed.config import (
    CheckpointConfig,
    DataConfig,
    DTypeConfig,
    EvalConfig,
    RunConfig,
)


T = TypeVar("T")


def main() -> None:
    """Runs the benchmark."""
    args = _arguments()
    launch.quiet()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(
            _run(folder, args.devices, args.steps, args.batch, args.seq, args.cache)
        )
    sys.stdout.write(json.dumps(row) + "\n")


def measure(run: RunConfig) -> dict[str, Any]:
    """Returns microseconds of the main thread per step: median of the whole, means of the parts."""
    launch.start(run)
    import jax

    from jaxspeed import loop

    parts: dict[str, float] = {}
    marks: list[float] = []

    def timed(name: str, action: Callable[..., T]) -> Callable[..., T]:
        def run(*args: Any, **kwargs: Any) -> T:
            begin = time.thread_time()
            try:
                return action(*args, **kwargs)
            finally:
                parts[name] = parts.get(name, 0.0) + time.thread_time() - begin

        return run

    class Run(loop._Run):
        def _compile(self, state: Any) -> Any:
            super()._compile(state)
            self._note = timed("metrics", self._note)
            self.data = _Timed(self.data, timed)
            step = _idle_step(self.program)

            def marked(state: Any, batch: Any) -> Any:
                marks.append(time.thread_time())
                return step(state, batch)

            return timed("transfer_and_dispatch", marked)

    Run(run, "host_overhead", ()).fit()
    warm = marks[len(marks) // 4 :]
    steps = [after - before for before, after in zip(warm, warm[1:], strict=False)]
    return {
        "devices": len(jax.devices()),
        "state_leaves": len(jax.tree.leaves(loop.build_program(run).abstract_state)),
        "host_us_per_step": round(1e6 * statistics.median(steps)),
        "p10_us_per_step": round(1e6 * statistics.quantiles(steps, n=10)[0]),
    } | {f"{name}_us": round(1e6 * spent / len(marks)) for name, spent in parts.items()}


class _Timed:
    """An iterator whose `next` is timed; the rest is the iterator's own."""

    def __init__(self, inner: Any, timed: Callable[..., Any]) -> None:
        self._inner, self._next = inner, timed("data", lambda: next(inner))

    def __next__(self) -> Any:
        return self._next()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _idle_step(program: Any) -> Any:
    """Returns a compiled step of the real one's signature that does nothing."""
    import jax
    import jax.numpy as jnp

    batch = program.abstract_batch()
    real = jax.eval_shape(program.train_step, program.abstract_state, batch)[1]
    tokens = program.batch.global_size * program.run.seq_len

    def step(state: Any, batch: Any) -> Any:
        del batch
        metrics = {n: jnp.zeros(x.shape, x.dtype) for n, x in real.items()}
        metrics["train/tokens"] += tokens
        return {**state, "step": state["step"] + 1}, metrics

    return (
        jax.jit(step, donate_argnums=0, out_shardings=(program.shardings, None))
        .lower(program.abstract_state, batch)
        .compile()
    )


def _run(
    folder: str, devices: int, steps: int, batch: int, seq: int, cache: str
) -> RunConfig:
    from models.gpt2 import Config

    return RunConfig(
        model=Config(
            vocab_size=264, max_seq_len=seq, num_layers=2, num_heads=2, d_model=16
        ),
        steps=steps,
        seq_len=seq,
        global_batch_size=batch,
        dtype=DTypeConfig(compute="float32"),
        data=DataConfig(cache_dir=cache),
        checkpoint=CheckpointConfig(every=0),
        eval=EvalConfig(every=0, batches=1, sample_tokens=0),
        virtual_devices=devices,
        workdir=str(Path(folder) / "run"),
        compile_cache="",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--cache", default="~/.cache/jaxspeed", help="prepared text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
