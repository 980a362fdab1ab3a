# SPDX-License-Identifier: Apache-2.0
"""The command line: recipes, typed overrides, help, and the tools around a run."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxspeed import cli, launch, loop
from jaxspeed.config import ConfigError, RunConfig
from jaxspeed.loop import Result, TrainingError
from tests.command import ROOT, Recipe, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return write_recipe(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, dict[str, Any]]]:
    """Records what would be trained, in place of training it."""
    calls: list[tuple[RunConfig, dict[str, Any]]] = []

    def fit(run: RunConfig, **how: Any) -> Result:
        calls.append((run, how))
        return Result(Path("runs/x"), run.steps, {})

    monkeypatch.setattr(loop, "fit", fit)
    monkeypatch.setattr(launch, "start", lambda run: None)
    return calls


@pytest.fixture
def overridden(recipe: Recipe) -> Callable[..., RunConfig]:
    """Returns `overridden(*flags)`: the recipe's configuration with flags applied."""
    base = cli.load_recipe(str(recipe.path))
    return lambda *flags: cli.override(base, flags, prog="train")


def test_flags_override_the_json_which_overrides_the_recipe(
    recipe: Recipe, fitted: list[tuple[RunConfig, dict[str, Any]]], tmp_path: Path
) -> None:
    ds = tmp_path / "ds.json"
    ds.write_text('{"train_batch_size": 16, "zero_optimization": {"stage": 1}}')
    flags = ["--steps", "7", "--deepspeed", str(ds), "--zero.stage=2"]
    assert cli.train([str(recipe.path), *flags]) == 0
    ((run, how),) = fitted
    assert (run.steps, run.global_batch_size, run.zero.stage) == (7, 16, 2)
    assert how["name"] == "small"
    answered = {answer.key for answer in how["answers"]}
    assert {"train_batch_size", "zero_optimization.stage"} <= answered


def test_overrides_are_typed(overridden: Callable[..., RunConfig]) -> None:
    run = overridden(
        *("--optim.lr", "1e-4", "--data.shuffle", "False", "--data.path", "a", "b"),
        *("--global_batch_size", "None", "--micro_batch_size", "2", "--remat=full"),
        *("--model.num_layers", "3", "--data.weights", "1", "2", "--process-id", "-1"),
    )
    assert run.optim.lr == 1e-4
    assert run.data.shuffle is False
    assert (run.data.path, run.data.weights) == (("a", "b"), (1.0, 2.0))
    assert (run.global_batch_size, run.micro_batch_size) == (None, 2)
    assert (run.remat, run.model.num_layers, run.process_id) == ("full", 3, -1)
    assert overridden("--data.weights").data.weights == ()
    groups = overridden("--optim.lr_groups", "embed", "0.1", "*.b", "2").optim.lr_groups
    assert groups == (("embed", 0.1), ("*.b", 2.0))
    assert overridden("--freeze", "embed", "*.scale").freeze == ("embed", "*.scale")


NAMES_TO_KEEP = [
    *("steps", "global_batch_size", "micro_batch_size", "accumulate", "seq_len"),
    *("zero.stage", "mesh.data", "mesh.fsdp", "mesh.tensor", "dtype.compute", "remat"),
    *("optim.lr", "data.path", "init", "model.num_layers", "model.num_heads"),
    *("model.d_model", "model.d_ff", "model.vocab_size", "checkpoint.every"),
    *("log_every", "workdir", "coordinator", "num_processes", "process_id"),
]


