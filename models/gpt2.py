# SPDX-License-Identifier: Apache-2.0
"""GPT-2 (Radford et al. 2019), as Hugging Face's GPT2LMHeadModel and its other heads.

Learned positions, pre-layer-norm blocks, biases everywhere, tanh GELU, tied embeddings. Differs:
query, key and value are three parameters, not one; dropout is one rate.
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


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a GPT-2."""

    vocab_size: int = 50_257
    """Rows of the embedding (V)."""
    max_seq_len: int = 1024
    """Learned positions."""
    num_layers: int = 12
    """Blocks (L)."""
    num_heads: int = 12
    """Attention heads (N); head_dim is d_model / num_heads."""
    d_model: int = 768
    """Width of the residual stream (D)."""
    d_ff: int = 0
    """Width of the MLP (F); 0 means 4 * d_model."""
    dropout: float = 0.0
    """Share dropped after embedding, attention and MLP."""
    norm_eps: float = 1e-5
    """Added to the variance in layer norms."""
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
    def ff(self) -> int:
        """Width of the MLP (F), resolved."""
        return self.d_ff or 4 * self.d_model

    def build(self, rngs: nnx.Rngs) -> "GPT2":
        """Returns a new model."""
        return GPT2(self, rngs)

    def num_params(self) -> int:
        """Returns the number of parameters."""
        D, F = self.d_model, self.ff
        block = 4 * D * D + 4 * D + 2 * D * F + F + D + 4 * D
        embeddings = (self.vocab_size + self.max_seq_len) * D
        head = num_head_params(self.head, D, self.num_labels)
        return embeddings + self.num_layers * block + 2 * D + head

    def flops_per_token(self, seq_len: int) -> float:
        """Returns model FLOPs of forward and backward for one token, attention counted causally."""
        D, F = self.d_model, self.ff
        matmul = self.num_layers * (4 * D * D + 2 * D * F)
        matmul += self.vocab_size * D * (self.head == "lm")
        return 6.0 * matmul + 6.0 * self.num_layers * seq_len * D


SMALL = Config()
MEDIUM = Config(num_layers=24, num_heads=16, d_model=1024)
LARGE = Config(num_layers=36, num_heads=20, d_model=1280)
XL = Config(num_layers=48, num_heads=25, d_model=1600)

