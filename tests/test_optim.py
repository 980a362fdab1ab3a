# SPDX-License-Identifier: Apache-2.0
"""The optimizers against their formulas in float64 numpy, parameter by parameter."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxspeed.config import OPTIMIZER_FIELDS, ConfigError, OptimConfig, ScheduleConfig
from jaxspeed.optim import (
    make_optimizer,
    map_like_params,
    orthogonalize,
    update_count,
)


OPTIMIZERS = sorted(OPTIMIZER_FIELDS)
CONSTANT = ScheduleConfig(name="constant")
L, D, N, H, F, V = 3, 16, 2, 4, 24, 40

# Every kind of leaf: embeddings, stacked and single matrices (some with "embed" last or in the
# middle), stacked and single vectors.
DIMS = {
    "embed": ("vocab", "embed"),
    "position": ("seq", "embed"),
    "blocks": {
        "wq": ("layers", "embed", "heads", "head_dim"),
        "wo": ("layers", "heads", "head_dim", "embed"),
        "w_up": ("layers", "embed", "mlp"),
        "b_up": ("layers", "mlp"),
        "scale": ("layers", "embed"),
    },
    "odd": ("heads", "embed", "head_dim"),
    "norm": {"scale": ("embed",)},
}
SIZES = {
    "layers": L, "embed": D, "heads": N, "head_dim": H, "mlp": F, "vocab": V, "seq": 8,
}  # fmt: skip
DECAYED = {"embed", "position", "wq", "wo", "w_up", "odd"}
MATRICES = {"wq", "wo", "w_up", "odd"}


def is_names(x):
    return isinstance(x, tuple)


def make_tree(seed, dims=DIMS, sizes=SIZES):
    """Returns a tree of random arrays with the shapes of `dims`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda names: rng.standard_normal([sizes[n] for n in names], np.float32),
        dims,
        is_leaf=is_names,
    )


def make_grads(seed, dims=DIMS, sizes=SIZES):
    """Returns gradients of very different sizes, some of them zero."""
    tree = make_tree(seed, dims, sizes)
    return jax.tree.map(lambda g: g * 10.0 ** (g.ravel()[0] * 2) * (abs(g) > 0.1), tree)


def train(tx, params, grads, finite=None) -> tuple[Any, Any]:
    """Returns parameters and state after an update with each of the gradients."""

    @jax.jit
    def step(params, state, g, ok):
        updates, state = tx.update(g, state, params, finite=ok)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for at, g in enumerate(grads):
        ok = None if finite is None else jnp.asarray(finite[at])
        params, state = step(params, state, g, ok)
    return params, state


