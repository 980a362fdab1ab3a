# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks, prints each one's table and writes all of them to one file.

    make bench                                              # jaxspeed beside the bare step
    python benchmarks/run.py --peers .venv-peers/bin/python # and beside PyTorch and DeepSpeed
    python benchmarks/run.py --only 8192-bf16 eight-devices --rounds 3

Each line of a table is the median of `--rounds` rounds in which the programs took turns. With
`--peers` the losses are compared first, and a difference above 1e-5 (fp32) or 2e-2 (bf16) ends
the run: a program that computes something else has no speed worth printing.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

import versus


ROOT = pathlib.Path(__file__).resolve().parent
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


class Suite(NamedTuple):
    """Programs that take turns, and the figure they are compared by."""

    commands: dict[str, str]
    key: str
    core: int | None = None


def main() -> None:
    """Runs the benchmarks asked for."""
    args = _arguments()
    os.environ["PYTHONPATH"] = str(ROOT.parent)  # models/ is not part of the package
    suites = _suites(args.peers, args.weights)
    unknown = sorted(set(args.only or ()) - set(suites))
    if unknown:
        sys.stderr.write(f"--only {unknown[0]}: no such benchmark: {list(suites)}\n")
        sys.exit(2)
    if not args.peers:
        sys.stderr.write("no --peers: PyTorch and DeepSpeed are left out\n")
    tables = [_machine()]
    for name in args.only or suites:
        suite = suites[name]
        if args.peers and suite.core is not None:
            _compare_losses(name, suite)
        sys.stderr.write(f"{name}: {args.rounds} rounds of {list(suite.commands)}\n")
        figures = versus.measure(suite.commands, suite.key, args.rounds, suite.core)
        table = versus.table(versus.summary(figures), suite.key)
        tables.append(f"### {name}\n\n{table}")
        sys.stdout.write(f"\n{tables[-1]}\n")
        sys.stdout.flush()
        output = pathlib.Path(args.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("\n\n".join(tables) + "\n")


def _suites(peers: str | None, weights: str) -> dict[str, Suite]:
    peer, python = f"{peers} {ROOT}/peer_torch.py", sys.executable
    ours = f"{python} {ROOT}/train_cpu.py"
    suites = {}
    for vocab in (8192, 50257):
        npz = f"{weights}/{vocab}.npz"
        if peers and not os.path.exists(npz):
            os.makedirs(weights, exist_ok=True)
            dump = f"--vocab {vocab} --steps 1 --warmup 0 --dump {npz}"
            versus.run(f"{peer} {dump}", None)
        given = f"--vocab {vocab}" + (f" --npz {npz}" if peers else "")
        for precision, flag in (("fp32", ""), ("bf16", " --bf16")):
            commands = {}
            if peers:
                commands["PyTorch"] = f"{peer} --vocab {vocab}{flag}"
                commands["DeepSpeed"] = f"{commands['PyTorch']} --deepspeed"
            commands["bare"] = f"{python} {ROOT}/bare_jax.py {given}{flag}"
            commands["jaxspeed"] = f"{ours} {given}{flag}"
            suites[f"{vocab}-{precision}"] = Suite(commands, "tok_per_cpu_s", core=1)
    if peers:
        npz = f"--npz {weights}/8192.npz"
        commands = {"DeepSpeed": f"{peer} --deepspeed", "jaxspeed": f"{ours} {npz}"}
        suites["all-cores"] = Suite(commands, "tok_s")
    for batch in (8, 16, 32):
        one = f"{ours} --steps 4 --batch {batch}"
        eight = {f"8 x stage {s}": f"{one} --devices 8 --stage {s}" for s in range(4)}
        suites[f"eight-devices-{batch}"] = Suite({"1 device": one, **eight}, "step_s")
    host = f"{python} {ROOT}/host_overhead.py"
    commands = {"1 device": host, "8 devices": f"{host} --devices 8"}
    suites["host"] = Suite(commands, "host_us_per_step")
    return suites


def _compare_losses(name: str, suite: Suite) -> None:
    os.environ["PARITY"] = "1"
    losses = {
        program: versus.run(command, None)["losses"]
        for program, command in suite.commands.items()
    }
    del os.environ["PARITY"]
    first, tolerance = losses["PyTorch"], TOLERANCE[name.split("-")[1]]
    for program, values in losses.items():
        # The programs print five decimals, so a difference of one there is none.
        off = max(abs(a - b) - 1e-5 for a, b in zip(values, first, strict=True))
        if off / first[0] > tolerance:
            sys.exit(f"{name}: {program}'s losses {values} are not PyTorch's {first}")


def _machine() -> str:
    """Returns what was measured, on what, and when."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    names = {}
    if sys.platform == "linux":
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = dict(line.split("\t", 1) for line in lines if "\t" in line)
    parts = [names.get(key, "").strip(": \t") for key in ("model name", "model")]
    machine = " model ".join(part for part in parts if part) or "unknown processor"
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return f"{day}, commit {commit.stdout.strip()}, {os.cpu_count()} cores of {machine}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="benchmarks to run")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--peers", metavar="PYTHON", help="with torch and deepspeed")
    parser.add_argument(
        "--weights",
        default=".cache/bench",
        help="folder for what all start from; default: %(default)s",
    )
    parser.add_argument(
        "--output", default=".cache/bench/results.md", help="default: %(default)s"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
