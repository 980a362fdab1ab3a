# SPDX-License-Identifier: Apache-2.0
"""Adapters start as nothing, train alone, and are the same model folded into their matrices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.ambient import ambient
from jaxspeed.config import (
    ConfigError,
    DTypeConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
)
from jaxspeed.engine import initialize
from jaxspeed.generate import Writer
from jaxspeed.ledger import read_ledger
from jaxspeed.lora import find_targets, folded, without
from jaxspeed.nn import abstract, rngs, split
from jaxspeed.program import Program, build_program
from jaxspeed.sampling import SamplingConfig
from jaxspeed.sharding import part_of
from jaxspeed.state import bytes_per_device
from jaxspeed.step import model_of
from tests.models.zoo import ZOO, members
from tests.toy import (
    Config,
    assert_same,
    batch_of,
    host,
    parameters,
    program_of,
    run_of,
)


R = 4
LORA = LoraConfig(rank=R)
ADAPTER = 2 * (16 * R + R * 16)
"""Elements of the toy's adapters."""

MESHES = {
    "one": (1, MeshConfig()),
    "fsdp": (4, MeshConfig(fsdp=4)),
    "data x fsdp x tensor": (8, MeshConfig(data=2, fsdp=2, tensor=2)),
}


def program(stage: int = 0, mesh: str = "one", **changes: Any) -> Program:
    devices, axes = MESHES[mesh]
    return program_of(devices, **{"stage": stage, "mesh": axes, "lora": LORA} | changes)


@functools.cache
def drawn() -> Any:
    """Returns parameters with adapters whose B is not 0 either."""
    adapters = program().abstract_state["params"]["lora"]
    rng = np.random.default_rng(1)
    make = lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32)
    return {**parameters(), "lora": jax.tree.map(make, adapters)}


def on_device(params: Any) -> Any:
    return jax.tree.map(jnp.asarray, params)


def start(program: Program, params: Any = None) -> Any:
    """Returns the state at step 0 from these parameters."""
    params = drawn() if params is None else params
    placed = jax.tree.map(jax.device_put, params, program.shardings["params"])
    fresh = lambda p: {**program.init(jax.random.key(0)), "params": p}
    return jax.jit(fresh, out_shardings=program.shardings)(placed)


def curve(program: Program, steps: int = 4) -> tuple[list[float], Any]:
    """Returns the losses of some updates, and the parameters after them."""
    state, losses = start(program), []
    for seed in range(steps):
        batch = program.put_batch(batch_of(seed))
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics["train/loss"]))
    return losses, host(state["params"])


def mean_loss(program: Program, params: Any) -> float:
    placed = jax.tree.map(jax.device_put, params, program.shardings["params"])
    sums = program.eval_step(placed, program.put_batch(batch_of(), training=False))
    return float(sums.total / sums.count)


