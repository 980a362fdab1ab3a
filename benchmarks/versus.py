# SPDX-License-Identifier: Apache-2.0
"""Runs commands in turn (A B A B ...) and prints medians and their ratios to the first one.

    python benchmarks/versus.py --rounds 5 --core 1 torch='CMD' bare='CMD' ours='CMD'

It times nothing itself: each command prints one JSON line with its own figures, of which
`--key` is compared. The one design decision is the turn-taking: a machine that drifts by
15 % within an hour still gives the same ratio when each run is compared with the runs beside
it, so the ratio printed is the median over rounds of ratios, not a ratio of medians.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys


def main() -> None:
    """Runs the rounds, writes a line per run to `--log` and the table to stdout."""
    args = _arguments()
    commands = dict(args.command)
    rows = summary(measure(commands, args.key, args.rounds, args.core, args.log))
    text = json.dumps(rows, indent=1) if args.json else table(rows, args.key)
    sys.stdout.write(text + "\n")


def measure(
    commands: dict[str, str],
    key: str,
    rounds: int,
    core: int | None = None,
    log: str | None = None,
) -> dict[str, list[float]]:
    """Returns each command's figures, a round at a time; says each on stderr as it comes."""
    figures: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds):
        for name, command in commands.items():
            result = run(command, core)
            if key not in result:
                sys.exit(f"{name}: no {key!r} in the line it printed: {sorted(result)}")
            figures[name].append(result[key])
            _log(log, {"round": turn, "run": name, **result})
            sys.stderr.write(f"round {turn} {name}: {key} {result[key]}\n")
    return figures


def run(command: str, core: int | None) -> dict:
    """Returns the last JSON line that `command` prints; a failing command ends the program.

    One core means one thread: the variable keeps libraries from starting more, which would
    only take turns on that core.
    """
    pin = ["taskset", "-c", str(core)] if core is not None else []
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if core is not None else {})
    done = subprocess.run(
        pin + shlex.split(command), capture_output=True, text=True, env=env, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        sys.exit(
            f"{command}\nexit code {done.returncode}\n{done.stderr.strip()[-2000:]}"
        )
    return json.loads(lines[-1])


def summary(figures: dict[str, list[float]]) -> list[dict]:
    """Returns per command the median, the spread and the ratio to the first command."""
    first = next(iter(figures.values()))
    return [
        {
            "name": name,
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "ratio": statistics.median(
                v / f for v, f in zip(values, first, strict=True)
            ),
            "rounds": len(values),
        }
        for name, values in figures.items()
    ]


def table(rows: list[dict], key: str) -> str:
    """Returns the rows as a Markdown table."""
    lines = [f"| run | {key}, median | min - max | ratio |", "|---|---|---|---|"]
    for r in rows:
        spread = f"{r['min']:.1f} - {r['max']:.1f}"
        lines.append(
            f"| {r['name']} | {r['median']:.1f} | {spread} | {r['ratio']:.3f} |"
        )
    return "\n".join(lines)


def _log(path: str | None, entry: dict) -> None:
    if path is not None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", nargs="+", type=_named, metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--core", type=int, help="pin each command to this core")
    parser.add_argument("--key", default="tok_per_cpu_s", help="figure to compare")
    parser.add_argument("--log", help="file that gets one JSON line per run")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    return parser.parse_args()


def _named(text: str) -> tuple[str, str]:
    name, sign, command = text.partition("=")
    if not (name and sign and command):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COMMAND")
    return name, command


if __name__ == "__main__":
    main()
