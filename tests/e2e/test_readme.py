# SPDX-License-Identifier: Apache-2.0
"""What the README says is so: its commands run, its flags exist, its files are there."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxspeed.cli import load_recipe, override
from tests.command import ROOT, write_recipe


README = (ROOT / "README.md").read_text()

SMALL = shlex.split(
    "--steps 2 --seq_len 16 --micro_batch_size 1 --global_batch_size 8 --checkpoint.every 0 --eval.every 0 "
    "--eval.sample_tokens 0 --model.num_layers 1 --model.d_model 16 --model.num_heads 2"
)
"""What makes a command of the README a matter of seconds."""

DEEPSPEED = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
}


def blocks(language: str) -> list[str]:
    """Returns what stands between the README's fences of this language."""
    fenced = README.split("```")[1::2]
    return [x.split("\n", 1)[1] for x in fenced if x.split("\n", 1)[0] == language]


def commands(program: str) -> list[str]:
    """Returns the lines of the README's shell blocks that start with this program, without remarks."""
    lines = "\n".join(blocks("sh")).splitlines()
    return [re.sub(r"\s+#.*", "", x) for x in lines if x.startswith(program + " ")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with what the README's commands name, and the repository's own files."""
    for name in ("train.py", "configs", "models", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my_texts").mkdir()
    write_recipe(tmp_path).text.rename(tmp_path / "my_texts" / "one.txt")
    (tmp_path / "ds_config.json").write_text(json.dumps(DEEPSPEED))
    return tmp_path


def run(command: str, folder: Path, *flags: str) -> str:
    words = shlex.split(command)
    start = ["-m", "jaxspeed"] if words[0] == "jaxspeed" else []
    done = subprocess.run(
        [sys.executable, *start, *words[1:], *flags],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FETCHED = "--init ~/.cache"
"""In commands that train on what `jaxspeed data` fetched."""


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands("python") if FETCHED not in c])
def test_training_commands(command: str, folder: Path) -> None:
    out = run(command, folder, *([] if "--help" in command else SMALL))
    assert "--optim.lr" in out if "--help" in command else "done: step 2" in out
    if "--deepspeed" in command:
        assert "zero_optimization.stage" in out


@pytest.mark.parametrize("command", [c for c in commands("python") if FETCHED in c])
def test_recipes_for_fetched_data_and_weights_are_there(command: str) -> None:
    _, _, recipe, *flags = shlex.split(command)
    assert override(load_recipe(str(ROOT / recipe)), flags, prog="train.py").init


@pytest.mark.parametrize(
    "command", [c for c in commands("jaxspeed") if c.startswith("jaxspeed data ")]
)
def test_sets_and_weights_exist(command: str, folder: Path) -> None:
    """Without fetching them: that needs a network."""
    known = run("jaxspeed data --list", folder)
    assert all(name in known for name in command.split()[2:])


@pytest.mark.parametrize(
    "command", [c for c in commands("jaxspeed") if not c.startswith("jaxspeed data ")]
)
def test_other_commands(command: str, folder: Path) -> None:
    if "runs/tiny" in command:
        run(
            "python train.py configs/tiny.py", folder, *SMALL, "--checkpoint.every", "2"
        )
    assert run(command, folder).strip()


def test_commands_are_found() -> None:
    assert len(commands("python")) >= 5
    assert len(commands("jaxspeed")) >= 2


def test_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))
    assert {"train", "test", "check"} <= named
    missing = [name for name in named if f"\n{name}:" not in makefile]
    assert not missing


@pytest.mark.parametrize("flags", re.findall(r"\| `(--[a-z][^`]*)` \|", README))
def test_flags_of_the_feature_table(flags: str) -> None:
    other = ["--zero.stage", "0", "--remat", "full", "--dtype.compute", "float32"]
    recipe = load_recipe(str(ROOT / "configs/gpt2_124m.py"))
    recipe = override(recipe, other, prog="train.py")
    if not flags.startswith("--deepspeed"):
        assert override(recipe, shlex.split(flags), prog="train.py") != recipe


def test_paths_exist() -> None:
    linked = re.findall(r"\]\(([^)]+)\)", README)
    quoted = re.findall(
        r"`((?:jaxspeed|tests|configs|docs|benchmarks)/[^` ]+)`", README
    )
    tree = next(x for x in blocks("") if "train.py   " in x)
    folder, listed = "", []
    for line in tree.splitlines():
        first, *names = re.findall(r"(?<!\S)[\w/]+(?:\.py|/)(?!\S)", line)
        if line.startswith(" "):
            names = [first, *names]  # of the folder above
        else:
            folder = first if first.endswith("/") else ""
            listed.append(first)
        listed += [folder + name for name in names]
    assert len(linked) >= 5
    assert len(quoted) >= 10
    assert len(listed) >= 20
    missing = [p for p in (*linked, *quoted, *listed) if not (ROOT / p).exists()]
    assert not missing


def test_script(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (script,) = blocks("python")
    sizes = "num_layers=6, d_model=384, num_heads=6"
    assert sizes in script
    script = script.replace(
        sizes, "num_layers=1, d_model=16, num_heads=2, vocab_size=64"
    )
    ids = np.random.default_rng(0).integers(0, 64, (2, 8, 16), np.int32)
    batches = [{"inputs": x} for x in ids]
    (folder / "script.py").write_text(script)
    given = {"batches": batches, "micro_batches": batches}
    engine = runpy.run_path(str(folder / "script.py"), given)["engine"]
    assert int(engine.global_steps) == 4
    assert any((folder / "checkpoints").iterdir())
