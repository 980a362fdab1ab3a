# SPDX-License-Identifier: Apache-2.0
"""Sequences split over devices: the one-device loss curve, the collectives of the formulas, and what cannot be."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from jaxspeed.config import ConfigError, MeshConfig, RunConfig, TaskConfig
from jaxspeed.ledger import Ledger, read_ledger
from jaxspeed.losses import (
    masked_lm_loss,
    next_token_loss,
    seq2seq_loss,
    tagging_loss,
)
from jaxspeed.program import build_program, notices
from tests.dist.runs import batches, config, curve, program_of, reference
from tests.models.zoo import ZOO, L, T, members


pytestmark = pytest.mark.slow

MESHES = {
    "context 8": MeshConfig(fsdp=1, context=8),
    "fsdp 4 context 2": MeshConfig(fsdp=4, context=2),
    "data 2 fsdp 2 context 2": MeshConfig(data=2, fsdp=2, context=2),
    "fsdp 2 context 2 tensor 2": MeshConfig(fsdp=2, context=2, tensor=2),
    "context 4 tensor 2": MeshConfig(fsdp=1, context=4, tensor=2),
}
CASES = [
    ("context 8", "ring", 3, 1, "llama"),
    ("fsdp 4 context 2", "ulysses", 0, 4, "gpt2"),
    ("fsdp 4 context 2", "ring", 1, 1, "gpt2"),
    ("fsdp 4 context 2", "ring", 2, 4, "llama"),
    ("data 2 fsdp 2 context 2", "ulysses", 3, 1, "llama"),
    ("data 2 fsdp 2 context 2", "ring", 3, 4, "gpt2"),
    ("fsdp 2 context 2 tensor 2", "ulysses", 3, 1, "gpt2"),
    ("fsdp 2 context 2 tensor 2", "ring", 1, 4, "llama"),
    ("context 4 tensor 2", "ring", 2, 1, "gpt2"),
]


def with_targets(family: str) -> list[dict[str, np.ndarray]]:
    """Returns the family's batches with the targets that the loss would make of them."""
    made = []
    for batch in batches(family):
        if "targets" not in batch and "labels" not in batch:
            inner = np.arange(T) < T - 1
            mask = batch.get("mask", np.ones_like(batch["inputs"], bool))
            targets = np.roll(batch["inputs"], -1, axis=1)
            batch = {**batch, "targets": targets, "mask": mask & inner}
        made.append(batch)
    return made


def check(run: RunConfig, family: str) -> None:
    ours = curve(run, family, rows=with_targets(family))
    theirs = reference(family)
    np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=3e-5)
    np.testing.assert_allclose(
        ours["train/grad_norm"], theirs["train/grad_norm"], rtol=1e-4
    )


@pytest.mark.parametrize(("mesh", "by", "stage", "accumulate", "family"), CASES)
def test_split_sequences_do_not_change_the_loss_curve(
    mesh: str, by: Any, stage: int, accumulate: int, family: str
) -> None:
    check(
        config(
            family, stage=stage, accumulate=accumulate, context=by, mesh=MESHES[mesh]
        ),
        family,
    )


BY_TOKEN = (next_token_loss, masked_lm_loss, seq2seq_loss, tagging_loss)
SPLIT = [
    name
    for name in members()
    if ZOO[name].loss in BY_TOKEN
    and ZOO[name].kind != "recurrent"
    and not hasattr(ZOO[name].cfg, "feature_shape")
]


@pytest.mark.parametrize("family", SPLIT)
def test_every_family_whose_loss_goes_token_by_token_can_be_split(family: str) -> None:
    mesh = MeshConfig(fsdp=4, context=2)
    check(config(family, stage=3, context="ulysses", mesh=mesh), family)


def ledger(**changes: Any) -> Ledger:
    program = program_of(config(**changes))
    step = program.lower_step(["inputs", "targets", "mask"]).compile()
    return read_ledger(step, program.mesh.shape)


def test_ulysses_has_four_exchanges_a_layer_and_pass() -> None:
    found = ledger(mesh=MESHES["fsdp 4 context 2"], context="ulysses", stage=0)
    assert sum(e.trips for e in found.select("all-to-all", ("context",))) == 8 * L
    B, D = 16 // 4, ZOO["gpt2"].cfg.d_model
    assert found.elements("all-to-all") == 8 * L * B * (T // 2) * D


@pytest.mark.parametrize("size", [2, 4])
def test_a_ring_sends_keys_and_values_one_time_less_than_it_has_devices(
    size: int,
) -> None:
    mesh = MeshConfig(fsdp=8 // size, context=size)
    found = ledger(mesh=mesh, context="ring", stage=0)
    B, D = 16 // (8 // size), ZOO["gpt2"].cfg.d_model
    pair = B * (T // size) * 2 * D
    # There, and again in the backward pass with the gradients, which go home at the end.
    sends = (size - 1) + (size - 1) + size
    owners = found.elements("collective-permute") - L * sends * pair
    assert 0 < owners <= 2 * L * (size - 1)
    assert found.elements("all-to-all") == 0


def test_context_shards_the_state_too() -> None:
    program = program_of(config(mesh=MESHES["fsdp 4 context 2"], stage=1))
    shards = {
        name: x.sharding.shard_shape(x.shape)
        for name, x in jax.tree_util.tree_leaves_with_path(
            program.abstract_state["params"]
        )
    }
    whole = {
        name: x.shape
        for name, x in jax.tree_util.tree_leaves_with_path(
            program.abstract_state["params"]
        )
    }
    split = [n for n in whole if np.prod(whole[n]) == 8 * np.prod(shards[n])]
    assert len(split) > len(whole) / 2


def test_evaluation_and_whole_rows_agree() -> None:
    run = config(mesh=MESHES["fsdp 4 context 2"], context="ring")
    program, batch = program_of(run), with_targets("gpt2")[0]
    state = program.init_state()
    split = program.eval_step(state["params"], program.put_batch(batch, training=False))
    whole, _ = program.predictor(_only_loss)(state["params"], batch)
    assert float(split.count) == float(whole.count)
    assert float(split.total) == pytest.approx(float(whole.total), rel=1e-5)


def _only_loss(model: Any, batch: Any) -> Any:
    return ZOO["gpt2"].loss(model, batch), ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 12}, "mesh.context=8: inputs of seq_len=12 has 12 tokens, which do not divide into 16 parts; nearest legal: 16"),
        ({"task": TaskConfig(name="classification")}, "mesh.context=8: task.name='classification' reads rows whole"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused(changes: Any, message: str) -> None:
    run = dataclasses.replace(
        config(mesh=MESHES["context 8"], context="ring"), **changes
    )
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        build_program(run, devices=jax.devices()[:8])


def test_batch_without_targets_cannot_be_split() -> None:
    run = config(mesh=MESHES["fsdp 4 context 2"])
    program = program_of(run)
    with pytest.raises(ConfigError, match="needs whole sequences; give it targets"):
        program.train_step(program.init_state(), program.put_batch(batches("gpt2")[0]))


def test_recurrence_cannot_be_split() -> None:
    run = config("lstm", mesh=MESHES["fsdp 4 context 2"])
    program = program_of(run, family="lstm")
    with pytest.raises(ConfigError, match="a recurrence needs whole sequences"):
        program.lower_step(["inputs", "targets", "mask"])


def test_name_of_the_way_without_devices_is_said() -> None:
    program = program_of(config(mesh=MeshConfig(fsdp=8), context="ring"))
    assert any("mesh.context is 1" in said for said in notices(program))
