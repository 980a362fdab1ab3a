# SPDX-License-Identifier: Apache-2.0
"""T5 (arXiv 1910.10683), as Hugging Face's T5ForConditionalGeneration: an encoder and a decoder of text.

RMS norm before each part, no biases, unscaled scores with a bias by relative position that all
layers of a stack share. By configuration v1.0 (ReLU, tied embeddings) and v1.1 with FLAN-T5, ByT5
and mT5 (2002.05202: gated GELU, an output embedding of its own). Differs: dropout is one rate and
spares the attention weights; an output embedding of its own begins as small as a tied one acts
(as in the published code; Hugging Face begins it sqrt(d_model) larger).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspeed import ops
from jaxspeed.hf import Exchange, Row, required, setting
from jaxspeed.nn import Layers, in_tiles, param
from jaxspeed.sharding import shard
from jaxspeed.types import Parameter


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a T5, and its special tokens."""

    vocab_size: int = 32_128
    """Rows of the embedding (V)."""
    num_layers: int = 6
    """Blocks of the encoder (L)."""
    num_decoder_layers: int = 6
    """Blocks of the decoder."""
    num_heads: int = 8
    """Attention heads (N)."""
    d_model: int = 512
    """Width of the residual stream (D)."""
    head_dim: int = 64
    """Width of one head (H)."""
    d_ff: int = 2048
    """Width of the MLP (F)."""
    gated: bool = False
    """The MLP is a gated GELU, as in v1.1; else a ReLU."""
    num_buckets: int = 32
    """Relative positions that are told apart, in the encoder half of them on either side."""
    max_distance: int = 128
    """Distance from which on all positions are one bucket."""
    norm_eps: float = 1e-6
    """Added to the mean square in norms."""
    tie_embeddings: bool = True
    """One matrix for input and output embedding, as in v1.0."""
    dropout: float = 0.0
    """Share dropped after embedding, attention, both products of the MLP and the last norms."""
    pad_id: int = 0
    """Fills rows."""
    end_id: int = 1
    """Ends a text."""
    start_id: int = 0
    """The decoder's first input."""

    def __post_init__(self) -> None:
        """Checks that there are heads, and buckets to tell positions apart by."""
        if self.num_heads < 1:
            raise ValueError(f"model.num_heads={self.num_heads}: give 1 or more")
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise ValueError(
                f"model.num_buckets={self.num_buckets}: half of them are on either side, and half of those exact; give a multiple of 4"
            )
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"model.max_distance={self.max_distance}: {self.num_buckets // 2} distances have a bucket each; give more than those"
            )

    def build(self, rngs: nnx.Rngs) -> "T5":
        """Returns a new model."""
        return T5(self, rngs)

    def num_params(self) -> int:
        """Returns the number of parameters."""
        D, E, L = self.d_model, self.num_layers, self.num_decoder_layers
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * D
        scales = (2 * E + 1 + 3 * L + 1) * D
        tables = 2 * self.num_buckets * self.num_heads
        return embeddings + self._matrices() + scales + tables

    def flops_per_token(self, seq_len: int) -> float:
        """Returns model FLOPs of forward and backward for a token of the source and one of the target.

        Both are `seq_len` long; the decoder's attention to itself is counted causally.
        """
        matmul = self._matrices() + self.vocab_size * self.d_model
        heads = self.num_heads * self.head_dim
        halves = 2 * self.num_layers + 3 * self.num_decoder_layers
        return 6.0 * matmul + 6.0 * halves * seq_len * heads

    def _matrices(self) -> int:
        """Returns the number of weights of all layers that a pair of tokens is multiplied by."""
        attention = 4 * self.num_heads * self.head_dim
        mlp = (3 if self.gated else 2) * self.d_ff
        encoder = self.num_layers * (attention + mlp)
        decoder = self.num_decoder_layers * (2 * attention + mlp)
        return self.d_model * (encoder + decoder)


SMALL = Config()
BASE = Config(
    num_layers=12, num_decoder_layers=12, num_heads=12, d_model=768, d_ff=3072
)
FLAN_SMALL = Config(
    num_layers=8,
    num_decoder_layers=8,
    num_heads=6,
    d_ff=1024,
    gated=True,
    tie_embeddings=False,
)

ONES = jax.nn.initializers.ones


def normal(variance: float) -> jax.nn.initializers.Initializer:
    """Returns the initialiser of this variance."""
    return jax.nn.initializers.normal(variance**0.5)


class RMSNorm(nnx.Module):
    """RMS norm with scale."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.eps = cfg.norm_eps
        self.scale = param(ONES, rngs, (cfg.d_model,), ("embed",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns x normalised."""
        return ops.rms_norm(x, self.scale[...], eps=self.eps)


