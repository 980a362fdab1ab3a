# SPDX-License-Identifier: Apache-2.0
"""The optimizers, as Optax gradient transformations over a nested dict of parameters.

Not here: gradient clipping and the finite check (the step does both in one pass), and applying
the updates (`optax.apply_updates`). The code is written as if on one device; placements come
from the shardings of its inputs, except for Muon's, whose collectives are written out.

The one design decision: a skipped step is decided *inside* the update, by the keyword `finite`.
A `where(finite, new, old)` around the whole update reads the old moments after they were
overwritten, so XLA copies all of them first: five times slower on a CPU, and a third set of
optimizer state in memory. Inside, the parameters are computed from the moments already
selected, and a leaf is updated in place.

Stacked layers: a parameter whose logical dims begin with "layers" (or "expert") is that many
parameters of the remaining shape. LAMB's trust ratio, Muon's matrices and Adafactor's
statistics are per layer, so scanning layers does not change the optimizer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from jaxspeed.config import ConfigError, OptimConfig, ScheduleConfig, config_error
from jaxspeed.paths import by_pattern, dotted
from jaxspeed.schedules import make_momentum_schedule, make_schedule
from jaxspeed.types import PyTree


_STACKED = ("layers", "expert")
_NOT_HIDDEN = ("vocab", "seq", "labels", "rank")
_NS = (3.4445, -4.7750, 2.0315)


def make_optimizer(
    optim: OptimConfig,
    schedule: ScheduleConfig,
    steps: int,
    dims: PyTree | None = None,
    *,
    placements: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer: `init(params)`, `update(grads, state, params, finite=...)`.

    The state is a dict: `count` (updates applied, int32) and, per kind of statistic, a nested
    dict of float32 arrays at the paths of the parameters: `mu` and `nu` for the moments, `sum`
    for Adagrad, `v`, `v_row` and `v_col` for Adafactor. A parameter without a statistic has no
    entry there. `update` returns what to add to the parameters, in float32, and the next state.
    With `finite` false it returns zeros and the state it was given, bit for bit.

    Formulas: docs/optimizers.md. With g the gradient, p the parameter, t = count + 1:

        adam, adamw  m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2
                     p -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
        sgd          m = momentum m + g; p -= lr m, or lr (g + momentum m) with nesterov
        lion         p -= lr sign(b1 m + (1 - b1) g); m = b2 m + (1 - b2) g
        lamb         u = m / (sqrt(v) + eps) + decay p; r = clip(|p| / |u|), 1 if either is 0
                     p -= lr sqrt(1 - b2^t) / (1 - b1^t) r u
        adagrad      s += g^2; p -= lr g / (sqrt(s) + eps)
        adafactor    optax.adafactor's defaults, factored over ("embed", all else)
        muon         m = momentum m + (1 - momentum) g; p -= lr sqrt(max(1, out / in)) O(m)

    Weight decay is added to the gradient (L2) for adam, sgd and adagrad, is part of u for lamb,
    and is p -= lr decay p for the others. lr and decay are a parameter's own where a pattern of
    `optim.lr_groups` or `optim.decay_groups` matches its dotted path.

    Args:
        optim: which optimizer, and its constants. `clip_norm` is not read here.
        schedule: the learning rate, and one_cycle's momentum, over `count`.
        steps: updates of the run.
        dims: the logical dims of each parameter, a tuple of names at each leaf of the tree of
            parameters, or None at a leaf for unknown. None: all unknown. A parameter with
            unknown dims is one tensor, decayed if it has two dims or more, and not Muon's.
        placements: the sharding of each parameter (its master copy and moments). Only Muon
            reads it; without it, it may gather what it orthogonalises at each of its products.

    Raises:
        ConfigError: settings that contradict each other, or muon without a matrix (at `init`).
    """
    _check(optim)
    rule = _RULES[optim.name]
    lr = make_schedule(schedule, optim.lr, steps)
    matrix_lr = make_schedule(schedule, optim.muon_lr or optim.lr, steps)
    cycle = make_momentum_schedule(schedule, steps)
    if cycle is not None:
        _check_cycle(optim)

    def init(params: PyTree) -> dict[str, Any]:
        leaves = _leaves(optim, params, dims, placements)
        slots = [rule.init(optim, leaf) for leaf in leaves]
        return {"count": jnp.zeros((), jnp.int32)} | _by_slot(leaves, slots)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        *,
        finite: Bool[Array, ""] | None = None,
        **_: Any,
    ) -> tuple[PyTree, dict[str, Any]]:
        if params is None:
            raise ValueError(
                "params=None: the update needs the parameters; pass params"
            )
        count = state["count"]
        at = _Step(
            optim=optim,
            t=(count + 1).astype(jnp.float32),
            lr=lr(count),
            matrix_lr=matrix_lr(count),
            b1=float(optim.b1) if cycle is None else cycle(count),
            momentum=float(optim.momentum) if cycle is None else cycle(count),
            finite=finite,
        )
        treedef = jax.tree.structure(params)
        leaves = _leaves(optim, params, dims, placements)
        deltas, slots = [], []
        for leaf, g, p in zip(
            leaves, treedef.flatten_up_to(updates), jax.tree.leaves(params), strict=True
        ):
            g, p = g.astype(jnp.float32), p.astype(jnp.float32)
            delta, new = rule.update(at, leaf, g, p, _slots_of(leaf, state))
            # -0.0 and not 0.0: x + -0.0 is x in every bit, also for x = -0.0.
            deltas.append(at.select(delta, -0.0))
            slots.append(new)
        new_state = {"count": at.select(count + 1, count)} | _by_slot(leaves, slots)
        return jax.tree.unflatten(treedef, deltas), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def update_count(opt_state: PyTree) -> Int[Array, ""]:
    """Returns the updates applied so far: what to call a schedule with.

    `make_schedule(...)(update_count(state))` is the rate that the next update will use.
    """
    return opt_state["count"]


