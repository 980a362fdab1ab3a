# SPDX-License-Identifier: Apache-2.0
"""Any three axes of the mesh at once give the one-device loss curve.

`make test` runs every mesh of three axes once, with settings in turn; `pytest
tests/dist/test_axes.py --matrix full` runs each with all settings.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jaxspeed.config import MESH_AXES, MeshConfig
from tests.dist.test_equivalence import covering
from tests.dist.test_stages import alone, curve, deep


pytestmark = pytest.mark.slow

ROW_AXES = ("data", "fsdp", "expert")
TRIPLES = list(itertools.combinations(MESH_AXES, 3))
FACTORS: dict[str, Sequence[Any]] = {
    "stage": [0, 1, 2, 3],
    "accumulate": [1, 2, 4],
    "pipeline": ["1f1b", "gpipe"],
    "chunks": [1, 2],
    "family": ["gpt2", "llama", "mixtral"],
}


def legal(axes: tuple[str, ...], case: dict[str, Any]) -> bool:
    """Sixteen sequences must divide; stages need as many micro-batches; only they have schedules; only a mixture has experts."""
    rows = 2 ** len(set(axes) & set(ROW_AXES))
    if "stage" in axes and case["accumulate"] == 1:
        return False
    idle = "stage" not in axes and (case["pipeline"] != "1f1b" or case["chunks"] > 1)
    experts = "expert" not in axes or case["family"] == "mixtral"
    return 16 % (rows * case["accumulate"]) == 0 and experts and not idle


def cases(*, full: bool) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """Returns meshes with settings: each mesh with all of them, or once."""
    product = [
        dict(zip(FACTORS, row, strict=True))
        for row in itertools.product(*FACTORS.values())
    ]
    if full:
        return [(axes, c) for axes in TRIPLES for c in product if legal(axes, c)]
    chosen, turn = [], dict.fromkeys(itertools.product((True, False), repeat=2), 0)
    for axes in TRIPLES:
        kind = "stage" in axes, "expert" in axes
        fits = covering([c for c in product if legal(axes, c)])
        chosen.append((axes, fits[turn[kind] % len(fits)]))
        turn[kind] += 1
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Takes the selection, or with `--matrix full` the product."""
    if "axes" in metafunc.fixturenames:
        found = cases(full=metafunc.config.getoption("--matrix") == "full")
        ids = ["-".join(map(str, (*axes, *c.values()))) for axes, c in found]
        metafunc.parametrize(("axes", "case"), found, ids=ids)


def test_three_axes_do_not_change_the_loss_curve(
    axes: tuple[str, ...], case: dict[str, Any]
) -> None:
    sizes = {"fsdp": 1} | dict.fromkeys(axes, 2)
    run = deep(
        case["family"],
        mesh=MeshConfig(**sizes),
        stage=case["stage"],
        accumulate=case["accumulate"],
        pipeline=case["pipeline"],
        pipeline_chunks=case["chunks"],
    )
    ours, theirs = curve(run, case["family"]), alone(case["family"])
    np.testing.assert_array_equal(ours["train/tokens"], theirs["train/tokens"])
    np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=3e-5)
    np.testing.assert_allclose(
        ours["train/grad_norm"], theirs["train/grad_norm"], rtol=1e-4
    )


def test_the_selection_has_every_setting() -> None:
    found = [case for _, case in cases(full=False)]
    for name, values in FACTORS.items():
        assert {case[name] for case in found} == set(values)
