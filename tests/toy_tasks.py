# SPDX-License-Identifier: Apache-2.0
"""An encoder with a head, and an encoder-decoder, that compile in a moment."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspeed import ops
from jaxspeed.ambient import current
from jaxspeed.nn import param
from tests.toy import NORMAL


ZEROS = jax.nn.initializers.zeros


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Sizes of the encoder and the kind of its head."""

    vocab_size: int = 264
    max_seq_len: int = 64
    d_model: int = 16
    head: Literal["row", "token", "word"] = "row"
    num_labels: int = 2
    labels: tuple[str, ...] = ()
    dropout: float = 0.0

    def build(self, rngs: nnx.Rngs) -> "Labels":
        """Returns a new model."""
        return Labels(self, rngs)


class Labels(nnx.Module):
    """Two tokens' neighbourhood, mixed with the row's mean; then classes, or tokens."""

    def __init__(self, cfg: LabelConfig, rngs: nnx.Rngs) -> None:
        D, C, V = cfg.d_model, cfg.num_labels, cfg.vocab_size
        self.head = cfg.head
        self.embed = param(NORMAL, rngs, (V, D), ("vocab", "embed"))
        self.kind = param(NORMAL, rngs, (2, D), ("vocab", "embed"))
        self.w = param(NORMAL, rngs, (D, D), ("embed", "mlp"))
        self.out = param(NORMAL, rngs, (D, C), ("embed", "mlp"))
        self.bias = param(ZEROS, rngs, (V,), ("vocab",))

    def hidden(
        self,
        inputs: Any,
        positions: Any = None,
        segment_ids: Any = None,
        token_types: Any = None,
    ) -> jax.Array:
        """Returns the last hidden states; each token sees the last two and the mean of its segment."""
        del positions
        x = ops.embed(self.embed[...], inputs)
        if token_types is not None:
            x = x + ops.embed(self.kind[...], token_types)
        segments = jnp.ones_like(inputs) if segment_ids is None else segment_ids
        same = (segments[:, :, None] == segments[:, None, :]).astype(x.dtype)
        mean = jnp.einsum("BTS,BSD->BTD", same, x) / jnp.sum(same, -1, keepdims=True)
        return x + jnp.tanh(ops.linear(mean + jnp.roll(x, 1, 1), self.w[...]))

    def __call__(
        self,
        inputs: Any,
        positions: Any = None,
        segment_ids: Any = None,
        token_types: Any = None,
    ) -> jax.Array:
        """Returns the head's logits."""
        x = self.hidden(inputs, positions, segment_ids, token_types)
        return ops.linear(x[:, 0] if self.head == "row" else x, self.out[...])

    def output_embedding(self) -> jax.Array:
        """Returns the input embedding."""
        return self.embed[...]

    def output_bias(self) -> jax.Array:
        """Returns the bias of the logits."""
        return self.bias[...]


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Sizes of the encoder-decoder; with a `feature_shape` the source is not tokens."""

    vocab_size: int = 264
    max_seq_len: int = 64
    d_model: int = 16
    feature_shape: tuple[int, ...] = ()
    dropout: float = 0.0
    end_id: int = 256
    start_id: int = 257

    def build(self, rngs: nnx.Rngs) -> "Pair":
        """Returns a new model."""
        return Pair(self, rngs)


class Pair(nnx.Module):
    """A decoder of running means that reads the mean of the memory, and its own place in it."""

    def __init__(self, cfg: PairConfig, rngs: nnx.Rngs) -> None:
        D, V = cfg.d_model, cfg.vocab_size
        F = cfg.feature_shape[-1] if cfg.feature_shape else D
        self.embed = param(NORMAL, rngs, (V, D), ("vocab", "embed"))
        self.w_in = param(NORMAL, rngs, (F, D), ("mlp", "embed"))
        self.w = param(NORMAL, rngs, (D, D), ("embed", "mlp"))

    def encode(self, inputs: Any, segment_ids: Any = None) -> jax.Array:
        """Returns the memory."""
        del segment_ids
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            x = ops.embed(self.embed[...], inputs)
        else:
            x = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        return jnp.tanh(ops.linear(x, self.w_in[...]))

    def hidden(
        self,
        decoder_inputs: Any,
        positions: Any = None,
        segment_ids: Any = None,
        *,
        memory: Any,
        memory_segment_ids: Any = None,
    ) -> jax.Array:
        """Returns the last hidden states."""
        del positions

        def segments() -> Any:
            everything = jnp.ones(memory.shape[:2], jnp.int32)
            return everything if memory_segment_ids is None else memory_segment_ids

        known, theirs = ops.remember(lambda: (memory, segments()))
        ours = jnp.ones_like(decoder_inputs) if segment_ids is None else segment_ids
        x = ops.embed(self.embed[...], decoder_inputs)
        x = jnp.where(ours[..., None] > 0, x, 0.0)
        scores = jnp.einsum("BTD,BSD->BTS", x, known)
        seen = ours[:, :, None] == theirs[:, None, :]
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
        read = jnp.einsum("BTS,BSD->BTD", weights, known)
        return x + jnp.tanh(ops.linear(_running_sum(x) + read, self.w[...]))

    def output_embedding(self) -> jax.Array:
        """Returns the input embedding."""
        return self.embed[...]


@dataclass(frozen=True, kw_only=True)
class WriterConfig:
    """Sizes of a decoder that writes."""

    vocab_size: int = 264
    max_seq_len: int = 64
    d_model: int = 16
    dropout: float = 0.0

    def build(self, rngs: nnx.Rngs) -> "Writes":
        """Returns a new model."""
        return Writes(self, rngs)


class Writes(nnx.Module):
    """A decoder of running sums."""

    def __init__(self, cfg: WriterConfig, rngs: nnx.Rngs) -> None:
        D, V = cfg.d_model, cfg.vocab_size
        self.embed = param(NORMAL, rngs, (V, D), ("vocab", "embed"))
        self.w = param(NORMAL, rngs, (D, D), ("embed", "mlp"))

    def hidden(
        self, inputs: Any, positions: Any = None, segment_ids: Any = None
    ) -> jax.Array:
        """Returns the last hidden states."""
        x = ops.embed(self.embed[...], inputs)
        if segment_ids is not None:
            x = jnp.where(segment_ids[..., None] > 0, x, 0.0)
        total = _running_sum(x)
        if positions is not None and current().cache is None:
            # Less the sum before the document.
            before = jnp.arange(x.shape[1])[None] - positions - 1
            start = jnp.take_along_axis(total, jnp.maximum(before, 0)[..., None], 1)
            total = total - jnp.where(before[..., None] >= 0, start, 0.0)
        return x + jnp.tanh(ops.linear(total, self.w[...]))

    def output_embedding(self) -> jax.Array:
        """Returns the input embedding."""
        return self.embed[...]


def _running_sum(x: jax.Array) -> jax.Array:
    """Returns the sum over the tokens so far, which is kept while the model writes."""
    cache = current().cache
    if cache is None:
        return jnp.cumsum(x, 1)
    before = cache.take()
    total = jnp.cumsum(x, 1) + (0.0 if before is None else before)
    cache.keep(total[:, -1:])
    return total