def assert_close(got, want, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(
            a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
        )


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- the formulas, for one unstacked tensor, in float64 ---


def adam_oracle(cfg, p, grads, decay, *, decoupled):
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        g = g if decoupled else g + decay * p
        m = cfg.b1 * m + (1 - cfg.b1) * g
        v = cfg.b2 * v + (1 - cfg.b2) * g**2
        c1 = 1 - cfg.b1**t if cfg.bias_correction else 1.0
        c2 = 1 - cfg.b2**t if cfg.bias_correction else 1.0
        step = (m / c1) / (np.sqrt(v / c2) + cfg.eps)
        p = p - cfg.lr * (step + decay * p * decoupled)
    return p


def sgd_oracle(cfg, p, grads, decay):
    m = 0.0
    for g in grads:
        g = g + decay * p
        m = cfg.momentum * m + g
        p = p - cfg.lr * (g + cfg.momentum * m if cfg.nesterov else m)
    return p


def lion_oracle(cfg, p, grads, decay):
    m = np.zeros_like(p)
    for g in grads:
        p = p * (1 - cfg.lr * decay)
        p = p - cfg.lr * np.sign(cfg.b1 * m + (1 - cfg.b1) * g)
        m = cfg.b2 * m + (1 - cfg.b2) * g
    return p


def lamb_oracle(cfg, p, grads, decay):
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m = cfg.b1 * m + (1 - cfg.b1) * g
        v = cfg.b2 * v + (1 - cfg.b2) * g**2
        rate = cfg.lr
        if cfg.bias_correction:
            rate *= math.sqrt(1 - cfg.b2**t) / (1 - cfg.b1**t)
        u = m / (np.sqrt(v) + cfg.eps) + decay * p
        size, change = np.linalg.norm(p), np.linalg.norm(u)
        ratio = size / change if size and change else 1.0
        ratio = min(max(ratio, cfg.min_coeff), cfg.max_coeff) if size and change else 1
        p = p - rate * ratio * u
    return p


def adagrad_oracle(cfg, p, grads, decay):
    total = 0.0
    for g in grads:
        g = g + decay * p
        total = total + g**2
        p = p - cfg.lr * g / (np.sqrt(total) + cfg.eps)
    return p


def adafactor_oracle(cfg, p, grads, decay):
    """Shazeer 2018, algorithms 4 and 5; factored where both sides are 128 or more."""
    shape, p = p.shape, p.reshape(p.shape[0], -1) if p.ndim > 1 else p
    factored = p.ndim == 2 and min(p.shape) >= 128
    row = col = full = 0.0
    for t, g in enumerate(grads, 1):
        g = g.reshape(p.shape)
        b = 1 - t**-0.8
        square = g**2 + 1e-30
        if factored:
            row = b * row + (1 - b) * square.mean(1)
            col = b * col + (1 - b) * square.mean(0)
            v = np.outer(row, col) / row.mean()
        else:
            v = full = b * full + (1 - b) * square
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt((u**2).mean()))
        u = u * max(1e-3, np.sqrt((p**2).mean()))
        p = p - cfg.lr * (u + decay * p)
    return p.reshape(shape)


