# SPDX-License-Identifier: Apache-2.0
"""The few types that every layer shares. Layer 0: standard library, jax and jaxtyping."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int


class TrainingError(RuntimeError):
    """Training cannot go on: one line with step, cause and what to change. What was saved stays."""


Parameter = Any
"""A model's parameter as `jaxspeed.nn.param` makes it, by whose `dims` it is known what a mesh axis splits; an array; or what stands in its place (`jaxspeed.sharding.Adapted`, `jaxspeed.tiles.Tiled`)."""

PyTree = Any
"""Any nest of dicts, tuples and dataclasses with arrays at the leaves."""

Params = Mapping[str, Any]
"""Parameters past `jaxspeed.nn.split`: a nested dict of arrays."""

Batch = Mapping[str, jax.Array]
"""Arrays by name, a row of each for each example; each loss of `jaxspeed.losses` says which it reads.

    inputs          (B, S) int32 tokens; or (B, S, M) float32 sound, (B, H, W, C) float32 pixels
    segment_ids     (B, S) int32: document of each token in the row; 0 is padding
    positions       (B, S) int32: place in the document
    token_types     (B, S) int32: which of two texts (BERT's token_type_ids)
    targets         (B, T) int32: tokens to predict
    mask            (B, T) bool: which of them, or of the labels, count
    slots           (B, T) int32: where in the row the targets of a masked model stand
    decoder_inputs, decoder_segment_ids, decoder_positions     (B, T) int32
    labels          (B,) int32, -1 for a row that does not count; or (B, S) with a mask
    starts, ends    (B,) int32: first and last token of an answer; -1 for a row that does not count
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

    def output_embedding(self) -> Parameter:
        """Returns the matrix that turns hidden states into logits."""
        ...


@runtime_checkable
class BiasedOutput(Protocol):
    """What a decoder may have besides: a bias of its logits."""

    def output_bias(self) -> Float[Array, " V"]:
        """Returns what is added to the logits."""
        ...


def output_bias(model: Any) -> Float[Array, " V"] | None:
    """Returns what is added to a decoder's logits; None: nothing."""
    return model.output_bias() if isinstance(model, BiasedOutput) else None


@runtime_checkable
class MaskedLM(Protocol):
    """What the library asks of an encoder that predicts tokens where they stand (BERT)."""

    def hidden(
        self,
        inputs: Int[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        token_types: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Returns what the output embedding turns into logits: the head's transform is done."""
        ...

    def output_embedding(self) -> Parameter:
        """Returns the matrix that turns hidden states into logits."""
        ...

    def output_bias(self) -> Float[Array, " V"] | None:
        """Returns what is added to the logits."""
        ...


@runtime_checkable
class Labeller(Protocol):
    """What the library asks of an encoder with a head of labels.

    The head decides the result: logits (B, C) of the row's class, (B, S, C) of each token's
    class, or (B, S, 2) of each token as an answer's first and last one. Its Config states the
    number of classes as `num_labels` and their names, if known, as `labels`.
    """

    def __call__(
        self,
        inputs: Array,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        token_types: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B ..."]:
        """Returns the head's logits; padding (segment 0) does not change those of other tokens."""
        ...


@runtime_checkable
class Seq2Seq(Protocol):
    """What the library asks of an encoder-decoder: memory of a source, and a decoder that reads it.

    The source may be tokens, sound or pixels; where it is not tokens, the Config states the shape
    of one row as `feature_shape`. A decoder position reads the memory of its own segment.
    """

    def encode(
        self, inputs: Array, segment_ids: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        """Returns the encoder's last hidden states, normalised."""
        ...

    def hidden(
        self,
        decoder_inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        memory: Float[Array, "B S D"] | None,
        memory_segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the decoder's last hidden states, normalised and scaled for the output embedding.

        While it writes (`jaxspeed.cache`), memory is given at the first pass only.
        """
        ...

    def output_embedding(self) -> Parameter:
        """Returns the matrix that turns hidden states into logits."""
        ...
