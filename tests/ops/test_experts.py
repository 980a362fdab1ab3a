# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts against an oracle that has every expert do every token, on one device and on many."""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec as P

from jaxspeed import ops
from jaxspeed.ambient import ambient
from jaxspeed.auxiliary import Auxiliary
from jaxspeed.config import MESH_AXES, MoeConfig
from jaxspeed.ops import grouped


B, T, D, F, E = 8, 12, 16, 24, 8

experts: Any = importlib.import_module("jaxspeed.ops.experts")
"""The module, whose name the function takes in `jaxspeed.ops`."""

Run = Callable[..., Any]


@functools.cache
def inputs(seed: int = 0) -> dict[str, jax.Array]:
    """Returns activations, a router with favourites, and experts."""
    keys = iter(jax.random.split(jax.random.key(seed), 6))
    draw = lambda *shape: jax.random.normal(next(keys), shape)
    x = draw(B, T, D)
    router = draw(D, E) + 0.5 * draw(1, E)
    return {
        "x": x,
        "router": router,
        "w_gate": draw(E, D, F) / 4,
        "w_up": draw(E, D, F) / 4,
        "w_down": jax.random.normal(jax.random.key(9), (E, F, D)) / 4,
    }


SEGMENTS = jnp.asarray(np.arange(T)[None] < np.arange(T - B, T)[:, None] + 1, jnp.int32)
"""Rows with padding behind."""


def mixture(
    given: dict[str, jax.Array], *, each: int = 2, normalise: bool = True
) -> jax.Array:
    segments = given.get("segment_ids", SEGMENTS)
    routing = ops.route(
        given["x"],
        given["router"],
        each=each,
        normalise=normalise,
        segment_ids=segments,
    )
    return ops.experts(
        given["x"], routing, given["w_gate"], given["w_up"], given["w_down"]
    )


def oracle(
    given: dict[str, jax.Array],
    *,
    each: int = 2,
    normalise: bool = True,
    places: int = T,
) -> jax.Array:
    """Returns the same, every expert doing every token; who is beyond an expert's places is left out by a loop."""
    x = given["x"]
    probabilities = jax.nn.softmax(x @ given["router"])
    best = np.asarray(jnp.argsort(-probabilities, -1)[..., :each])
    kept = np.zeros((B, T, E))
    for row in range(B):
        taken = [0] * E
        for rank in range(each):
            for token in range(T):
                expert = best[row, token, rank]
                if SEGMENTS[row, token] and taken[expert] < places:
                    kept[row, token, expert] = 1
                    taken[expert] += 1
    weights = probabilities * kept
    if normalise:
        total = jnp.sum(weights, -1, keepdims=True)
        weights = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)
    hidden = jax.nn.silu(jnp.einsum("btd,edf->ebtf", x, given["w_gate"]))
    hidden = hidden * jnp.einsum("btd,edf->ebtf", x, given["w_up"])
    each_does = jnp.einsum("ebtf,efd->ebtd", hidden, given["w_down"])
    return jnp.einsum("ebtd,bte->btd", each_does, weights)


TARGET = jax.random.normal(jax.random.key(5), (B, T, D))


def with_gradients(fn: Run, **settings: Any) -> tuple[jax.Array, Any]:
    def loss(given: Any) -> tuple[jax.Array, jax.Array]:
        y = fn(given, **settings)
        return jnp.sum(y * TARGET), y

    (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(inputs())
    return y, gradients


def assert_same(ours: Any, theirs: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("each", [1, 2, 3])
def test_dropless_is_the_dense_oracle(each: int, normalise: bool) -> None:
    settings = {"each": each, "normalise": normalise}
    assert_same(
        with_gradients(mixture, **settings),
        with_gradients(oracle, **settings),
    )


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("each", [1, 2])
def test_places_are_those_of_the_oracle(each: int, factor: float) -> None:
    places = min(T, max(2, math.ceil(factor * each * T / E)))
    moe = MoeConfig(capacity_factor=factor, min_capacity=2)
    with ambient(moe=moe, auxiliary=Auxiliary()):
        ours = with_gradients(mixture, each=each)
    theirs = with_gradients(oracle, each=each, places=places)
    assert_same(ours, theirs)
    if factor < 1:
        assert not np.allclose(ours[0], with_gradients(oracle, each=each)[0])


def on_mesh(
    sizes: dict[str, int], moe: MoeConfig, remat: str = "none"
) -> tuple[jax.Array, Any]:
    """Returns result and gradients with rows and experts split, and the width of each over `tensor`."""
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    rows, mine = P(("data", "fsdp", "expert")), P("expert")
    specs = {"x": rows, "router": P(), "segment_ids": rows}
    specs |= dict.fromkeys(("w_gate", "w_up", "w_down"), mine)
    others = ("data", "fsdp")

    def local(given: Any, target: jax.Array) -> tuple[jax.Array, Any]:
        def loss(given: Any) -> tuple[jax.Array, jax.Array]:
            y = mixture(given)
            return jnp.sum(y * target), y

        settings: Any = {
            "expert": sizes.get("expert", 1),
            "tensor": sizes.get("tensor", 1),
            "remat": remat,
        }
        with ambient(moe=moe, auxiliary=Auxiliary(), **settings):
            (_, y), gradients = jax.value_and_grad(loss, has_aux=True, allow_int=True)(
                given
            )
        gradients.pop("segment_ids")
        for name in gradients:
            if name != "x":
                axes = (*others, "expert") if name == "router" else others
                gradients[name] = jax.lax.psum(gradients[name], axes)
        return y, gradients

    out = (rows, {name: specs[name] for name in inputs()})
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, rows), out_specs=out,
        axis_names=set(MESH_AXES) - ({"tensor"} if sizes.get("tensor", 1) > 1 else set()),
        check_vma=False,
    )  # fmt: skip
    return jax.jit(run)({**inputs(), "segment_ids": SEGMENTS}, TARGET)


