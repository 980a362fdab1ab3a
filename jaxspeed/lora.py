# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, arXiv 2106.09685): what a model gets beside its parameters, and how the two meet.

Adapters are parameters of their own, under the key `lora` at the paths of their matrices:
`lora.layers.block.attn.wq.a` and `.b`. So placements, optimizer and checkpoints treat them as any
other, and no model file knows of them: on the way into the forward pass a matrix and its adapter
become one `Adapted`, which `jaxspeed.ops.linear` multiplies by. Not here: PEFT's files
(`jaxspeed.peft`). Layer 3.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspeed.config import ConfigError, LoraConfig, config_error
from jaxspeed.paths import dotted, matching, paths_of
from jaxspeed.sharding import Adapted, matrix_inputs
from jaxspeed.types import Params, PyTree


ADAPTERS = "lora"
"""The key of the adapters among the parameters."""

RANK = "rank"
"""The logical dim that A and B share."""


class Part(NamedTuple):
    """A or B of an adapter, before it exists."""

    shape: tuple[int, ...]
    dims: tuple[str, ...]


class Target(NamedTuple):
    """A matrix that gets an adapter."""

    keys: tuple[Any, ...]
    """Where it is among the parameters."""
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    stacked: int
    """1 if the first dim counts layers, else 0."""
    inputs: int
    """Number of dims that are summed over."""

    def parts(self, rank: int) -> dict[str, Part]:
        """Returns A, of the inputs and the rank, and B, of the rank and the outputs."""
        start, end = self.stacked, self.stacked + self.inputs
        shape, dims = self.shape, self.dims
        return {
            "a": Part((*shape[:end], rank), (*dims[:end], RANK)),
            "b": Part(
                (*shape[:start], rank, *shape[end:]), (*dims[:start], RANK, *dims[end:])
            ),
        }


def scale_of(lora: LoraConfig) -> float:
    """Returns the factor on A B."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def find_targets(lora: LoraConfig, params: Params, dims: PyTree) -> dict[str, Target]:
    """Returns the matrices that get an adapter, by path.

    A matrix has the logical dim `embed` first (then that is its input) or last (its output), and
    other dims; one with vocab, seq, expert or gates is none, as it is not used in a plain product.

    Args:
        lora: the patterns.
        params: arrays or shapes.
        dims: the logical dims of each.

    Raises:
        ConfigError: a pattern matches no matrix.
    """
    named = paths_of(dims, is_leaf=lambda x: x is None or isinstance(x, tuple))
    known = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = named[dotted(path)] or ()
        if inputs := matrix_inputs(names):
            keys = tuple(entry.key for entry in path)
            stacked = int(names[:1] == ("layers",))
            known[dotted(path)] = Target(keys, leaf.shape, names, stacked, inputs)
    if not lora.targets:
        raise config_error(
            "lora.targets", (), "there is nothing to adapt", "give a pattern"
        )
    return {
        path: known[path]
        for pattern in lora.targets
        for path in matching("lora.targets", pattern, known)
    }


def with_adapters(
    targets: Mapping[str, Target], rank: int, params: Params, dims: PyTree
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns abstract parameters and their dims, with those of the adapters.

    Raises:
        ConfigError: the model has a part named as its adapters would be.
    """
    if ADAPTERS in params:
        raise ConfigError(
            f"model: it has a part called {ADAPTERS!r}, as its adapters would be; rename that"
        )
    shape_of = lambda part: jax.ShapeDtypeStruct(part.shape, jnp.float32)
    made = {target.keys: target.parts(rank) for target in targets.values()}
    shapes, names = _nested(made, shape_of), _nested(made, lambda part: part.dims)
    return {**params, ADAPTERS: shapes}, {**dims, ADAPTERS: names}


def init_adapters(
    key: jax.Array, targets: Mapping[str, Target], rank: int
) -> dict[str, Any]:
    """Returns new adapters: A uniform in +-1 / sqrt(number of inputs), as PEFT draws it, and B zero."""
    made = {}
    for number, (_, target) in enumerate(sorted(targets.items())):
        a, b = target.parts(rank).values()
        bound = math.prod(a.shape[target.stacked : -1]) ** -0.5
        draw = jax.random.uniform(
            jax.random.fold_in(key, number), a.shape, minval=-bound, maxval=bound
        )
        made[target.keys] = {"a": draw, "b": jnp.zeros(b.shape, jnp.float32)}
    return _nested(made, lambda array: array)


def frozen_paths(
    lora: LoraConfig, targets: Collection[str], paths: Iterable[str]
) -> set[str]:
    """Returns the paths of the model's parameters that are not trained beside the adapters.

    Args:
        lora: its `trained` names those that are.
        targets: paths that have an adapter.
        paths: of the model's parameters.

    Raises:
        ConfigError: a pattern of `trained` matches nothing, or a matrix that has an adapter.
    """
    frozen, paths = set(paths), list(paths)
    for pattern in lora.trained:
        found = set(matching("lora.trained", pattern, paths))
        if both := sorted(found & set(targets)):
            raise config_error(
                "lora.trained",
                pattern,
                f"{both[0]} has an adapter",
                "leave it out here, or in lora.targets",
            )
        frozen -= found
    return frozen


def joined(params: Params, lora: LoraConfig) -> Params:
    """Returns the tree that the model takes: each matrix that has an adapter as an `Adapted`.

    Args:
        params: of anything, arrays or `Weight`s for instance; without adapters it is returned as it is.
        lora: scale and dropout.
    """
    if ADAPTERS not in params:
        return params

    def join(of: Any, adapters: Any, path: str) -> Any:
        if not isinstance(of, Mapping):
            a, b = adapters["a"], adapters["b"]
            return Adapted(of, a, b, path, scale_of(lora), lora.dropout)
        inner = {
            key: join(of[key], below, f"{path}.{key}".lstrip("."))
            for key, below in adapters.items()
        }
        return {**of, **inner}

    return join(without(params), params[ADAPTERS], "")


def without(params: Params) -> dict[str, Any]:
    """Returns the model's own parameters, without adapters."""
    return {name: part for name, part in params.items() if name != ADAPTERS}


def folded(params: Params, lora: LoraConfig) -> Params:
    """Returns the model's parameters with each adapter added to its matrix: W + scale A B, in float32."""

    def fold(w: Any) -> Any:
        if not isinstance(w, Adapted):
            return w
        product = functools.partial(jnp.tensordot, axes=1, precision="highest")
        stacked = w.a.ndim + w.b.ndim - 2 > w.w.ndim
        change = (jax.vmap(product) if stacked else product)(w.a, w.b)
        return w.w.astype(jnp.float32) + w.scale * change

    is_adapted = lambda x: isinstance(x, Adapted)
    return jax.tree.map(fold, joined(params, lora), is_leaf=is_adapted)


def _nested(
    parts: Mapping[tuple[Any, ...], Mapping[str, Any]], value: Callable[[Any], Any]
) -> dict[str, Any]:
    """Returns a nested dict with the values of the parts at each place."""
    tree: dict[str, Any] = {}
    for keys, of in parts.items():
        node = tree
        for key in keys:
            node = node.setdefault(key, {})
        node |= {name: value(part) for name, part in of.items()}
    return tree
