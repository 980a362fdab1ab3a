# SPDX-License-Identifier: Apache-2.0
"""OPT (arXiv 2205.01068), as Hugging Face's OPTForCausalLM and OPTForSequenceClassification.

Learned positions, biases everywhere, ReLU, tied embeddings; norms before attention and MLP, or
after them and an embedding narrower than the blocks (350M). Differs: dropout is one rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspeed import ops
from jaxspeed.hf import Exchange, Heads, Row, required, setting
from jaxspeed.nn import Layers, in_tiles, param
from jaxspeed.sharding import shard
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


RESERVED_POSITIONS = 2
"""Rows of the table of positions before the first: fairseq's, for padding."""

NORM_EPS = 1e-5
"""Added to the variance in layer norms."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of an OPT."""

    vocab_size: int = 50_272
    """Rows of the embedding (V)."""
    max_seq_len: int = 2048
    """Learned positions."""
    num_layers: int = 12
    """Blocks (L)."""
    num_heads: int = 12
    """Attention heads (N); head_dim is d_model / num_heads."""
    d_model: int = 768
    """Width of the residual stream (D)."""
    d_ff: int = 3072
    """Width of the MLP (F)."""
    d_embed: int = 0
    """Width of the embedding, with a projection to d_model and back where it is another; 0 means d_model."""
    norm_first: bool = True
    """Norms before attention and MLP, and after the last block; False: after attention and MLP."""
    dropout: float = 0.0
    """Share dropped after attention and MLP."""
    head: DecoderHead = "lm"
    """What it gives: logits of the next token, of the row's label, of each token's label, or a value a token."""
    num_labels: int = 2
    """Labels (C) of the heads classify and tag."""
    labels: tuple[str, ...] = ()
    """Their names, if known."""

    def __post_init__(self) -> None:
        """Checks that heads divide the width, and the labels."""
        check_labels(self.num_labels, len(self.labels))
        if self.num_heads < 1:
            raise ValueError(f"model.num_heads={self.num_heads}: give 1 or more")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.d_model={self.d_model} does not divide by model.num_heads={self.num_heads}; "
                f"nearest legal: {self.d_model // self.num_heads * self.num_heads or self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head (H)."""
        return self.d_model // self.num_heads

    @property
    def embed_width(self) -> int:
        """Width of the embedding, resolved."""
        return self.d_embed or self.d_model

    @property
    def projected(self) -> bool:
        """Whether the embedding has another width than the blocks."""
        return self.embed_width != self.d_model

    def build(self, rngs: nnx.Rngs) -> "OPT":
        """Returns a new model."""
        return OPT(self, rngs)

    def num_params(self) -> int:
        """Returns the number of parameters."""
        D, F = self.d_model, self.d_ff
        block = 4 * D * D + 4 * D + 2 * D * F + F + D + 4 * D
        tables = (
            self.vocab_size * self.embed_width
            + (self.max_seq_len + RESERVED_POSITIONS) * D
        )
        projections = 2 * D * self.embed_width * self.projected
        head = num_head_params(self.head, self.embed_width, self.num_labels)
        layers = self.num_layers * block + 2 * D * self.norm_first
        return tables + projections + layers + head

    def flops_per_token(self, seq_len: int) -> float:
        """Returns model FLOPs of forward and backward for one token, attention counted causally."""
        D, F = self.d_model, self.d_ff
        matmul = self.num_layers * (4 * D * D + 2 * D * F)
        matmul += self.vocab_size * self.embed_width * (self.head == "lm")
        matmul += 2 * D * self.embed_width * self.projected
        return 6.0 * matmul + 6.0 * self.num_layers * seq_len * D


OPT_125M = Config()
OPT_350M = Config(
    num_layers=24, num_heads=16, d_model=1024, d_ff=4096, d_embed=512, norm_first=False
)
OPT_1_3B = Config(num_layers=24, num_heads=32, d_model=2048, d_ff=8192)
OPT_6_7B = Config(num_layers=32, num_heads=32, d_model=4096, d_ff=16_384)