def newton_schulz(x, steps):
    """Returns DeepSpeed's iteration on one (out, in) matrix."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def muon_oracle(cfg, p, grads, decay, *, name):
    if name not in MATRICES:
        return adam_oracle(cfg, p, grads, decay, decoupled=True)

    def torch_layout(x):
        # (out, in): "embed" is the input unless it is the last dim.
        if name == "wo":
            return x.reshape(-1, D).T
        return np.moveaxis(x, 1 if name == "odd" else 0, 0).reshape(D, -1).T

    def ours(x):
        if name == "wo":
            return x.T.reshape(p.shape)
        first = np.moveaxis(p, 1 if name == "odd" else 0, 0)
        return np.moveaxis(x.T.reshape(first.shape), 0, 1 if name == "odd" else 0)

    m, lr = 0.0, cfg.muon_lr or cfg.lr
    for g in grads:
        m = cfg.momentum * m + (1 - cfg.momentum) * g
        u = (1 - cfg.momentum) * g + cfg.momentum * m if cfg.nesterov else m
        u = newton_schulz(torch_layout(u), cfg.ns_steps)
        u = u * max(1, u.shape[0] / u.shape[1]) ** 0.5
        p = p * (1 - lr * decay) - lr * ours(u)
    return p


ORACLES = {
    "adam": functools.partial(adam_oracle, decoupled=False),
    "adamw": functools.partial(adam_oracle, decoupled=True),
    "sgd": sgd_oracle,
    "lion": lion_oracle,
    "lamb": lamb_oracle,
    "adagrad": adagrad_oracle,
    "adafactor": adafactor_oracle,
    "muon": muon_oracle,
}

CONFIGS = {
    "adam": {},
    "adam without bias correction": dict(name="adam", bias_correction=False, b2=0.999),
    "adamw": dict(b2=0.999),
    "adamw without moments": dict(name="adamw", b1=0.0, b2=0.0, eps=1e-3),
    "adamw without bias correction": dict(name="adamw", bias_correction=False),
    "sgd": {},
    "sgd nesterov": dict(name="sgd", nesterov=True),
    "sgd plain": dict(name="sgd", momentum=0.0),
    "lion": dict(b2=0.99),
    "lion without memory": dict(name="lion", b2=0.0),
    "lamb": {},
    "lamb at its bounds": dict(
        name="lamb", min_coeff=0.9, max_coeff=1.1, bias_correction=False
    ),
    "adagrad": dict(eps=1e-10),
    "adafactor": {},
    "muon": dict(momentum=0.95),
    "muon nesterov": dict(
        name="muon", momentum=0.95, nesterov=True, muon_lr=0.05, ns_steps=3
    ),
}


def at_path(tree, keys):
    return functools.reduce(lambda node, key: node[key], keys, tree)


def each_tensor(params, grads):
    """Yields (keys, layer or None, parameter, its gradients), stacks taken apart."""
    for path, names in jax.tree_util.tree_leaves_with_path(DIMS, is_leaf=is_names):
        keys = [k.key for k in path]
        p, gs = at_path(params, keys), [at_path(g, keys) for g in grads]
        for layer in range(L) if names[0] == "layers" else [None]:
            at = () if layer is None else layer
            yield keys, layer, np.float64(p[at]), [np.float64(g[at]) for g in gs]


@pytest.mark.parametrize("case", CONFIGS)
def test_ten_updates_equal_the_formula(case):
    fields = {"name": case, "lr": 0.02, "weight_decay": 0.3} | CONFIGS[case]
    cfg = OptimConfig(**fields)
    params = make_tree(0)
    params["norm"]["scale"][:] = 0.0  # LAMB's trust ratio of a zero tensor is 1
    grads = [make_grads(seed) for seed in range(1, 11)]
    got, _ = train(make_optimizer(cfg, CONSTANT, 10, DIMS), params, grads)
    for keys, layer, p, gs in each_tensor(params, grads):
        decay = 0.3 if keys[-1] in DECAYED else 0.0
        extra = {"name": keys[-1]} if cfg.name == "muon" else {}
        want = ORACLES[cfg.name](cfg, p, gs, decay, **extra)
        mine = at_path(got, keys)
        np.testing.assert_allclose(
            mine if layer is None else mine[layer], want, rtol=3e-5, atol=3e-6,
            err_msg=f"{keys} layer {layer}",
        )  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_group_of_a_pattern_has_its_own_rate_and_decay_the_last_one_deciding(name):
    cfg = OptimConfig(
        name=name, lr=0.02, weight_decay=0.3,
        lr_groups=(("blocks.*", 10.0), ("*.wo", 0.5)),
        decay_groups=(("*.w*", 0.0), ("*.scale", 0.4)),
    )  # fmt: skip
    params, grads = make_tree(0), [make_grads(seed) for seed in (1, 2, 3)]
    got, _ = train(make_optimizer(cfg, CONSTANT, 3, DIMS), params, grads)
    decays = {"embed": 0.3, "position": 0.3, "odd": 0.3, "scale": 0.4}
    for keys, layer, p, gs in each_tensor(params, grads):
        lr = 0.02 * (0.5 if keys[-1] == "wo" else 10.0 if len(keys) > 1 else 1.0)
        lr = 0.02 if keys[0] == "norm" else lr
        own = dataclasses.replace(cfg, lr=lr)
        extra = {"name": keys[-1]} if name == "muon" else {}
        want = ORACLES[name](own, p, gs, decays.get(keys[-1], 0.0), **extra)
        mine = at_path(got, keys)
        np.testing.assert_allclose(
            mine if layer is None else mine[layer], want, rtol=3e-5, atol=3e-6,
            err_msg=f"{keys} layer {layer}",
        )  # fmt: skip


@pytest.mark.parametrize("field", ["lr_groups", "decay_groups"])
def test_group_of_no_parameter_is_refused(field):
    groups: Any = {field: (("block.*", 2.0),)}
    cfg = OptimConfig(**groups)
    with pytest.raises(ConfigError, match=f"optim.{field}='block.*': matches none"):
        make_optimizer(cfg, CONSTANT, 1, DIMS).init(make_tree(0))


def test_decay_all_decays_every_parameter():
    cfg = OptimConfig(lr=0.5, weight_decay=0.1, decay="all")
    params = make_tree(0)
    zero = jax.tree.map(np.zeros_like, params)
    got, _ = train(make_optimizer(cfg, CONSTANT, 1, DIMS), params, [zero])
    assert_close(got, jax.tree.map(lambda p: p * 0.95, params))


def test_unknown_dims_decay_what_has_two_dims():
    cfg = OptimConfig(lr=0.5, weight_decay=0.1)
    params = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
    zero = jax.tree.map(np.zeros_like, params)
    for dims in (None, {"w": None, "b": None}):
        got, _ = train(make_optimizer(cfg, CONSTANT, 1, dims), params, [zero])
        assert_close(got, {"w": params["w"] * 0.95, "b": params["b"]})


def test_an_output_bias_per_expert_is_no_matrix_but_a_router_is():
    cfg = OptimConfig(name="muon", lr=0.5, weight_decay=0.1)
    dims = {
        "router": ("layers", "embed", "expert"),
        "bias": ("layers", "expert", "embed"),
        "w": ("layers", "expert", "embed", "mlp"),
    }
    params = make_tree(0, dims, SIZES | {"expert": 2})
    tx = make_optimizer(cfg, CONSTANT, 1, dims)
    state: Any = tx.init(params)
    assert set(state["nu"]) == {"bias"}
    zero = jax.tree.map(np.zeros_like, params)
    got, _ = train(tx, params, [zero])
    assert_close(got, {k: p * (1 if k == "bias" else 0.95) for k, p in params.items()})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stack_of_layers_trains_like_its_layers_alone(name):
    # Wide enough that Adafactor factors.
    sizes = SIZES | {"embed": 128, "heads": 4, "head_dim": 32, "mlp": 256}
    stacked, alone = {}, {}
    for key, names in DIMS["blocks"].items():
        stacked[key] = names
        for layer in range(L):
            alone.setdefault(f"layer_{layer}", {})[key] = names[1:]
    cfg = OptimConfig(name=name, lr=0.02, weight_decay=0.1)
    params = make_tree(0, stacked, sizes)
    grads = [make_grads(seed, stacked, sizes) for seed in (1, 2, 3)]
    take = lambda tree: {
        f"layer_{i}": {key: x[i] for key, x in tree.items()} for i in range(L)
    }
    got, _ = train(make_optimizer(cfg, CONSTANT, 3, stacked), params, grads)
    tx = make_optimizer(cfg, CONSTANT, 3, alone)
    want, _ = train(tx, take(params), [take(g) for g in grads])
    assert_close(take(got), want, atol=2e-6)


def test_adafactor_factors_matrices_by_the_paper_and_equals_optax():
    cfg = OptimConfig(name="adafactor", lr=0.1)
    sizes = {"embed": 128, "mlp": 192, "layers": 2}
    dims = {"w": ("embed", "mlp"), "b": ("mlp",)}
    params = make_tree(0, dims, sizes)
    grads = [make_grads(seed, dims, sizes) for seed in range(1, 5)]
    tx = make_optimizer(cfg, CONSTANT, 4, dims)
    got, state = train(tx, params, grads)
    assert jax.tree.map(jnp.shape, state) == {
        "count": (), "v_row": {"w": (1, 128)}, "v_col": {"w": (1, 192)},
        "v": {"b": (192,)},
    }  # fmt: skip

    reference = optax.adafactor(0.1)
    want, memory = params, reference.init(params)
    for g in grads:
        updates, memory = reference.update(g, memory, want)
        want = optax.apply_updates(want, updates)
    assert_close(got, want)
    for key, p in params.items():
        gs = [np.float64(g[key]) for g in grads]
        oracle = adafactor_oracle(cfg, np.float64(p), gs, 0.0)
        np.testing.assert_allclose(got[key], oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_update_changes_no_bit_and_leaves_no_trace(name):
    cfg = OptimConfig(name=name, lr=0.02, weight_decay=0.1)
    params = make_tree(0)
    params["norm"]["scale"][0] = -0.0
    grads = [make_grads(seed) for seed in (1, 2, 3)]
    bad = jax.tree.map(lambda g: np.full_like(g, np.nan), grads[0])
    bad["embed"][:] = np.inf
    schedule = ScheduleConfig(warmup_steps=2)
    tx = make_optimizer(cfg, schedule, 10, DIMS)
    want = train(tx, params, grads, [True] * 3)
    script = [bad, grads[0], bad, grads[1], grads[2], bad]
    got = train(tx, params, script, [False, True, False, True, True, False])
    assert_same(got, want)
    assert int(update_count(got[1])) == 3
    start = train(tx, params, [bad], [False])[0]
    assert np.signbit(np.asarray(start["norm"]["scale"])[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_float32_zeros_whatever_the_gradients_are(name):
    cfg = OptimConfig(name=name)
    half = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)
    params, grads = half(make_tree(0)), half(make_grads(1))
    tx = make_optimizer(cfg, CONSTANT, 10, DIMS)
    state = tx.init(params)
    updates, after = jax.eval_shape(tx.update, grads, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.dtype == (jnp.float32 if a.shape else jnp.int32)
        assert not a.any()
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adafactor"])
def test_every_statistic_but_the_count_mirrors_its_parameter(name):
    params = make_tree(0)
    state = make_optimizer(OptimConfig(name=name), CONSTANT, 10, DIMS).init(params)
    marks = map_like_params(state, params, DIMS, "other")
    assert marks.pop("count") == "other"
    for slot in marks.values():
        for path, names in jax.tree_util.tree_leaves_with_path(slot, is_leaf=is_names):
            assert names == at_path(DIMS, [k.key for k in path])
    if name not in ("muon", "sgd"):
        assert all(slot == DIMS for slot in marks.values())


def test_map_like_params_gives_factored_statistics_the_other_value():
    dims = {"w": ("embed", "mlp"), "b": ("mlp",)}
    params = make_tree(0, dims, {"embed": 128, "mlp": 256})
    tx = make_optimizer(OptimConfig(name="adafactor"), CONSTANT, 10, dims)
    marks = map_like_params(jax.eval_shape(tx.init, params), params, dims, None)
    assert marks == {
        "count": None, "v": {"b": ("mlp",)}, "v_row": {"w": None}, "v_col": {"w": None}
    }  # fmt: skip


def test_a_parameter_may_be_called_like_a_statistic():
    dims = {"mu": {"w": ("mlp",)}, "w": ("embed",)}
    params = make_tree(0, dims, {"mlp": 3, "embed": 3})
    tx = make_optimizer(OptimConfig(name="lion"), CONSTANT, 10, dims)
    marks = map_like_params(tx.init(params), params, dims, None)
    assert marks == {"count": None, "mu": dims}


def test_map_like_params_understands_optax_states():
    params = {"a": {"w": np.ones((2, 3))}, "w": np.ones(3)}
    state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params)
    adam = map_like_params(state, params, {"a": {"w": 1}, "w": 2}, 0)[1][0]
    assert adam.count == 0
    assert adam.mu == adam.nu == {"a": {"w": 1}, "w": 2}


# --- placements ---


def place(mesh, tensor):
    """Returns a sharding for each parameter, ZeRO over fsdp and Megatron over tensor."""

    def spec(names):
        rules = {"embed": "fsdp"}
        if "vocab" in names:
            rules = {"vocab": ("tensor", "fsdp") if tensor else "fsdp"}
        elif tensor:
            rules |= {"heads": "tensor", "mlp": "tensor"}
        return NamedSharding(mesh, PartitionSpec(*[rules.get(n) for n in names]))

    return jax.tree.map(spec, DIMS, is_leaf=is_names)


def compile_sharded(tx, params, shardings, mesh):
    """Returns the compiled update and its inputs' placements."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(tx.init, params)
    state = map_like_params(abstract, params, shardings, everywhere)

    def step(params, state, g, ok):
        updates, state = tx.update(g, state, params, finite=ok)
        return optax.apply_updates(params, updates), state

    places = (shardings, state, shardings, everywhere)
    jitted = jax.jit(step, in_shardings=places, out_shardings=places[:2])
    ok = jax.ShapeDtypeStruct((), jnp.bool_)
    return jitted.lower(params, abstract, params, ok).compile(), places