def relative_bias(
    table: Float[Array, "P N"],
    distances: Int[Array, "T S"],
    *,
    bidirectional: bool,
    max_distance: int,
) -> Float[Array, "N T S"]:
    """Returns what each head adds to the score of a key at each distance from its query.

    Half of the buckets hold one distance each, the others hold ranges that grow geometrically up
    to `max_distance`. Reference: section 2.1; the buckets are those of the published code.

    Args:
        table: a value per bucket and head.
        distances: key - query.
        bidirectional: half of the buckets are for keys after the query; else those share bucket 0.
        max_distance: from which on all are in the last bucket.
    """
    buckets = table.shape[0] // 2 if bidirectional else table.shape[0]
    exact = buckets // 2
    growth = (max_distance / exact) ** (1 / (buckets - exact))
    # Bucket k holds what is at least edge k: no rounding of logarithms decides.
    ranges = [math.ceil(exact * growth**k - 1e-6) for k in range(buckets - exact)]
    edges = jnp.asarray([*range(1, exact), *ranges], jnp.int32)
    away = jnp.abs(distances) if bidirectional else jnp.maximum(-distances, 0)
    bucket = jnp.searchsorted(edges, away, side="right", method="compare_all")
    if bidirectional:
        bucket = jnp.where(distances > 0, bucket + buckets, bucket)
    # As a product: the gradient of a lookup would add up T x S rows one by one.
    chosen = jax.nn.one_hot(bucket, table.shape[0], dtype=jnp.float32)
    bias = jnp.einsum("TSP,PN->NTS", chosen, table)
    return shard(bias, "heads", None, None)


class Attention(nnx.Module):
    """Multi-head attention without scaling, of a sequence to itself or to another one."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, N, H = cfg.d_model, cfg.num_heads, cfg.head_dim
        heads = ("embed", "heads", "head_dim")
        self.max_distance = cfg.max_distance
        self.wq = param(normal(1 / (D * H)), rngs, (D, N, H), heads)
        self.wk = param(normal(1 / D), rngs, (D, N, H), heads)
        self.wv = param(normal(1 / D), rngs, (D, N, H), heads)
        self.wo = param(
            normal(1 / (N * H)), rngs, (N, H, D), ("heads", "head_dim", "embed")
        )

    def within(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        table: Float[Array, "P N"],
        *,
        causal: bool,
    ) -> Float[Array, "B T D"]:
        """Returns what each position gathers from its document, from earlier positions only if causal."""

        def bias(distances: Int[Array, "T S"]) -> Float[Array, "N T S"]:
            return relative_bias(
                table,
                distances,
                bidirectional=not causal,
                max_distance=self.max_distance,
            )

        q, k, v = ops.linears(x, (self.wq, self.wk, self.wv))
        attended = ops.attention(
            q, k, v, segment_ids, causal=causal, bias=bias, scale=1.0
        )
        return self._out(attended)

    def across(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        memory: Float[Array, "B S D"] | None,
        memory_segment_ids: Int[Array, "B S"] | None,
    ) -> Float[Array, "B T D"]:
        """Returns what each position gathers from its document in the memory."""
        (q,) = ops.linears(x, (self.wq,))
        k, v = ops.remember(lambda: self._keys_and_values(memory))
        if memory_segment_ids is None:
            memory_segment_ids = jnp.ones(k.shape[:2], jnp.int32)
        attended = ops.attention(
            q,
            k,
            v,
            segment_ids,
            key_segment_ids=memory_segment_ids,
            causal=False,
            scale=1.0,
        )
        return self._out(attended)

    def _keys_and_values(self, x: Float[Array, "B S D"] | None) -> tuple[Array, ...]:
        assert x is not None, "memory is read at the first pass"
        return ops.linears(x, (self.wk, self.wv))

    def _out(self, attended: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        attended = shard(attended, "batch", "seq", "heads", "head_dim")
        return ops.linear(attended, self.wo, contract=2)


class MLP(nnx.Module):
    """Two products with a ReLU between, or a gated GELU."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, F = cfg.d_model, cfg.d_ff
        self.dropout, self.gated = cfg.dropout, cfg.gated
        if cfg.gated:
            self.w_gate = param(normal(1 / D), rngs, (D, F), ("embed", "mlp"))
        self.w_up = param(normal(1 / D), rngs, (D, F), ("embed", "mlp"))
        self.w_down = param(normal(1 / F), rngs, (F, D), ("mlp", "embed"))

    @in_tiles
    def __call__(self, x: Float[Array, "B T D"], *, site: int) -> Float[Array, "B T D"]:
        """Returns w_down(relu(w_up x)), or w_down(gelu(w_gate x) * w_up x)."""
        if self.gated:
            gate, up = ops.linears(x, (self.w_gate, self.w_up))
            inner = ops.gelu(gate) * up
        else:
            inner = jax.nn.relu(ops.linear(x, self.w_up))
        inner = ops.dropout(shard(inner, "batch", "seq", "mlp"), self.dropout, site)
        return ops.linear(inner, self.w_down)