@pytest.mark.parametrize("factor", [0.0, 1.0])
@pytest.mark.parametrize(
    "sizes",
    [
        {"expert": 8},
        {"expert": 2},
        {"fsdp": 2, "expert": 4},
        {"data": 2, "expert": 2, "tensor": 2},
        {"fsdp": 4, "tensor": 2},
    ],
    ids=str,
)
def test_experts_elsewhere_are_the_dense_oracle(
    sizes: dict[str, int], factor: float
) -> None:
    moe = MoeConfig(capacity_factor=factor)
    places = max(4, math.ceil(factor * 2 * T / E)) if factor else T
    assert_same(on_mesh(sizes, moe), with_gradients(oracle, places=places))


@pytest.mark.parametrize(
    ("shares", "taken"), [((0.01, 0.02), 2), ((0.01, 0.95), 1), ((0.9, 0.95), 0)]
)
@pytest.mark.parametrize(
    "sizes", [{"expert": 8}, {"data": 2, "expert": 2, "tensor": 2}], ids=str
)
def test_experts_elsewhere_take_the_smallest_room_that_is_enough(
    sizes: dict[str, int],
    shares: tuple[float, ...],
    taken: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = sizes["expert"]
    tokens = B * T // math.prod(sizes.get(axis, 1) for axis in ("data", "expert"))
    worst = devices * tokens * min(2, E // devices)
    factors = [share * worst / (2 * tokens) for share in shares]
    used: set[int] = set()
    inside = experts._in_room

    def noted(room: int, *given: Any, **named: Any) -> jax.Array:
        jax.debug.callback(lambda: used.add(room))
        return inside(room, *given, **named)

    monkeypatch.setattr(experts, "ROOMS", factors)
    monkeypatch.setattr(experts, "_in_room", noted)
    ours = on_mesh(sizes, MoeConfig(), remat="full")
    assert_same(ours, with_gradients(oracle))
    assert used == {[*(math.ceil(f * tokens * 2) for f in factors), worst][taken]}


def test_room_for_the_worst_case_is_the_only_one_where_products_are_kept() -> None:
    sizes = {"expert": 8}
    kept = str(jax.make_jaxpr(lambda: on_mesh(sizes, MoeConfig(), remat="dots"))())
    again = str(jax.make_jaxpr(lambda: on_mesh(sizes, MoeConfig(), remat="full"))())
    assert "cond[" not in kept
    assert "cond[" in again


def test_every_token_to_one_expert_is_not_too_many() -> None:
    given = inputs()
    favourite = {**given, "router": given["router"].at[:, 3].add(0.0)}
    favourite["x"] = jnp.abs(given["x"])
    favourite["router"] = jnp.zeros((D, E)).at[:, 3].set(1.0)
    assert_same(mixture(favourite, each=1), oracle(favourite, each=1))


def test_padding_goes_to_no_expert() -> None:
    given = {**inputs(), "segment_ids": jnp.zeros((B, T), jnp.int32)}
    assert not np.any(mixture(given))


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize("sizes", [[16, 0, 40, 8], [0, 0, 0, 64], [0, 0, 0, 0]])
def test_kernels_agree_with_products_one_by_one(
    sizes: list[int], platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gmm = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    for name in ("gmm", "tgmm"):
        interpreted = functools.partial(getattr(gmm, name), interpret=True)
        monkeypatch.setattr(gmm, name, interpreted)
    rows = 128
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, 128))
    w = jax.random.normal(keys[1], (4, 128, 256))
    g = jax.random.normal(keys[2], (rows, 256))
    g = jnp.where((jnp.arange(rows) < sum(sizes))[:, None], g, 0)

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return grouped.grouped_linear(x, w, jnp.array(sizes, jnp.int32), tile=8)

    with ambient(platform=platform):
        y, back = jax.vjp(run, x, w)
        dx, dw = back(g)
    ends = np.cumsum(sizes)
    for e, (begin, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        part = slice(begin, end)
        np.testing.assert_allclose(y[part], x[part] @ w[e], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(dx[part], g[part] @ w[e].T, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(dw[e], x[part].T @ g[part], rtol=1e-4, atol=1e-3)