def map_like_params(
    opt_state: PyTree, params: PyTree, per_param: PyTree, other: Any
) -> PyTree:
    """Returns a tree of the optimizer state's structure with a parameter's value where one is.

    A leaf of the state mirrors a parameter if its path ends in the parameter's path and it has
    the parameter's shape: moments do, counts and factored statistics do not.

    Args:
        opt_state: the state, or its `jax.eval_shape`.
        params: the parameters, or their `jax.eval_shape`.
        per_param: a tree of the parameters' structure, with anything at its leaves (shardings).
        other: the value everywhere else.

    Example:
        >>> import jax, optax
        >>> params = {"w": jax.numpy.ones((4, 2))}
        >>> state = optax.adam(1e-3).init(params)[0]
        >>> map_like_params(state, params, {"w": "sharded"}, "replicated")
        ScaleByAdamState(count='replicated', mu={'w': 'sharded'}, nu={'w': 'sharded'})
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    values = treedef.flatten_up_to(per_param)
    known = {
        jax.tree_util.keystr(path): (leaf.shape, value)
        for (path, leaf), value in zip(paths, values, strict=True)
    }

    def find(path: tuple[Any, ...], leaf: Any) -> Any:
        # From 1: the state is never the tree of parameters itself, and the name of a
        # statistic may also be a parameter's.
        for start in range(1, len(path) + 1):
            shape, value = known.get(jax.tree_util.keystr(path[start:]), (None, None))
            if shape is not None:
                return value if shape == leaf.shape else other
        return other

    return jax.tree_util.tree_map_with_path(find, opt_state)


def orthogonalize(x: Float[Array, "*n R C"], steps: int) -> Float[Array, "*n R C"]:
    """Returns the matrices with their singular values moved towards 1 (Newton-Schulz).

        X = x / |x|; `steps` times: A = X X^T; X = (3.4445 + (-4.7750) A + 2.0315 A^2) X

    The polynomial is steep at 0 rather than exact at 1: the values end between 0.7 and 1.2.
    On CPU, where one side is at least twice the other, the same polynomials are applied to the
    small A and X is multiplied once: 1.7 times faster at 384 x 1536, equal to 1e-5. That form
    needs float32 products (noise in A grows twelvefold a step), and accelerators multiply
    float32 arrays in fewer bits. References: Jordan 2024, kellerjordan.github.io/posts/muon;
    Dao 2026, tridao.me/blog/2026/gram-newton-schulz.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + 1e-7)
    plain = functools.partial(_iterate, steps=steps)
    if x.shape[-1] >= 2 * x.shape[-2]:
        gram = functools.partial(_iterate_gram, steps=steps)
        x = jax.lax.platform_dependent(x, cpu=gram, default=plain)
    else:
        x = plain(x)
    return jnp.swapaxes(x, -1, -2) if tall else x


