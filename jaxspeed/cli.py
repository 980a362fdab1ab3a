# SPDX-License-Identifier: Apache-2.0
"""The command line: `train.py RECIPE ...` and `jaxspeed config|doctor|report`.

A recipe gives the configuration, a DeepSpeed JSON changes it, flags override both. Every error of
the user's is one line on stderr and exit code 2; what trained so far is never lost. Layer 4.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxspeed.config import ConfigError, RunConfig, suggest


USAGE = """\
usage: python train.py RECIPE [--FIELD VALUE ...] [--deepspeed ds_config.json]

Trains a recipe (a Python file with config() -> RunConfig); goes on where it was if the run
directory holds a checkpoint.

examples:
  python train.py configs/tiny.py                                  a small GPT on Shakespeare
  python train.py configs/tiny.py --steps 50 --optim.lr 1e-3       other settings
  python train.py configs/tiny.py --virtual_devices 8 --zero.stage 3
  python train.py configs/tiny.py --data.path my.txt --workdir runs/mine
  python train.py configs/tiny.py --deepspeed ds_config.json       settings of an old project
  python train.py configs/gpt2_124m.py                             on a TPU VM or a multi-GPU host
  python train.py configs/tiny.py --help                           every field, with its default
"""


def train(argv: Sequence[str]) -> int:
    """Runs `train.py`; returns its exit code."""
    if not argv or (argv[0] in ("-h", "--help")):
        sys.stdout.write(USAGE)
        return 0 if argv else 2
    return _guarded(lambda: _train(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jaxspeed`; returns its exit code."""
    parser = argparse.ArgumentParser(prog="jaxspeed", description="Tools around training runs; training itself is train.py.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    config = commands.add_parser("config", help="what becomes of a DeepSpeed JSON, key by key")
    config.add_argument("action", choices=["explain"])
    config.add_argument("file", help="for example: jaxspeed config explain ds_config.json")
    config.add_argument("--json", action="store_true", help='a list of {"key", "status", "to", "why"}')
    doctor = commands.add_parser("doctor", help="devices, versions, what works here and how to get what is missing")
    doctor.add_argument("--json", action="store_true")
    report = commands.add_parser("report", help="write report.html of a run again")
    report.add_argument("run", help="for example: jaxspeed report runs/tiny")
    args = parser.parse_args(argv)
    actions: dict[str, Callable[[argparse.Namespace], int]] = {"config": _explain, "doctor": _doctor, "report": _report}
    return _guarded(lambda: actions[args.command](args))


def load_recipe(path: str) -> RunConfig:
    """Returns the configuration that a recipe file makes.

    Raises:
        ConfigError: no such file, or it has no `config()` that returns a RunConfig.
    """
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        known = [str(p) for p in sorted(Path("configs").rglob("*.py"))]
        raise ConfigError(f"recipe {path!r}: no such Python file; give one of {known or 'your own'}.{suggest(path, known)}")
    for root in (str(Path.cwd()), str(file.resolve().parent)):
        if root not in sys.path:
            sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = module.config() if hasattr(module, "config") else None
    if not isinstance(run, RunConfig):
        raise ConfigError(f"recipe {path!r}: it must define config() and return a RunConfig, not {type(run).__name__}")
    return run


def override(run: RunConfig, flags: Sequence[str], *, prog: str) -> RunConfig:
    """Returns the configuration with `--field value` flags applied; `--help` prints them and exits.

    Raises:
        ConfigError: an unknown field (with the nearest known one), or a value of the wrong type.
    """
    import tyro

    known = ["--help", *("--" + name for name in _fields(run))]
    for flag in flags:
        name = flag.split("=")[0]
        if name.startswith("--") and name not in known and name.replace("-", "_").replace("__", "--", 1) not in known:
            raise ConfigError(f"{name}: no such field.{suggest(name, known)} `{prog} --help` lists all")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                RunConfig[type(run.model)], default=run, args=list(flags), prog=prog,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff), use_underscores=True,
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        text = re.sub(r"[^\x20-\x7e]|-{4,}", " ", said.getvalue())
        raise ConfigError(re.sub(r"\s+", " ", text).strip() or "bad value on the command line") from None


def _train(argv: Sequence[str]) -> int:
    recipe, rest = argv[0], list(argv[1:])
    json_path, flags = _take(rest, "--deepspeed")
    run, answers = load_recipe(recipe), []
    if json_path is not None:
        from jaxspeed.deepspeed_json import apply_deepspeed, load_deepspeed_json

        run, answers = apply_deepspeed(run, load_deepspeed_json(json_path))
    run = override(run, flags, prog=f"python train.py {recipe}")

    from jaxspeed import launch

    launch.start(run)
    from jaxspeed.loop import TrainingError, fit

    try:
        result = fit(run, name=Path(recipe).stem, answers=answers)
    except TrainingError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 128 + result.stopped_by if result.stopped_by else 0


def _explain(args: argparse.Namespace) -> int:
    from rich.console import Console

    from jaxspeed.deepspeed_json import answers_json, answers_table, explain, load_deepspeed_json

    answers = explain(load_deepspeed_json(args.file))
    if args.json:
        sys.stdout.write(json.dumps(answers_json(answers), indent=1) + "\n")
    else:
        Console().print(answers_table(answers))
    return 2 if any(a.status in ("refused", "unknown") for a in answers) else 0


def _doctor(args: argparse.Namespace) -> int:
    from jaxspeed.doctor import examine, show

    findings = examine()
    sys.stdout.write(json.dumps(findings, indent=1) + "\n") if args.json else show(findings)
    return 0


def _report(args: argparse.Namespace) -> int:
    from jaxspeed.report import report_from_run

    sys.stdout.write(f"{report_from_run(args.run)}\n")
    return 0


def _guarded(action: Callable[[], int]) -> int:
    """Returns the action's exit code; 2 and one line on stderr if the user's input was at fault."""
    try:
        return action()
    except ConfigError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2


def _take(flags: list[str], name: str) -> tuple[str | None, list[str]]:
    """Returns the value of one flag and the flags without it."""
    for i, flag in enumerate(flags):
        if flag == name:
            if i + 1 == len(flags):
                raise ConfigError(f"{name}: it wants a value; give {name} FILE")
            return flags[i + 1], flags[:i] + flags[i + 2 :]
        if flag.startswith(name + "="):
            return flag.split("=", 1)[1], flags[:i] + flags[i + 1 :]
    return None, flags


def _fields(config: Any, prefix: str = "") -> list[str]:
    """Returns the dotted names of all fields."""
    names = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        names += _fields(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else [prefix + f.name]
    return names
