# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's three calls are the fused step to the last bit; any NNX model trains."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxspeed
from jaxspeed.config import ConfigError, MeshConfig, RunConfig
from jaxspeed.engine import Engine, MicroLoss
from jaxspeed.types import Sums, TrainingError
from tests import toy
from tests.toy import (
    G,
    T,
    assert_same,
    batch_of,
    boom,
    boom_loss,
    float16_program,
    host,
    program_of,
    run_of,
)


ONE = jax.devices()[:1]


def engine_of(devices: int = 1, **changes: Any) -> Engine:
    """Returns a new engine; the compiled step is that of other tests with the same arguments."""
    program = program_of(devices, **changes)
    return Engine(program, toy.start(program))


def parts(batch: dict[str, np.ndarray], count: int) -> list[dict[str, np.ndarray]]:
    """Returns the batch cut into micro-batches."""
    pieces = {name: np.split(x, count) for name, x in batch.items()}
    return [{name: x[i] for name, x in pieces.items()} for i in range(count)]


def three_calls(
    engine: Engine, batch: dict[str, np.ndarray], accumulate: int
) -> list[MicroLoss]:
    losses = []
    for micro in parts(batch, accumulate):
        losses.append(engine(micro))
        engine.backward(losses[-1])
        engine.step()
    return losses