def _iterate(x: Float[Array, "*n R C"], steps: int) -> Float[Array, "*n R C"]:
    for _ in range(steps):
        a = x @ jnp.swapaxes(x, -1, -2)
        x = _NS[0] * x + (_NS[1] * a + _NS[2] * (a @ a)) @ x
    return x


def _iterate_gram(x: Float[Array, "*n R C"], steps: int) -> Float[Array, "*n R C"]:
    a = x @ jnp.swapaxes(x, -1, -2)
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    product = eye
    for step in range(steps):
        w = _NS[0] * eye + _NS[1] * a + _NS[2] * (a @ a)
        product = w @ product if step else w
        if step < steps - 1:
            a = w @ (a @ w)
    return product @ x


class _Leaf(NamedTuple):
    """What is static about one parameter."""

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    stacked: int
    """Leading dims that count layers or experts."""
    embed: int | None
    """Index of "embed" if the other dims make a matrix: it and at least one more."""
    lr: float
    """Factor on the learning rate."""
    decay: float
    """Weight decay."""
    hidden: bool
    """A matrix that is not an embedding or the output layer: Muon's."""
    sharding: NamedSharding | None


@dataclasses.dataclass(frozen=True)
class _Step:
    """What all parameters share in one update."""

    optim: OptimConfig
    t: Float[Array, ""]
    lr: Float[Array, ""]
    matrix_lr: Float[Array, ""]
    b1: float | Float[Array, ""]
    momentum: float | Float[Array, ""]
    finite: Bool[Array, ""] | None

    def rate(self, leaf: _Leaf, base: Array | None = None) -> Array:
        """Returns the learning rate of a parameter: its factor times the base, `lr` by default."""
        base = self.lr if base is None else base
        return base if leaf.lr == 1.0 else base * leaf.lr

    def select(self, new: Array, old: jax.typing.ArrayLike) -> Array:
        """Returns `new`, or `old` in a skipped step."""
        return new if self.finite is None else jnp.where(self.finite, new, old)

    def correction(self, b: float | Float[Array, ""]) -> jax.typing.ArrayLike:
        """Returns 1 - b**t, or 1 without bias correction."""
        if not self.optim.bias_correction or (isinstance(b, float) and b == 0):
            return 1.0
        # expm1, because 1 - 0.999**t in float32 is off by 1e-5 of itself at first.
        log = math.log(b) if isinstance(b, float) else jnp.log(b)
        return -jnp.expm1(self.t * log)


Slots = dict[str, Array]
"""The statistics of one parameter, by name."""


def _zeros(shape: tuple[int, ...], *names: str) -> Slots:
    return {name: jnp.zeros(shape, jnp.float32) for name in names}


def _init_adam(_: OptimConfig, leaf: _Leaf) -> Slots:
    return _zeros(leaf.shape, "mu", "nu")


