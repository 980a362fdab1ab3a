# SPDX-License-Identifier: Apache-2.0
"""Layers in stages: the one-device loss curve, what travels between stages, and what cannot be."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from jaxspeed.config import ConfigError, MeshConfig, RunConfig, ZeroConfig
from jaxspeed.ledger import read_ledger
from jaxspeed.pipeline import pipeline_schedule
from jaxspeed.program import build_program, notices
from jaxspeed.types import Sums
from tests.dist.runs import batches, config, program_of
from tests.dist.test_context import with_targets
from tests.models.zoo import ZOO, D, T, members


pytestmark = pytest.mark.slow

MESHES = {
    "stage 2 fsdp 4": MeshConfig(stage=2, fsdp=4),
    "stage 4 fsdp 2": MeshConfig(stage=4, fsdp=2),
    "stage 2 data 2 fsdp 2": MeshConfig(stage=2, data=2, fsdp=2),
    "stage 2 fsdp 2 tensor 2": MeshConfig(stage=2, fsdp=2, tensor=2),
    "stage 2 fsdp 2 context 2": MeshConfig(stage=2, fsdp=2, context=2),
    "stage 2 fsdp 2 expert 2": MeshConfig(stage=2, fsdp=2, expert=2),
    "stage 4 tensor 2": MeshConfig(stage=4, fsdp=1, tensor=2),
}
CASES = [
    ("stage 2 fsdp 4", 3, 4, "1f1b", 1, "gpt2"),
    ("stage 2 fsdp 4", 0, 2, "gpipe", 2, "llama"),
    ("stage 4 fsdp 2", 2, 8, "1f1b", 1, "llama"),
    ("stage 4 fsdp 2", 1, 4, "gpipe", 1, "gpt2"),
    ("stage 2 data 2 fsdp 2", 3, 4, "1f1b", 2, "llama, windows"),
    ("stage 2 fsdp 2 tensor 2", 3, 4, "1f1b", 1, "llama"),
    ("stage 2 fsdp 2 tensor 2", 1, 2, "gpipe", 2, "gpt2"),
    ("stage 2 fsdp 2 context 2", 3, 2, "1f1b", 1, "gpt2"),
    ("stage 2 fsdp 2 expert 2", 3, 4, "1f1b", 2, "mixtral"),
    ("stage 4 tensor 2", 0, 16, "1f1b", 1, "gpt2"),
]


def deep(family: str, **changes: Any) -> RunConfig:
    """Returns a run of a model of four layers."""
    cfg = dataclasses.replace(ZOO[family].cfg, num_layers=4)
    return config(family, model=cfg, **changes)


def curve(run: RunConfig, family: str, devices: int = 8) -> dict[str, np.ndarray]:
    """Returns loss and gradient norm of each update, from the parameters of the run's seed."""
    program = program_of(run, devices, family)
    state, history = program.init_state(), []
    for batch in with_targets(family):
        state, metrics = program.train_step(state, program.put_batch(batch))
        history.append(jax.device_get(metrics))
    names = ("train/loss", "train/grad_norm", "train/tokens")
    return {n: np.asarray([h[n] for h in history], np.float64) for n in names}


@functools.cache
def alone(family: str) -> dict[str, np.ndarray]:
    return curve(deep(family, stage=0), family, 1)


@pytest.mark.parametrize(("mesh", "stage", "accumulate", "pipeline", "chunks", "family"), CASES)
def test_stages_do_not_change_the_loss_curve(
    mesh: str, stage: int, accumulate: int, pipeline: Any, chunks: int, family: str
) -> None:
    run = deep(
        family,
        mesh=MESHES[mesh],
        stage=stage,
        accumulate=accumulate,
        pipeline=pipeline,
        pipeline_chunks=chunks,
    )
    ours, theirs = curve(run, family), alone(family)
    np.testing.assert_array_equal(ours["train/tokens"], theirs["train/tokens"])
    np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=3e-5)
    np.testing.assert_allclose(
        ours["train/grad_norm"], theirs["train/grad_norm"], rtol=1e-4
    )


ONE_STACK = [n for n in members("decoder", "encoder") if n not in ("gpt2", "llama", "mixtral")]


@pytest.mark.parametrize("family", ONE_STACK)
def test_every_family_of_one_stack_can_be_cut(family: str) -> None:
    run = deep(family, mesh=MESHES["stage 2 fsdp 4"], accumulate=2)
    ours, theirs = curve(run, family), alone(family)
    np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=3e-5)


def test_two_levels_of_zero_in_stages() -> None:
    zero = ZeroConfig(stage=3, param_persistence_threshold=0, secondary=True)
    mesh = MESHES["stage 2 data 2 fsdp 2"]
    ours = curve(deep("gpt2", zero=zero, mesh=mesh, accumulate=4), "gpt2")
    np.testing.assert_allclose(
        ours["train/loss"], alone("gpt2")["train/loss"], rtol=3e-5
    )


def test_a_stage_has_its_layers_and_a_share_of_the_rest() -> None:
    program = program_of(deep("gpt2", mesh=MESHES["stage 4 fsdp 2"], accumulate=4))
    params = program.abstract_state["params"]
    for leaf in jax.tree.leaves(params["layers"]):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 1
    embed = params["embed"]
    assert np.prod(embed.sharding.shard_shape(embed.shape)) == embed.size / 8