SETTINGS = [
    {"accumulate": 1},
    {"accumulate": 4},
    {"accumulate": 2, "devices": 8, "stage": 3},
    {"accumulate": 2, "devices": 8, "stage": 1, "mesh": MeshConfig(data=2, fsdp=4)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_three_calls_equal_train_batch_to_the_last_bit(
    settings: dict[str, Any],
) -> None:
    fused, called = engine_of(**settings), engine_of(**settings)
    for seed in range(3):
        metrics = fused.train_batch(batch_of(seed))
        losses = three_calls(called, batch_of(seed), settings["accumulate"])
        np.testing.assert_array_equal(
            [float(loss) for loss in losses], metrics["train/micro_losses"]
        )
    assert_same(fused.state, called.state)
    assert called.global_steps == 3


def test_loss_before_the_step_is_the_loss_of_the_step() -> None:
    engine = engine_of(accumulate=4)
    losses = [engine(micro) for micro in parts(batch_of(), 4)]
    before = [loss.item() for loss in losses]
    for loss in losses:
        engine.backward(loss)
        engine.step()
    assert [loss.item() for loss in losses] == pytest.approx(before, rel=1e-6)
    assert len(set(before)) == 4


def test_loss_that_is_not_read_costs_no_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(accumulate=4)
    monkeypatch.setattr(
        type(engine.program),
        "eval_step",
        property(lambda _: pytest.fail("a forward pass")),
    )
    losses = three_calls(engine, batch_of(), 4)
    assert all(np.isfinite(loss.item()) for loss in losses)


def test_loss_reads_as_a_number() -> None:
    loss = engine_of(accumulate=4)(parts(batch_of(), 4)[0])
    assert f"{loss:.3f}" == f"{loss.item():.3f}"
    assert float(loss) == loss.item()
    assert repr(loss) == f"MicroLoss({loss.item():.6f})"


def test_step_does_nothing_until_the_accumulation_is_complete() -> None:
    engine = engine_of(accumulate=4)
    start = host(engine.state)
    for index, micro in enumerate(parts(batch_of(), 4)):
        assert not engine.is_gradient_accumulation_boundary()
        engine.backward(engine(micro))
        assert engine.is_gradient_accumulation_boundary() == (index == 3)
        assert engine.global_steps == 0
        assert_same(engine.state, start)
        engine.step()
    assert engine.global_steps == 1
    assert not engine.is_gradient_accumulation_boundary()


def test_calls_out_of_order_are_refused() -> None:
    engine, micros = engine_of(accumulate=4), parts(batch_of(), 4)
    with pytest.raises(
        ConfigError,
        match=r"step: no micro-batch is waiting; call loss = engine\(batch\)",
    ):
        engine.step()
    with pytest.raises(
        ConfigError, match=r"backward\(float\): takes what engine\(batch\) returned"
    ):
        engine.backward(2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ConfigError, match=r"backward\(MicroLoss\): takes what engine\(batch\) returned"
    ):
        engine.backward(engine_of(accumulate=4)(micros[0]))
    losses = [engine(micro) for micro in micros]
    engine.backward(losses[0])
    with pytest.raises(ConfigError, match="this micro-batch was counted already"):
        engine.backward(losses[0])
    for loss in losses[1:]:
        engine.backward(loss)
    with pytest.raises(
        ConfigError,
        match=r"backward: 4 micro-batches are waiting already \(accumulate\); call engine.step",
    ):
        engine.backward(engine(micros[0]))
    engine.step()
    assert engine.global_steps == 1


def test_micro_batches_of_one_update_have_the_same_arrays() -> None:
    engine, micros = engine_of(accumulate=4), parts(batch_of(), 4)
    engine.backward(engine(micros[0]))
    for other in (
        {"inputs": micros[1]["inputs"]},
        {n: x[:, :4] for n, x in micros[1].items()},
    ):
        with pytest.raises(ConfigError, match="cannot join one of"):
            engine.backward(engine(other))


BAD_BATCHES: list[tuple[Any, str]] = [
    ({}, "batch is empty"),
    ({"inputs": np.zeros((G - 1, T), np.int32)}, "its first dim must be 16"),
    (
        {"inputs": np.zeros((G, T), np.int32), "mask": np.ones((T,), bool)},
        r"batch\['mask'\] has shape \(8,\)",
    ),
    ({"inputs": np.array([["a"] * T] * G)}, "holds <U1"),
]


@pytest.mark.parametrize(("batch", "message"), BAD_BATCHES)
@pytest.mark.parametrize(
    "method", ["train_batch", "eval_batch", "__call__", "first_nonfinite"]
)
def test_batch_that_does_not_fit_is_refused_and_the_state_stays(
    method: str, batch: Any, message: str
) -> None:
    engine = engine_of()
    with pytest.raises(ConfigError, match=message):
        getattr(engine, method)(batch)
    assert np.isfinite(engine.train_batch(batch_of())["train/loss"])


@pytest.mark.parametrize(
    "make", [jnp.asarray, lambda x: x.astype(np.int64)], ids=["jax", "int64"]
)
def test_batch_may_be_of_any_array_kind(make: Callable[[Any], Any]) -> None:
    ours, theirs = engine_of(), engine_of()
    batch = {"inputs": batch_of()["inputs"]}
    ours.train_batch({name: make(x) for name, x in batch.items()})
    theirs.train_batch(batch)
    assert_same(ours.state, theirs.state)


def test_evaluation_changes_nothing_and_equals_the_training_loss() -> None:
    engine = engine_of()
    start = host(engine.state)
    loss = engine.eval_batch(batch_of())
    assert_same(engine.state, start)
    assert loss == pytest.approx(
        float(engine.train_batch(batch_of())["train/loss"]), rel=1e-6
    )


def test_figures_of_the_last_update() -> None:
    engine = engine_of()
    for ask in (engine.get_lr, engine.get_global_grad_norm, engine.was_step_applied):
        with pytest.raises(
            ConfigError, match="no update has been made yet; call train_batch"
        ):
            ask()
    metrics = engine.train_batch(batch_of())
    assert engine.get_lr() == [float(metrics["train/lr"])] == [pytest.approx(1e-2)]
    assert engine.get_global_grad_norm() == float(metrics["train/grad_norm"]) > 0
    assert engine.was_step_applied()
    assert (engine.global_steps, engine.skipped_steps) == (1, 0)


def test_skipped_step_is_said_until_one_is_applied() -> None:
    program = float16_program()
    engine = Engine(program, toy.start(program))
    for skipped, value in enumerate([np.inf, 1.0, np.nan, np.inf, 1.0]):
        before = engine.skipped_steps
        engine.train_batch(boom(value))
        assert engine.was_step_applied() == np.isfinite(value)
        assert engine.skipped_steps - before == (not np.isfinite(value))
        assert engine.global_steps == skipped + 1


def test_skips_before_a_load_do_not_count_after_it(tmp_path: Path) -> None:
    program = float16_program()
    engine = Engine(program, toy.start(program))
    engine.train_batch(boom(np.inf))
    engine.save_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="no update has been made yet"):
        engine.was_step_applied()
    engine.train_batch(boom(1.0))
    assert engine.was_step_applied()


def test_overflow_at_the_smallest_loss_scale_ends_training() -> None:
    program = float16_program()
    engine = Engine(program, toy.start(program))
    while not bool(engine.state["loss_scale"].exhausted):
        engine.train_batch(boom(np.inf))
    before = host(engine.state)
    with pytest.raises(
        TrainingError, match=r"loss_scale.minimum=2\), by step \d+; use"
    ):
        engine.train_batch(boom(1.0))
    assert_same(engine.state, before)


def test_deepspeeds_questions_are_answered() -> None:
    engine = engine_of(8, accumulate=2)
    assert engine.train_batch_size() == G
    assert engine.gradient_accumulation_steps() == 2
    assert engine.train_micro_batch_size_per_gpu() == G // 8 // 2
    assert engine.zero_optimization_stage() == engine.program.run.zero.stage


def test_backward_needs_the_training_mode() -> None:
    engine = engine_of()
    loss = engine.eval()(batch_of())
    assert loss.item() > 0
    with pytest.raises(ConfigError, match="call engine.train"):
        engine.backward(loss)
    engine.train().backward(loss)
    engine.step()
    assert engine.global_steps == 1


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": np.ones((G, T), np.int32)}, r"batch has \['ids'\].*name them so"),
        ({"inputs": np.ones((G, T))}, "'inputs'] is of float32: give integers"),
        (
            {"inputs": np.ones((G, T), np.int32), "mask": np.ones((G, T))},
            "'mask'] is of float32: give booleans",
        ),
    ],
)
def test_batch_of_other_arrays_is_refused_in_one_line(batch: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_of().train_batch(batch)


def test_mask_of_zeros_and_ones_is_a_mask() -> None:
    whole = np.arange(G * T).reshape(G, T) % 3 > 0
    losses = [
        engine_of().eval_batch({**batch_of(), "mask": whole.astype(dtype)})
        for dtype in (bool, np.int32)
    ]
    assert losses[0] == losses[1]


class Planted(nnx.Module):
    """Three parameters, of which the second has no finite gradient where x is zero."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        del rngs
        self.a, self.b, self.c = (nnx.Param(jnp.ones((4,))) for _ in range(3))


def planted_loss(model: Planted, batch: Any) -> Any:
    x = batch["x"]
    y = model.a[...][None] * x + jnp.sqrt(x * model.b[...][None]) + model.c[...][None]
    return jnp.sum(y), jnp.float32(x.shape[0])


@pytest.mark.parametrize("stage", [0, 3])
def test_first_leaf_that_is_not_finite_is_named(stage: int) -> None:
    devices = jax.devices()[: 1 if stage == 0 else 4]
    ds = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine = jaxspeed.initialize(
        model=Planted, config=ds, loss_fn=planted_loss, devices=devices
    )
    assert engine.first_nonfinite({"x": np.ones((4, 4), np.float32)}) is None
    bad = {"x": np.ones((4, 4), np.float32) * [[1], [1], [0], [1]]}
    assert engine.first_nonfinite(bad) == "b"
    before = host(engine.params)
    engine.train_batch(bad)
    assert not engine.was_step_applied()
    assert_same(engine.params, before)


def test_training_goes_on_after_a_checkpoint_on_another_mesh_and_stage(
    tmp_path: Path,
) -> None:
    big = engine_of(8, accumulate=2, stage=3)
    for seed in range(2):
        big.train_batch(batch_of(seed))
    assert (
        big.save_checkpoint(tmp_path, client_state={"epoch": 3, "note": ["x", None]})
        == 2
    )
    small = engine_of(accumulate=4)
    small.backward(small(parts(batch_of(), 4)[0]))
    assert small.load_checkpoint(tmp_path) == (2, {"epoch": 3, "note": ["x", None]})
    assert_same(small.state, host(big.state))
    assert not small.is_gradient_accumulation_boundary()
    for seed in (2, 3):
        losses = [
            float(e.train_batch(batch_of(seed))["train/loss"]) for e in (big, small)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_older_checkpoints_stay_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    engine = engine_of()
    states = {}
    for step in (1, 2):
        engine.train_batch(batch_of(step))
        assert engine.save_checkpoint(tmp_path) == step
        states[step] = host(engine.state)
    for step in (1, 2):
        assert engine.load_checkpoint(tmp_path, step) == (step, {})
        assert_same(engine.state, states[step])
    with pytest.raises(ConfigError, match="7"):
        engine.load_checkpoint(tmp_path, 7)
    with pytest.raises(ConfigError, match="nowhere"):
        engine.load_checkpoint(tmp_path / "nowhere")
    program = program_of(model=toy.Config(num_layers=3))
    other = Engine(program, program.init_state())
    with pytest.raises(ConfigError, match="layers"):
        other.load_checkpoint(tmp_path)
    assert np.isfinite(other.train_batch(batch_of())["train/loss"])


# initialize


DS = {
    "train_batch_size": G,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
}

initialize = functools.partial(jaxspeed.initialize, devices=ONE)


def test_every_kind_of_model_is_the_same_model() -> None:
    run = run_of()
    engines = [
        initialize(model=toy.Config(), config=run),
        initialize(model=lambda rngs: toy.Toy(toy.Config(), rngs), config=run),
        initialize(model=toy.Config().build, config=run),
    ]
    for engine in engines[1:]:
        assert_same(engine.state, host(engines[0].state))


def test_every_kind_of_config_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(DS))
    by_dict, by_path = (
        initialize(model=toy.Config(), config=config) for config in (DS, str(path))
    )
    assert by_dict.program.run == by_path.program.run
    assert by_dict.program.run.optim.lr == 1e-2
    assert by_dict.program.batch.global_size == G
    assert {a.key: a.to for a in by_dict.config_answers}[
        "train_batch_size"
    ] == f"global_batch_size = {G}"
    run = initialize(model=toy.Config(), config=run_of())
    assert run.program.run == run_of()
    assert run.config_answers == []


def test_model_takes_the_place_of_the_models_of_the_config() -> None:
    model = toy.Config(num_layers=3, dropout=0.5)
    engine = initialize(model=model, config=run_of())
    assert engine.program.run.model == model
    assert engine.program.spec.dropout
    with pytest.raises(ConfigError, match="the model has 4 positions"):
        initialize(model=toy.Config(max_seq_len=4), config=run_of())


@pytest.mark.parametrize(("devices", "stage"), [(1, 0), (8, 0), (8, 3)])
def test_module_keeps_its_parameters_and_they_stay_its_own(
    devices: int, stage: int
) -> None:
    model = toy.Config().build(nnx.Rngs(7))
    mine = host(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    engine = jaxspeed.initialize(
        model=model, config=run_of(stage=stage), devices=jax.devices()[:devices]
    )
    assert_same(engine.params, mine)
    # The logical dims came with it.
    by_config = program_of(devices, stage=stage)
    assert engine.program.spec.placements == by_config.spec.placements
    engine.train_batch(batch_of())
    assert_same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), mine)
    assert np.any(host(engine.params)["embed"] != mine["embed"])


def test_seed_belongs_to_a_json() -> None:
    first, other = (
        initialize(model=toy.Config(), config=DS, seed=seed) for seed in (None, 1)
    )
    assert first.program.run.seed == 0
    assert np.any(host(first.params)["embed"] != host(other.params)["embed"])
    with pytest.raises(ConfigError, match="seed=1 has no effect with a RunConfig"):
        initialize(model=toy.Config(), config=run_of(), seed=1)


class MLP(nnx.Module):
    """A classifier as a user writes it: no logical dims, no layers of ours, keyword-only rngs."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.outer = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(nnx.relu(self.norm(self.inner(x))))


def classify(model: MLP, batch: Any) -> Any:
    logp = jax.nn.log_softmax(model(batch["x"]))
    hit = jax.nn.one_hot(batch["y"], 3)
    return -jnp.sum(logp * hit), batch["y"].shape[0]


@functools.cache
def points() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(G, 8)).astype(np.float32)
    return {"x": x, "y": (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0)}