def _adam(
    at: _Step, leaf: _Leaf, g: Array, p: Array, old: Slots
) -> tuple[Array, Slots]:
    new = _moments(at, g, old)
    rate = at.rate(leaf) / at.correction(at.b1)
    scale = jax.lax.rsqrt(jnp.asarray(at.correction(float(at.optim.b2)), jnp.float32))
    delta = -rate * new["mu"] / (jnp.sqrt(new["nu"]) * scale + at.optim.eps)
    return delta, new


def _adam_l2(
    at: _Step, leaf: _Leaf, g: Array, p: Array, old: Slots
) -> tuple[Array, Slots]:
    return _adam(at, leaf, _l2(leaf, g, p), p, old)


def _adamw(
    at: _Step, leaf: _Leaf, g: Array, p: Array, old: Slots
) -> tuple[Array, Slots]:
    delta, new = _adam(at, leaf, g, p, old)
    return _decay(leaf, at.rate(leaf), delta, p), new


def _lamb(
    at: _Step, leaf: _Leaf, g: Array, p: Array, old: Slots
) -> tuple[Array, Slots]:
    new = _moments(at, g, old)
    u = _l2(leaf, new["mu"] / (jnp.sqrt(new["nu"]) + at.optim.eps), p)
    axes = tuple(range(leaf.stacked, p.ndim))
    size = jnp.sqrt(jnp.sum(p * p, axes, keepdims=True))
    change = jnp.sqrt(jnp.sum(u * u, axes, keepdims=True))
    usable = (size > 0) & (change > 0)
    ratio = size / jnp.where(usable, change, 1.0)
    ratio = jnp.clip(ratio, at.optim.min_coeff, at.optim.max_coeff)
    c1, c2 = at.correction(at.b1), at.correction(float(at.optim.b2))
    rate = at.rate(leaf) * jnp.sqrt(c2) / c1
    return -rate * jnp.where(usable, ratio, 1.0) * u, new


def _init_sgd(optim: OptimConfig, leaf: _Leaf) -> Slots:
    return _zeros(leaf.shape, "mu") if optim.momentum else {}


def _sgd(at: _Step, leaf: _Leaf, g: Array, p: Array, old: Slots) -> tuple[Array, Slots]:
    g = _l2(leaf, g, p)
    if not old:
        return -at.rate(leaf) * g, old
    mu = at.select(at.momentum * old["mu"] + g, old["mu"])
    return -at.rate(leaf) * (g + at.momentum * mu if at.optim.nesterov else mu), {
        "mu": mu
    }


def _init_lion(_: OptimConfig, leaf: _Leaf) -> Slots:
    return _zeros(leaf.shape, "mu")


def _lion(
    at: _Step, leaf: _Leaf, g: Array, p: Array, old: Slots
) -> tuple[Array, Slots]:
    mu, b2 = old["mu"], at.optim.b2
    new = at.select(b2 * mu + (1 - b2) * g, mu)
    # b1 mu + (1 - b1) g, but by the new mu where that is possible: a second reader of the old
    # one would have XLA copy it before it is overwritten.
    kept, b = (new, at.b1 / b2) if b2 else (mu, at.b1)
    delta = -at.rate(leaf) * jnp.sign(b * kept + (1 - b) * g)
    return _decay(leaf, at.rate(leaf), delta, p), {"mu": new}


def _init_adagrad(_: OptimConfig, leaf: _Leaf) -> Slots:
    return _zeros(leaf.shape, "sum")


def _adagrad(
    at: _Step, leaf: _Leaf, g: Array, p: Array, old: Slots
) -> tuple[Array, Slots]:
    g = _l2(leaf, g, p)
    total = at.select(old["sum"] + g * g, old["sum"])
    return -at.rate(leaf) * g / (jnp.sqrt(total) + at.optim.eps), {"sum": total}


_FACTORED = optax.scale_by_factored_rms()