NORMAL = jax.nn.initializers.normal(0.006)
ZEROS = jax.nn.initializers.zeros
ONES = jax.nn.initializers.ones


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.scale = param(ONES, rngs, (cfg.d_model,), ("embed",))
        self.bias = param(ZEROS, rngs, (cfg.d_model,), ("embed",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns x normalised."""
        return ops.layer_norm(x, self.scale[...], self.bias[...], eps=NORM_EPS)


class Attention(nnx.Module):
    """Multi-head causal self-attention."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, N, H = cfg.d_model, cfg.num_heads, cfg.head_dim
        residual = jax.nn.initializers.normal(0.006 / (2 * cfg.num_layers) ** 0.5)
        self.wq = param(NORMAL, rngs, (D, N, H), ("embed", "heads", "head_dim"))
        self.wk = param(NORMAL, rngs, (D, N, H), ("embed", "heads", "head_dim"))
        self.wv = param(NORMAL, rngs, (D, N, H), ("embed", "heads", "head_dim"))
        self.wo = param(residual, rngs, (N, H, D), ("heads", "head_dim", "embed"))
        self.bq = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bk = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bv = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bo = param(ZEROS, rngs, (D,), ("embed",))

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """Returns what each position gathers from the earlier ones of its document."""
        heads = ("batch", "seq", "heads", "head_dim")
        q, k, v = ops.linears(
            x,
            (self.wq, self.wk, self.wv),
            (self.bq[...], self.bk[...], self.bv[...]),
        )
        attended = shard(ops.attention(q, k, v, segment_ids), *heads)
        return ops.linear(attended, self.wo, self.bo[...], contract=2)


class MLP(nnx.Module):
    """Two products with a ReLU between."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, F = cfg.d_model, cfg.d_ff
        residual = jax.nn.initializers.normal(0.006 / (2 * cfg.num_layers) ** 0.5)
        self.w_up = param(NORMAL, rngs, (D, F), ("embed", "mlp"))
        self.b_up = param(ZEROS, rngs, (F,), ("mlp",))
        self.w_down = param(residual, rngs, (F, D), ("mlp", "embed"))
        self.b_down = param(ZEROS, rngs, (D,), ("embed",))

    @in_tiles
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns w_down relu(w_up x), with biases."""
        up = shard(ops.linear(x, self.w_up, self.b_up[...]), "batch", "seq", "mlp")
        return ops.linear(jax.nn.relu(up), self.w_down, self.b_down[...])


class Block(nnx.Module):
    """Attention and MLP, each around a residual, with a norm before it or behind."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.dropout, self.norm_first = cfg.dropout, cfg.norm_first
        self.attn_norm = LayerNorm(cfg, rngs)
        self.attn = Attention(cfg, rngs)
        self.mlp_norm = LayerNorm(cfg, rngs)
        self.mlp = MLP(cfg, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream after this block."""
        attn = self.attn(self.attn_norm(x) if self.norm_first else x, segment_ids)
        x = x + ops.dropout(attn, self.dropout, site=0)
        x = x if self.norm_first else self.attn_norm(x)
        mlp = self.mlp(self.mlp_norm(x) if self.norm_first else x)
        x = x + ops.dropout(mlp, self.dropout, site=1)
        return x if self.norm_first else self.mlp_norm(x)


class OPT(nnx.Module):
    """The decoder. `hidden` and `output_embedding` make it a `jaxspeed.types.CausalLM`."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, E = cfg.d_model, cfg.embed_width
        self.projected, self.norm_first = cfg.projected, cfg.norm_first
        self.embed = param(NORMAL, rngs, (cfg.vocab_size, E), ("vocab", "embed"))
        rows = cfg.max_seq_len + RESERVED_POSITIONS
        self.positions = param(NORMAL, rngs, (rows, D), ("seq", "embed"))
        if cfg.projected:
            self.w_enter = param(NORMAL, rngs, (E, D), ("embed", "embed"))
            self.w_leave = param(NORMAL, rngs, (D, E), ("embed", "embed"))
        self.layers = Layers(lambda rngs: Block(cfg, rngs), cfg.num_layers, rngs)
        if cfg.norm_first:
            self.final_norm = LayerNorm(cfg, rngs)
        self.labelled = cfg.head != "lm"
        if self.labelled:
            self.head = OfDecoder(cfg.head, cfg.embed_width, cfg.num_labels, rngs)

    def hidden(
        self,
        inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the last hidden states, normalised, in the width of the embedding."""
        if positions is None:
            limit = self.positions.shape[0] - RESERVED_POSITIONS
            if inputs.shape[1] > limit:
                raise ValueError(
                    f"inputs have {inputs.shape[1]} tokens; the model has {limit} positions; raise model.max_seq_len"
                )
            positions = ops.row_places(inputs.shape)
        x = ops.embed(self.embed, inputs)
        if self.projected:
            x = ops.linear(x, self.w_enter)
        x = x + ops.embed(self.positions, positions + RESERVED_POSITIONS)
        x = self.layers(x, segment_ids)
        x = self.final_norm(x) if self.norm_first else x
        return ops.linear(x, self.w_leave) if self.projected else x

    def output_embedding(self) -> Parameter:
        """Returns the input embedding: it is tied."""
        if self.labelled:
            refuse_text(self.head.head)
        return self.embed

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
    ("OPTForCausalLM", "lm"),
    ("OPTModel", "lm"),
    ("OPTForSequenceClassification", "classify"),
    # Which transformers does not have.
    ("OPTForTokenClassification", "tag"),
    ("OPTForTokenClassification", "value"),
]


def _read_config(hf: Mapping[str, Any]) -> Config:
    setting(hf, "activation_function", ("relu",), "relu")
    setting(hf, "enable_bias", (True,), True)
    setting(hf, "layer_norm_elementwise_affine", (True,), True)
    setting(hf, "_remove_final_layer_norm", (False,), False)
    setting(hf, "tie_word_embeddings", (True,), True)
    width = required(hf, "hidden_size")
    d_embed = hf.get("word_embed_proj_dim") or width
    return Config(
        vocab_size=required(hf, "vocab_size"),
        max_seq_len=required(hf, "max_position_embeddings"),
        num_layers=required(hf, "num_hidden_layers"),
        num_heads=required(hf, "num_attention_heads"),
        d_model=width,
        d_ff=required(hf, "ffn_dim"),
        d_embed=0 if d_embed == width else d_embed,
        norm_first=hf.get("do_layer_norm_before", True),
        **read_decoder_head(hf, _HEADS),
    )


def _write_config(cfg: Config) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "activation_function": "relu",
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_seq_len,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "hidden_size": cfg.d_model,
        "ffn_dim": cfg.d_ff,
        "word_embed_proj_dim": cfg.embed_width,
        "do_layer_norm_before": cfg.norm_first,
        "dropout": cfg.dropout,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        **write_decoder_head(cfg.head, cfg.num_labels, cfg.labels),
    }


