# SPDX-License-Identifier: Apache-2.0
"""LSTM and GRU language models: layers of torch.nn.LSTM or torch.nn.GRU between embedding and output.

An embedding, recurrent layers of one width, and an output embedding, its own or the same; where
the embedding is narrower than the layers, a projection to their width and back (arXiv 1611.01462
ties, 1409.2329 drops out between layers only). The state is zero where a document begins. Hugging
Face has no such family; its folders hold the `state_dict` of the torch module that docs/families.md
shows. Differs: nothing is carried from one row of tokens to the next.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspeed import ops
from jaxspeed.hf import Exchange, Heads, Row, required, setting
from jaxspeed.nn import Layers, param
from jaxspeed.types import Parameter
from models.heads import (
    DecoderHead,
    OfDecoder,
    check_labels,
    decoder_rows,
    num_head_params,
    read_decoder_head,
    refuse_text,
    write_decoder_head,
)


GATES = {"lstm": 4, "gru": 3}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a recurrent language model."""

    cell: Literal["lstm", "gru"] = "lstm"
    """Kind of layer."""
    vocab_size: int = 50_257
    """Rows of the embedding (V)."""
    num_layers: int = 2
    """Recurrent layers (L)."""
    d_model: int = 1024
    """Width of their state (D)."""
    d_embed: int = 0
    """Width of the embedding, with a projection to d_model and back where it is another; 0 means d_model."""
    tie_embeddings: bool = False
    """One matrix for input and output embedding."""
    dropout: float = 0.0
    """Share dropped after the embedding and after each layer."""
    head: DecoderHead = "lm"
    """What it gives: logits of the next token, of the row's label, of each token's label, or a value a token."""
    num_labels: int = 2
    """Labels (C) of the heads classify and tag."""
    labels: tuple[str, ...] = ()
    """Their names, if known."""

    def __post_init__(self) -> None:
        """Checks the kind of layer, and the labels."""
        check_labels(self.num_labels, len(self.labels))
        if self.cell not in GATES:
            raise ValueError(f"model.cell={self.cell!r}: give {' or '.join(GATES)}")

    @property
    def embed_width(self) -> int:
        """Width of the embedding, resolved."""
        return self.d_embed or self.d_model

    @property
    def projected(self) -> bool:
        """Whether the embedding has another width than the layers."""
        return self.embed_width != self.d_model

    @property
    def ties(self) -> bool:
        """Whether the input embedding is the output's too."""
        return self.head == "lm" and self.tie_embeddings

    @property
    def unties(self) -> bool:
        """Whether there is an output embedding of its own."""
        return self.head == "lm" and not self.tie_embeddings

    def build(self, rngs: nnx.Rngs) -> "RNN":
        """Returns a new model."""
        return RNN(self, rngs)

    def num_params(self) -> int:
        """Returns the number of parameters."""
        D, P = self.d_model, GATES[self.cell]
        embeddings = (2 if self.unties else 1) * self.vocab_size
        layers = self.num_layers * P * (2 * D * D + 2 * D)
        head = num_head_params(self.head, self.embed_width, self.num_labels)
        return (embeddings + 2 * D * self.projected) * self.embed_width + layers + head

    def flops_per_token(self, seq_len: int) -> float:
        """Returns model FLOPs of forward and backward for one token, whatever the sequence is."""
        D, P = self.d_model, GATES[self.cell]
        outside = self.vocab_size * (self.head == "lm") + 2 * D * self.projected
        return 6.0 * (outside * self.embed_width + self.num_layers * P * 2 * D * D)


ZEROS = jax.nn.initializers.zeros