def _init_adafactor(_: OptimConfig, leaf: _Leaf) -> Slots:
    n, *layer = jax.eval_shape(lambda: _layers(leaf, jnp.zeros(leaf.shape))).shape
    one = jax.eval_shape(_FACTORED.init, jax.ShapeDtypeStruct(layer, jnp.float32))
    if one.v.shape == tuple(layer):
        return _zeros(leaf.shape, "v")
    rows, cols = (n, *one.v_row.shape), (n, *one.v_col.shape)
    return _zeros(rows, "v_row") | _zeros(cols, "v_col")


def _adafactor(
    at: _Step, leaf: _Leaf, g: Array, p: Array, old: Slots
) -> tuple[Array, Slots]:
    """Runs the chain of optax.adafactor on each layer, as a matrix where it is one."""
    g, p_layers = _layers(leaf, g), _layers(leaf, p)
    absent = jnp.zeros((g.shape[0], 1), jnp.float32)
    axes = optax.FactoredState(None, 0, 0, 0)  # pyright: ignore[reportArgumentType]
    scale: Any = jax.vmap(_FACTORED.update, in_axes=(0, axes, 0), out_axes=(0, axes))
    state = optax.FactoredState(
        count=(at.t - 1).astype(jnp.int32),
        v_row=old.get("v_row", absent),
        v_col=old.get("v_col", absent),
        v=_layers(leaf, old["v"]) if "v" in old else absent,
    )
    u, state = scale(g, state, p_layers)

    def rms(x: Array) -> Array:
        return jnp.sqrt(jnp.mean(x * x, tuple(range(1, x.ndim)), keepdims=True))

    u = u / jnp.maximum(1.0, rms(u)) * jnp.maximum(1e-3, rms(p_layers))
    new = {"v_row": state.v_row, "v_col": state.v_col}
    if "v" in old:
        new = {"v": _unlayers(leaf, state.v, p.shape)}
    new = {name: at.select(array, old[name]) for name, array in new.items()}
    rate = at.rate(leaf)
    return _decay(leaf, rate, -rate * _unlayers(leaf, u, p.shape), p), new


def _init_muon(optim: OptimConfig, leaf: _Leaf) -> Slots:
    return _zeros(leaf.shape, "mu") if leaf.hidden else _init_adam(optim, leaf)


def _muon(
    at: _Step, leaf: _Leaf, g: Array, p: Array, old: Slots
) -> tuple[Array, Slots]:
    if not leaf.hidden:
        return _adamw(at, leaf, g, p, old)
    b = at.momentum
    mu = at.select(b * old["mu"] + (1 - b) * g, old["mu"])
    u = (1 - b) * g + b * mu if at.optim.nesterov else mu
    u = _orthogonalize_leaf(leaf, u, at.optim.ns_steps)
    rate = at.rate(leaf, at.matrix_lr)
    return _decay(leaf, rate, -rate * u, p), {"mu": mu}


class _Rule(NamedTuple):
    """An optimizer: the first statistics of a parameter, and its update."""

    init: Callable[[OptimConfig, _Leaf], Slots]
    update: Callable[[_Step, _Leaf, Array, Array, Slots], tuple[Array, Slots]]


_RULES: Mapping[str, _Rule] = {
    "adam": _Rule(_init_adam, _adam_l2),
    "adamw": _Rule(_init_adam, _adamw),
    "lamb": _Rule(_init_adam, _lamb),
    "sgd": _Rule(_init_sgd, _sgd),
    "lion": _Rule(_init_lion, _lion),
    "adagrad": _Rule(_init_adagrad, _adagrad),
    "adafactor": _Rule(_init_adafactor, _adafactor),
    "muon": _Rule(_init_muon, _muon),
}


def _moments(at: _Step, g: Array, old: Slots) -> Slots:
    b1, b2 = at.b1, at.optim.b2
    return {
        "mu": at.select(b1 * old["mu"] + (1 - b1) * g, old["mu"]),
        "nu": at.select(b2 * old["nu"] + (1 - b2) * (g * g), old["nu"]),
    }


def _l2(leaf: _Leaf, x: Array, p: Array) -> Array:
    return x + leaf.decay * p if leaf.decay else x


