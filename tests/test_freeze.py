# SPDX-License-Identifier: Apache-2.0
"""A frozen parameter has no gradient, no optimizer state and no update, and changes nothing for the others."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.config import ConfigError, DTypeConfig, MeshConfig, OptimConfig
from jaxspeed.ledger import read_ledger
from jaxspeed.optim import map_like_params
from jaxspeed.paths import with_part
from jaxspeed.program import Program
from jaxspeed.sharding import part_of
from jaxspeed.state import bytes_per_device
from jaxspeed.step import make_grad_fn
from tests.toy import assert_same, batch_of, host, program_of, start


FREEZE = ("embed", "*.b")
"""All of the toy but its matrices."""

MESHES = {
    "one": (1, MeshConfig()),
    "fsdp": (4, MeshConfig(fsdp=4)),
    "data x fsdp x tensor": (8, MeshConfig(data=2, fsdp=2, tensor=2)),
}


def program(stage: int = 0, mesh: str = "one", **changes: Any) -> Program:
    devices, axes = MESHES[mesh]
    given = {"stage": stage, "mesh": axes, "freeze": FREEZE} | changes
    return program_of(devices, **given)


def curve(program: Program, steps: int = 4) -> tuple[list[float], Any]:
    """Returns the losses of some updates, and the parameters after them."""
    state, losses = start(program), []
    for seed in range(steps):
        batch = program.put_batch(batch_of(seed))
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics["train/loss"]))
    return losses, host(state["params"])


@pytest.mark.parametrize(
    ("stage", "mesh", "accumulate"),
    [
        (0, "fsdp", 1),
        (1, "fsdp", 2),
        (2, "fsdp", 2),
        (3, "fsdp", 2),
        (1, "data x fsdp x tensor", 1),
        (3, "data x fsdp x tensor", 2),
    ],
)
def test_curve_is_that_of_one_device_and_frozen_parameters_keep_every_bit(
    stage: int, mesh: str, accumulate: int
) -> None:
    alone, _ = curve(program())
    losses, after = curve(program(stage, mesh, accumulate=accumulate))
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    before = host(start(program())["params"])
    assert_same(after["embed"], before["embed"])
    blocks = after["layers"]["block"], before["layers"]["block"]
    assert_same(blocks[0]["b"], blocks[1]["b"])
    assert np.all(np.any(blocks[0]["w"] != blocks[1]["w"], axis=(1, 2)))


def test_gradient_of_what_is_trained_is_the_one_without_freezing() -> None:
    def gradients(program: Program) -> Any:
        args = program.put_batch(batch_of()), jnp.ones(()), jax.random.key(0)
        fn = jax.jit(make_grad_fn(program.spec))
        return host(fn(start(program)["params"], *args)[0])

    some, every = gradients(program()), gradients(program_of())
    assert jax.tree.map(jnp.shape, some) == {"layers": {"block": {"w": (2, 16, 16)}}}
    trained = part_of(every, program().spec.placements)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), some, trained
    )


@pytest.mark.parametrize("stage", [0, 3])
def test_optimizer_state_is_of_what_is_trained_alone(stage: int) -> None:
    ours = program(stage, "fsdp")
    opt = ours.abstract_state["opt"]
    assert set(opt) == {"count", "mu", "nu"}
    for name in ("mu", "nu"):
        assert jax.tree.map(jnp.shape, opt[name]) == {
            "layers": {"block": {"w": (2, 16, 16)}}
        }
    shards = 4 if stage else 1
    assert bytes_per_device(opt) == 4 + 2 * 4 * (2 * 16 * 16) // shards
    # Its moments lie where the parameter lies.
    placed = map_like_params(
        opt, ours.abstract_state["params"], ours.shardings["params"], 0
    )
    moment = opt["mu"]["layers"]["block"]["w"]
    assert moment.sharding == placed["mu"]["layers"]["block"]["w"]


@pytest.mark.parametrize(("stage", "kind"), [(0, "all-reduce"), (3, "reduce-scatter")])
def test_ledger_has_gradient_reductions_of_what_is_trained_alone(
    stage: int, kind: str
) -> None:
    ours = program(stage, "fsdp")
    ledger = read_ledger(ours.lower_step(["inputs"]).compile(), ours.mesh.shape)
    matrices = 2 * 16 * 16
    scalars = 64
    reduced = ledger.elements(kind, "fsdp")
    assert matrices <= reduced <= matrices + scalars
    other = "all-reduce" if kind == "reduce-scatter" else "reduce-scatter"
    assert ledger.elements(other, "fsdp") <= scalars
    gathered = ledger.elements("all-gather", "fsdp")
    # Frozen parameters are gathered as the stage says: each layer's twice at most.
    assert (gathered > matrices) == (stage == 3)


def test_frozen_parameters_are_stored_as_told() -> None:
    for stored, size in (("compute", 2), ("float32", 4), ("auto", 4)):
        frozen: Any = stored
        dtype = DTypeConfig(compute="bfloat16", frozen=frozen)
        params = program(dtype=dtype).abstract_state["params"]
        assert params["embed"].dtype.itemsize == size
        assert params["layers"]["block"]["w"].dtype == jnp.float32


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_half_of_the_bytes_compute_what_all_of_them_do(stage: int) -> None:
    """Products round to bfloat16 anyway; the toy's frozen bias is 0."""
    losses = []
    for stored in ("compute", "float32"):
        dtype = DTypeConfig(compute="bfloat16", frozen=stored)
        losses.append(curve(program(stage, "fsdp", dtype=dtype), 2)[0])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_parts_of_a_tree_make_the_whole() -> None:
    tree, places = host(start(program())["params"]), program().spec.placements
    trained, frozen = (part_of(tree, places, trained=t) for t in (True, False))
    assert set(trained) == {"layers"}
    assert set(frozen) == {"embed", "layers"}
    assert_same(with_part(tree, trained), tree)
    doubled = jax.tree.map(lambda x: 2 * x, trained)
    both = with_part(tree, doubled)
    assert_same(with_part(trained, frozen), tree)
    assert_same(part_of(both, places), doubled)
    assert_same(part_of(both, places, trained=False), frozen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ("embedding",)}, "freeze='embedding': matches none .* near it are embed"),
        ({"freeze": ("*",)}, r"freeze=\('\*',\): nothing is left to train"),
        (
            {"dtype": DTypeConfig(frozen="compute"), "freeze": ()},
            "dtype.frozen='compute' has no effect: all parameters are trained",
        ),
        (
            {"optim": OptimConfig(name="muon"), "freeze": ("*.w",)},
            "no parameter is a hidden matrix",
        ),
    ],
)  # fmt: skip
def test_freezing_that_cannot_be_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        program_of(**changes)