class EncoderBlock(nnx.Module):
    """Attention to the whole document and MLP, each behind a norm and around a residual."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.dropout = cfg.dropout
        self.attn_norm = RMSNorm(cfg, rngs)
        self.attn = Attention(cfg, rngs)
        self.mlp_norm = RMSNorm(cfg, rngs)
        self.mlp = MLP(cfg, rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        table: Float[Array, "P N"],
        segment_ids: Int[Array, "B S"] | None,
    ) -> Float[Array, "B S D"]:
        """Returns the residual stream after this block."""
        y = self.attn.within(self.attn_norm(x), segment_ids, table, causal=False)
        x = x + ops.dropout(y, self.dropout, site=0)
        return x + ops.dropout(self.mlp(self.mlp_norm(x), site=1), self.dropout, site=2)


class DecoderBlock(nnx.Module):
    """Causal attention, attention to the memory and MLP, each behind a norm and around a residual."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.dropout = cfg.dropout
        self.attn_norm = RMSNorm(cfg, rngs)
        self.attn = Attention(cfg, rngs)
        self.cross_norm = RMSNorm(cfg, rngs)
        self.cross = Attention(cfg, rngs)
        self.mlp_norm = RMSNorm(cfg, rngs)
        self.mlp = MLP(cfg, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        table: Float[Array, "P N"],
        segment_ids: Int[Array, "B T"] | None,
        memory: Float[Array, "B S D"] | None,
        memory_segment_ids: Int[Array, "B S"] | None,
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream after this block."""
        y = self.attn.within(self.attn_norm(x), segment_ids, table, causal=True)
        x = x + ops.dropout(y, self.dropout, site=3)
        y = self.cross.across(
            self.cross_norm(x), segment_ids, memory, memory_segment_ids
        )
        x = x + ops.dropout(y, self.dropout, site=4)
        return x + ops.dropout(self.mlp(self.mlp_norm(x), site=5), self.dropout, site=6)


class T5(nnx.Module):
    """The encoder-decoder, a `jaxspeed.types.Seq2Seq`."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, V, P, N = cfg.d_model, cfg.vocab_size, cfg.num_buckets, cfg.num_heads
        self.tied, self.dropout = cfg.tie_embeddings, cfg.dropout
        self.embed = param(normal(1.0), rngs, (V, D), ("vocab", "embed"))
        self.encoder_bias = param(normal(1 / D), rngs, (P, N), ("seq", "heads"))
        self.encoder = Layers(
            lambda rngs: EncoderBlock(cfg, rngs), cfg.num_layers, rngs
        )
        self.encoder_norm = RMSNorm(cfg, rngs)
        self.decoder_bias = param(normal(1 / D), rngs, (P, N), ("seq", "heads"))
        self.decoder = Layers(
            lambda rngs: DecoderBlock(cfg, rngs), cfg.num_decoder_layers, rngs
        )
        self.decoder_norm = RMSNorm(cfg, rngs)
        if not cfg.tie_embeddings:
            self.lm_head = param(normal(1 / D), rngs, (V, D), ("vocab", "embed"))

    def encode(
        self, inputs: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        """Returns the memory: the encoder's normalised last hidden states."""
        x = ops.dropout(ops.embed(self.embed, inputs), self.dropout, site=0)
        x = self.encoder(x, self.encoder_bias[...], segment_ids)
        return ops.dropout(self.encoder_norm(x), self.dropout, site=1)

    def hidden(
        self,
        decoder_inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        memory: Float[Array, "B S D"] | None,
        memory_segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the decoder's normalised last hidden states, scaled if the embeddings are tied.

        Positions change nothing: distances in the row decide.
        """
        del positions
        x = ops.embed(self.embed, decoder_inputs)
        x = self.decoder(
            ops.dropout(x, self.dropout, site=2),
            self.decoder_bias[...],
            segment_ids,
            memory,
            memory_segment_ids,
        )
        x = ops.dropout(self.decoder_norm(x), self.dropout, site=3)
        return x * x.shape[-1] ** -0.5 if self.tied else x

    def output_embedding(self) -> Parameter:
        """Returns the output embedding."""
        return self.embed if self.tied else self.lm_head

    def __call__(
        self,
        inputs: Int[Array, "B S"],
        decoder_inputs: Int[Array, "B T"],
        segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns the logits."""
        hidden = self.hidden(
            decoder_inputs,
            segment_ids=decoder_segment_ids,
            memory=self.encode(inputs, segment_ids),
            memory_segment_ids=segment_ids,
        )
        return ops.linear(hidden, self.output_embedding().T)


def _read_config(hf: Mapping[str, Any]) -> Config:
    kind = hf["model_type"]
    # transformers 5 writes that version 1.1 ties its embeddings, too, but does not scale.
    tied = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True))
    mlp = "relu" if kind == "t5" else "gated-gelu"
    setting(hf, "feed_forward_proj", ("relu", "gated-gelu"), mlp)
    layers = required(hf, "num_layers")
    return Config(
        vocab_size=required(hf, "vocab_size"),
        num_layers=layers,
        num_decoder_layers=hf.get("num_decoder_layers") or layers,
        num_heads=required(hf, "num_heads"),
        d_model=required(hf, "d_model"),
        head_dim=required(hf, "d_kv"),
        d_ff=required(hf, "d_ff"),
        gated=hf.get("feed_forward_proj", mlp) == "gated-gelu",
        num_buckets=hf.get("relative_attention_num_buckets", 32),
        max_distance=hf.get("relative_attention_max_distance", 128),
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        tie_embeddings=tied and kind == "t5",
        pad_id=hf.get("pad_token_id", 0),
        end_id=hf.get("eos_token_id", 1),
        start_id=hf.get("decoder_start_token_id", 0),
    )


def _write_config(cfg: Config) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": cfg.vocab_size,
        "num_layers": cfg.num_layers,
        "num_decoder_layers": cfg.num_decoder_layers,
        "num_heads": cfg.num_heads,
        "d_model": cfg.d_model,
        "d_kv": cfg.head_dim,
        "d_ff": cfg.d_ff,
        "feed_forward_proj": "gated-gelu" if cfg.gated else "relu",
        "relative_attention_num_buckets": cfg.num_buckets,
        "relative_attention_max_distance": cfg.max_distance,
        "layer_norm_epsilon": cfg.norm_eps,
        "dropout_rate": cfg.dropout,
        "tie_word_embeddings": cfg.tie_embeddings,
        "scale_decoder_outputs": cfg.tie_embeddings,
        "pad_token_id": cfg.pad_id,
        "eos_token_id": cfg.end_id,
        "decoder_start_token_id": cfg.start_id,
    }


