# SPDX-License-Identifier: Apache-2.0
"""Short training runs for the tests: a tiny model of each family, the same eight batches, every setting.

All runs of a family start from the same parameters, made once on one device, so that a
test of the step does not compile the initialisation again for each mesh.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxspeed.config import (
    DTypeConfig,
    LossScaleConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    ZeroConfig,
)
from jaxspeed.program import Program, State, build_program
from tests.models.zoo import ZOO, T


G, UPDATES = 16, 8
"""Rows of a batch, and batches."""

MESHES = {
    "8x1": MeshConfig(data=8, fsdp=1),
    "1x8": MeshConfig(data=1, fsdp=8),
    "4x2": MeshConfig(data=4, fsdp=2),
    "2x4": MeshConfig(data=2, fsdp=4),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
    "1x4x2": MeshConfig(data=1, fsdp=4, tensor=2),
}


def config(family: str = "gpt2", **changes: Any) -> RunConfig:
    """Returns a run of `UPDATES` updates in which stage 3 gathers every parameter."""
    stage = changes.pop("stage", 3)
    compute = changes.pop("compute", "float32")
    optimizer = changes.pop("optimizer", "adamw")
    run = RunConfig(
        model=ZOO[family].cfg,
        steps=UPDATES,
        seq_len=T,
        global_batch_size=G,
        zero=ZeroConfig(stage=stage, param_persistence_threshold=0),
        dtype=DTypeConfig(compute=compute),
        optim=OptimConfig(name=optimizer, lr=1e-2, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=2),
        compile_cache="",
    )
    if compute == "float16":
        run = dataclasses.replace(run, loss_scale=LossScaleConfig(initial_power=8))
    return dataclasses.replace(run, **changes)


@functools.cache
def batches(family: str) -> list[dict[str, np.ndarray]]:
    """Returns the family's batches, which can be learnt."""
    rng = np.random.default_rng(0)
    return [ZOO[family].batch(rng, G) for _ in range(UPDATES)]


@functools.cache
def _parameters(family: str) -> Any:
    program = program_of(config(family, stage=0), 1, family)
    return jax.device_get(program.init_state()["params"])


def start(program: Program, family: str) -> State:
    """Returns the train state at step 0, from the family's parameters."""

    def fresh(params: Any) -> State:
        return {**program.init(jax.random.key(0)), "params": params}

    params = jax.tree.map(
        jax.device_put, _parameters(family), program.shardings["params"]
    )
    return jax.jit(fresh, out_shardings=program.shardings)(params)


def program_of(run: RunConfig, devices: int = 8, family: str = "gpt2") -> Program:
    """Returns the run's program on the first virtual devices."""
    loss = ZOO[family].loss
    return build_program(run, loss_fn=loss, devices=jax.devices()[:devices])


def curve(
    run: RunConfig,
    family: str,
    devices: int = 8,
    rows: list[dict[str, np.ndarray]] | None = None,
) -> dict[str, np.ndarray]:
    """Returns loss, gradient norm and parameter checksum of each update, on the family's batches or these rows."""
    program = program_of(run, devices, family)
    state, history = start(program, family), []
    for batch in rows or batches(family):
        state, metrics = program.train_step(state, program.put_batch(batch))
        history.append(jax.device_get(metrics))
    names = ("train/loss", "train/grad_norm", "train/lr", "train/skipped")
    return {n: np.asarray([h[n] for h in history], np.float64) for n in names} | {
        "params": np.concatenate(
            [np.ravel(x) for x in jax.tree.leaves(jax.device_get(state["params"]))]
        )
    }


@functools.cache
def reference(
    family: str, compute: str = "float32", optimizer: str = "adamw"
) -> dict[str, np.ndarray]:
    """Returns the curve of one device without ZeRO."""
    run = config(family, stage=0, compute=compute, optimizer=optimizer)
    return curve(run, family, devices=1)
