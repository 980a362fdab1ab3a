# SPDX-License-Identifier: Apache-2.0
"""Compiles the step of models of real size for slices and hosts that are not there: memory, traffic, cycles.

Nothing is run. Each job is compiled in a process of its own, so that its time and memory are its own:

    python -m benchmarks.real_size --list
    python -m benchmarks.real_size --only 7b-v5p-full 7b-v5p-dots

`peak` is the compiler's peak memory of a chip, `state` what it holds between steps, `cycles` the sum of
the compiler's estimates over all operations divided by the clock: attention kernels and collectives
are not in it. Where a program chooses (experts, by how many tokens they are sent) the cheapest branch counts, here and
on the wire, and `to` says the dearest. `roofline` is the larger of the model's products at the chip's peak (nothing computed
again) and of the traffic over all links at once. TPUs need `pip install 'jaxspeed[tpu]'`, GPUs `'jaxspeed[cuda12]'`.
"""

import argparse
import dataclasses
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxspeed import launch
from jaxspeed.config import DTypeConfig, MeshConfig, MoeConfig, RunConfig, ZeroConfig
from models import gpt2, llama, mixtral, opt


BAD = "Involuntary full rematerialization"
"""What XLA prints where it gathers an activation because placements do not agree."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model on a slice."""

    model: Any
    topology: str
    mesh: MeshConfig = MeshConfig()
    """The sizes; `fsdp` takes what is left."""
    rows: int = 1
    """Sequences of a micro-batch, on each batch shard."""
    seq: int = 4096
    accumulate: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of the run."""
    options: dict[str, str] = field(default_factory=dict)
    """Compiler options beside those that the library chooses."""


B7, B8, B70, B405 = (
    llama.LLAMA2_7B,
    llama.LLAMA3_8B,
    llama.LLAMA3_70B,
    llama.LLAMA3_405B,
)

LONG = {"context": "ring", "remat": "offload", "mlp_tiles": 8}
"""A sequence of a million tokens."""

JOBS = {
    "124m-v5e-1": Job(model=gpt2.SMALL, topology="v5e:1x1", rows=16, seq=1024, settings={"zero": ZeroConfig(stage=0)}),
    "1.3b-v5e-8": Job(model=opt.OPT_1_3B, topology="v5e:2x4", rows=4, seq=2048, settings={"remat": "attention"}),
    "7b-v5p-full": Job(model=B7, topology="v5p:4x4x4", rows=4, settings={"remat": "full"}),
    "7b-v5p-attention": Job(model=B7, topology="v5p:4x4x4", rows=4, settings={"remat": "attention"}),
    "7b-v5p-dots": Job(model=B7, topology="v5p:4x4x4", rows=4, settings={"remat": "dots"}),
    "7b-v5p-tensor": Job(model=B7, topology="v5p:4x4x4", mesh=MeshConfig(tensor=4), rows=16, settings={"remat": "full"}),
    "7b-v5p-8": Job(model=B7, topology="v5p:2x2x2", rows=2, settings={"remat": "full"}),
    "7b-v5p-256": Job(model=B7, topology="v5p:4x8x8", rows=2, settings={"remat": "full"}),
    "7b-v5p-256-8-layers": Job(model=dataclasses.replace(B7, num_layers=8), topology="v5p:4x8x8", rows=2, settings={"remat": "full"}),
    "7b-v5p-256-128-layers": Job(model=dataclasses.replace(B7, num_layers=128), topology="v5p:4x8x8", rows=2, settings={"remat": "full"}),
    "7b-v5p-1024": Job(model=B7, topology="v5p:8x8x16", rows=1, settings={"remat": "full"}),
    "7b-v5p-slices": Job(model=B7, topology="2xv5p:2x4x4", mesh=MeshConfig(data=2), rows=4, settings={"remat": "full"}),
    "7b-v5p-stages": Job(model=B7, topology="v5p:4x4x4", mesh=MeshConfig(stage=4), accumulate=16, settings={"remat": "dots", "zero": ZeroConfig(stage=1)}),
    "8b-v5p-16-1m": Job(model=B8, topology="v5p:2x2x4", mesh=MeshConfig(context=16), seq=2**20, settings=LONG),
    "8b-v5e-64-1m": Job(model=B8, topology="v5e:8x8", mesh=MeshConfig(context=64), seq=2**20, settings=LONG),
    "70b-v5p-256": Job(model=B70, topology="v5p:4x8x8", rows=2, seq=8192, settings={"remat": "full"}),
    "405b-v5p-1024": Job(model=B405, topology="v5p:8x8x16", rows=1, seq=8192, settings={"remat": "full"}),
    "mixtral-v5e-64": Job(model=mixtral.MIXTRAL_8X7B, topology="v5e:8x8", mesh=MeshConfig(expert=8), settings={"remat": "full", "moe": MoeConfig(capacity_factor=1.25)}),
    "30b-a3b-v5p-64": Job(model=mixtral.QWEN3_30B_A3B, topology="v5p:4x4x4", mesh=MeshConfig(expert=8), settings={"remat": "full"}),
    "8b-h100-8": Job(model=B8, topology="h100:8", rows=2, seq=8192, settings={"remat": "full"}),
    "70b-h100-64": Job(model=B70, topology="h100:8x8", mesh=MeshConfig(tensor=8), rows=2, seq=8192, settings={"remat": "full"}),
}  # fmt: skip


def main() -> int:
    """Compiles the jobs asked for; returns the exit code."""
    args = _arguments()
    if args.here:
        sys.stdout.write(json.dumps(compile_job(JOBS[args.here])) + "\n")
        return 0
    if args.list:
        sys.stdout.write("\n".join(JOBS) + "\n")
        return 0
    heading = "job|mesh|parameters|compile s|host GB|state GB|peak GB|cycles s|roofline s|wire GB (overlapped)".split(
        "|"
    )
    write = lambda *cells: sys.stdout.write("| " + " | ".join(cells) + " |\n")
    write(*heading)
    write(*["---"] * len(heading))
    failed = 0
    for name in args.only or JOBS:
        command = [sys.executable, "-m", "benchmarks.real_size", "--here", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or BAD in done.stderr:
            failed += 1
            why = BAD if BAD in done.stderr else done.stderr.strip().splitlines()[-1]
            write(name, why[:300])
        else:
            found = json.loads(done.stdout.splitlines()[-1])
            write(name, *_cells(found))
            if args.json:
                with open(args.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"job": name, **found}) + "\n")
        sys.stdout.flush()
    return 1 if failed else 0


def compile_job(job: Job) -> dict[str, Any]:
    """Returns what the compiler says of a job's step."""
    launch.quiet()
    import jax

    from jaxspeed.ledger import LedgerError, read_cycles, read_ledger
    from jaxspeed.program import build_program
    from jaxspeed.topology import get_topology

    jax.config.update("jax_platforms", "cpu")
    topology = get_topology(job.topology)
    settings: dict[str, Any] = {"zero": ZeroConfig(stage=3), **job.settings}
    run = RunConfig(
        model=dataclasses.replace(job.model, max_seq_len=job.seq),
        steps=1000,
        seq_len=job.seq,
        micro_batch_size=job.rows,
        accumulate=job.accumulate,
        mesh=job.mesh,
        dtype=DTypeConfig(compute="bfloat16"),
        **settings,
    )
    program = build_program(run, devices=topology.devices)
    axes = dict(program.mesh.shape)
    lowered = program.lower_step(["inputs", "targets", "mask"])
    begin = time.perf_counter()
    options = {**topology.compiler_options, **job.options}
    compiled = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - begin
    memory: Any = compiled.memory_analysis()
    try:
        clock = topology.chip.clock_hz if topology.chip else math.nan
        cycles = read_cycles(compiled, branch="least") / clock
        at_worst = read_cycles(compiled) / clock
    except LedgerError:
        cycles = at_worst = None  # not a TPU
    params = program.abstract_state["params"]
    rows = read_ledger(compiled, axes, branch="least").rows()
    return {
        "mesh": {axis: n for axis, n in axes.items() if n > 1},
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "compile_seconds": seconds,
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "state_bytes": memory.alias_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "cycles_seconds": cycles,
        "cycles_seconds_at_worst": at_worst,
        "roofline_seconds": _roofline(job, topology, program.batch.global_size, rows),
        "collectives": rows,
    }


