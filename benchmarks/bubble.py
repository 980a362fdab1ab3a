# SPDX-License-Identifier: Apache-2.0
"""Measures how much of the time a pipeline's stages wait, beside the formula (p - 1) / (v m + p - 1).

Every stage is a virtual device that computes on one core, so there must be as many idle cores as
stages; what an update of one device on one core takes, times 1 / p, is an update without a bubble.

    python benchmarks/bubble.py --stages 2 --micros 2 4 8 16 --chunks 1 2
"""

import argparse
import os
import statistics
import sys
import time

from jaxspeed import launch
from jaxspeed.config import DTypeConfig, MeshConfig, RunConfig, ZeroConfig


def main() -> None:
    """Runs the benchmark."""
    args = _arguments()
    one_core = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {one_core}"
    launch.quiet()
    launch.start_alone(args.stages, "")
    lines = ["| schedule | chunks | m | one device | stages | idle | formula |"]
    lines += ["|---|---|---|---|---|---|---|"]
    sys.stdout.write("\n".join(lines) + "\n")
    for m in args.micros:
        alone = seconds(args, 1, m, "1f1b", 1)
        for name, v in [("gpipe", 1), *(("1f1b", v) for v in args.chunks)]:
            if v > 1 and m % args.stages:
                continue
            took = seconds(args, args.stages, m, name, v)
            idle = 1 - alone / (args.stages * took)
            due = (args.stages - 1) / (v * m + args.stages - 1)
            row = f"| {name} | {v} | {m} | {alone:.3f} s | {took:.3f} s | {idle:.1%} | {due:.1%} |"
            sys.stdout.write(row + "\n")
            sys.stdout.flush()


def seconds(args: argparse.Namespace, p: int, m: int, name: str, v: int) -> float:
    """Returns the seconds of an update: the median of several, after one that compiles."""
    import jax
    import numpy as np

    from jaxspeed.program import build_program
    from models.gpt2 import Config

    run = RunConfig(
        model=Config(
            vocab_size=256,
            max_seq_len=args.seq,
            num_layers=args.layers,
            num_heads=8,
            d_model=args.dim,
        ),
        steps=100,
        seq_len=args.seq,
        global_batch_size=m * args.micro_batch,
        accumulate=m,
        mesh=MeshConfig(stage=p, fsdp=1),
        zero=ZeroConfig(stage=0),
        dtype=DTypeConfig(compute="float32"),
        remat="full",
        pipeline=name if p > 1 else "1f1b",  # pyright: ignore[reportArgumentType]
        pipeline_chunks=v if p > 1 else 1,
        compile_cache="",
    )
    program = build_program(run, devices=jax.devices()[:p])
    rng = np.random.default_rng(0)
    shape = (m * args.micro_batch, args.seq)
    batch = {"inputs": rng.integers(0, 256, shape, np.int32)}
    state, times = program.init_state(), []
    for _ in range(args.repeats + 1):
        begin = time.perf_counter()
        state, metrics = program.train_step(state, program.put_batch(batch))
        jax.block_until_ready(metrics["train/loss"])
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--micros", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
