# SPDX-License-Identifier: Apache-2.0
"""Short training runs for the tests: one tiny model of each family, the same eight batches, every setting.

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
from models import gpt2, llama


G, T, V = 16, 16, 64
UPDATES = 8

FAMILIES: dict[str, Any] = {
    "gpt2": gpt2.Config(
        vocab_size=V, max_seq_len=T, num_layers=2, num_heads=4, d_model=32
    ),
    "llama": llama.Config(
        vocab_size=V,
        max_seq_len=T,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_model=32,
        d_ff=64,
    ),
}

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
        model=FAMILIES[family],
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
def batches() -> list[dict[str, np.ndarray]]:
    """Returns batches with ragged masks, packed documents and learnable text."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(UPDATES):
        inputs = (rng.integers(0, V, (G, 1)) + 3 * np.arange(T)) % V
        made.append(
            {
                "inputs": inputs.astype(np.int32),
                "mask": rng.random((G, T)) < rng.random((G, 1)),
                "segment_ids": np.sort(rng.integers(1, 4, (G, T)), axis=1).astype(
                    np.int32
                ),
            }
        )
    return made


@functools.cache
def _parameters(family: str) -> Any:
    program = build_program(config(family, stage=0), devices=jax.devices()[:1])
    return jax.device_get(program.init_state()["params"])


def start(program: Program, family: str) -> State:
    """Returns the train state at step 0, from the family's parameters."""

    def fresh(params: Any) -> State:
        return {**program.init(jax.random.key(0)), "params": params}

    params = jax.tree.map(
        jax.device_put, _parameters(family), program.shardings["params"]
    )
    return jax.jit(fresh, out_shardings=program.shardings)(params)


def program_of(run: RunConfig, devices: int = 8) -> Program:
    """Returns the run's program on the first virtual devices."""
    return build_program(run, devices=jax.devices()[:devices])


def curve(run: RunConfig, family: str, devices: int = 8) -> dict[str, np.ndarray]:
    """Returns loss, gradient norm and parameter checksum of each update."""
    program = program_of(run, devices)
    state, history = start(program, family), []
    for batch in batches():
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
