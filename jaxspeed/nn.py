# SPDX-License-Identifier: Apache-2.0
"""The boundary with Flax NNX: how a model states its parameters, and how it becomes plain arrays.

A model file uses `param` and `Layers`. The rest of the library uses `split` and `merge`: past
them a model is (graphdef, nested dict of arrays), so optimizers, checkpoints and sharding know
nothing of NNX. Of the library only this module imports flax. ADR 0003.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxspeed.ambient import ambient, current
from jaxspeed.auxiliary import Auxiliary
from jaxspeed.cache import Cache
from jaxspeed.config import ConfigError
from jaxspeed.ops.tiled import by_tiles
from jaxspeed.pipeline import AXIS as STAGE, one_behind_another
from jaxspeed.remat import RESIDUAL_NAME, checkpoint_layer
from jaxspeed.sharding import Weight, is_weight, materialise, shard
from jaxspeed.types import Params, PyTree


Method = TypeVar("Method", bound=Callable[..., Any])

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def param(
    init: Initializer, rngs: nnx.Rngs, shape: tuple[int, ...], dims: tuple[str, ...]
) -> nnx.Param:
    """Returns a float32 parameter that carries the logical name of each dim.

    Args:
        init: an initialiser, as in `jax.nn.initializers`.
        rngs: where its key comes from.
        shape: of the parameter.
        dims: one logical name per dim; they decide where it lives (`jaxspeed.sharding`).
    """
    if len(shape) != len(dims):
        raise ValueError(f"param of shape {shape} has dims {dims}: one name per dim")
    return nnx.Param(init(rngs.params(), shape, jnp.float32), dims=dims)


class Layers(nnx.Module):
    """L blocks of one shape, stored stacked (leading dim `layers`) and run one after another by a scan.

    Inside the scan each block's weights are materialised (gathered, at ZeRO stage 3), used, and
    dropped; the rematerialisation policy is applied once, here.
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        num_layers: int,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes `num_layers` blocks, each from its own key."""
        self.num_layers = num_layers
        self.block = nnx.vmap(make_block)(rngs.split(num_layers))

    def __call__(self, x: jax.Array, *args: Any, each: PyTree = ()) -> jax.Array:
        """Returns x after all blocks.

        Args:
            x: the residual stream.
            *args: go to each block unchanged (positions, masks).
            each: a tuple of arrays over layers, or None; a block gets its own elements after `args`.
        """
        graphdef, state = nnx.split(self.block)
        weights = nnx.to_pure_dict(state)
        settings = current()
        key, cache, auxiliary = (
            settings.dropout_key,
            settings.cache,
            settings.auxiliary,
        )
        count, begin = jax.tree.leaves(weights)[0].shape[0], 0
        if settings.pipe is not None:
            begin = settings.pipe.begin
        elif settings.stage > 1:
            begin = jax.lax.axis_index(STAGE) * count
        if settings.stage > 1:
            each = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, begin, count), each
            )

        def body(
            x: jax.Array, layer: tuple[PyTree, ...], *args: Any
        ) -> tuple[jax.Array, Any]:
            weights, each, index = layer
            whole = jax.tree.map(materialise, weights, is_leaf=is_weight)
            layer_key = None if key is None else jax.random.fold_in(key, index)
            inner = None if auxiliary is None else Auxiliary()
            with ambient(dropout_key=layer_key, auxiliary=inner):
                x = checkpoint_name(_residual(x), RESIDUAL_NAME)
                x = nnx.merge(graphdef, whole)(x, *args, *each)
            return _residual(x), None if inner is None else inner.arrays()

        if cache is not None:
            if settings.stage > 1:
                raise ConfigError(
                    f"mesh.stage={settings.stage}: a model in stages does not write text; set mesh.stage 1"
                )
            return self._while_writing(
                cache,
                x,
                (weights, each),
                lambda x, layer: body(x, (*layer, jnp.zeros((), jnp.int32)), *args)[0],
            )
        body = checkpoint_layer(body, settings.remat)

        def run(x: jax.Array) -> jax.Array:
            x, added = jax.lax.scan(
                lambda x, layer: body(x, layer, *args),
                x,
                (weights, each, begin + jnp.arange(count)),
            )
            if auxiliary is not None:
                auxiliary.add_layers(added)
            return x

        if settings.pipe is not None:
            return settings.pipe.through(run, x)
        return run(x) if settings.stage == 1 else one_behind_another(run, x)

    def _while_writing(
        self,
        cache: Cache,
        x: jax.Array,
        layers: PyTree,
        block: Callable[[jax.Array, PyTree], jax.Array],
    ) -> jax.Array:
        """Runs the blocks, each with its own part of the cache.

        The first pass is a scan, as in training. The later ones, a token each, are written out
        layer by layer: twice as fast on a CPU, where a scan copies each layer's part of the cache.
        """

        def run(x: jax.Array, layer: PyTree, before: Any) -> tuple[jax.Array, Any]:
            inner = cache.inner(before)
            with ambient(cache=inner):
                x = block(x, layer)
            return x, inner.kept

        before = cache.take()
        if before is None and not any(map(_is_unstacked, _leaves(layers))):
            x, stacked = jax.lax.scan(lambda x, w: run(x, w, None), x, layers)
            kept = [
                jax.tree.map(lambda a, i=i: a[i], stacked)
                for i in range(self.num_layers)
            ]
        else:
            kept = []
            for i in range(self.num_layers):
                layer = jax.tree.map(
                    lambda w, i=i: w.layers[i] if _is_unstacked(w) else w[i],
                    layers,
                    is_leaf=_is_unstacked,
                )
                x, entry = run(x, layer, None if before is None else before[i])
                kept.append(entry)
        cache.keep(kept)
        return x


def _residual(x: jax.Array) -> jax.Array:
    """Returns what goes from block to block, constrained to lie as the axis `tensor` has it between products."""
    return shard(x, "batch", "seq", "embed") if x.ndim == 3 else x


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unstacked:
    """A stacked parameter taken apart: an array (or a `Weight`) per layer."""

    layers: tuple[Any, ...]


def unstack(params: Params) -> Params:
    """Returns the parameters with each stacked `Weight` as one per layer, so that no pass slices them."""

    def apart(weight: Any) -> Any:
        if not (isinstance(weight, Weight) and weight.placement.stacked):
            return weight
        assert weight.slot is None, "gradients are of stacked parameters"
        layers = range(weight.copy.shape[0])
        return Unstacked(
            tuple(dataclasses.replace(weight, copy=weight.copy[i]) for i in layers)
        )

    return jax.tree.map(apart, params, is_leaf=is_weight)


def _is_unstacked(x: Any) -> bool:
    return isinstance(x, Unstacked)


def _leaves(weights: PyTree) -> list[Any]:
    return jax.tree.leaves(weights, is_leaf=_is_unstacked)


def split(model: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Returns (graphdef, parameters, logical dims) of a model.

    Parameters are a nested dict of arrays (or of shapes, for an abstract model); dims mirror it,
    with None for a parameter that has no names.

    Raises:
        ConfigError: it is not a model, or it holds what the step does not train (batch statistics, say).
    """
    if not isinstance(model, nnx.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}, not an nnx.Module; give one, or a function that returns one"
        )
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)
    _refuse_untrainable(model, graphdef, state, rest)
    dims = jax.tree.map(_dims_of, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return graphdef, nnx.to_pure_dict(state), _plain(dims)


def in_tiles(mlp: Method) -> Method:
    """Returns a module's method `mlp(self, x, ...) -> y` that goes by tiles of x (B, T, D) where the run says so (`mlp_tiles`).

    While text is written it does not. Of a tile nothing is known but x: other arrays are None then.

    Args:
        mlp: does the same to each token.
    """

    @functools.wraps(mlp)
    def tiled(module: Any, x: jax.Array, *rest: Any, **named: Any) -> jax.Array:
        settings = current()
        if settings.mlp_tiles == 1 or settings.cache is not None or x.ndim != 3:
            return mlp(module, x, *rest, **named)
        graphdef, weights = nnx.split(module)
        nothing = (None,) * len(rest)
        run = lambda weights, x: mlp(nnx.merge(graphdef, weights), x, *nothing, **named)
        return by_tiles(run, weights, x)

    _IN_TILES.add(tiled)
    return cast(Method, tiled)


_IN_TILES: set[Callable[..., Any]] = set()


def goes_in_tiles(graphdef: Any) -> bool:
    """Whether a part of a model does, if the run says so."""
    kinds = (getattr(node, "type", object) for node in graphdef.nodes)
    return any(vars(kind).get("__call__") in _IN_TILES for kind in kinds)


def merge(graphdef: Any, params: Params) -> Any:
    """Returns the model with these parameters.

    `Weight`s outside stacked layers are materialised here, those inside by `Layers`. A table of tokens
    keeps the one that it was made of for as long as nothing reads it: see `jaxspeed.sharding.opened_last`.
    """
    tables: dict[int, Weight] = {}

    def enter(weight: Any) -> Any:
        if not is_weight(weight):
            return weight
        if weight.placement.stacked:
            return weight
        array = weight.materialise()
        if weight.placement.dims == TABLE and weight.reduces:
            tables[id(array)] = weight
        return array

    whole = lambda x: is_weight(x) or _is_unstacked(x)
    model = nnx.merge(graphdef, jax.tree.map(enter, params, is_leaf=whole))
    if tables:
        for _, node in nnx.iter_graph(model):
            if isinstance(node, nnx.Variable) and id(node.get_raw_value()) in tables:
                weight = tables[id(node.get_raw_value())]
                node.set_metadata(unread=weight, on_get_value=_read)
    return model


TABLE = ("vocab", "embed")
"""The dims of a table of tokens."""


def _read(variable: nnx.Variable, value: Any) -> Any:
    variable.set_metadata(unread=None)
    return value


def abstract(
    make_model: Callable[[], nnx.Module],
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Returns `split` of the model that `make_model` would make, with shapes in place of arrays."""
    return split(nnx.eval_shape(make_model))


def initialise(make_model: Callable[[], nnx.Module]) -> dict[str, Any]:
    """Returns the parameters of a new model, as float32 masters; to be called under jit with out_shardings."""
    params = nnx.to_pure_dict(nnx.state(make_model(), nnx.Param))
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def is_module(x: Any) -> bool:
    """Whether x is an NNX module."""
    return isinstance(x, nnx.Module)


def rngs(key: jax.Array) -> nnx.Rngs:
    """Returns the NNX random streams that start from this key."""
    # `default` serves streams of any name, so that a model with nnx.Dropout gets as far as `split`.
    return nnx.Rngs(params=key, default=key)


def _refuse_untrainable(
    model: nnx.Module, graphdef: Any, state: Any, rest: Any
) -> None:
    """Raises if the model holds arrays that are not real-valued parameters, or no parameter."""
    dotted = lambda path: "model." + ".".join(map(str, path))
    others = [
        (path, v)
        for path, v in nnx.to_flat_state(rest)
        if not isinstance(v, nnx.RngState)
    ]
    arrays = [path for path, v in others if not isinstance(v, nnx.Variable)]
    # While tracing, flax 0.12 takes a plain array for a static attribute.
    arrays += [
        (name,)
        for name, v in graphdef.attributes
        if isinstance(getattr(v, "value", None), jax.Array)
    ]
    if arrays:
        raise ConfigError(
            f"{dotted(arrays[0])} is an array but not a parameter; make it an nnx.Param, or compute it in __call__"
        )
    if others:
        path, variable = others[0]
        raise ConfigError(
            f"{dotted(path)} is a {type(variable).__name__}: the step trains parameters (nnx.Param) only; "
            "use a layer without running statistics, such as LayerNorm"
        )
    if nnx.to_flat_state(rest):
        raise ConfigError(
            "model holds random-number state (nnx.Rngs); use jaxspeed.ops.dropout, which takes its key from the step"
        )
    params = nnx.to_flat_state(state)
    if not params:
        raise ConfigError(
            f"model {type(model).__name__} has no parameters; hold them as nnx.Param, and layers as nnx.Module attributes"
        )
    for path, variable in params:
        dtype = variable.get_value().dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ConfigError(
                f"{dotted(path)} is an nnx.Param of {dtype}: only real numbers are trained; compute it in __call__ instead"
            )


def _dims_of(variable: nnx.Variable) -> Any:
    dims = variable.get_metadata().get("dims")
    if dims is None:
        return None
    ndim = len(variable.get_value().shape)
    assert ndim - len(dims) in (0, 1), (dims, ndim)
    return ("layers",) * (ndim - len(dims)) + tuple(dims)


def _plain(tree: Any) -> Any:
    return {k: _plain(v) for k, v in tree.items()} if hasattr(tree, "items") else tree