@functools.cache
def plain_curve() -> tuple[list[float], Any]:
    """Returns losses and parameters of the same training written by hand."""
    model = MLP(rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    batch = {n: jnp.asarray(x) for n, x in points().items()}

    @jax.jit
    def step(params: Any) -> Any:
        def mean(params: Any) -> jax.Array:
            return classify(nnx.merge(graphdef, params), batch)[0] / G

        loss, slope = jax.value_and_grad(mean)(params)
        return loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)

    losses = []
    for _ in range(4):
        loss, params = step(params)
        losses.append(float(loss))
    return losses, nnx.to_pure_dict(params)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_users_own_module_trains_at_every_stage_as_by_hand(stage: int) -> None:
    ds = {
        "train_batch_size": G,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine = jaxspeed.initialize(
        model=MLP(rngs=nnx.Rngs(0)), config=ds, loss_fn=classify
    )
    losses = [float(engine.train_batch(points())["train/loss"]) for _ in range(4)]
    expected, params = plain_curve()
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        host(engine.params),
        params,
    )
    sharded = engine.params["inner"]["kernel"].addressable_shards[0].data.shape
    assert sharded == ((8, 16) if stage == 0 else (8, 2))


def test_what_a_users_module_does_without_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = {"train_batch_size": 8, "bf16": {"enabled": True}}
    for stage in (0, 3):
        ds = {**config, "zero_optimization": {"stage": stage}}
        jaxspeed.initialize(model=MLP, config=ds, loss_fn=classify)
    said = "\n".join(caplog.messages)
    assert said.count("zero.stage=3 gathers the whole model at once") == 1
    assert said.count("products are float32 except by jaxspeed.ops") == 2
    caplog.clear()
    engine_of(8, stage=3)
    jaxspeed.initialize(model=toy.Config(), config=config)
    assert not caplog.messages