def _rows(cfg: Config) -> list[Row]:
    root = "model.decoder."
    there, here = root + "layers.{layer}.", "layers.block."
    rows = [
        Row(root + "embed_tokens.weight", "embed"),
        Row(root + "embed_positions.weight", "positions"),
    ]
    for x in "qkv":
        rows += [
            Row(
                f"{there}self_attn.{x}_proj.weight",
                f"{here}attn.w{x}",
                "(N H) D -> D N H",
            ),
            Row(f"{there}self_attn.{x}_proj.bias", f"{here}attn.b{x}", "(N H) -> N H"),
        ]
    rows += [
        Row(there + "self_attn.out_proj.weight", here + "attn.wo", "D (N H) -> N H D"),
        Row(there + "self_attn.out_proj.bias", here + "attn.bo"),
        Row(there + "fc1.weight", here + "mlp.w_up", "F D -> D F"),
        Row(there + "fc1.bias", here + "mlp.b_up"),
        Row(there + "fc2.weight", here + "mlp.w_down", "D F -> F D"),
        Row(there + "fc2.bias", here + "mlp.b_down"),
    ]
    norms = [
        (there + "self_attn_layer_norm", here + "attn_norm"),
        (there + "final_layer_norm", here + "mlp_norm"),
    ]
    if cfg.norm_first:
        norms.append((root + "final_layer_norm", "final_norm"))
    for theirs, ours in norms:
        rows += [
            Row(theirs + ".weight", ours + ".scale"),
            Row(theirs + ".bias", ours + ".bias"),
        ]
    if cfg.projected:
        rows += [
            Row(root + "project_in.weight", "w_enter", "D E -> E D"),
            Row(root + "project_out.weight", "w_leave", "E D -> D E"),
        ]
    return rows + decoder_rows(cfg.head, "score")


EXCHANGE = Exchange(
    architectures={"opt": _HEADS},
    read_config=_read_config,
    write_config=_write_config,
    rows=_rows,
    prefix=r"model\.",
    ignored=r"(model\.)?lm_head\.weight",
    heads=r"score\..*",
)
