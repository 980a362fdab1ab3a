# SPDX-License-Identifier: Apache-2.0
"""BART (arXiv 1910.13461) and its kin, as Hugging Face's BartForConditionalGeneration: text from text.

An encoder and a decoder with biases everywhere, tied embeddings and a fixed bias of the logits.
By configuration also Marian (1804.00344: sinusoids for positions, no norm after the embedding),
mBART (2001.08210: norms before each part) and Pegasus (1912.08777: both). Differs: dropout is one
rate and spares the attention weights; rows may hold several texts, by segment ids.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspeed import ops
from jaxspeed.config import ConfigError
from jaxspeed.hf import Exchange, Row, required, setting
from jaxspeed.nn import Layers, in_tiles, param
from jaxspeed.sharding import shard
from jaxspeed.types import Parameter


RESERVED_POSITIONS = 2
"""Rows of a table of positions before the first: fairseq's, for padding."""

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a BART, and its special tokens."""

    vocab_size: int = 50_265
    """Rows of the embedding (V)."""
    max_seq_len: int = 1024
    """Positions of encoder and decoder."""
    num_layers: int = 12
    """Blocks of the encoder (L)."""
    num_decoder_layers: int = 12
    """Blocks of the decoder."""
    num_heads: int = 16
    """Attention heads (N); head_dim is d_model / num_heads."""
    d_model: int = 1024
    """Width of the residual stream (D)."""
    d_ff: int = 4096
    """Width of the MLP (F)."""
    activation: Literal["gelu", "swish", "relu"] = "gelu"
    """Between the products of the MLP."""
    norm_first: bool = False
    """Norms before each part, and after the last block; False: after each part."""
    embed_norm: bool = True
    """A norm after the embedding."""
    sinusoids: bool = False
    """Positions are sines and cosines, not learned."""
    scale_embedding: bool = False
    """Embedded tokens are multiplied by sqrt(d_model)."""
    dropout: float = 0.0
    """Share dropped after embedding, attention and MLP."""
    pad_id: int = 1
    """Fills rows."""
    end_id: int = 2
    """Ends a text."""
    start_id: int = 2
    """The decoder's first input."""

    def __post_init__(self) -> None:
        """Checks that heads divide the width and that sine and cosine share it."""
        if self.num_heads < 1:
            raise ValueError(f"model.num_heads={self.num_heads}: give 1 or more")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.d_model={self.d_model} does not divide by model.num_heads={self.num_heads}; "
                f"nearest legal: {self.d_model // self.num_heads * self.num_heads or self.num_heads}"
            )
        if self.sinusoids and self.d_model % 2:
            raise ValueError(
                f"model.d_model={self.d_model}: half of it are sines, half cosines; give an even number"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head (H)."""
        return self.d_model // self.num_heads

    def build(self, rngs: nnx.Rngs) -> "Bart":
        """Returns a new model."""
        return Bart(self, rngs)

    def num_params(self) -> int:
        """Returns the number of parameters, the bias of the logits included."""
        D, F = self.d_model, self.d_ff
        # Biases and norms: of an attention 4 and 2, of the MLP F + 1 and 2.
        encoder = self._block(attentions=1) + 9 * D + F
        decoder = self._block(attentions=2) + 15 * D + F
        blocks = self.num_layers * encoder + self.num_decoder_layers * decoder
        rows = 0 if self.sinusoids else 2 * (self.max_seq_len + RESERVED_POSITIONS)
        norms = 4 * (self.embed_norm + self.norm_first)
        return self.vocab_size * (D + 1) + blocks + (rows + norms) * D

    def flops_per_token(self, seq_len: int) -> float:
        """Returns model FLOPs of forward and backward for a token of the source and one of the target.

        Both are `seq_len` long; the decoder's attention to itself is counted causally.
        """
        D, E, L = self.d_model, self.num_layers, self.num_decoder_layers
        matmul = E * self._block(attentions=1) + L * self._block(attentions=2)
        return 6.0 * (matmul + self.vocab_size * D + (2 * E + 3 * L) * seq_len * D)

    def _block(self, attentions: int) -> int:
        """Returns the number of weights in the matrices of one block."""
        return (4 * attentions * self.d_model + 2 * self.d_ff) * self.d_model


BASE = Config(num_layers=6, num_decoder_layers=6, num_heads=12, d_model=768, d_ff=3072)
LARGE = Config()
MARIAN = Config(
    vocab_size=58_101,
    max_seq_len=512,
    num_layers=6,
    num_decoder_layers=6,
    num_heads=8,
    d_model=512,
    d_ff=2048,
    activation="swish",
    embed_norm=False,
    sinusoids=True,
    scale_embedding=True,
    pad_id=58_100,
    end_id=0,
    start_id=58_100,
)

NORMAL = jax.nn.initializers.normal(0.02)
ZEROS = jax.nn.initializers.zeros
ONES = jax.nn.initializers.ones


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.scale = param(ONES, rngs, (cfg.d_model,), ("embed",))
        self.bias = param(ZEROS, rngs, (cfg.d_model,), ("embed",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns x normalised."""
        return ops.layer_norm(x, self.scale[...], self.bias[...], eps=1e-5)


class Embedding(nnx.Module):
    """What a stack makes of embedded tokens: positions are added, and the sum may be normalised."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.limit, self.scale = cfg.max_seq_len, cfg.scale_embedding
        self.learned, self.normed = not cfg.sinusoids, cfg.embed_norm
        if self.learned:
            rows = cfg.max_seq_len + RESERVED_POSITIONS
            self.positions = param(NORMAL, rngs, (rows, cfg.d_model), ("seq", "embed"))
        if self.normed:
            self.norm = LayerNorm(cfg, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream before the first block."""
        if positions is None:
            if x.shape[1] > self.limit:
                raise ValueError(
                    f"a row has {x.shape[1]} tokens; the model has {self.limit} positions; raise model.max_seq_len"
                )
            positions = ops.row_places(x.shape[:2])
        if self.scale:
            x = x * x.shape[-1] ** 0.5
        if self.learned:
            x = x + ops.embed(self.positions, positions + RESERVED_POSITIONS)
        else:
            x = x + sinusoids(positions, x.shape[-1]).astype(x.dtype)
        return self.norm(x) if self.normed else x


def sinusoids(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Returns sines, then cosines, of positions / 10000^(2 i / D). Reference: arXiv 1706.03762 section 3.5."""
    rates = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[..., None].astype(jnp.float32) * rates[None, None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class Attention(nnx.Module):
    """Multi-head attention of a sequence to itself or to another one."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, N, H = cfg.d_model, cfg.num_heads, cfg.head_dim
        heads = ("embed", "heads", "head_dim")
        self.wq = param(NORMAL, rngs, (D, N, H), heads)
        self.wk = param(NORMAL, rngs, (D, N, H), heads)
        self.wv = param(NORMAL, rngs, (D, N, H), heads)
        self.wo = param(NORMAL, rngs, (N, H, D), ("heads", "head_dim", "embed"))
        self.bq = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bk = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bv = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bo = param(ZEROS, rngs, (D,), ("embed",))

    def within(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        *,
        causal: bool,
    ) -> Float[Array, "B T D"]:
        """Returns what each position gathers from its text, from earlier positions only if causal."""
        matrices = (self.wq, self.wk, self.wv)
        biases = (self.bq[...], self.bk[...], self.bv[...])
        q, k, v = ops.linears(x, matrices, biases)
        return self._out(ops.attention(q, k, v, segment_ids, causal=causal))

    def across(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        memory: Float[Array, "B S D"] | None,
        memory_segment_ids: Int[Array, "B S"] | None,
    ) -> Float[Array, "B T D"]:
        """Returns what each position gathers from its text in the memory."""
        k, v = ops.remember(lambda: self._keys_and_values(memory))
        if memory_segment_ids is None:
            memory_segment_ids = jnp.ones(k.shape[:2], jnp.int32)
        (q,) = ops.linears(x, (self.wq,), (self.bq[...],))
        attended = ops.attention(
            q,
            k,
            v,
            segment_ids,
            key_segment_ids=memory_segment_ids,
            causal=False,
        )
        return self._out(attended)

    def _keys_and_values(self, x: Float[Array, "B S D"] | None) -> tuple[Array, ...]:
        assert x is not None, "memory is read at the first pass"
        matrices, biases = (self.wk[...], self.wv[...]), (self.bk[...], self.bv[...])
        return ops.linears(x, matrices, biases)

    def _out(self, attended: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        attended = shard(attended, "batch", "seq", "heads", "head_dim")
        return ops.linear(attended, self.wo, self.bo[...], contract=2)


class MLP(nnx.Module):
    """Two products with an activation between."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, F = cfg.d_model, cfg.d_ff
        self.activation = cfg.activation
        self.w_up = param(NORMAL, rngs, (D, F), ("embed", "mlp"))
        self.b_up = param(ZEROS, rngs, (F,), ("mlp",))
        self.w_down = param(NORMAL, rngs, (F, D), ("mlp", "embed"))
        self.b_down = param(ZEROS, rngs, (D,), ("embed",))

    @in_tiles
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns w_down f(w_up x), with biases."""
        up = shard(ops.linear(x, self.w_up, self.b_up[...]), "batch", "seq", "mlp")
        inner = ACTIVATIONS[self.activation](up)
        return ops.linear(inner, self.w_down, self.b_down[...])


class EncoderBlock(nnx.Module):
    """Attention to the whole text and MLP."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.norm_first, self.dropout = cfg.norm_first, cfg.dropout
        self.attn, self.attn_norm = Attention(cfg, rngs), LayerNorm(cfg, rngs)
        self.mlp, self.mlp_norm = MLP(cfg, rngs), LayerNorm(cfg, rngs)

    def __call__(
        self, x: Float[Array, "B S D"], segment_ids: Int[Array, "B S"] | None
    ) -> Float[Array, "B S D"]:
        """Returns the residual stream after this block."""
        attend = lambda x: self.attn.within(x, segment_ids, causal=False)
        x = _around(self, attend, x, self.attn_norm, site=0)
        return _around(self, self.mlp, x, self.mlp_norm, site=1)


class DecoderBlock(nnx.Module):
    """Causal attention, attention to the memory and MLP."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.norm_first, self.dropout = cfg.norm_first, cfg.dropout
        self.attn, self.attn_norm = Attention(cfg, rngs), LayerNorm(cfg, rngs)
        self.cross, self.cross_norm = Attention(cfg, rngs), LayerNorm(cfg, rngs)
        self.mlp, self.mlp_norm = MLP(cfg, rngs), LayerNorm(cfg, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        memory: Float[Array, "B S D"] | None,
        memory_segment_ids: Int[Array, "B S"] | None,
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream after this block."""
        attend = lambda x: self.attn.within(x, segment_ids, causal=True)
        read = lambda x: self.cross.across(x, segment_ids, memory, memory_segment_ids)
        x = _around(self, attend, x, self.attn_norm, site=2)
        x = _around(self, read, x, self.cross_norm, site=3)
        return _around(self, self.mlp, x, self.mlp_norm, site=4)


def _around(
    block: EncoderBlock | DecoderBlock,
    part: Callable[[Float[Array, "B T D"]], Float[Array, "B T D"]],
    x: Float[Array, "B T D"],
    norm: LayerNorm,
    *,
    site: int,
) -> Float[Array, "B T D"]:
    """Returns the sum of x and a part of the block; its norm comes before the part, or after the sum."""
    y = part(norm(x) if block.norm_first else x)
    x = x + ops.dropout(y, block.dropout, site=site)
    return x if block.norm_first else norm(x)


class Bart(nnx.Module):
    """The encoder-decoder, a `jaxspeed.types.Seq2Seq`."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, V = cfg.d_model, cfg.vocab_size
        self.dropout, self.norm_first = cfg.dropout, cfg.norm_first
        self.embed = param(NORMAL, rngs, (V, D), ("vocab", "embed"))
        self.encoder_embed = Embedding(cfg, rngs)
        self.encoder = Layers(
            lambda rngs: EncoderBlock(cfg, rngs), cfg.num_layers, rngs
        )
        self.decoder_embed = Embedding(cfg, rngs)
        self.decoder = Layers(
            lambda rngs: DecoderBlock(cfg, rngs), cfg.num_decoder_layers, rngs
        )
        if cfg.norm_first:
            self.encoder_norm = LayerNorm(cfg, rngs)
            self.decoder_norm = LayerNorm(cfg, rngs)
        # Fixed: Marian's models bring one, the others have zeros.
        self.bias = param(ZEROS, rngs, (V,), ("vocab",))

    def encode(
        self, inputs: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        """Returns the memory: the encoder's last hidden states. Positions count from each segment's beginning."""
        positions = None if segment_ids is None else ops.document_places(segment_ids)
        x = self.encoder_embed(ops.embed(self.embed, inputs), positions)
        x = self.encoder(ops.dropout(x, self.dropout, site=0), segment_ids)
        return self.encoder_norm(x) if self.norm_first else x

    def hidden(
        self,
        decoder_inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        memory: Float[Array, "B S D"] | None,
        memory_segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the decoder's last hidden states."""
        x = self.decoder_embed(ops.embed(self.embed, decoder_inputs), positions)
        x = ops.dropout(x, self.dropout, site=1)
        x = self.decoder(x, segment_ids, memory, memory_segment_ids)
        return self.decoder_norm(x) if self.norm_first else x

    def output_embedding(self) -> Parameter:
        """Returns the input embedding: it is tied."""
        return self.embed

    def output_bias(self) -> Float[Array, " V"]:
        """Returns what is added to the logits; it is not trained."""
        return jax.lax.stop_gradient(self.bias[...])

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
        return ops.linear(hidden, self.output_embedding().T, self.output_bias())


KINDS = {
    # norm_first, embed_norm, sinusoids
    "bart": (False, True, False),
    "marian": (False, False, True),
    "mbart": (True, True, False),
    "pegasus": (True, False, True),
}
"""What tells Hugging Face's types apart."""


def _read_config(hf: Mapping[str, Any]) -> Config:
    norm_first, embed_norm, sinusoids = KINDS[hf["model_type"]]
    setting(hf, "activation_function", (*ACTIVATIONS, "silu"), "gelu")
    setting(hf, "tie_word_embeddings", (True,), True)
    setting(hf, "share_encoder_decoder_embeddings", (True,), True)
    for name in ("attention_heads", "ffn_dim"):
        encoder, decoder = (hf.get(f"{x}_{name}") for x in ("encoder", "decoder"))
        if encoder != decoder:
            raise ConfigError(
                f"config.json: encoder_{name}={encoder} and decoder_{name}={decoder}: this family has the same in both"
            )
    activation: Any = hf.get("activation_function", "gelu")
    return Config(
        vocab_size=required(hf, "vocab_size"),
        max_seq_len=required(hf, "max_position_embeddings"),
        num_layers=required(hf, "encoder_layers"),
        num_decoder_layers=required(hf, "decoder_layers"),
        num_heads=required(hf, "encoder_attention_heads"),
        d_model=required(hf, "d_model"),
        d_ff=required(hf, "encoder_ffn_dim"),
        activation="swish" if activation == "silu" else activation,
        norm_first=norm_first,
        embed_norm=embed_norm,
        sinusoids=sinusoids,
        scale_embedding=hf.get("scale_embedding", False),
        pad_id=required(hf, "pad_token_id"),
        end_id=required(hf, "eos_token_id"),
        start_id=required(hf, "decoder_start_token_id"),
    )


def _write_config(cfg: Config) -> dict[str, Any]:
    flags = (cfg.norm_first, cfg.embed_norm, cfg.sinusoids)
    kind = next((kind for kind, those in KINDS.items() if those == flags), None)
    if kind is None:
        raise ConfigError(
            f"model.norm_first, model.embed_norm and model.sinusoids are {flags}: no Hugging Face model is such, so this one cannot be exported"
        )
    return {
        "model_type": kind,
        "is_encoder_decoder": True,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_seq_len,
        "encoder_layers": cfg.num_layers,
        "decoder_layers": cfg.num_decoder_layers,
        "encoder_attention_heads": cfg.num_heads,
        "decoder_attention_heads": cfg.num_heads,
        "d_model": cfg.d_model,
        "encoder_ffn_dim": cfg.d_ff,
        "decoder_ffn_dim": cfg.d_ff,
        "activation_function": cfg.activation,
        "scale_embedding": cfg.scale_embedding,
        "dropout": cfg.dropout,
        "tie_word_embeddings": True,
        "pad_token_id": cfg.pad_id,
        "eos_token_id": cfg.end_id,
        "forced_eos_token_id": cfg.end_id,
        "decoder_start_token_id": cfg.start_id,
    }


def _rows(cfg: Config) -> list[Row]:
    rows = [
        Row("model.shared.weight", "embed"),
        Row("final_logits_bias", "bias", "() V -> V"),
    ]
    for stack in ("encoder", "decoder"):
        there, here = "model." + stack + ".layers.{layer}.", stack + ".block."
        attentions = [("self_attn", "attn")]
        attentions += [("encoder_attn", "cross")] * (stack == "decoder")
        for theirs, ours in attentions:
            at, to = f"{there}{theirs}.", f"{here}{ours}."
            for x in "qkv":
                rows += [
                    Row(f"{at}{x}_proj.weight", f"{to}w{x}", "(N H) D -> D N H"),
                    Row(f"{at}{x}_proj.bias", f"{to}b{x}", "(N H) -> N H"),
                ]
            rows += [
                Row(f"{at}out_proj.weight", f"{to}wo", "D (N H) -> N H D"),
                Row(f"{at}out_proj.bias", f"{to}bo"),
            ]
        for theirs, ours in (("fc1", "up"), ("fc2", "down")):
            rows += [
                Row(f"{there}{theirs}.weight", f"{here}mlp.w_{ours}", "F D -> D F"),
                Row(f"{there}{theirs}.bias", f"{here}mlp.b_{ours}"),
            ]
        norms = {f"{there}{x}_layer_norm": f"{here}{y}_norm" for x, y in attentions}
        norms[f"{there}final_layer_norm"] = f"{here}mlp_norm"
        if cfg.embed_norm:
            norms[f"model.{stack}.layernorm_embedding"] = f"{stack}_embed.norm"
        if cfg.norm_first:
            norms[f"model.{stack}.layer_norm"] = f"{stack}_norm"
        for theirs, ours in norms.items():
            rows += [
                Row(f"{theirs}.weight", f"{ours}.scale"),
                Row(f"{theirs}.bias", f"{ours}.bias"),
            ]
        if not cfg.sinusoids:
            rows.append(
                Row(f"model.{stack}.embed_positions.weight", f"{stack}_embed.positions")
            )
    return rows


EXCHANGE = Exchange(
    architectures={
        "bart": "BartForConditionalGeneration",
        "marian": "MarianMTModel",
        "mbart": "MBartForConditionalGeneration",
        "pegasus": "PegasusForConditionalGeneration",
    },
    read_config=_read_config,
    write_config=_write_config,
    rows=_rows,
    # Copies of the embedding, and sinusoids.
    ignored=r"lm_head\.weight|model\.(encoder|decoder)\.embed_(tokens|positions)\.weight",
)