@pytest.mark.parametrize(("pipeline", "chunks"), [("gpipe", 1), ("1f1b", 1), ("1f1b", 2)])
def test_activations_go_ahead_and_gradients_back(pipeline: Any, chunks: int) -> None:
    m, p = 4, 2
    mesh = MESHES["stage 2 fsdp 4"]
    run = deep("gpt2", mesh=mesh, accumulate=m, pipeline=pipeline, pipeline_chunks=chunks)
    program = program_of(run)
    step = program.lower_step(["inputs", "targets", "mask"]).compile()
    ledger = read_ledger(step, program.mesh.shape)
    schedule = pipeline_schedule(pipeline, p, m, chunks)
    residual = 16 // (4 * m) * T * D
    params = program.abstract_state["params"]
    layers = sum(x.size for x in jax.tree.leaves(params["layers"]))
    others = sum(x.size for x in jax.tree.leaves(params)) - layers
    # Chunks go once to where they are worked on, unless they lie there, and their gradients back.
    parts = p * chunks
    away = sum(c // chunks != c % p for c in range(parts))
    moved = 2 * layers / p / 4 * away / parts
    phases = list(schedule.phases())
    ahead, back = (
        sum(part.stop - part.start for part, *does in phases if does[i]) for i in (0, 1)
    )
    assert ahead == back == m * chunks + p - 1
    # Nobody reads what the last tick sends: where it is no loop the compiler leaves it out.
    last = phases[-1][0]
    turns = ahead + back - (last.stop - last.start == 1)
    sent = ledger.elements("collective-permute", ("stage",))
    assert sent == turns * residual + moved
    assert ledger.elements("all-to-all") == 0
    # A layer is gathered for its forward pass and twice for its backward one, which begins with another
    # forward pass, unless the chunk is one layer, still there; embedding and head beside it, those of
    # idle ticks too. Its gradients need no output of the layer, so none of the bias it ends with.
    gathered = ledger.elements("all-gather", ("fsdp",))
    each, times = layers / parts, 2 if parts == 4 else 3
    spared = 4 // parts * D
    assert times * ahead * each - ahead * spared <= gathered
    assert gathered <= times * ahead * (each + others)


def test_evaluation_has_all_layers() -> None:
    run = deep("llama", mesh=MESHES["stage 4 fsdp 2"], accumulate=4)
    one = program_of(deep("llama", stage=0), 1, "llama")
    batch = with_targets("llama")[0]
    sums = []
    for program in (program_of(run, family="llama"), one):
        params = program.init_state()["params"]
        sums.append(program.eval_step(params, program.put_batch(batch, training=False)))
    assert float(sums[0].count) == float(sums[1].count)
    assert float(sums[0].total) == pytest.approx(float(sums[1].total), rel=1e-5)


def test_idle_time_is_said() -> None:
    program = program_of(deep("gpt2", mesh=MESHES["stage 2 fsdp 4"], accumulate=4))
    assert any("20% of the time idle" in said for said in notices(program))
    program = program_of(config("gpt2", pipeline="gpipe"))
    assert any("mesh.stage is 1" in said for said in notices(program))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"mesh": MeshConfig(stage=8, fsdp=1), "accumulate": 8}, "mesh.stage=8: it does not divide the model's 4 layers; give one of 1, 2, 4"),
        ("gpt2", {"mesh": MeshConfig(stage=4, fsdp=2), "accumulate": 2}, "accumulate=2: mesh.stage=4 stages would wait for fewer micro-batches"),
        ("gpt2", {"mesh": MeshConfig(stage=2, fsdp=4), "accumulate": 4, "pipeline_chunks": 4}, "mesh.stage=2: it times pipeline_chunks=4 does not divide the model's 4 layers; give one of 1"),
        ("gpt2", {"mesh": MeshConfig(stage=4, fsdp=2), "accumulate": 8, "pipeline_chunks": 3}, "give fewer pipeline_chunks"),
        ("gpt2", {"accumulate": 2, "pipeline_chunks": 2}, "pipeline_chunks=2: it has no effect without stages"),
        ("gpt2", {"mesh": MeshConfig(stage=2, data=4, fsdp=1), "global_batch_size": 12, "accumulate": 3, "pipeline_chunks": 2}, "accumulate=3: .* go round in groups of mesh.stage=2; give --accumulate 2 or 4"),
        ("t5", {"mesh": MeshConfig(stage=2, fsdp=4), "accumulate": 2}, "mesh.stage=2: the model has stacks of 2 and 4 layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(family: str, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        program_of(deep(family, **changes), family=family)


def test_two_stacks_of_one_length_cannot_be_cut() -> None:
    cfg = dataclasses.replace(ZOO["t5"].cfg, num_layers=2)
    run = config("t5", model=cfg, mesh=MESHES["stage 2 fsdp 4"], accumulate=2)
    program = program_of(run, family="t5")
    with pytest.raises(ConfigError, match="more than one stack of layers"):
        program.train_step(program.init_state(), program.put_batch(batches("t5")[0]))


def test_no_stack_cannot_be_cut() -> None:
    def alone(model: Any, batch: Any) -> Sums:
        return Sums(jax.numpy.sum(model.embed[...]) * 0.1, jax.numpy.ones(()))

    run = deep("gpt2", mesh=MESHES["stage 2 fsdp 4"], accumulate=2)
    program = build_program(run, loss_fn=alone, devices=jax.devices()[:8])
    with pytest.raises(ConfigError, match="no stack of layers"):
        program.train_step(program.init_state(), program.put_batch(batches("gpt2")[0]))
