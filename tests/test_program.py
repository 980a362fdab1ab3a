# SPDX-License-Identifier: Apache-2.0
"""What is settled before an array exists: batches, shares of processes, precision."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxspeed.config import (
    BATCH_AXES,
    ConfigError,
    DTypeConfig,
    LossScaleConfig,
    MeshConfig,
    ScheduleConfig,
    ZeroConfig,
)
from jaxspeed.paths import paths_of
from jaxspeed.program import Program, build_program, notices
from tests import toy
from tests.toy import G, T, batch_of, program_of, run_of


MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def test_training_batch_has_the_rows_of_micro_step_i_at_index_i() -> None:
    program = program_of(8, mesh=MESH, accumulate=2)
    rows = {
        "inputs": np.arange(G * T, dtype=np.int32).reshape(G, T),
        "weight": np.arange(G, dtype=np.float32),
    }
    batch = program.put_batch(rows)
    np.testing.assert_array_equal(batch["inputs"], rows["inputs"].reshape(2, G // 2, T))
    np.testing.assert_array_equal(batch["weight"], rows["weight"].reshape(2, G // 2))
    for x in batch.values():
        assert isinstance(x.sharding, NamedSharding)
        along = ("context",) if x.ndim > 2 else ()
        assert x.sharding.spec == P(None, BATCH_AXES, *along)
        assert x.addressable_shards[0].data.shape[:2] == (2, program.batch.micro_size)


def test_evaluation_batch_is_split_over_all_shards() -> None:
    program = program_of(8, mesh=MESH, accumulate=2)
    batch = program.put_batch(batch_of(), training=False)
    np.testing.assert_array_equal(batch["inputs"], batch_of()["inputs"])
    assert batch["inputs"].addressable_shards[0].data.shape == (G // 4, T)


def test_abstract_batch_is_that_of_put_batch() -> None:
    program = program_of(8, mesh=MESH, accumulate=2)
    announced, made = (
        program.abstract_batch(["inputs", "mask"]),
        program.put_batch(batch_of()),
    )
    for name, x in announced.items():
        assert (x.shape, x.dtype) == (made[name].shape, made[name].dtype)
        assert made[name].sharding.is_equivalent_to(x.sharding, 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "batch is empty; give at least one array"),
        (
            {"inputs": np.zeros((15, T), np.int32)},
            r"batch\['inputs'\] has shape \(15, 8\): its first dim must be 16",
        ),
        ({"inputs": np.zeros((0, T), np.int32)}, "its first dim must be 16"),
        (
            {"inputs": np.zeros((G, T), np.int32), "t": np.float32(1)},
            r"batch\['t'\] has shape \(\)",
        ),
        (
            {"text": np.array(["a"] * G)},
            r"batch\['text'\] holds <U1, which no device computes with",
        ),
        ({"x": np.array([None] * G)}, r"batch\['x'\] holds object"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_batch_that_does_not_fit_is_refused(
    rows: Any, message: str, training: bool
) -> None:
    with pytest.raises(ConfigError, match=message):
        program_of().put_batch(rows, training=training)


def test_wide_numbers_become_the_devices_own() -> None:
    rows = {"inputs": np.zeros((G, T), np.int64), "x": np.zeros((G,), np.float64)}
    batch = program_of().put_batch(rows)
    assert (batch["inputs"].dtype, batch["x"].dtype) == (jnp.int32, jnp.float32)


def test_micro_program_takes_the_rows_of_one_micro_step() -> None:
    program = program_of(8, mesh=MESH, accumulate=2)
    assert dataclasses.astuple(program.micro.batch) == (8, 2, 1, 4)
    assert program.micro.put_batch(batch_of(rows=8), training=False)[
        "inputs"
    ].shape == (8, T)
    with pytest.raises(ConfigError, match="its first dim must be 8"):
        program.micro.check_rows(batch_of())


def shares(
    processes: Any, shards: int, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, int]]:
    """Returns each process's (index, count) for a grid (batch shards, tensor) of processes."""
    grid = np.vectorize(lambda p: SimpleNamespace(process_index=p), otypes=[object])(
        np.asarray(processes)
    )
    sizes = {"data": 1, "fsdp": shards, "expert": 1, "tensor": grid.size // shards}
    mesh = SimpleNamespace(
        devices=grid.reshape(tuple(sizes.values())),
        shape=sizes,
        axis_names=tuple(sizes),
    )
    found = []
    for index in np.unique(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: int(index))
        fake = SimpleNamespace(mesh=mesh, batch=SimpleNamespace(shards=shards))
        found.append(vars(Program)["process_rows"].func(fake))
    return found


@pytest.mark.parametrize(
    ("processes", "shards", "expected"),
    [
        ([0, 0, 0, 0], 4, [(0, 1)]),
        ([0, 0, 1, 1], 4, [(0, 2), (1, 2)]),
        ([1, 1, 0, 0], 4, [(1, 2), (0, 2)]),
        ([0, 1, 2, 3], 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        # A TPU slice of 4 x 4 chips on hosts of 2 x 2: a host's shards are not neighbours.
        (
            [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3],
            16,
            [(0, 4), (1, 4), (2, 4), (3, 4)],
        ),
        # tensor inside a process, over two, and over all.
        ([[0, 0], [0, 0], [1, 1], [1, 1]], 4, [(0, 2), (1, 2)]),
        ([[0, 1], [0, 1]], 2, [(0, 1), (0, 1)]),
        ([[0, 1], [0, 1], [2, 3], [2, 3]], 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_share_the_rows_by_their_shards(
    processes: Any,
    shards: int,
    expected: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert shares(processes, shards, monkeypatch) == expected


@pytest.mark.parametrize("processes", [[[0, 0], [0, 1], [1, 1]], [0, 0, 0, 1]])
def test_processes_whose_parts_overlap_are_refused(
    processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="overlap with another's; let tensor divide"):
        shares(processes, len(processes), monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "compute", "activations", "reduce"),
    [
        (DTypeConfig(compute="float32"), "float32", "float32", "float32"),
        (DTypeConfig(), "bfloat16", "float32", "float32"),
        (DTypeConfig(activations="compute"), "bfloat16", "bfloat16", "float32"),
        (
            DTypeConfig(activations="float32", reduce="compute"),
            "bfloat16",
            "float32",
            "bfloat16",
        ),
    ],
)
def test_precision_of_the_settings_reaches_the_trace(
    dtype: DTypeConfig, compute: str, activations: str, reduce: str
) -> None:
    spec = build_program(run_of(dtype=dtype), devices=jax.devices()[:1]).spec
    assert (spec.settings.compute, spec.settings.activations, spec.reduce_dtype) == (
        compute,
        activations,
        reduce,
    )
    assert (spec.settings.platform, spec.settings.tensor) == ("cpu", 1)


def test_dropout_is_drawn_where_the_model_may_drop() -> None:
    build = lambda rate, **more: build_program(
        run_of(model=toy.Config(dropout=rate)), devices=jax.devices()[:1], **more
    )
    assert not build(0.0).spec.dropout
    assert build(0.1).spec.dropout
    # Nothing is known of a function's model, so it gets a key.
    assert build(0.0, make_model=toy.Config(dropout=0.1).build).spec.dropout


@pytest.mark.parametrize("batch", [8, 24, 1024])
def test_seed_scale_is_a_power_of_two_near_one_over_the_tokens(batch: int) -> None:
    scale = build_program(
        run_of(global_batch_size=batch), devices=jax.devices()[:1]
    ).spec.seed_scale
    assert np.frexp(scale)[0] == 0.5
    assert 0.7 <= scale * batch * T <= 1.42


def test_loss_scale_is_a_part_of_float16_states_only() -> None:
    assert program_of().abstract_state["loss_scale"] == ()
    run = run_of(compute="float16", loss_scale=LossScaleConfig(static=8.0))
    assert (
        build_program(run, devices=jax.devices()[:1])
        .abstract_state["loss_scale"]
        .scale.shape
        == ()
    )


@pytest.mark.parametrize(
    ("changes", "devices", "said"),
    [
        ({"stage": 0}, 8, []),
        ({"stage": 3}, 8, []),
        ({"stage": 3, "mesh": MESH}, 8, []),
        ({"stage": 2}, 1, ["zero.stage=2 shards nothing here: mesh.fsdp is 1"]),
        (
            {"stage": 1, "mesh": MeshConfig(data=8)},
            8,
            ["zero.stage=1 shards nothing here"],
        ),
        (
            {"stage": 3, "model": toy.Config(d_model=12, vocab_size=30)},
            8,
            [
                "3 parameters (672 elements) stay whole: none of their dims divides by mesh.fsdp=8"
            ],
        ),
        ({"stage": 0, "model": toy.Config(d_model=12, vocab_size=30)}, 8, []),
        ({"remat": "offload"}, 1, ["remat=offload has nothing to do here"]),
        (
            {"schedule": ScheduleConfig(warmup_steps=99)},
            8,
            ["schedule.warmup_steps=99"],
        ),
        (
            {"stage": 3, "model": toy.Config(vocab_size=70_001), "mesh": MESH},
            8,
            ["not split over mesh.tensor=2 (no dim that may be divides): (70001, 16)"],
        ),
    ],
)
def test_settings_without_effect_are_said_once(
    changes: Any, devices: int, said: list[str]
) -> None:
    program = build_program(run_of(**changes), devices=jax.devices()[:devices])
    found = notices(program)
    assert len(found) == len(said)
    for line, start in zip(found, said, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 12}, "nearest legal: 8 or 16"),
        ({"seq_len": 9}, "the model has 8 positions"),
        ({"mesh": MeshConfig(data=16)}, "needs a multiple of 16 devices"),
        ({"loss_scale": LossScaleConfig(window=3)}, "no effect"),
        (
            {"dtype": DTypeConfig(reduce="compute")},
            "dtype.reduce='compute': XLA dies of a bfloat16 reduction on CPU",
        ),
        (
            {"zero": ZeroConfig(), "mesh": MeshConfig(fsdp=4)},
            "asks for 4 devices but there are 8",
        ),
    ],
)
def test_run_that_cannot_be_is_refused_before_anything_is_built(
    changes: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_program(run_of(**changes), devices=jax.devices())


def test_program_is_built_and_lowered_without_arrays() -> None:
    big = toy.Config(vocab_size=10**9, num_layers=100, d_model=1024)
    before = sum(x.nbytes for x in jax.live_arrays())
    program = build_program(run_of(model=big, stage=3), devices=jax.devices())
    text = program.lower_step(["inputs", "mask"]).as_text()
    assert "1000000000x1024" in text
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 10**4


def test_steps_are_jitted_once() -> None:
    program = program_of()
    assert program.train_step is program.train_step
    assert program.eval_step is program.eval_step


def test_parts_of_a_new_state_are_those_of_the_whole() -> None:
    program = program_of(8, mesh=MESH)
    whole = program.init_state()
    some = ["embed", sorted(paths_of(whole["params"]))[-1]]
    drawn = paths_of(program.draw(some))
    assert set(drawn) == set(some)
    for path, leaf in drawn.items():
        there = paths_of(whole["params"])[path]
        np.testing.assert_array_equal(leaf, there)
        assert leaf.sharding.is_equivalent_to(there.sharding, leaf.ndim)
    assert program.draw([]) == {}
    rest = program.init_rest()
    assert rest.pop("params") is None
    chex.assert_trees_all_equal(
        jax.random.key_data(rest.pop("key")), jax.random.key_data(whole["key"])
    )
    chex.assert_trees_all_equal(rest, {name: whole[name] for name in rest})
