# SPDX-License-Identifier: Apache-2.0
"""Every stage, mesh, precision, accumulation, policy and optimizer gives the one-device loss curve.

`make test` runs a selection in which every pair of settings occurs; `pytest
tests/dist/test_equivalence.py --matrix full` runs the whole product.
"""

import itertools
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest

from jaxspeed.config import REMAT_POLICIES, MeshConfig, OptimizerName, ZeroConfig
from tests.dist.runs import MESHES, config, curve, reference
from tests.models.zoo import ZOO, members


pytestmark = pytest.mark.slow

FACTORS: dict[str, Sequence[Any]] = {
    "mesh": list(MESHES),
    "stage": [0, 1, 2, 3],
    "compute": ["float32", "bfloat16", "float16"],
    "accumulate": [1, 4],
    "remat": list(REMAT_POLICIES),
    "mlp_tiles": [1, 3],
    "family": ["gpt2", "llama"],
}
OTHERS = [name for name in members() if name not in FACTORS["family"]]
TOLERANCE = {"float32": 3e-5, "bfloat16": 2e-2, "float16": 2e-2}


def legal(case: dict[str, Any]) -> bool:
    """Sixteen sequences do not split eight ways and four times."""
    mesh = MESHES[case["mesh"]]
    return 16 % (mesh.data * mesh.fsdp * case["accumulate"]) == 0


def product() -> list[dict[str, Any]]:
    """Returns every legal combination."""
    rows = itertools.product(*FACTORS.values())
    return [c for row in rows if legal(c := dict(zip(FACTORS, row, strict=True)))]


def covering(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns few of the cases such that any two settings that occur together do so in one of them."""

    def pairs(case: dict[str, Any]) -> set[Any]:
        return set(itertools.combinations(case.items(), 2))

    left, chosen = set().union(*map(pairs, cases)), []
    while left:
        best = max(cases, key=lambda case: len(pairs(case) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Takes the selection, or with `--matrix full` the product."""
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--matrix") == "full"
        cases = product() if full else covering(product())
        ids = ["-".join(str(v) for v in case.values()) for case in cases]
        metafunc.parametrize("case", cases, ids=ids)


def test_settings_do_not_change_the_loss_curve(case: dict[str, Any]) -> None:
    run = config(
        **{k: v for k, v in case.items() if k != "mesh"}, mesh=MESHES[case["mesh"]]
    )
    ours, theirs = curve(run, case["family"]), reference(case["family"])
    tolerance = TOLERANCE[case["compute"]]
    assert not ours["train/skipped"].any()
    np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=tolerance)
    np.testing.assert_array_equal(ours["train/lr"], theirs["train/lr"])
    if case["compute"] == "float32":
        np.testing.assert_allclose(
            ours["train/grad_norm"], theirs["train/grad_norm"], rtol=1e-4
        )


@pytest.mark.parametrize("family", FACTORS["family"])
def test_the_reference_learns(family: str) -> None:
    losses = reference(family)["train/loss"]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("family", OTHERS)
def test_stage_3_on_a_mesh_gives_the_loss_curve_of_one_device(family: str) -> None:
    run = config(family, stage=3, mesh=MESHES["2x2x2"])
    ours, theirs = curve(run, family), reference(family)
    for name, tolerance in (("train/loss", 3e-5), ("train/grad_norm", 1e-4)):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance)
    assert theirs["train/loss"][-1] < theirs["train/loss"][0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_optimizers_agree_with_one_device_at_every_stage(
    optimizer: str, stage: int
) -> None:
    run = config("gpt2", stage=stage, optimizer=optimizer, mesh=MESHES["2x4"])
    ours, theirs = curve(run, "gpt2"), reference("gpt2", optimizer=optimizer)
    np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=3e-5)


@pytest.mark.parametrize(("accumulate", "family"), [(1, "gpt2"), (4, "llama")])
@pytest.mark.parametrize("mesh", ["4x2", "2x2x2"])
def test_a_second_copy_does_not_change_the_loss_curve(
    mesh: str, accumulate: int, family: str
) -> None:
    if 16 % (MESHES[mesh].data * MESHES[mesh].fsdp * accumulate):
        accumulate = 2
    zero = ZeroConfig(stage=3, param_persistence_threshold=600, secondary=True)
    run = config(family, zero=zero, accumulate=accumulate, mesh=MESHES[mesh])
    ours, theirs = curve(run, family), reference(family)
    np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=3e-5)
    np.testing.assert_allclose(
        ours["train/grad_norm"], theirs["train/grad_norm"], rtol=1e-4
    )


@pytest.mark.parametrize("attention", ["xla", "cpu"])
def test_fewer_key_heads_than_tensor_has_devices(attention: Any) -> None:
    mesh = MeshConfig(fsdp=2, tensor=4)
    assert ZOO["llama"].cfg.num_kv_heads == 2
    run = config("llama", mesh=mesh, attention=attention)
    ours, theirs = curve(run, "llama"), reference("llama")
    np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=3e-5)
    np.testing.assert_allclose(
        ours["train/grad_norm"], theirs["train/grad_norm"], rtol=1e-4
    )