def scaled(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns numbers whose variance is 1 / (the first dim, which is summed over)."""
    return jax.random.normal(key, shape, dtype) * shape[0] ** -0.5


class Block(nnx.Module):
    """A recurrent layer."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, P = cfg.d_model, GATES[cfg.cell]
        self.cell, self.dropout = cfg.cell, cfg.dropout
        self.w_in = param(scaled, rngs, (D, P, D), ("embed", "gates", "state"))
        self.w_rec = param(scaled, rngs, (D, P, D), ("embed", "gates", "state"))
        self.b_in = param(ZEROS, rngs, (P, D), ("gates", "state"))
        self.b_rec = param(ZEROS, rngs, (P, D), ("gates", "state"))

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """Returns the layer's outputs."""
        h = ops.recurrence(
            self.cell,
            x,
            self.w_in[...],
            self.w_rec[...],
            self.b_in[...],
            self.b_rec[...],
            segment_ids,
        )
        return ops.dropout(h, self.dropout, site=0)


class RNN(nnx.Module):
    """The decoder. `hidden` and `output_embedding` make it a `jaxspeed.types.CausalLM`."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        V, D, E = cfg.vocab_size, cfg.d_model, cfg.embed_width
        self.dropout, self.projected = cfg.dropout, cfg.projected
        self.tied = cfg.ties
        # Outputs begin at about a quarter; with small logits or inputs the first hundred
        # updates would learn how common each token is, and no more.
        out = jax.nn.initializers.normal(4 * E**-0.5)
        table = out if cfg.ties else jax.nn.initializers.normal(1.0)
        self.embed = param(table, rngs, (V, E), ("vocab", "embed"))
        if cfg.projected:
            self.w_enter = param(scaled, rngs, (E, D), ("embed", "embed"))
            self.w_leave = param(scaled, rngs, (D, E), ("embed", "embed"))
        self.layers = Layers(lambda rngs: Block(cfg, rngs), cfg.num_layers, rngs)
        if cfg.unties:
            self.lm_head = param(out, rngs, (V, E), ("vocab", "embed"))
        self.labelled = cfg.head != "lm"
        if self.labelled:
            self.head = OfDecoder(cfg.head, cfg.embed_width, cfg.num_labels, rngs)

    def hidden(
        self,
        inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the last layer's outputs, in the width of the embedding. Positions change nothing."""
        del positions
        x = ops.dropout(ops.embed(self.embed, inputs), self.dropout, site=1)
        if self.projected:
            x = ops.linear(x, self.w_enter)
        x = self.layers(x, segment_ids)
        return ops.linear(x, self.w_leave) if self.projected else x

    def output_embedding(self) -> Parameter:
        """Returns the output embedding."""
        if self.labelled:
            refuse_text(self.head.head)
        return self.embed if self.tied else self.lm_head

    def __call__(
        self,
        inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B ..."]:
        """Returns the head's result; see `Config.head`. Types of texts are not read."""
        del token_types
        hidden = self.hidden(inputs, positions, segment_ids)
        if self.labelled:
            return self.head(hidden, segment_ids)
        return ops.linear(hidden, self.output_embedding().T)


_HEADS: Heads = [
    ("RNNLanguageModel", "lm"),
    ("RNNForSequenceClassification", "classify"),
    ("RNNForTokenClassification", "tag"),
    ("RNNForTokenClassification", "value"),
]


def _read_config(hf: Mapping[str, Any]) -> Config:
    setting(hf, "cell", tuple(GATES))
    width = required(hf, "hidden_size")
    d_embed = hf.get("embedding_size") or width
    return Config(
        cell=hf["cell"],
        vocab_size=required(hf, "vocab_size"),
        num_layers=required(hf, "num_layers"),
        d_model=width,
        d_embed=0 if d_embed == width else d_embed,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        **read_decoder_head(hf, _HEADS),
    )


def _write_config(cfg: Config) -> dict[str, Any]:
    return {
        "model_type": "rnn",
        "cell": cfg.cell,
        "vocab_size": cfg.vocab_size,
        "num_layers": cfg.num_layers,
        "hidden_size": cfg.d_model,
        "embedding_size": cfg.embed_width,
        "tie_word_embeddings": cfg.tie_embeddings,
        "dropout": cfg.dropout,
        **write_decoder_head(cfg.head, cfg.num_labels, cfg.labels),
    }


def _rows(cfg: Config) -> list[Row]:
    rows = [Row("embed.weight", "embed")]
    for theirs, ours in (("ih", "in"), ("hh", "rec")):
        rows += [
            Row(
                f"rnn.weight_{theirs}_l{{layer}}",
                f"layers.block.w_{ours}",
                "(P F) D -> D P F",
            ),
            Row(
                f"rnn.bias_{theirs}_l{{layer}}",
                f"layers.block.b_{ours}",
                "(P F) -> P F",
            ),
        ]
    if cfg.projected:
        rows += [
            Row("enter.weight", "w_enter", "D E -> E D"),
            Row("leave.weight", "w_leave", "E D -> D E"),
        ]
    if cfg.unties:
        rows.append(Row("head.weight", "lm_head"))
    return rows + decoder_rows(cfg.head, "score")


EXCHANGE = Exchange(
    architectures={"rnn": _HEADS},
    read_config=_read_config,
    write_config=_write_config,
    rows=_rows,
    heads=r"(head|score)\..*",
)
