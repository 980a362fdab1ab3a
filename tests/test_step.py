# SPDX-License-Identifier: Apache-2.0
"""Accumulation, clipping, skipped updates, loss scale, donation. Meshes: tests/dist."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.config import MeshConfig, OptimConfig, ScheduleConfig
from jaxspeed.loss_scale import init_loss_scale, update_loss_scale
from jaxspeed.losses import next_token_loss
from jaxspeed.nn import merge
from jaxspeed.program import Program
from jaxspeed.schedules import make_schedule
from jaxspeed.step import make_grad_fn, make_train_step
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
    start,
)


PLAIN = OptimConfig(name="sgd", lr=0.5, momentum=0.0, clip_norm=0.0)
"""An update that is minus half the gradient."""


def step(program: Program, batch: Any, state: Any = None) -> tuple[Any, dict[str, Any]]:
    """Returns the state and the metrics after a step, from the initial state by default."""
    state = start(program) if state is None else state
    state, metrics = program.train_step(state, program.put_batch(batch))
    return state, jax.device_get(metrics)


def exact(batch: Any, params: Any = None) -> tuple[float, Any]:
    """Returns mean loss and gradient of all rows at once, without the step."""
    program = program_of()
    params = start(program)["params"] if params is None else params

    @jax.jit
    def mean(params: Any, batch: Any) -> jax.Array:
        sums = next_token_loss(merge(program.spec.graphdef, params), batch)
        return sums.total / sums.count

    return jax.value_and_grad(mean)(
        params, {n: jnp.asarray(x) for n, x in batch.items()}
    )


def norm(tree: Any) -> float:
    return float(
        np.sqrt(
            sum(
                np.square(np.asarray(x, np.float64)).sum()
                for x in jax.tree.leaves(tree)
            )
        )
    )


@pytest.mark.parametrize(("accumulate", "devices"), [(1, 1), (4, 1), (16, 1), (2, 8)])
def test_accumulated_update_is_that_of_all_tokens_at_once(
    accumulate: int, devices: int
) -> None:
    program = program_of(devices, accumulate=accumulate, optim=PLAIN)
    before = host(start(program)["params"])
    state, metrics = step(program, batch_of())
    loss, gradient = exact(batch_of())
    assert float(metrics["train/loss"]) == pytest.approx(float(loss), rel=1e-6)
    jax.tree.map(
        lambda p, q, g: np.testing.assert_allclose(
            q, p - 0.5 * g, rtol=1e-5, atol=1e-6
        ),
        before,
        host(state["params"]),
        gradient,
    )


def test_masks_of_micro_steps_differ_and_so_do_their_losses() -> None:
    counts = batch_of()["mask"].reshape(4, -1).sum(1)
    assert len(set(counts)) > 1
    program = program_of(accumulate=4, optim=PLAIN)
    _, metrics = step(program, batch_of())
    for index, micro in enumerate(metrics["train/micro_losses"]):
        rows = {n: x[index * 4 : (index + 1) * 4] for n, x in batch_of().items()}
        assert float(micro) == pytest.approx(float(exact(rows)[0]), rel=1e-6)
    assert not np.isclose(
        np.mean(metrics["train/micro_losses"]), metrics["train/loss"], rtol=1e-6
    )


@pytest.mark.parametrize("clip", [0.0, 0.05, 100.0])
def test_clipping_scales_the_gradient_to_the_norm_and_says_both(clip: float) -> None:
    program = program_of(optim=dataclasses.replace(PLAIN, clip_norm=clip))
    before = host(start(program)["params"])
    state, metrics = step(program, batch_of())
    gradient = host(exact(batch_of())[1])
    size = norm(gradient)
    assert size > 0.05
    clipped = min(size, clip) if clip else size
    assert float(metrics["train/grad_norm"]) == pytest.approx(size, rel=1e-5)
    assert float(metrics["train/grad_norm_clipped"]) == pytest.approx(clipped, rel=1e-5)
    moved = jax.tree.map(lambda p, q: (p - q) / 0.5, before, host(state["params"]))
    assert norm(moved) == pytest.approx(clipped, rel=1e-4)
    jax.tree.map(
        lambda m, g: np.testing.assert_allclose(
            m, g * clipped / size, rtol=1e-3, atol=1e-6
        ),
        moved,
        gradient,
    )


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_update_that_is_not_finite_is_skipped_to_the_last_bit(value: float) -> None:
    program = program_of(loss_fn=boom_loss, schedule=ScheduleConfig(warmup_steps=5))
    state, good = step(program, boom(1.0))
    before = host(state)
    state, bad = step(program, boom(value), state)
    after = host(state)
    assert_same(after["params"], before["params"])
    assert_same(after["opt"], before["opt"])
    assert_same(after["key"], before["key"])
    assert (int(after["step"]), int(after["skipped"])) == (2, 1)
    assert (int(good["train/skipped"]), int(bad["train/skipped"])) == (0, 1)
    assert not np.isfinite(bad["train/grad_norm"])
    state, again = step(program, boom(1.0), state)
    # The schedule did not move on either: this is its second update.
    assert again["train/lr"] == bad["train/lr"] > good["train/lr"]
    assert np.any(host(state["params"])["embed"] != before["params"]["embed"])


def test_float16_scale_follows_the_state_machine() -> None:
    program = float16_program()
    cfg = program.run.loss_scale
    state, expected = start(program), init_loss_scale(cfg)
    scales, exhausted = [], []
    for value in [
        1,
        1,
        1,
        1,
        np.inf,
        np.inf,
        np.inf,
        1,
        np.nan,
        np.inf,
        np.inf,
        1,
        1,
        1,
    ]:
        before = host(state["params"])
        scales.append(float(expected.scale))
        state, metrics = step(program, boom(value), state)
        assert float(metrics["train/loss_scale"]) == scales[-1]
        expected = update_loss_scale(cfg, expected, jnp.asarray(np.isfinite(value)))
        assert_same(state["loss_scale"], expected)
        exhausted.append(bool(metrics["train/scale_exhausted"]))
        changed = np.any(host(state["params"])["embed"] != before["embed"])
        assert changed == np.isfinite(value)
    assert len(set(scales)) >= 4
    assert exhausted == sorted(exhausted)
    assert exhausted[-1]
    assert int(state["skipped"]) == 6


def test_float16_loss_and_norms_do_not_depend_on_the_scale() -> None:
    program, results = float16_program(), []
    for scale in (1.0, 4096.0):
        state = start(program)
        state["loss_scale"] = state["loss_scale"]._replace(scale=jnp.float32(scale))
        results.append(step(program, boom(1.0), state)[1])
    for name in ("train/loss", "train/grad_norm", "train/grad_norm_clipped"):
        assert float(results[0][name]) == pytest.approx(
            float(results[1][name]), rel=2e-3
        )
    loss, _ = exact({"inputs": batch_of()["inputs"]})
    assert float(results[1]["train/loss"]) == pytest.approx(float(loss), rel=2e-3)


@pytest.mark.slow
def test_seed_scale_cancels_to_the_last_bit_in_float32() -> None:
    program = program_of()
    states = []
    for scale in (program.spec.seed_scale, 1.0):
        spec = dataclasses.replace(program.spec, seed_scale=scale)
        run = jax.jit(
            make_train_step(
                spec, program.tx, program.schedule, clip_norm=1.0, loss_scale=None
            )
        )
        states.append(run(start(program), program.put_batch(batch_of())))
    assert program.spec.seed_scale == 2.0**-7 == 1 / (G * T)
    assert_same(states[0][0], states[1][0])
    assert_same(states[0][1], states[1][1])


def test_state_is_donated_and_batch_is_not() -> None:
    program = program_of()
    state, batch = start(program), program.put_batch(batch_of())
    new, _ = program.train_step(state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(state["params"]))
    assert all(x.is_deleted() for x in jax.tree.leaves(state["opt"]))
    assert not any(x.is_deleted() for x in jax.tree.leaves(batch))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_batch_without_a_token_that_counts_changes_nothing_but_the_counts() -> None:
    program = program_of(optim=OptimConfig(lr=0.1))
    before = host(start(program))
    state, metrics = step(program, {**batch_of(), "mask": np.zeros((G, T), bool)})
    assert (
        float(metrics["train/loss"]),
        float(metrics["train/grad_norm"]),
        float(metrics["train/tokens"]),
    ) == (0, 0, 0)
    assert_same(state["params"], before["params"])
    assert (int(state["step"]), int(state["skipped"])) == (1, 0)


@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_metrics_are_device_scalars_with_the_documented_names(compute: str) -> None:
    program, batch = (
        (program_of(accumulate=4, optim=PLAIN), batch_of())
        if compute == "float32"
        else (float16_program(), boom(1.0))
    )
    _, metrics = program.train_step(start(program), program.put_batch(batch))
    names = {
        "loss",
        "micro_losses",
        "grad_norm",
        "grad_norm_clipped",
        "lr",
        "skipped",
        "tokens",
    }
    names |= {"loss_scale", "scale_exhausted"} if compute == "float16" else set()
    assert set(metrics) == {f"train/{name}" for name in names}
    assert all(isinstance(x, jax.Array) for x in metrics.values())
    assert {n for n, x in metrics.items() if x.ndim} == {"train/micro_losses"}
    assert metrics["train/micro_losses"].shape == (program.batch.accumulate,)
    assert (
        int(metrics["train/tokens"]) == batch.get("mask", np.ones((G, T)))[:, :-1].sum()
    )


def test_learning_rate_is_the_schedule_at_the_updates_applied() -> None:
    run = ScheduleConfig(name="cosine", warmup_steps=3)
    program = program_of(schedule=run)
    schedule, state = make_schedule(run, 1e-2, 10), start(program)
    for count in range(5):
        state, metrics = step(program, batch_of(count), state)
        assert float(metrics["train/lr"]) == pytest.approx(
            float(schedule(count)), rel=1e-6
        )


def test_evaluation_has_the_loss_of_the_step_and_takes_nothing() -> None:
    program = program_of()
    state = start(program)
    sums = program.eval_step(
        state["params"], program.put_batch(batch_of(), training=False)
    )
    assert not state["params"]["embed"].is_deleted()
    _, metrics = step(program, batch_of(), state)
    assert float(sums.total / sums.count) == pytest.approx(
        float(metrics["train/loss"]), rel=1e-6
    )
    assert float(sums.count) == float(metrics["train/tokens"])


def dropping(devices: int = 1) -> Program:
    model = dataclasses.replace(program_of().run.model, dropout=0.5)
    still = dataclasses.replace(PLAIN, lr=0.0)
    return program_of(
        devices, model=model, optim=still, accumulate=2, global_batch_size=8 * devices
    )


@pytest.mark.slow
def test_dropout_changes_with_the_step_and_is_off_in_evaluation() -> None:
    program, batch = dropping(), batch_of(rows=8)
    state, first = step(program, batch)
    params = host(state["params"])
    state, second = step(program, batch, state)
    assert_same(state["params"], params)
    assert float(first["train/loss"]) != float(second["train/loss"])
    _, again = step(program, batch)
    assert float(again["train/loss"]) == float(first["train/loss"])
    sums = program.eval_step(state["params"], program.put_batch(batch, training=False))
    assert float(sums.total / sums.count) == pytest.approx(
        float(exact(batch)[0]), rel=1e-6
    )


@pytest.mark.slow
def test_micro_steps_and_devices_draw_masks_of_their_own() -> None:
    """All rows are the same: micro-steps and devices with one mask would have one loss."""
    rows = np.repeat(batch_of()["inputs"][:1], G, axis=0)
    one, two = (
        step(dropping(n), {"inputs": rows[: 8 * n]})[1]["train/micro_losses"]
        for n in (1, 2)
    )
    assert one[0] != one[1]
    assert two[0] != one[0]
    assert two[1] != one[1]


def test_gradients_lie_where_the_masters_lie() -> None:
    program = program_of(8, stage=2, mesh=MeshConfig(data=2, fsdp=4))
    grad_fn = jax.jit(make_grad_fn(program.spec))
    state = start(program)
    gradients, (sums, _) = grad_fn(
        state["params"], program.put_batch(batch_of()), jnp.ones(()), state["key"]
    )
    jax.tree.map(
        lambda g, p: (
            None
            if g.sharding.is_equivalent_to(p.sharding, p.ndim)
            else pytest.fail(f"{g.sharding} {p.sharding}")
        ),
        gradients,
        state["params"],
    )
    assert sums.total.shape == sums.count.shape == (1,)
