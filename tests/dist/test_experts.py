# SPDX-License-Identifier: Apache-2.0
"""Experts split over devices: the one-device loss curve, and the collectives of the formulas."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from jaxspeed.ambient import ambient
from jaxspeed.config import ConfigError, MeshConfig, MoeConfig, RunConfig
from jaxspeed.ledger import Ledger, read_ledger
from jaxspeed.losses import next_token_loss
from jaxspeed.nn import merge
from jaxspeed.program import build_program
from jaxspeed.types import Sums
from tests.dist.runs import batches, config, curve, program_of, reference, start
from tests.dist.test_context import with_targets
from tests.models.zoo import ZOO, D, L, T


pytestmark = pytest.mark.slow

MESHES = {
    "expert 8": MeshConfig(fsdp=1, expert=8),
    "fsdp 4 expert 2": MeshConfig(fsdp=4, expert=2),
    "data 2 expert 4": MeshConfig(data=2, fsdp=1, expert=4),
    "fsdp 2 expert 2 tensor 2": MeshConfig(fsdp=2, expert=2, tensor=2),
    "fsdp 2 expert 2 context 2": MeshConfig(fsdp=2, expert=2, context=2),
    "data 2 fsdp 2 tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}
FAMILY = "mixtral"
DROPS = MoeConfig(capacity_factor=1.0, z_coef=0.01)
DROPLESS = MoeConfig(balance_coef=0.1, z_coef=0.01)
CASES = [
    ("expert 8", 3, 1, DROPLESS),
    ("expert 8", 0, 1, DROPS),
    ("fsdp 4 expert 2", 1, 1, DROPLESS),
    ("fsdp 4 expert 2", 3, 2, DROPS),
    ("data 2 expert 4", 2, 2, DROPLESS),
    ("fsdp 2 expert 2 tensor 2", 3, 4, DROPLESS),
    ("fsdp 2 expert 2 tensor 2", 1, 1, DROPS),
    ("fsdp 2 expert 2 context 2", 3, 4, DROPLESS),
    ("data 2 fsdp 2 tensor 2", 2, 1, DROPLESS),
]


def config_of(mesh: str, **changes: Any) -> RunConfig:
    return config(FAMILY, mesh=MESHES[mesh], **changes)


@pytest.mark.parametrize(("mesh", "stage", "accumulate", "moe"), CASES)
def test_split_experts_do_not_change_the_loss_curve(
    mesh: str, stage: int, accumulate: int, moe: MoeConfig
) -> None:
    run = config_of(mesh, stage=stage, accumulate=accumulate, moe=moe)
    rows = with_targets(FAMILY)
    one = config(FAMILY, stage=0, moe=moe, mesh=MeshConfig())
    ours, theirs = curve(run, FAMILY, rows=rows), curve(one, FAMILY, 1, rows=rows)
    np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=3e-5)
    for name, tolerance in (("train/grad_norm", 1e-4), ("params", 1e-2)):
        np.testing.assert_allclose(
            ours[name], theirs[name], rtol=tolerance, atol=1e-3 * (name == "params")
        )


@pytest.mark.parametrize("mesh", ["expert 8", "fsdp 2 expert 2 tensor 2"])
def test_room_by_need_does_not_change_the_loss_curve(mesh: str) -> None:
    run = config_of(mesh, remat="full", moe=DROPLESS, accumulate=2)
    one = config(FAMILY, stage=0, moe=DROPLESS, mesh=MeshConfig(), accumulate=2)
    ours, theirs = curve(run, FAMILY), curve(one, FAMILY, 1)
    np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=3e-5)


@pytest.mark.parametrize("family", ["mixtral, shared", "mixtral, residual"])
def test_every_kind_of_mixture_can_be_split(family: str) -> None:
    mesh = MeshConfig(fsdp=2, expert=2, tensor=2)
    program = program_of(config(family, mesh=mesh), family=family)
    step = program.lower_step(list(batches(family)[0])).compile()
    # Masks that the compiler splits would travel so, in a loop over rows, and devices wait for ever.
    assert not read_ledger(step, program.mesh.shape).select("all-to-all", ("tensor",))
    ours, theirs = curve(config(family, mesh=mesh), family), reference(family)
    np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=3e-5)


def ledger(mesh: str, **changes: Any) -> Ledger:
    program = program_of(config_of(mesh, **changes), family=FAMILY)
    step = program.lower_step(["inputs", "targets", "mask"]).compile()
    return read_ledger(step, program.mesh.shape)


@pytest.mark.parametrize("moe", [DROPS, DROPLESS], ids=["drops", "dropless"])
def test_tokens_travel_there_and_back_in_either_pass(moe: MoeConfig) -> None:
    found = ledger("fsdp 4 expert 2", moe=moe, stage=0)
    entries = found.select("all-to-all", ("expert",))
    assert sum(e.trips for e in entries) == 4 * L
    assert found.elements("all-to-all") == sum(e.trips * e.elements for e in entries)


@pytest.mark.parametrize("moe", [DROPS, DROPLESS], ids=["drops", "dropless"])
def test_tokens_travel_there_and_back_once_more_where_all_is_computed_again(
    moe: MoeConfig,
) -> None:
    found = ledger("fsdp 4 expert 2", moe=moe, stage=0, remat="full")
    assert sum(e.trips for e in found.select("all-to-all", ("expert",))) == 6 * L


def test_places_are_what_travels() -> None:
    found = ledger("fsdp 4 expert 2", moe=DROPS, stage=0)
    B, E, k = 16 // 8, ZOO[FAMILY].cfg.num_experts, ZOO[FAMILY].cfg.experts_per_token
    places = max(4, k * T // E)
    assert found.elements("all-to-all") == 4 * L * B * E * places * D


def test_gradients_of_experts_stay_with_them() -> None:
    """Nothing of an expert is gathered or reduced over the axis that splits them."""
    found = ledger("expert 8", moe=DROPLESS, stage=3)
    cfg = ZOO[FAMILY].cfg
    experts = 3 * L * cfg.num_experts * cfg.d_model * cfg.d_ff
    others = cfg.num_params() - experts
    gathered = found.elements("all-gather", ("expert",))
    reduced = found.elements("reduce-scatter", ("expert",))
    assert reduced <= others * 1.05
    assert gathered <= 2.2 * others


def test_each_device_has_its_own_experts_at_every_stage() -> None:
    for stage in (0, 3):
        program = program_of(config_of("fsdp 4 expert 2", stage=stage), family=FAMILY)
        w = program.abstract_state["params"]["layers"]["block"]["mlp"]["w_up"]
        held = w.sharding.shard_shape(w.shape)
        assert held[1] == w.shape[1] // 2
        assert np.prod(w.shape) == np.prod(held) * (8 if stage else 2)


def test_routers_are_in_the_metrics() -> None:
    program = program_of(config_of("fsdp 4 expert 2", moe=DROPS), family=FAMILY)
    state = start(program, FAMILY)
    batch = program.put_batch(batches(FAMILY)[0])
    metrics = jax.device_get(program.train_step(state, batch)[1])
    assert 1.0 <= metrics["train/router_balance"] < 3.0
    assert metrics["train/router_z"] > 0
    assert 0 < metrics["train/router_dropped"] < 1
    assert metrics["train/auxiliary_loss"] == pytest.approx(
        L * (0.01 * metrics["train/router_balance"] + 0.01 * metrics["train/router_z"]),
        rel=0.2,  # rows count by their targets there
    )


def test_evaluation_adds_and_drops_nothing() -> None:
    program = program_of(config_of("fsdp 4 expert 2", moe=DROPS), family=FAMILY)
    params = start(program, FAMILY)["params"]
    batch = with_targets(FAMILY)[0]
    sums = program.eval_step(params, program.put_batch(batch, training=False))
    whole, batch = jax.tree.map(jax.numpy.asarray, jax.device_get((params, batch)))
    with ambient():
        model = merge(program.spec.graphdef, whole)
        expected = next_token_loss(model, batch)
    assert float(sums.total) == pytest.approx(float(expected.total), rel=1e-5)


def test_drawn_routers_learn_and_are_drawn_anew() -> None:
    moe = MoeConfig(capacity_factor=1.0, random_priority=True, sample_second=True)
    losses = curve(config_of("fsdp 4 expert 2", moe=moe), FAMILY)["train/loss"]
    assert losses[-1] < losses[0]
    others = dataclasses.replace(moe, sample_second=False, noise="jitter")
    assert curve(config_of("fsdp 4 expert 2", moe=others), FAMILY)["train/loss"][1] != losses[1]


def test_a_loss_that_leaves_routers_out_is_refused() -> None:
    def alone(model: Any, batch: Any) -> Sums:
        return Sums(jax.numpy.sum(model.hidden(batch["inputs"])), jax.numpy.ones(()))

    run = config_of("fsdp 4 expert 2")
    program = build_program(run, loss_fn=alone, devices=jax.devices()[:8])
    with pytest.raises(ConfigError, match="with_auxiliary"):
        program.train_step(program.init_state(), program.put_batch(batches(FAMILY)[0]))