NORMAL = jax.nn.initializers.normal(0.02)
ZEROS = jax.nn.initializers.zeros
ONES = jax.nn.initializers.ones


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.eps = cfg.norm_eps
        self.scale = param(ONES, rngs, (cfg.d_model,), ("embed",))
        self.bias = param(ZEROS, rngs, (cfg.d_model,), ("embed",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns x normalised."""
        return ops.layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


class Attention(nnx.Module):
    """Multi-head causal self-attention."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, N, H = cfg.d_model, cfg.num_heads, cfg.head_dim
        residual = jax.nn.initializers.normal(0.02 / (2 * cfg.num_layers) ** 0.5)
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
    """Two products with a GELU between."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, F = cfg.d_model, cfg.ff
        residual = jax.nn.initializers.normal(0.02 / (2 * cfg.num_layers) ** 0.5)
        self.w_up = param(NORMAL, rngs, (D, F), ("embed", "mlp"))
        self.b_up = param(ZEROS, rngs, (F,), ("mlp",))
        self.w_down = param(residual, rngs, (F, D), ("mlp", "embed"))
        self.b_down = param(ZEROS, rngs, (D,), ("embed",))

    @in_tiles
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns w_down gelu(w_up x), with biases."""
        up = shard(ops.linear(x, self.w_up, self.b_up[...]), "batch", "seq", "mlp")
        return ops.linear(ops.gelu(up), self.w_down, self.b_down[...])


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.dropout = cfg.dropout
        self.attn_norm = LayerNorm(cfg, rngs)
        self.attn = Attention(cfg, rngs)
        self.mlp_norm = LayerNorm(cfg, rngs)
        self.mlp = MLP(cfg, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream after this block."""
        x = x + ops.dropout(
            self.attn(self.attn_norm(x), segment_ids), self.dropout, site=0
        )
        return x + ops.dropout(self.mlp(self.mlp_norm(x)), self.dropout, site=1)


class GPT2(nnx.Module):
    """The decoder. `hidden` and `output_embedding` make it a `jaxspeed.types.CausalLM`."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.dropout = cfg.dropout
        self.embed = param(
            NORMAL, rngs, (cfg.vocab_size, cfg.d_model), ("vocab", "embed")
        )
        self.positions = param(
            jax.nn.initializers.normal(0.01),
            rngs,
            (cfg.max_seq_len, cfg.d_model),
            ("seq", "embed"),
        )
        self.layers = Layers(lambda rngs: Block(cfg, rngs), cfg.num_layers, rngs)
        self.final_norm = LayerNorm(cfg, rngs)
        self.labelled = cfg.head != "lm"
        if self.labelled:
            self.head = OfDecoder(cfg.head, cfg.d_model, cfg.num_labels, rngs)

    def hidden(
        self,
        inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the normalised last hidden states."""
        if positions is None:
            if inputs.shape[1] > (limit := self.positions.shape[0]):
                raise ValueError(
                    f"inputs have {inputs.shape[1]} tokens; the model has {limit} positions; raise model.max_seq_len"
                )
            positions = ops.row_places(inputs.shape)
        x = ops.embed(self.embed, inputs) + ops.embed(self.positions[...], positions)
        x = ops.dropout(x, self.dropout, site=2)
        return self.final_norm(self.layers(x, segment_ids))

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
    ("GPT2LMHeadModel", "lm"),
    ("GPT2Model", "lm"),
    ("GPT2ForSequenceClassification", "classify"),
    ("GPT2ForTokenClassification", "tag"),
    ("GPT2ForTokenClassification", "value"),
]


def _read_config(hf: Mapping[str, Any]) -> Config:
    setting(hf, "activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    setting(hf, "scale_attn_weights", (True,), True)
    setting(hf, "scale_attn_by_inverse_layer_idx", (False,), False)
    setting(hf, "reorder_and_upcast_attn", (False,), False)
    setting(hf, "add_cross_attention", (False,), False)
    setting(hf, "tie_word_embeddings", (True,), True)
    return Config(
        vocab_size=required(hf, "vocab_size"),
        max_seq_len=required(hf, "n_positions"),
        num_layers=required(hf, "n_layer"),
        num_heads=required(hf, "n_head"),
        d_model=required(hf, "n_embd"),
        d_ff=hf.get("n_inner") or 0,
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        **read_decoder_head(hf, _HEADS),
    )


def _write_config(cfg: Config) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.max_seq_len,
        "n_layer": cfg.num_layers,
        "n_head": cfg.num_heads,
        "n_embd": cfg.d_model,
        "n_inner": cfg.d_ff or None,
        "layer_norm_epsilon": cfg.norm_eps,
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
        **write_decoder_head(cfg.head, cfg.num_labels, cfg.labels),
    }


def _rows(cfg: Config) -> list[Row]:
    there, here = "transformer.h.{layer}.", "layers.block."
    qkv = ("q", "k", "v")
    return [
        Row("transformer.wte.weight", "embed"),
        Row("transformer.wpe.weight", "positions"),
        Row(there + "ln_1.weight", here + "attn_norm.scale"),
        Row(there + "ln_1.bias", here + "attn_norm.bias"),
        Row(
            there + "attn.c_attn.weight",
            tuple(f"{here}attn.w{x}" for x in qkv),
            "D (P N H) -> P D N H",
        ),
        Row(
            there + "attn.c_attn.bias",
            tuple(f"{here}attn.b{x}" for x in qkv),
            "(P N H) -> P N H",
        ),
        Row(there + "attn.c_proj.weight", here + "attn.wo", "(N H) D -> N H D"),
        Row(there + "attn.c_proj.bias", here + "attn.bo"),
        Row(there + "ln_2.weight", here + "mlp_norm.scale"),
        Row(there + "ln_2.bias", here + "mlp_norm.bias"),
        Row(there + "mlp.c_fc.weight", here + "mlp.w_up"),
        Row(there + "mlp.c_fc.bias", here + "mlp.b_up"),
        Row(there + "mlp.c_proj.weight", here + "mlp.w_down"),
        Row(there + "mlp.c_proj.bias", here + "mlp.b_down"),
        Row("transformer.ln_f.weight", "final_norm.scale"),
        Row("transformer.ln_f.bias", "final_norm.bias"),
        *decoder_rows(cfg.head, "classifier"),
    ]


EXCHANGE = Exchange(
    architectures={"gpt2": _HEADS},
    read_config=_read_config,
    write_config=_write_config,
    rows=_rows,
    prefix=r"transformer\.",
    ignored=r".*\.attn\.(bias|masked_bias)|(transformer\.)?lm_head\.weight",
    heads=r"(score|classifier)\..*",
)