def collectives(compiled):
    """Returns (kind, elements) of each collective of a compiled program."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    found = []
    for line in compiled.as_text().splitlines():
        if match := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
            shapes = re.findall(r"\[([\d,]*)\]", match.group(1))
            sizes = [math.prod(int(n) for n in s.split(",") if n) for s in shapes]
            found.append((match.group(2), sum(sizes)))
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_sharded_updates_equal_unsharded_ones(name, axes, mesh):
    devices = mesh(**axes)
    shardings = place(devices, "tensor" in axes)
    cfg = OptimConfig(name=name, lr=0.02, weight_decay=0.1)
    params, grads = make_tree(0), [make_grads(seed) for seed in (1, 2, 3)]
    want, want_state = train(make_optimizer(cfg, CONSTANT, 3, DIMS), params, grads)

    tx = make_optimizer(cfg, CONSTANT, 3, DIMS, placements=shardings)
    step, places = compile_sharded(tx, params, shardings, devices)
    state = jax.device_put(tx.init(params), places[1])
    got = jax.device_put(params, shardings)
    for g in grads:
        ok = jax.device_put(jnp.asarray(True), places[3])
        got, state = step(got, state, jax.device_put(g, shardings), ok)
    assert_close(got, want, rtol=2e-6, atol=2e-6)
    assert_close(state, want_state, rtol=2e-6, atol=2e-6)

    # No collective moves a parameter, except Muon's (next test).
    largest = max(math.prod(p.shape) for p in jax.tree.leaves(params)) // 8
    if name != "muon":
        assert all(size <= largest / 2 for _, size in collectives(step))
    if name in ("adam", "adamw", "sgd", "lion", "adagrad"):
        assert collectives(step) == []


@pytest.mark.parametrize(
    ("axes", "moves"), [(dict(fsdp=8), 1), (dict(fsdp=4, tensor=2), 2)]
)
def test_muon_deals_matrices_out_and_back_and_nothing_else(axes, moves, mesh):
    devices = mesh(**axes)
    shardings = place(devices, "tensor" in axes)
    params = make_tree(0)
    tx = make_optimizer(
        OptimConfig(name="muon"), CONSTANT, 3, DIMS, placements=shardings
    )
    step, _ = compile_sharded(tx, params, shardings, devices)
    found = collectives(step)
    # There and back for each of wq, wo, w_up and odd, once per sharded dim.
    assert [kind for kind, _ in found] == ["all-to-all"] * (2 * moves * len(MATRICES))
    # L = 3 layers are padded to one per device; a device sends no more than its share.
    padded = max(8 * D * F, 8 * D * N * H) // 8
    assert all(size <= padded for _, size in found)


# --- what XLA makes of it ---


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lion", "adagrad"])
def test_an_update_writes_in_place_and_copies_nothing(name):
    params = {"a": jnp.ones((64, 48)), "b": jnp.ones((48, 64))}
    tx = make_optimizer(OptimConfig(name=name, weight_decay=0.1), CONSTANT, 10)
    state: Any = tx.init(params)

    def step(params, state, g, scale, ok):
        g = jax.tree.map(lambda x: x * scale, g)
        updates, state = tx.update(g, state, params, finite=ok)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    compiled: Any = jitted.lower(params, state, params, 1.0, True).compile()
    text = compiled.as_text()
    assert not re.search(r"= f32\[\d+,\d+\]\S* copy\(", text)
    # One pass over each parameter and each statistic: XLA:CPU fuses nothing further.
    passes = re.findall(r"= f32\[\d+,\d+\]\S* fusion\(", text)
    assert len(passes) == 2 * len(state)
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 48 * 4


# --- schedules ---


def test_the_rate_is_the_schedule_at_the_count():
    cfg = OptimConfig(name="sgd", momentum=0.0, lr=1.0)
    schedule = ScheduleConfig(name="warmup", warmup_steps=3, warmup_shape="linear")
    tx = make_optimizer(cfg, schedule, 10)
    params, g = {"w": np.zeros(1, np.float32)}, {"w": -np.ones(1, np.float32)}
    path = [float(train(tx, params, [g] * n)[0]["w"][0]) for n in range(6)]
    np.testing.assert_allclose(np.diff(path), [0, 0, 1 / 3, 2 / 3, 1], atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
def test_one_cycle_cycles_the_first_moment(name):
    schedule = ScheduleConfig(
        name="one_cycle", cycle_first_steps=2, cycle_min_momentum=0.5
    )
    params = make_tree(0)
    tx = make_optimizer(OptimConfig(name=name), schedule, 10, DIMS)
    ones = jax.tree.map(np.ones_like, params)
    state = train(tx, params, [ones] * 3)[1]
    mu, weight = 0.0, {"sgd": 1.0}.get(name)
    for b in (0.5, 0.7, 0.5):
        if name == "lion":
            b = 0.95  # its mu decays by b2; b1 is in the sign only
        mu = b * mu + (weight or 1 - b)
    for x in jax.tree.leaves(state["mu"]):
        np.testing.assert_allclose(x, mu, rtol=1e-6)


def test_muon_lr_follows_the_schedule():
    cfg = OptimConfig(name="muon", lr=0.1, muon_lr=0.4, weight_decay=0.5)
    schedule = ScheduleConfig(warmup_steps=3)
    params = make_tree(0)
    zero = jax.tree.map(np.zeros_like, params)
    got, _ = train(make_optimizer(cfg, schedule, 10, DIMS), params, [zero])
    np.testing.assert_allclose(
        got["blocks"]["wq"], params["blocks"]["wq"] * (1 - 0.1 * 0.5), rtol=1e-6
    )
    np.testing.assert_allclose(
        got["embed"], params["embed"] * (1 - 0.025 * 0.5), rtol=1e-6
    )


# --- Newton-Schulz ---


@pytest.mark.parametrize("shape", [(8, 8), (8, 13), (8, 64), (64, 8), (5, 7, 15)])
def test_orthogonalize_is_the_iteration_in_either_form(shape):
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    want = [newton_schulz(np.float64(m), 5) for m in x.reshape(-1, *shape[-2:])]
    got = np.asarray(orthogonalize(jnp.asarray(x), 5)).reshape(-1, *shape[-2:])
    np.testing.assert_allclose(got, want, atol=2e-5)
    values = np.linalg.svd(got, compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_orthogonalize_survives_singular_and_zero_matrices():
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    v = np.linalg.qr(rng.standard_normal((64, 16)))[0]
    values = 10.0 ** -np.arange(16)
    x = (u * values) @ v.T
    for scale in (1.0, 1e-6, 1e6):
        got = orthogonalize(jnp.asarray(x * scale, jnp.float32), 5)
        np.testing.assert_allclose(got, newton_schulz(x * scale, 5), atol=2e-3)
    zero = jnp.zeros((4, 3, 8))
    assert not orthogonalize(zero, 5).any()


# --- bad input ---


@pytest.mark.parametrize(
    ("optim", "schedule", "message"),
    [
        (dict(name="sgd", momentum=0.0, nesterov=True), {}, "optim.nesterov=True"),
        (dict(name="lamb", min_coeff=2.0, max_coeff=1.0), {}, "optim.min_coeff=2.0"),
        (dict(name="adagrad"), dict(name="one_cycle"), "adagrad has no momentum"),
        (dict(name="adafactor"), dict(name="one_cycle"), "adafactor has no momentum"),
        (dict(name="sgd", momentum=0.0), dict(name="one_cycle"), "sgd has no momentum"),
        ({}, dict(warmup_steps=11, total_steps=10), "schedule.total_steps=10"),
    ],
)
def test_settings_that_contradict_are_one_clear_line(optim, schedule, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_optimizer(OptimConfig(**optim), ScheduleConfig(**schedule), 10)
    assert "\n" not in str(error.value)


def test_muon_without_a_matrix_is_refused():
    tx = make_optimizer(OptimConfig(name="muon"), CONSTANT, 10)
    with pytest.raises(ConfigError, match="optim.name='muon': no parameter"):
        tx.init({"w": jnp.ones((4, 4))})


def test_dims_that_do_not_fit_are_named():
    tx = make_optimizer(OptimConfig(), CONSTANT, 10, {"a": {"w": ("embed",)}})
    with pytest.raises(ValueError, match=r"dims of a/w: \('embed',\) .* \(4, 4\)"):
        tx.init({"a": {"w": jnp.ones((4, 4))}})
    with pytest.raises(TypeError, match="not a nested dict"):
        make_optimizer(OptimConfig(), CONSTANT, 10).init([jnp.ones(3)])
    tx = make_optimizer(OptimConfig(), CONSTANT, 10)
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="pass params"):
        tx.update(params, tx.init(params))