def _rows(cfg: Config) -> list[Row]:
    rows = [Row("shared.weight", "embed")]
    for stack in ("encoder", "decoder"):
        there, here = stack + ".block.{layer}.layer.", stack + ".block."
        parts = [("SelfAttention", "attn")]
        parts += [("EncDecAttention", "cross")] * (stack == "decoder")
        rows.append(
            Row(
                f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                f"{stack}_bias",
            )
        )
        for number, (theirs, ours) in enumerate(parts):
            at = f"{there}{number}."
            rows += [
                Row(
                    f"{at}{theirs}.{x}.weight", f"{here}{ours}.w{x}", "(N H) D -> D N H"
                )
                for x in "qkv"
            ]
            rows += [
                Row(f"{at}{theirs}.o.weight", f"{here}{ours}.wo", "D (N H) -> N H D"),
                Row(f"{at}layer_norm.weight", f"{here}{ours}_norm.scale"),
            ]
        at = f"{there}{len(parts)}."
        up = {"wi_0": "w_gate", "wi_1": "w_up"} if cfg.gated else {"wi": "w_up"}
        rows += [
            Row(
                f"{at}DenseReluDense.{theirs}.weight", f"{here}mlp.{ours}", "F D -> D F"
            )
            for theirs, ours in {**up, "wo": "w_down"}.items()
        ]
        rows += [
            Row(f"{at}layer_norm.weight", f"{here}mlp_norm.scale"),
            Row(f"{stack}.final_layer_norm.weight", f"{stack}_norm.scale"),
        ]
    if not cfg.tie_embeddings:
        rows.append(Row("lm_head.weight", "lm_head"))
    return rows


EXCHANGE = Exchange(
    architectures={
        "t5": "T5ForConditionalGeneration",
        "mt5": "MT5ForConditionalGeneration",
    },
    read_config=_read_config,
    write_config=_write_config,
    rows=_rows,
    # Copies of the embedding, and a table of early checkpoints that nothing reads.
    ignored=r"(encoder\.embed_tokens|decoder\.embed_tokens|lm_head)\.weight|.*EncDecAttention\.relative_attention_bias\.weight",
)