def _decay(leaf: _Leaf, lr: Array, delta: Array, p: Array) -> Array:
    return delta - (lr * leaf.decay) * p if leaf.decay else delta


def _layers(leaf: _Leaf, x: Array) -> Array:
    """Returns `x` as (layers, ...): each layer as a matrix where it is one, else as it is.

    A matrix has "embed" on one side, all other dims on the other, inputs first.
    """
    x = x.reshape(math.prod(x.shape[: leaf.stacked]), *x.shape[leaf.stacked :])
    if leaf.embed is None:
        return x
    axis = leaf.embed - leaf.stacked + 1
    if axis == x.ndim - 1:
        return x.reshape(x.shape[0], -1, x.shape[-1])
    x = jnp.moveaxis(x, axis, 1)
    return x.reshape(*x.shape[:2], -1)


def _unlayers(leaf: _Leaf, x: Array, shape: tuple[int, ...]) -> Array:
    """Returns the inverse of `_layers` for an array that had `shape`."""
    axis = 0 if leaf.embed is None else leaf.embed - leaf.stacked + 1
    if leaf.embed is None or axis in (1, len(shape) - leaf.stacked):
        return x.reshape(shape)
    rest = [size for dim, size in enumerate(shape) if dim >= leaf.stacked]
    rest.insert(0, rest.pop(axis - 1))
    return jnp.moveaxis(x.reshape(x.shape[0], *rest), 1, axis).reshape(shape)


def _orthogonalize_leaf(leaf: _Leaf, x: Array, steps: int) -> Array:
    """Returns Muon's direction: each layer's matrix orthogonalised and scaled.

    Where the matrices are split over devices, whole matrices are dealt out to the devices by an
    all-to-all, orthogonalised there, and dealt back. (Left to GSPMD, each of the fifteen
    products gathers or reduces.) Layers that do not divide by the devices are padded with zeros.
    """

    def run(x: Array) -> Array:
        scale = max(1.0, x.shape[-1] / x.shape[-2]) ** 0.5
        return scale * orthogonalize(x, steps)

    splits = _splits(leaf)
    if leaf.sharding is None or not splits:
        return _unlayers(leaf, run(_layers(leaf, x)), x.shape)
    assert leaf.embed is not None
    one = leaf._replace(stacked=1, embed=leaf.embed - leaf.stacked + 1)
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    devices = math.prod(mesh.shape[axis] for _, axes in splits for axis in axes)

    def local(x: Array) -> Array:
        shape = x.shape
        x = x.reshape(math.prod(shape[: leaf.stacked]), *shape[leaf.stacked :])
        n = x.shape[0]
        x = jnp.pad(x, [(0, -n % devices)] + [(0, 0)] * (x.ndim - 1))
        for dim, axes in splits:
            x = jax.lax.all_to_all(x, axes, 0, dim, tiled=True)
        x = _unlayers(one, run(_layers(one, x)), x.shape)
        for dim, axes in reversed(splits):
            x = jax.lax.all_to_all(x, axes, dim, 0, tiled=True)
        return x[:n].reshape(shape)

    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(x)


def _splits(leaf: _Leaf) -> list[tuple[int, tuple[str, ...]]]:
    """Returns (dim of the layer, from 1; its mesh axes) for each dim that is split."""
    if leaf.sharding is None:
        return []
    found = []
    for dim, entry in enumerate(leaf.sharding.spec):
        axes = entry if isinstance(entry, tuple) else (entry,)
        axes = tuple(a for a in axes if a and leaf.sharding.mesh.shape[a] > 1)
        if axes and dim >= leaf.stacked:
            found.append((dim - leaf.stacked + 1, axes))
    return found