def test_help_shows_examples_first_then_every_field_with_text_and_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.train(["configs/tiny.py", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    order = ["examples:", "--data.shuffle False", "Updates to train for."]
    assert sorted(order, key=out.index) == order
    assert "--deepspeed FILE" in out
    assert out.startswith("usage: python train.py configs/tiny.py")
    words = " ".join(re.sub(r"[^\x20-\x7e]|\|", " ", out).split())
    names = cli._fields(cli.load_recipe("configs/tiny.py"))
    assert set(NAMES_TO_KEEP) <= set(names)
    for name in names:
        described = words[words.index("-h, --help") :].partition(f" --{name} ")[2]
        assert 10 < described.index("(default: ") < 400, name


def test_usage_is_printed_without_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train([]) == 2
    assert cli.train(["--help"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == cli.USAGE
    assert "examples:\n  python train.py configs/tiny.py" in cli.USAGE


def test_examples_name_recipes_and_fields_that_there_are() -> None:
    known = cli._fields(cli.load_recipe("configs/tiny.py"))
    for line in cli.EXAMPLES.splitlines()[1:]:
        words = line.split("  ")[1].split()
        assert (ROOT / words[2]).is_file()
        flags = [word[2:] for word in words if word.startswith("--")]
        assert set(flags) <= {*known, "help", "deepspeed"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--optim.lrr 1", "--optim.lrr: no such field. Did you mean '--optim.lr'?"),
        ("--optim.lrr=1", "--optim.lrr: no such field. Did you mean '--optim.lr'?"),
        ("--num_steps 5", "--num_steps: no such field. Did you mean '--steps'?"),
        ("--steps abc", "--steps: 'abc' is not a whole number; `train --help`"),
        ("--steps 1e3", "--steps: '1e3' is not a whole number"),
        ("--steps", "--steps: it wants a value"),
        ("--steps 5 6", "not understood: 6"),
        ("--steps -5", "steps=-5: must be > 0; give a number > 0"),
        ("--optim.lr x", "--optim.lr: 'x' is not a number"),
        ("--optim.name adamx", "--optim.name: 'adamx' is not one of ('adam', 'adamw',"),
        ("--zero.stage 7", "--zero.stage: '7' is not one of ('0', '1', '2', '3')"),
        ("--data.shuffle maybe", "--data.shuffle: 'maybe' is not one of ('True', 'Fal"),
        ("--global_batch_size x", "--global_batch_size: 'x' is not {None}|INT"),
        ("--data.path", "data.path=(): there is nothing to read; give a file"),
    ],
)
def test_bad_flags_are_one_line(
    flags: str, words: str, overridden: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError) as caught:
        overridden(*flags.split())
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_bad_model_is_one_line() -> None:
    run = cli.load_recipe("configs/tiny.py")
    with pytest.raises(
        ConfigError, match="^model.d_model=130 does not divide by model"
    ):
        cli.override(run, ["--model.d_model", "130"], prog="train")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def config(:", "line 1: SyntaxError: invalid syntax"),
        ("import nothere", "line 1: ModuleNotFoundError: No module named 'nothere'"),
        ("\n\ndef config():\n    return 1 / 0", "line 4: ZeroDivisionError: division"),
        (
            "def config(): return 3",
            "it must define config() and return a RunConfig, no",
        ),
        ("", "it must define config() and return a RunConfig, not NoneType"),
    ],
)
def test_error_in_a_recipe_is_shown_with_its_line(
    source: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        cli.load_recipe(str(tmp_path / "mine.py"))
    assert words in str(caught.value)
    assert "mine.py" in str(caught.value)


def test_missing_recipe_suggests_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'configs/tiny.py'"):
        cli.load_recipe("configs/tinny.py")
    with pytest.raises(ConfigError, match="give one of .* as the first argument"):
        cli.load_recipe("--steps")


def test_json_without_a_file_and_with_a_misspelt_key_are_one_line(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.train([str(recipe.path), "--deepspeed"]) == 2
    assert "--deepspeed: it wants a value" in capsys.readouterr().err
    (tmp_path / "ds.json").write_text('{"gradient_cliping": 1.0}')
    assert cli.train([str(recipe.path), "--deepspeed", str(tmp_path / "ds.json")]) == 2
    err = capsys.readouterr().err
    assert "gradient_cliping" in err
    assert "Did you mean 'gradient_clipping'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (ConfigError("a=1:\n why"), 2, "error: a=1: why\n"),
        (
            TrainingError("step 3: the loss is nan"),
            2,
            "error: step 3: the loss is nan\n",
        ),
        (RuntimeError("a defect"), 1, "Traceback (most recent call last):"),
    ],
)
def test_exit_code_says_how_it_ended(
    raised: BaseException,
    code: int,
    words: str,
    recipe: Recipe,
    fitted: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> Result:
        raise raised

    monkeypatch.setattr(loop, "fit", fail)
    assert cli.train([str(recipe.path)]) == code
    assert capsys.readouterr().err.startswith(words)


def test_signal_that_ended_a_run_is_its_exit_code(
    recipe: Recipe, fitted: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Result(Path("x"), 3, {}, stopped_by=signal.SIGTERM)
    monkeypatch.setattr(loop, "fit", lambda *_, **__: stopped)
    assert cli.train([str(recipe.path)]) == 143


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_before_training_ends_it_with_a_word(number: signal.Signals) -> None:
    code = (
        "import signal, sys; from jaxspeed import cli\n"
        "cli._doctor = lambda args: signal.raise_signal(int(sys.argv[1]))\n"
        "cli.main(['doctor'])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(int(number))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    words = f"stopped at once by {number.name}; what was saved before is whole\n"
    assert (ended.returncode, ended.stderr) == (128 + number, words)


def test_signals_mean_what_they_did_afterwards(recipe: Recipe, fitted: object) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert cli.train([str(recipe.path)]) == 0
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_library_log_reaches_the_terminal_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = logging.getLogger("jaxspeed.ops.attention")
    with cli._shown_log():
        for _ in range(2):
            log.info("a choice")
        log.warning("a warning")
        log.debug("a detail")
    log.info("afterwards")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a choice\n", "a warning\n")


def test_config_explain_prints_a_row_a_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ds = tmp_path / "ds.json"
    ds.write_text('{"train_batch_size": 16, "wall_clock_breakdown": true}')
    assert cli.main(["config", "explain", str(ds), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row.keys() == {"key", "status", "to", "why"} for row in rows)
    assert {r["key"]: r["status"] for r in rows}["train_batch_size"] == "mapped"
    assert cli.main(["config", "explain", str(ds)]) == 0
    assert "train_batch_size" in capsys.readouterr().out
    ds.write_text('{"train_batch_sise": 16}')
    assert cli.main(["config", "explain", str(ds), "--json"]) == 2
    assert cli.main(["config", "explain", str(tmp_path / "none.json")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_report_is_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("command", [[], ["config"], ["doctor"], ["report"]])
def test_every_command_has_help(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: jaxspeed", *command]))


def test_reader_that_leaves_ends_it_quietly(tmp_path: Path) -> None:
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps({"train_batch_size": 16}))
    code = "import sys; from jaxspeed.cli import main; sys.exit(main())"
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-c", code, "config", "explain", str(ds), "--json"],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")