def _roofline(
    job: Job, topology: Any, batch: int, collectives: Sequence[dict[str, Any]]
) -> float:
    """Returns the seconds that no step can do without: its model's products at the chip's peak, or its traffic over all links at once."""
    chip, chips = topology.chip, len(topology.devices)
    products = job.model.flops_per_token(job.seq) * batch * job.seq / chips
    traffic = sum(row["wire_bytes"] for row in collectives)
    return max(
        products / chip.peak_flops["bfloat16"],
        traffic / (chip.links * chip.link_bandwidth),
    )


def _cells(found: dict[str, Any]) -> list[str]:
    cycles, at_worst = found["cycles_seconds"], found["cycles_seconds_at_worst"]
    worst = f" to {at_worst:.2f}" if at_worst != cycles else ""
    sent = [
        f"{row['kind']} {'x'.join(row['axes'])} {row['wire_bytes'] / 1e9:.1f}"
        f"{' sliced' if row['sliced_payload_bytes'] else ''} ({row['async_wire_bytes'] / row['wire_bytes']:.0%})"
        for row in found["collectives"]
        if row["wire_bytes"] > 1e8
    ]
    return [
        " ".join(f"{axis}={n}" for axis, n in found["mesh"].items()),
        f"{found['parameters'] / 1e9:.2f}B",
        f"{found['compile_seconds']:.0f}",
        f"{found['host_bytes'] / 1e9:.1f}",
        f"{found['state_bytes'] / 1e9:.2f}",
        f"{found['peak_bytes'] / 1e9:.2f}",
        "" if cycles is None else f"{cycles:.2f}{worst}",
        f"{found['roofline_seconds']:.2f}",
        "; ".join(sent),
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(JOBS), help="all if left out")
    parser.add_argument("--list", action="store_true", help="the names of the jobs")
    parser.add_argument("--json", help="a file to which a line per job is added")
    parser.add_argument("--here", choices=list(JOBS), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