def _leaves(
    optim: OptimConfig, params: PyTree, dims: PyTree | None, placements: PyTree | None
) -> list[_Leaf]:
    """Returns the static facts of each parameter, in the order of the tree's leaves."""
    found, treedef = jax.tree_util.tree_flatten_with_path(params)
    unknown = [None] * len(found)
    names = unknown if dims is None else treedef.flatten_up_to(dims)
    places = unknown if placements is None else treedef.flatten_up_to(placements)
    paths = [dotted(path) for path, _ in found]
    lrs = by_pattern("optim.lr_groups", optim.lr_groups, paths)
    decays = by_pattern("optim.decay_groups", optim.decay_groups, paths)
    leaves = [
        _leaf(
            optim,
            path,
            leaf.shape,
            name,
            place,
            lr=lrs.get(dotted(path), 1.0),
            decay=decays.get(dotted(path)),
        )
        for (path, leaf), name, place in zip(found, names, places, strict=True)
    ]
    if optim.name == "muon" and not any(leaf.hidden for leaf in leaves):
        why = "no parameter is a hidden matrix by its logical dims"
        raise config_error("optim.name", optim.name, why, "pass dims, or use adamw")
    return leaves


def _leaf(
    optim: OptimConfig,
    path: tuple[Any, ...],
    shape: tuple[int, ...],
    names: tuple[str | None, ...] | None,
    sharding: NamedSharding | None,
    *,
    lr: float,
    decay: float | None,
) -> _Leaf:
    keys = tuple(getattr(key, "key", None) for key in path)
    where = "/".join(map(str, keys))
    if None in keys:
        raise TypeError(
            f"params{jax.tree_util.keystr(path)}: not a nested dict of arrays"
        )
    if names is not None and len(names) != len(shape):
        raise ValueError(f"dims of {where}: {names} for an array of shape {shape}")
    stacked, embed = 0, None
    if names is not None:
        while stacked < len(names) and names[stacked] in _STACKED:
            stacked += 1
        if "embed" in names[stacked:] and len(names) - stacked > 1:
            embed = names.index("embed", stacked)
    matrix = len(shape) > 1 if names is None else embed is not None or "rank" in names
    if decay is None:
        decay = optim.weight_decay if matrix or optim.decay == "all" else 0.0
    return _Leaf(
        path=keys,
        shape=shape,
        stacked=stacked,
        embed=embed,
        lr=lr,
        decay=decay,
        hidden=embed is not None and not set(_NOT_HIDDEN) & set(names or ()),
        sharding=sharding,
    )


def _by_slot(leaves: list[_Leaf], slots: list[Slots]) -> dict[str, Any]:
    """Returns {statistic: nested dict of arrays at the paths of the parameters}."""
    state: dict[str, Any] = {}
    for leaf, arrays in zip(leaves, slots, strict=True):
        for name, array in arrays.items():
            node = state.setdefault(name, {})
            for key in leaf.path[:-1]:
                node = node.setdefault(key, {})
            node[leaf.path[-1]] = array
    return state


def _slots_of(leaf: _Leaf, state: Mapping[str, Any]) -> Slots:
    """Returns the inverse of `_by_slot` for one parameter."""
    found = {}
    for name, node in state.items():
        for key in leaf.path:
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is not None:
            found[name] = node
    return found


def _check(optim: OptimConfig) -> None:
    if optim.name == "sgd" and optim.nesterov and not optim.momentum:
        why = "nesterov looks ahead along a momentum, and momentum is 0"
        raise config_error(
            "optim.nesterov", True, why, "set momentum, or drop nesterov"
        )
    if optim.min_coeff > optim.max_coeff:
        why = f"the bounds of the trust ratio cross: max_coeff={optim.max_coeff}"
        raise config_error("optim.min_coeff", optim.min_coeff, why, "give less than it")


def _check_cycle(optim: OptimConfig) -> None:
    without = optim.name in ("adagrad", "adafactor")
    if without or (optim.name == "sgd" and not optim.momentum):
        raise ConfigError(
            f"schedule.cycle_momentum=True: {optim.name} has no momentum to cycle; "
            "set schedule.cycle_momentum False"
        )
