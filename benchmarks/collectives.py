# SPDX-License-Identifier: Apache-2.0
"""Prints the collectives of the train step at each ZeRO stage, beside the ZeRO paper's formula.

Compiled, not run, for devices that need not be there:

    python -m benchmarks.collectives --topology cpu:8 --topology v5p:2x2x2 --topology h100:8

`asked` is what the step's program says, `made` what the backend's compiler made of it, both in
Psi: elements per parameter of the model, summed over one step, loops multiplied out. `sliced`
is an all-reduce of which each device keeps only its own shard (a reduce-scatter that the
backend did not form). TPUs need `pip install 'jaxspeed[tpu]'`, GPUs `'jaxspeed[cuda12]'`; the
two do not share an environment well, so run each kind in its own.
"""

import argparse
import json
import sys
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxspeed import launch
from jaxspeed.config import (
    ConfigError,
    DTypeConfig,
    MeshConfig,
    RunConfig,
    ZeroConfig,
    config_error,
)
from jaxspeed.ledger import Ledger, read_ledger, read_partitioned
from jaxspeed.program import build_program
from jaxspeed.topology import Topology, get_topology
from models.gpt2 import Config


LARGE = 0.01
"""Rows of less than this many Psi (losses, norms) are left out of the table, not of --json."""


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    args = _arguments()
    launch.quiet()
    jax.config.update("jax_platforms", "cpu")
    console, results = Console(width=140), []
    try:
        for topology in [get_topology(name) for name in args.topology]:
            for stage in args.stage:
                results.append(measure(topology, stage, args))
                if not args.json:
                    console.print(_title(results[-1]), highlight=False)
                    console.print(_table(results[-1]))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if args.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
    return 0


def measure(topology: Topology, stage: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Returns what one step sends, asked for and made, and its memory."""
    sizes = {"num_layers": args.layers, "num_heads": args.heads, "d_model": args.dim}
    run = RunConfig(
        model=Config(vocab_size=args.vocab, max_seq_len=args.seq, **sizes),
        steps=1_000,
        seq_len=args.seq,
        micro_batch_size=args.micro_batch,
        accumulate=args.accumulate,
        mesh=MeshConfig(data=args.data, tensor=args.tensor),
        zero=ZeroConfig(stage=stage),
        dtype=DTypeConfig(compute="bfloat16"),
        remat=args.remat,
        attention="xla",  # a kernel has no part in the traffic
    )
    program = build_program(run, devices=topology.devices)
    axes = dict(program.mesh.shape)
    lowered = program.lower_step(["inputs"])
    options = {**topology.compiler_options, **_options(args.option)}
    compiled = lowered.compile(compiler_options=options)
    memory: Any = compiled.memory_analysis()
    parameters = sum(x.size for x in jax.tree.leaves(program.abstract_state["params"]))
    return {
        "topology": topology.name,
        "stage": stage,
        "mesh": axes,
        "accumulate": args.accumulate,
        "compiler_options": options,
        "parameters": parameters,
        "argument_bytes": memory.argument_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "formula": formula(stage, args.accumulate),
        "asked": _in_psi(read_partitioned(lowered, axes), parameters),
        "made": _in_psi(read_ledger(compiled, axes), parameters),
    }


def _options(given: list[str]) -> dict[str, str]:
    for option in given:
        if "=" not in option:
            raise config_error("option", option, "it has no value", "give NAME=VALUE")
    return dict(option.split("=", 1) for option in given)


def formula(stage: int, accumulate: int) -> dict[str, float]:
    """Returns the most that a stage may gather and reduce in a step, in Psi.

    Reference: ZeRO (arXiv 1910.02054) section 7, per micro-step where the stage works so.
    """
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * accumulate}[stage]
    reductions = {0: 1, 1: 1, 2: accumulate, 3: accumulate}[stage]
    return {"gather": gathers, "reduce": reductions}


def _in_psi(ledger: Ledger, parameters: int) -> list[dict[str, Any]]:
    return [row | {"psi": row["elements"] / parameters} for row in ledger.rows()]


def _title(result: dict[str, Any]) -> str:
    mesh = " x ".join(f"{axis}={n}" for axis, n in result["mesh"].items() if n > 1)
    limit = result["formula"]
    return (
        f"\n{result['topology']}, stage {result['stage']}: {mesh}, "
        f"{result['accumulate']} micro-steps, {result['parameters'] / 1e6:.1f}M parameters, "
        f"peak {result['peak_bytes'] / 1e6:.0f} MB; "
        f"formula: gather {limit['gather']}, reduce {limit['reduce']}"
    )


def _table(result: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("collective", "axes", "asked Psi", "made Psi", "as", "count"):
        table.add_column(
            heading,
            justify="left" if heading in ("collective", "axes", "as") else "right",
        )
    for heading in ("wire MB", "overlapped"):
        table.add_column(heading, justify="right")
    sides = [
        {(r["kind"], *r["axes"]): r for r in result[side]} for side in ("asked", "made")
    ]
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        asked, made = (side.get(key) for side in sides)
        if max(row["psi"] for row in (asked, made) if row) < LARGE:
            continue
        row = made or {
            "psi": 0,
            "dtypes": [],
            "count": 0,
            "wire_bytes": 0,
            "async_wire_bytes": 0,
            "sliced_payload_bytes": 0,
        }
        table.add_row(
            key[0] + (" (sliced)" if row["sliced_payload_bytes"] else ""),
            " ".join(key[1:]),
            f"{asked['psi']:.2f}" if asked else "",
            f"{row['psi']:.2f}" if made else "",
            " ".join(row["dtypes"]),
            str(row["count"]),
            f"{row['wire_bytes'] / 1e6:.1f}",
            f"{row['async_wire_bytes'] / max(1, row['wire_bytes']):.0%}",
        )
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--topology",
        action="append",
        help="as in cpu:8, v5p:2x2x2, v5e:4x4, h100:8; repeatable",
    )
    parser.add_argument(
        "--stage", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4)
    )
    parser.add_argument("--accumulate", type=int, default=2, help="micro-steps")
    parser.add_argument("--data", type=int, default=1, help="mesh axis data")
    parser.add_argument("--tensor", type=int, default=1, help="mesh axis tensor")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--micro_batch", type=int, default=1)
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        help="compiler option, NAME=VALUE; repeatable",
    )
    parser.add_argument("--remat", default="full")
    parser.add_argument(
        "--json", action="store_true", help="one JSON list on standard output"
    )
    args = parser.parse_args()
    args.topology = args.topology or ["cpu:8"]
    return args


if __name__ == "__main__":
    sys.exit(main())
