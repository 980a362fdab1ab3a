# SPDX-License-Identifier: Apache-2.0
"""Every recipe builds: configuration, placements and the step's program, without an array of its size."""

from pathlib import Path

import jax
import pytest

from jaxspeed.cli import load_recipe
from jaxspeed.config import diff, to_dict
from jaxspeed.lora import without
from jaxspeed.program import build_program
from jaxspeed.state import bytes_per_device
from tests.command import ROOT


RECIPES = sorted((ROOT / "configs").rglob("*.py"))


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_are_recipes() -> None:
    assert "tiny" in {path.stem for path in RECIPES}


@pytest.mark.parametrize("devices", [1, 8])
def test_recipe_builds_abstractly(recipe: Path, devices: int) -> None:
    run = load_recipe(str(recipe))
    before = sum(array.nbytes for array in jax.live_arrays())
    program = build_program(run, devices=jax.devices()[:devices])
    params = without(program.abstract_state["params"])
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == run.model.num_params()
    shape = program.batch
    assert shape.global_size == shape.micro_size * shape.shards * shape.accumulate
    assert shape.shards == devices
    # Beside the moments of the optimizer there are scalars only.
    state = bytes_per_device(program.abstract_state)
    shards = devices if run.zero.stage else 1
    assert state <= 12.1 * count / shards + 1e5
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 1e6


def test_step_of_the_recipe_is_a_program(recipe: Path) -> None:
    lowered = build_program(load_recipe(str(recipe))).lower_step()
    assert "func.func public @main" in lowered.as_text()


def test_recipe_says_how_to_run_it(recipe: Path) -> None:
    docstring = recipe.read_text().split('"""')[1]
    assert "Command:" in docstring
    assert "Hardware:" in docstring
    command = docstring.partition("python ")[2].split()
    assert command[:2] == [
        "train.py",
        f"configs/{recipe.relative_to(ROOT / 'configs')}",
    ] or ("make train" in docstring)


def test_resolved_recipe_is_plain_values(recipe: Path) -> None:
    run = load_recipe(str(recipe))
    assert to_dict(run)["steps"] == run.steps
    assert {name for name, _, _ in diff(run)} >= {"steps", "seq_len"}