def test_users_class_and_images_train() -> None:
    class Conv(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)

    def loss(model: Any, batch: Any) -> Sums:
        return Sums(
            jnp.sum(jnp.square(model.conv(batch["image"]) - 1)),
            jnp.float32(batch["image"].size),
        )

    engine = jaxspeed.initialize(
        model=Conv,
        config={"train_batch_size": 8},
        loss_fn=loss,
        devices=jax.devices()[:4],
    )
    images = {"image": np.random.default_rng(0).random((8, 5, 5, 1))}
    losses = [float(engine.train_batch(images)["train/loss"]) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)


BAD_MODELS: list[tuple[Any, str]] = [
    (3, "model=int: not a model; give a family's Config"),
    (toy.Config, "model=type: not a model"),
    (
        lambda rngs: nnx.BatchNorm(4, rngs=rngs),
        "model.mean is a BatchStat: .* such as LayerNorm",
    ),
    (
        lambda rngs: nnx.Sequential(
            nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
        ),
        "use jaxspeed.ops.dropout",
    ),
    (lambda rngs: {"w": jnp.ones(3)}, "model is a dict, not an nnx.Module"),
    (nnx.Module(), "model Module has no parameters"),
]


@pytest.mark.parametrize(("model", "message"), BAD_MODELS)
def test_what_is_no_model_is_refused_in_one_line(model: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        initialize(model=model, config=DS, loss_fn=boom_loss)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**DS, "train_batch_sise": 8}, "train_batch_sise"),
        (
            {**DS, "train_batch_size": 10, "train_micro_batch_size_per_gpu": 4},
            "nearest legal",
        ),
        ({}, "batch"),
        ("nowhere.json", "nowhere.json"),
    ],
)
def test_config_that_cannot_be_is_refused_in_one_line(
    config: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        initialize(model=toy.Config(), config=config)
    assert "\n" not in str(caught.value)


def test_run_config_of_the_engine_is_a_run_config() -> None:
    run = engine_of().program.run
    assert isinstance(run, RunConfig)
    assert dataclasses.replace(run, seed=1).validate(1).global_size == G
