# SPDX-License-Identifier: Apache-2.0
"""The few types that every layer shares. Layer 0: standard library, jax and jaxtyping."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int


class TrainingError(RuntimeError):
    """Training cannot go on: one line with step, cause and what to change. What was saved stays."""


PyTree = Any
"""Any nest of dicts, tuples and dataclasses with arrays at the leaves."""

Params = Mapping[str, Any]
"""Parameters past `jaxspeed.nn.split`: a nested dict of arrays."""

Batch = Mapping[str, jax.Array]
"""A batch of token sequences, by name (see `jaxspeed.losses.next_token_loss`).

`inputs` (B, T) int32; optional `targets` (B, T) int32, `mask` (B, T) bool (True = counts in
the loss), `positions` (B, T) int32, `segment_ids` (B, T) int32 (0 = padding).
"""


class Sums(NamedTuple):
    """A loss as a sum and the number of things summed.

    Micro-batches, devices and processes add their sums and divide once, so a mean over tokens
    stays exact whatever the masks and the accumulation are.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]


LossFn = Callable[[Any, Batch], Sums]
"""`(model, batch) -> Sums`: what to minimise. The model is the merged NNX module."""


@runtime_checkable
class CausalLM(Protocol):
    """What the library asks of a decoder: hidden states and the output embedding, apart.

    They are apart so that the loss can take the vocabulary in chunks and never hold logits
    of the whole (B, T, V).
    """

    def hidden(
        self,
        inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the normalised last hidden states."""
        ...

    def output_embedding(self) -> Float[Array, "V D"]:
        """Returns the matrix that turns hidden states into logits."""
        ...
