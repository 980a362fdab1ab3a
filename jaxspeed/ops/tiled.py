# SPDX-License-Identifier: Apache-2.0
"""What goes token by token, done a part of the sequence at a time.

Inside an MLP a token is several times as wide as in the residual stream: of long sequences this is
most of what a layer holds. Reference: the tiled MLP of Arctic Long Sequence Training (arXiv
2506.13996 section 3.1; DeepSpeed's `TiledMLP`), whose gradients of the weights are summed in the
compute dtype: here they are float32. `jaxspeed.nn.in_tiles` applies it to a module.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxspeed.ambient import ambient, current
from jaxspeed.sharding import shard, splits_sequence


def by_tiles(
    mlp: Callable[[Any, Array], Array], weights: Any, x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Returns `mlp(weights, x)`, by `mlp_tiles` parts of each device's tokens.

    A tile's inner activations are gone when the next begins, and are computed again in the backward
    pass. The last tile is filled up.

    Args:
        mlp: does the same to each token of x.
        weights: any pytree of arrays.
        x: activations.
    """
    settings = current()
    static = dataclasses.replace(settings, dropout_key=None)

    def one(weights: Any, key: Array | None, x: Array) -> Array:
        with ambient(static, dropout_key=key):
            return mlp(weights, shard(x, "batch", "seq", "embed"))

    shards = settings.tensor if splits_sequence(x.shape[1]) else 1
    tiles = _cut(x, shards, settings.mlp_tiles)
    keys = None
    if settings.dropout_key is not None:
        keys = jax.random.split(settings.dropout_key, len(tiles))
    return _joined(_tile_by_tile(one, weights, keys, tiles), shards, x.shape)


def _tile_by_tile(
    one: Callable[..., Array], weights: Any, keys: Any, tiles: Float[Array, "n B t D"]
) -> Float[Array, "n B t D"]:
    """Returns `one(weights, key, tile)` of each; its derivative is its own, since no policy of rematerialisation may look inside."""

    @jax.custom_vjp
    def run(weights: Any, keys: Any, tiles: Array) -> Array:
        body = lambda _, tile: (None, one(weights, *tile))
        return jax.lax.scan(body, None, (keys, tiles))[1]

    def forward(weights: Any, keys: Any, tiles: Array) -> tuple[Array, tuple[Any, ...]]:
        return run(weights, keys, tiles), (weights, keys, tiles)

    def backward(kept: tuple[Any, ...], gradients: Array) -> tuple[Any, None, Array]:
        weights, keys, tiles = kept

        def body(total: Any, tile: tuple[Any, ...]) -> tuple[Any, Array]:
            key, x, g = tile
            of_weights, of_x = jax.vjp(lambda s, x: one(s, key, x), weights, x)[1](g)
            return jax.tree.map(jnp.add, total, of_weights), of_x

        nothing = jax.tree.map(jnp.zeros_like, weights)
        total, of_tiles = jax.lax.scan(body, nothing, (keys, tiles, gradients))
        return total, None, of_tiles

    run.defvjp(forward, backward)
    return run(weights, keys, tiles)


def _cut(x: Float[Array, "B T D"], shards: int, count: int) -> Float[Array, "n B t D"]:
    """Returns tiles, each with a part of what every device of `tensor` has of the sequence."""
    B, T, D = x.shape
    x = x.reshape(B, shards, T // shards, D)
    each = -(-x.shape[2] // count)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, each * count - x.shape[2]), (0, 0)])
    x = jnp.moveaxis(x.reshape(B, shards, count, each, D), 2, 0)
    return x.reshape(count, B, shards * each, D)


def _joined(
    tiles: Float[Array, "n B t D"], shards: int, shape: tuple[int, ...]
) -> Float[Array, "B T D"]:
    """Undoes `_cut`."""
    B, T, D = shape
    count, each = tiles.shape[0], tiles.shape[2] // shards
    x = jnp.moveaxis(tiles.reshape(count, B, shards, each, D), 0, 2)
    return x.reshape(B, shards, count * each, D)[:, :, : T // shards].reshape(shape)
