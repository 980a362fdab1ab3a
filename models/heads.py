# SPDX-License-Identifier: Apache-2.0
"""Heads, which several families share: from hidden states to labels, values, or tokens in their place.

Not a family: a family says which it has (`head` of its Config), and what Hugging Face calls their
parameters.
"""

from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspeed import ops
from jaxspeed.config import ConfigError
from jaxspeed.hf import Heads, Row, head_of, read_labels, write_labels
from jaxspeed.nn import param


DecoderHead = Literal["lm", "classify", "tag", "value"]
"""What a decoder gives: logits of the next token (B, T, V), of the row's label (B, C) from its last
token, of each token's label (B, T, C), or one number a token (B, T)."""

NORMAL = jax.nn.initializers.normal(0.02)
ZEROS = jax.nn.initializers.zeros
ONES = jax.nn.initializers.ones


class Labels(nnx.Module):
    """Logits of the labels, one product."""

    def __init__(
        self, d_model: int, num_labels: int, rngs: nnx.Rngs, *, bias: bool = True
    ) -> None:
        self.biased = bias
        self.w = param(NORMAL, rngs, (d_model, num_labels), ("embed", "labels"))
        if bias:
            self.b = param(ZEROS, rngs, (num_labels,), ("labels",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B C"]:
        """Returns w x, with a bias if it has one."""
        return ops.linear(x, self.w, self.b[...] if self.biased else None)


class Dense(nnx.Module):
    """A product with a bias that keeps the width."""

    def __init__(self, d_model: int, rngs: nnx.Rngs) -> None:
        self.w = param(NORMAL, rngs, (d_model, d_model), ("embed", "embed"))
        self.b = param(ZEROS, rngs, (d_model,), ("embed",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns w x + b."""
        return ops.linear(x, self.w, self.b[...])


class MaskedTokens(nnx.Module):
    """What precedes the output embedding of a masked language model, and the bias of its logits.

    Reference: BERT's code (arXiv 1810.04805): a dense layer, GELU, layer norm.
    """

    def __init__(
        self, d_model: int, vocab_size: int, rngs: nnx.Rngs, *, eps: float
    ) -> None:
        self.eps = eps
        self.dense = Dense(d_model, rngs)
        self.scale = param(ONES, rngs, (d_model,), ("embed",))
        self.bias = param(ZEROS, rngs, (d_model,), ("embed",))
        self.b_vocab = param(ZEROS, rngs, (vocab_size,), ("vocab",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns norm(gelu(dense(x)))."""
        x = jax.nn.gelu(self.dense(x), approximate=False)
        return ops.layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


class OfDecoder(nnx.Module):
    """A decoder's labels or values; see `DecoderHead`."""

    def __init__(
        self, head: DecoderHead, d_model: int, num_labels: int, rngs: nnx.Rngs
    ) -> None:
        self.head = head
        count = 1 if head == "value" else num_labels
        self.labels = Labels(d_model, count, rngs, bias=head != "classify")

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None
    ) -> Float[Array, "B ..."]:
        """Returns the head's result from the last hidden states."""
        if self.head == "classify":
            return self.labels(last_token(x, segment_ids))
        labels = self.labels(x)
        return labels[..., 0] if self.head == "value" else labels


def last_token(
    x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None
) -> Float[Array, "B D"]:
    """Returns each row at its last token that is not padding."""
    ops.need_whole("a label of the row")
    if segment_ids is None:
        return x[:, -1]
    places = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    last = jnp.max(jnp.where(segment_ids > 0, places, 0), axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def refuse_text(head: str) -> NoReturn:
    """Raises for a model that was asked for text, which needs the logits of tokens.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"model.head={head}: the model gives that, not text; take one whose head is a language model"
    )


def check_labels(num_labels: int, labels: int) -> None:
    """Raises if the number of labels is none, or not that of their names.

    Raises:
        ValueError: it is so.
    """
    if num_labels < 1:
        raise ValueError(f"model.num_labels={num_labels}: give 1 or more")
    if labels and labels != num_labels:
        raise ValueError(
            f"model.labels names {labels} labels, model.num_labels is {num_labels}; give as many"
        )


def num_head_params(head: DecoderHead, d_model: int, num_labels: int) -> int:
    """Returns the parameters of a decoder's labels or values."""
    width = {"lm": 0, "classify": d_model, "tag": d_model + 1, "value": d_model + 1}
    return width[head] * (1 if head == "value" else num_labels)


def decoder_rows(head: DecoderHead, tags: str) -> list[Row]:
    """Returns the table of a decoder's labels or values, "score" or, of tokens, what `tags` says."""
    if head == "lm":
        return []
    if head == "classify":
        return [Row("score.weight", "head.labels.w", "C D -> D C")]
    return [
        Row(f"{tags}.weight", "head.labels.w", "C D -> D C"),
        Row(f"{tags}.bias", "head.labels.b"),
    ]


def read_decoder_head(hf: Mapping[str, Any], heads: Heads) -> dict[str, Any]:
    """Returns `head`, `num_labels` and `labels` of a decoder's Config.

    A value is stored as the labels of tokens, of which there is one.
    """
    head, labels = head_of(hf, heads), read_labels(hf)
    if head == "tag" and labels["num_labels"] == 1:
        head = "value"
    return {"head": head} | (labels if head in ("classify", "tag") else {})


def write_decoder_head(
    head: DecoderHead, num_labels: int, labels: tuple[str, ...]
) -> dict[str, Any]:
    """Returns the settings of config.json for a decoder's head."""
    if head == "lm":
        return {}
    return write_labels(1, ()) if head == "value" else write_labels(num_labels, labels)