@pytest.mark.parametrize(
    ("stage", "mesh", "accumulate"),
    [
        (0, "fsdp", 2),
        (1, "fsdp", 2),
        (2, "fsdp", 2),
        (3, "fsdp", 1),
        (1, "data x fsdp x tensor", 2),
        (3, "data x fsdp x tensor", 2),
    ],
)
def test_curve_is_that_of_one_device_and_the_model_keeps_every_bit(
    stage: int, mesh: str, accumulate: int
) -> None:
    alone, after_alone = curve(program())
    losses, after = curve(program(stage, mesh, accumulate=accumulate))
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert_same(without(after), parameters())
    for mine, theirs, before in zip(
        *(jax.tree.leaves(p["lora"]) for p in (after, after_alone, drawn())),
        strict=True,
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
        assert np.all(mine != before)


def test_curve_is_that_of_the_matrices_with_adapters_added() -> None:
    """The first gradient of A and B is what the chain rule makes of that of W."""
    ours, plain = (
        program(optim=OptimConfig(name="sgd", lr=1.0, momentum=0.0, clip_norm=0.0)),
        program_of(),
    )
    params = drawn()

    def loss(adapters: Any) -> jax.Array:
        whole = folded({**on_device(parameters()), "lora": adapters}, LORA)
        with ambient(plain.spec.settings):
            batch = {n: jnp.asarray(x) for n, x in batch_of().items()}
            sums = plain.spec.loss_fn(model_of(plain.spec, whole), batch)
        return sums.total / sums.count

    expected = jax.jit(jax.grad(loss))(params["lora"])
    state, _ = ours.train_step(start(ours), ours.put_batch(batch_of()))
    jax.tree.map(
        lambda p, q, g: np.testing.assert_allclose(p - q, g, rtol=1e-4, atol=1e-6),
        params["lora"], host(state["params"]["lora"]), expected,
    )  # fmt: skip


def test_new_adapters_change_nothing_yet() -> None:
    ours = program()
    params = host(ours.init_state()["params"])
    pair = params["lora"]["layers"]["block"]["w"]
    assert not np.any(pair["b"])
    assert np.all(pair["a"] != 0)
    assert np.abs(pair["a"]).max() <= 16**-0.5
    assert pair["a"].std() == pytest.approx(16**-0.5 / 3**0.5, rel=0.2)
    assert np.any(pair["a"][0] != pair["a"][1])
    assert_same(without(params), host(program_of().init_state()["params"]))
    assert mean_loss(ours, params) == mean_loss(program_of(), without(params))


@pytest.mark.parametrize("rslora", [False, True])
def test_folded_model_says_what_the_adapted_one_says(rslora: bool) -> None:
    lora = dataclasses.replace(LORA, rslora=rslora, alpha=6.0)
    ours = program(lora=lora)
    whole = folded(drawn(), lora)
    w, a, b = (
        drawn()["layers"]["block"]["w"],
        *(drawn()["lora"]["layers"]["block"]["w"][x] for x in "ab"),
    )
    scale = 3.0 if rslora else 1.5
    np.testing.assert_allclose(
        whole["layers"]["block"]["w"], w + scale * a @ b, rtol=1e-5, atol=1e-6
    )
    assert jax.tree.structure(whole) == jax.tree.structure(parameters())
    tokens = jnp.asarray(batch_of()["inputs"])
    hidden = []
    for of, params in ((ours, drawn()), (program_of(), whole)):
        with ambient(of.spec.settings):
            hidden.append(model_of(of.spec, on_device(params)).hidden(tokens))
    np.testing.assert_allclose(*hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", ["one", "data x fsdp x tensor"])
def test_adapted_model_writes_what_the_folded_one_writes(mesh: str) -> None:
    model = Config(max_seq_len=32)
    how = SamplingConfig(max_new_tokens=8, temperature=0.0)
    texts = []
    whole = folded(drawn(), LORA)
    for params, lora in ((drawn(), LORA), (whole, LoraConfig())):
        of = program(3, mesh, lora=lora, model=model, seq_len=32)
        placed = jax.tree.map(jax.device_put, params, of.shardings["params"])
        texts.append(
            [t.ids.tolist() for t in Writer(of, placed).write([[1, 2, 3]], how)]
        )
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("stage", "kind"), [(0, "all-reduce"), (3, "reduce-scatter")])
def test_optimizer_state_and_reductions_are_of_the_adapters_alone(
    stage: int, kind: str
) -> None:
    ours = program(stage, "fsdp")
    opt = ours.abstract_state["opt"]
    assert bytes_per_device(opt) == 4 + 8 * ADAPTER // (4 if stage else 1)
    ledger = read_ledger(ours.lower_step(["inputs"]).compile(), ours.mesh.shape)
    assert ADAPTER <= ledger.elements(kind, "fsdp") <= ADAPTER + 64


def test_bytes_per_device_are_those_of_the_compute_copy_and_the_adapters() -> None:
    for stage, shards in ((0, 1), (3, 4)):
        dtype = DTypeConfig(compute="bfloat16", frozen="compute")
        state = program(stage, "fsdp", dtype=dtype).abstract_state
        base = sum(x.size for x in jax.tree.leaves(parameters()))
        assert bytes_per_device(without(state["params"])) == 2 * base // shards
        assert bytes_per_device(state["params"]["lora"]) == 4 * ADAPTER // shards


def test_dropout_is_the_adapters_and_of_training_alone() -> None:
    ours = program(lora=dataclasses.replace(LORA, dropout=0.5))
    state, batch = start(ours), ours.put_batch(batch_of())
    quiet = mean_loss(ours, drawn())
    assert quiet == pytest.approx(mean_loss(program(), drawn()), rel=1e-6)
    state, metrics = ours.train_step(state, batch)
    assert abs(float(metrics["train/loss"]) - quiet) > 1e-4


def test_what_is_named_is_trained_whole_beside_the_adapters() -> None:
    lora = dataclasses.replace(LORA, trained=("*.b",))
    ours = program(lora=lora)
    trained = part_of(ours.abstract_state["params"], ours.spec.placements)
    assert set(trained) == {"layers", "lora"}
    assert set(trained["layers"]["block"]) == {"b"}
    _, after = curve(ours, 1)
    assert np.any(after["layers"]["block"]["b"] != 0)
    np.testing.assert_array_equal(
        after["layers"]["block"]["w"], parameters()["layers"]["block"]["w"]
    )


def test_both_factors_are_decayed_as_matrices_are() -> None:
    optim = OptimConfig(lr=0.1, weight_decay=0.5, decay_groups=(("lora.*.a", 0.25),))
    ours = program(optim=optim)
    empty = {**batch_of(), "mask": np.zeros((16, 8), bool)}
    state, _ = ours.train_step(start(ours), ours.put_batch(empty))
    pair, before = (
        p["lora"]["layers"]["block"]["w"] for p in (host(state["params"]), drawn())
    )
    np.testing.assert_allclose(pair["a"], before["a"] * (1 - 0.1 * 0.25), rtol=1e-6)
    np.testing.assert_allclose(pair["b"], before["b"] * (1 - 0.1 * 0.5), rtol=1e-6)


def test_module_that_exists_gets_adapters_too() -> None:
    module = Config().build(rngs(jax.random.key(5)))
    engine = initialize(
        model=module, config=run_of(lora=LORA), devices=jax.devices()[:1]
    )
    before = host(split(module)[1])
    assert_same(without(engine.params), before)
    engine.train_batch(batch_of())
    assert_same(without(engine.params), before)
    assert np.any(host(engine.params)["lora"]["layers"]["block"]["w"]["b"] != 0)


TARGETS = {
    "gpt2": {"wq", "wk", "wv", "wo", "w_up", "w_down"},
    "llama": {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"},
}


@pytest.mark.parametrize("family", list(TARGETS))
def test_targets_are_the_matrices_of_the_blocks(family: str) -> None:
    cfg = ZOO[family].cfg
    _, params, dims = abstract(lambda: cfg.build(rngs(jax.random.key(0))))
    found = find_targets(LORA, params, dims)
    assert {path.rpartition(".")[2] for path in found} == TARGETS[family]
    wo = found["layers.block.attn.wo"].parts(R)
    assert wo["a"] == ((2, 4, 8, R), ("layers", "heads", "head_dim", "rank"))
    assert wo["b"] == ((2, R, 32), ("layers", "rank", "embed"))
    wq = found["layers.block.attn.wq"].parts(R)
    assert wq["a"].shape == (2, 32, R)
    assert wq["b"].dims == ("layers", "rank", "heads", "head_dim")
    some = dataclasses.replace(LORA, targets=("*.wq", "*.wv"))
    assert len(find_targets(some, params, dims)) == 2


@pytest.mark.parametrize(
    "name", [name for name in members() if ZOO[name].kind != "recurrent"]
)
def test_every_family_takes_adapters(name: str) -> None:
    """Each matrix of its blocks is used in a product: else tracing the step would say so."""
    member = ZOO[name]
    rows = member.batch(np.random.default_rng(0), 2)
    run = run_of(model=member.cfg, lora=LORA, global_batch_size=2)
    ours = build_program(run, loss_fn=member.loss, devices=jax.devices()[:1])
    batch = {n: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for n, x in rows.items()}
    state, _ = jax.eval_shape(ours.train_step, ours.abstract_state, batch)
    assert jax.tree.structure(state) == jax.tree.structure(ours.abstract_state)


@pytest.mark.parametrize(
    ("lora", "changes", "message"),
    [
        (
            {"targets": ("*.wq",)},
            {},
            "lora.targets='\\*.wq': matches none .* layers.block.w",
        ),
        ({"targets": ("embed",)}, {}, "lora.targets='embed': matches none"),
        ({"targets": ()}, {}, "lora.targets=.* nothing to adapt"),
        ({"trained": ("*.w",)}, {}, "lora.trained=.*layers.block.w has an adapter"),
        ({"trained": ("head.*",)}, {}, "lora.trained='head.\\*': matches none"),
        (
            {},
            {"freeze": ("embed",)},
            "freeze=.*lora.rank=4 freezes all but the adapters",
        ),
        ({}, {"optim": OptimConfig(name="muon")}, "no parameter is a hidden matrix"),
    ],
)
def test_adapters_that_cannot_be_are_refused(
    lora: Any, changes: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        program(lora=dataclasses.replace(LORA, **lora), **changes)
