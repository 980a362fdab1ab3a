# SPDX-License-Identifier: Apache-2.0
"""What both generation benchmarks share: settings, prompts, timing. Imports neither jax nor torch."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def arguments(doc: str | None) -> argparse.Namespace:
    """Returns the settings of both programs."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    return parser.parse_args()


def prompts(args: argparse.Namespace) -> np.ndarray:
    """Returns the prompts, (batch, prompt)."""
    rng = np.random.default_rng(1)
    return rng.integers(0, args.vocab, (args.batch, args.prompt), np.int64)


def report(
    name: str, args: argparse.Namespace, write: Callable[[], np.ndarray]
) -> None:
    """Times `write() -> (batch, new) ids`, after two calls to warm up, and prints the line."""
    ids, cpu, wall = write(), [], []
    write()
    for _ in range(args.reps):
        at, cpu_at = time.perf_counter(), time.process_time()
        write()
        wall.append(time.perf_counter() - at)
        cpu.append(time.process_time() - cpu_at)
    tokens = args.batch * args.new
    line = {
        "name": name,
        "tok_per_cpu_s": round(tokens / statistics.median(cpu), 1),
        "tok_per_s": round(tokens / statistics.median(wall), 1),
        "ids": np.asarray(ids)[:, :8].tolist() if args.batch <= 8 else [],
        "checksum": int(np.asarray(ids, np.int64).sum()),
    }
    sys.stdout.write(json.dumps(line) + "\n")
