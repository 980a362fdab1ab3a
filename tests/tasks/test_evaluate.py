# SPDX-License-Identifier: Apache-2.0
"""A model that lies somewhere, evaluated by itself: the same figures as at the end of its training."""

import json
from pathlib import Path

import pytest

from jaxspeed import cli, launch
from jaxspeed.config import RunConfig
from jaxspeed.loop import Result, fit
from jaxspeed.pretrained import run_config
from tests.command import write_recipe


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("evaluate")
    run = cli.load_recipe(str(write_recipe(folder).path))
    flags = ["--steps", "3", "--workdir", str(folder / "run")]
    return fit(cli.override(run, flags, prog="train"), name="small")


@pytest.fixture(autouse=True)
def _started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "start", lambda run: None)
    monkeypatch.setattr(launch, "keep_freed_memory", lambda: None)


def test_run_is_evaluated_as_its_configuration_says(
    done: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(done.workdir), "--models", "tests"]
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == done.metrics
    assert cli.main([*command, "--eval.batches", "1"]) == 0
    out = capsys.readouterr().out
    assert "held-out loss" in out
    assert f"{done.metrics['eval/loss']:.4f}" not in out


def test_configuration_of_a_run_is_read_back(done: Result) -> None:
    run = run_config(done.workdir, models="tests")
    assert isinstance(run, RunConfig)
    assert (run.steps, run.data.path[0][-8:], run.model.vocab_size) == (
        3,
        "text.txt",
        264,
    )
    assert run.workdir == str(done.workdir)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval.batchez", "1"], "Did you mean '--eval.batches'"),
        (["--recipe", "none.py"], "recipe 'none.py': no such Python file"),
    ],
)
def test_mistakes_are_named(
    flags: list[str],
    message: str,
    done: Result,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["evaluate", str(done.workdir), "--models", "tests", *flags]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err


def test_folder_needs_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert "give --recipe FILE" in capsys.readouterr().err


def test_flags_are_for_evaluate_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["report", "runs/x", "--steps", "3"])
    assert "unrecognized arguments: --steps 3" in capsys.readouterr().err
