# SPDX-License-Identifier: Apache-2.0
"""Matrices cut into narrow tiles, as a CPU multiplies a few rows by them fastest.

XLA's CPU backend multiplies (M, K) by (K, N) some columns at a time. Where the rows of the matrix are
long, each of those reads touches another page, and with few rows of M that is what the product
waits for. A tile of 64 columns lies in one piece: for 2 to 8 rows that takes 0.5 to 0.65 of the time,
for 1 and for 16 the same (jaxlib 0.10, Zen 4). Layer 1.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


TILE = 64
"""Columns of a tile."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiled:
    """A matrix in tiles, in a parameter's place: `jaxspeed.ops.linear` multiplies by it, all else gets it whole."""

    tiles: Float[Array, "J K 64"]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """Of the parameter."""

    def __getitem__(self, index: Any) -> Any:
        """Returns itself for `[...]`, by which a model reads its parameters, and else a part of the whole."""
        return self if index is Ellipsis else self.whole()[index]

    def __jax_array__(self) -> Array:
        """Returns the whole: for jax's own functions."""
        return self.whole()

    @property
    def ndim(self) -> int:
        """Dims of the parameter."""
        return len(self.shape)

    def whole(self) -> Float[Array, "..."]:
        """Returns the parameter as it was."""
        _, K, _ = self.tiles.shape
        flat = self.tiles.transpose(1, 0, 2).reshape(K, -1)
        return flat[:, : math.prod(self.shape) // K].reshape(self.shape)


def tiled(parameter: Float[Array, "..."], inputs: int) -> Tiled:
    """Returns a parameter in tiles, the last one filled up with zeros.

    Args:
        parameter: a matrix, its first `inputs` dims those that a product sums over.
        inputs: how many.
    """
    K = math.prod(parameter.shape[:inputs])
    matrix = parameter.reshape(K, -1)
    matrix = jnp.pad(matrix, [(0, 0), (0, -matrix.shape[1] % TILE)])
    tiles = matrix.reshape(K, -1, TILE).transpose(1, 0, 2)
    return Tiled(tiles, parameter.shape)


def dot_tiled(x: Float[Array, "M K"], matrix: Tiled) -> Float[Array, "M N"]:
    """Returns x times the matrix, summed in float32.

    Args:
        x: rows, in the dtype of the tiles.
        matrix: in tiles.
    """
    J, K, _ = matrix.tiles.shape
    rows = jnp.broadcast_to(x, (J, *x.shape))
    dims = (((2,), (1,)), ((0,), (0,)))
    y = jax.lax.dot_general(
        rows, matrix.tiles, dims, preferred_element_type=jnp.float32
    )
    y = y.transpose(1, 0, 2).reshape(x.shape[0], -1)
    return y[:, : math.prod(matrix.shape) // K]
