# SPDX-License-Identifier: Apache-2.0
"""Whisper (arXiv 2212.04356), as Hugging Face's WhisperForConditionalGeneration: from sound to text.

Two convolutions over a log-mel spectrogram (`jaxspeed.data.audio`), the second of stride 2, then a
pre-layer-norm encoder with fixed sinusoids and a decoder with learned positions; exact GELU,
biases on all but keys, tied embeddings. Differs: sound may be shorter than the model could take,
and rows may hold padding or several recordings, by segment ids, where Hugging Face wants silence
up to the full length; dropout is one rate and spares the attention weights.
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
from jaxspeed.config import ConfigError
from jaxspeed.hf import Exchange, Row, required, setting
from jaxspeed.nn import Layers, in_tiles, param
from jaxspeed.sharding import shard
from jaxspeed.types import Parameter


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a Whisper, and its special tokens."""

    vocab_size: int = 51_865
    """Rows of the embedding (V)."""
    num_mel_bins: int = 80
    """Channels of the spectrogram (M)."""
    max_source_len: int = 1500
    """Encoder positions, of two frames (20 ms) each."""
    max_seq_len: int = 448
    """Decoder positions."""
    num_layers: int = 4
    """Blocks of the encoder (L)."""
    num_decoder_layers: int = 4
    """Blocks of the decoder."""
    num_heads: int = 6
    """Attention heads (N); head_dim is d_model / num_heads."""
    d_model: int = 384
    """Width of the residual stream (D)."""
    d_ff: int = 1536
    """Width of the MLP (F)."""
    dropout: float = 0.0
    """Share dropped after embedding, attention and MLP."""
    pad_id: int = 50_257
    """Fills rows."""
    end_id: int = 50_257
    """Ends a text."""
    start_id: int = 50_258
    """The decoder's first input: `<|startoftranscript|>`."""

    def __post_init__(self) -> None:
        """Checks that heads divide the width and that sine and cosine share it."""
        if self.num_heads < 1:
            raise ValueError(f"model.num_heads={self.num_heads}: give 1 or more")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.d_model={self.d_model} does not divide by model.num_heads={self.num_heads}; "
                f"nearest legal: {self.d_model // self.num_heads * self.num_heads or self.num_heads}"
            )
        if self.d_model % 2 or self.d_model < 4:
            raise ValueError(
                f"model.d_model={self.d_model}: half of it are sines, half cosines; give an even number from 4 on"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head (H)."""
        return self.d_model // self.num_heads

    @property
    def feature_shape(self) -> tuple[int, int]:
        """The longest spectrogram: frames and channels."""
        return 2 * self.max_source_len, self.num_mel_bins

    def build(self, rngs: nnx.Rngs) -> "Whisper":
        """Returns a new model."""
        return Whisper(self, rngs)

    def num_params(self) -> int:
        """Returns the number of parameters, the encoder's sinusoids included."""
        D, M = self.d_model, self.num_mel_bins
        rows = self.vocab_size + self.max_source_len + self.max_seq_len
        convolutions = 3 * (M + D) * D + 2 * D
        # Norms, then the biases of attention (three) and MLP.
        encoder = self._block(attentions=1) + (4 + 3 + 1) * D + self.d_ff
        decoder = self._block(attentions=2) + (6 + 6 + 1) * D + self.d_ff
        blocks = self.num_layers * encoder + self.num_decoder_layers * decoder
        return rows * D + convolutions + blocks + 4 * D

    def flops_per_token(self, seq_len: int) -> float:
        """Returns model FLOPs of forward and backward for a target token and its share of the sound.

        The sound has the full length; the decoder's attention to itself is counted causally.
        """
        D, S = self.d_model, self.max_source_len
        sound = 3 * (2 * self.num_mel_bins + D) * D
        sound += self.num_layers * (self._block(attentions=1) + 2 * S * D)
        sound += self.num_decoder_layers * 2 * D * D
        text = self._block(attentions=2) - 2 * D * D + (seq_len + 2 * S) * D
        text = self.num_decoder_layers * text + self.vocab_size * D
        return 6.0 * (sound * S / seq_len + text)

    def _block(self, attentions: int) -> int:
        """Returns the number of weights in the matrices of one block."""
        return (4 * attentions * self.d_model + 2 * self.d_ff) * self.d_model


TINY = Config()
BASE = Config(num_layers=6, num_decoder_layers=6, num_heads=8, d_model=512, d_ff=2048)
LARGE_V3 = Config(
    vocab_size=51_866,
    num_mel_bins=128,
    num_layers=32,
    num_decoder_layers=32,
    num_heads=20,
    d_model=1280,
    d_ff=5120,
)

ZEROS = jax.nn.initializers.zeros
ONES = jax.nn.initializers.ones


def fan_in(terms: int) -> jax.nn.initializers.Initializer:
    """Returns normal numbers that keep the variance of what they sum: the paper and its code leave it open, and with 0.02 sound comes in at a twentieth of the positions' size."""
    return jax.nn.initializers.normal(terms**-0.5)


def sinusoids(key: Any, shape: tuple[int, ...], dtype: Any) -> Float[Array, "S D"]:
    """Returns sines and cosines of each position, their wavelengths from 2 pi to 20000 pi; an initialiser."""
    del key
    length, half = shape[0], shape[1] // 2
    rates = jnp.exp(-math.log(10_000.0) / (half - 1) * jnp.arange(half, dtype=dtype))
    angles = jnp.arange(length, dtype=dtype)[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.scale = param(ONES, rngs, (cfg.d_model,), ("embed",))
        self.bias = param(ZEROS, rngs, (cfg.d_model,), ("embed",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns x normalised."""
        return ops.layer_norm(x, self.scale[...], self.bias[...], eps=1e-5)


class Convolution(nnx.Module):
    """Convolution over time: three taps, within a recording."""

    def __init__(
        self, channels: tuple[int, int], dims: tuple[str, str], rngs: nnx.Rngs
    ) -> None:
        self.w = param(fan_in(3 * channels[0]), rngs, (3, *channels), ("seq", *dims))
        self.bias = param(ZEROS, rngs, channels[1:], dims[1:])

    def __call__(
        self,
        x: Float[Array, "B F M"],
        segment_ids: Int[Array, "B F"] | None,
        *,
        stride: int,
    ) -> Float[Array, "B S D"]:
        """Returns the features of every `stride`-th frame and its neighbours."""
        around = [
            slice(tap, tap + x.shape[1], stride) for tap in range(self.w.shape[0])
        ]
        padded = jnp.pad(x, [(0, 0), (1, 1), (0, 0)])
        taps = jnp.stack([padded[:, frames] for frames in around], 2)
        if segment_ids is not None:
            padded = jnp.pad(segment_ids, [(0, 0), (1, 1)])
            segments = jnp.stack([padded[:, frames] for frames in around], 2)
            same = segments == segment_ids[:, ::stride, None]
            taps = jnp.where(same[..., None], taps, jnp.zeros((), taps.dtype))
        return ops.linear(taps, self.w, self.bias[...], contract=2)


class Attention(nnx.Module):
    """Multi-head attention of a sequence to itself or to another one."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, N, H = cfg.d_model, cfg.num_heads, cfg.head_dim
        heads = ("embed", "heads", "head_dim")
        self.wq = param(fan_in(D), rngs, (D, N, H), heads)
        self.wk = param(fan_in(D), rngs, (D, N, H), heads)
        self.wv = param(fan_in(D), rngs, (D, N, H), heads)
        self.wo = param(fan_in(D), rngs, (N, H, D), ("heads", "head_dim", "embed"))
        self.bq = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bv = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bo = param(ZEROS, rngs, (D,), ("embed",))

    def within(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        *,
        causal: bool,
    ) -> Float[Array, "B T D"]:
        """Returns what each position gathers from its document, from earlier positions only if causal."""
        matrices = (self.wq, self.wk, self.wv)
        q, k, v = ops.linears(x, matrices, (self.bq[...], None, self.bv[...]))
        return self._out(ops.attention(q, k, v, segment_ids, causal=causal))

    def across(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        memory: Float[Array, "B S D"] | None,
        memory_segment_ids: Int[Array, "B S"] | None,
    ) -> Float[Array, "B T D"]:
        """Returns what each position gathers from its document in the memory."""
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
        matrices = (self.wk, self.wv)
        return ops.linears(x, matrices, (None, self.bv[...]))

    def _out(self, attended: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        attended = shard(attended, "batch", "seq", "heads", "head_dim")
        return ops.linear(attended, self.wo, self.bo[...], contract=2)


class MLP(nnx.Module):
    """Two products with a GELU between."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, F = cfg.d_model, cfg.d_ff
        self.w_up = param(fan_in(D), rngs, (D, F), ("embed", "mlp"))
        self.b_up = param(ZEROS, rngs, (F,), ("mlp",))
        self.w_down = param(fan_in(F), rngs, (F, D), ("mlp", "embed"))
        self.b_down = param(ZEROS, rngs, (D,), ("embed",))

    @in_tiles
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns w_down gelu(w_up x), with biases."""
        up = shard(ops.linear(x, self.w_up, self.b_up[...]), "batch", "seq", "mlp")
        return ops.linear(gelu(up), self.w_down, self.b_down[...])


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns GELU by the error function. Reference: arXiv 1606.08415."""
    return jax.nn.gelu(x, approximate=False)


class EncoderBlock(nnx.Module):
    """Attention to the whole recording and MLP, each behind a norm and around a residual."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.dropout = cfg.dropout
        self.attn_norm = LayerNorm(cfg, rngs)
        self.attn = Attention(cfg, rngs)
        self.mlp_norm = LayerNorm(cfg, rngs)
        self.mlp = MLP(cfg, rngs)

    def __call__(
        self, x: Float[Array, "B S D"], segment_ids: Int[Array, "B S"] | None
    ) -> Float[Array, "B S D"]:
        """Returns the residual stream after this block."""
        y = self.attn.within(self.attn_norm(x), segment_ids, causal=False)
        x = x + ops.dropout(y, self.dropout, site=0)
        return x + ops.dropout(self.mlp(self.mlp_norm(x)), self.dropout, site=1)


class DecoderBlock(nnx.Module):
    """Causal attention, attention to the memory and MLP, each behind a norm and around a residual."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.dropout = cfg.dropout
        self.attn_norm = LayerNorm(cfg, rngs)
        self.attn = Attention(cfg, rngs)
        self.cross_norm = LayerNorm(cfg, rngs)
        self.cross = Attention(cfg, rngs)
        self.mlp_norm = LayerNorm(cfg, rngs)
        self.mlp = MLP(cfg, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        memory: Float[Array, "B S D"] | None,
        memory_segment_ids: Int[Array, "B S"] | None,
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream after this block."""
        y = self.attn.within(self.attn_norm(x), segment_ids, causal=True)
        x = x + ops.dropout(y, self.dropout, site=2)
        y = self.cross.across(
            self.cross_norm(x), segment_ids, memory, memory_segment_ids
        )
        x = x + ops.dropout(y, self.dropout, site=3)
        return x + ops.dropout(self.mlp(self.mlp_norm(x)), self.dropout, site=4)


class Whisper(nnx.Module):
    """The encoder-decoder, a `jaxspeed.types.Seq2Seq`."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D = cfg.d_model
        self.dropout = cfg.dropout
        self.conv1 = Convolution((cfg.num_mel_bins, D), ("embed", "mlp"), rngs)
        self.conv2 = Convolution((D, D), ("mlp", "embed"), rngs)
        # Fixed, but a tensor of its own in every file, rounded as its writer rounded it. Its
        # second dim is no `embed`, which weight decay and Muon look for.
        self.waves = param(sinusoids, rngs, (cfg.max_source_len, D), ("seq", "seq"))
        self.encoder = Layers(
            lambda rngs: EncoderBlock(cfg, rngs), cfg.num_layers, rngs
        )
        self.encoder_norm = LayerNorm(cfg, rngs)
        self.embed = param(fan_in(D), rngs, (cfg.vocab_size, D), ("vocab", "embed"))
        self.positions = param(fan_in(D), rngs, (cfg.max_seq_len, D), ("seq", "embed"))
        self.decoder = Layers(
            lambda rngs: DecoderBlock(cfg, rngs), cfg.num_decoder_layers, rngs
        )
        self.decoder_norm = LayerNorm(cfg, rngs)

    def encode(
        self,
        inputs: Float[Array, "B F M"],
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Returns the memory, a position for every two frames.

        Args:
            inputs: log-mel spectrograms.
            segment_ids: recording of each position; None: one a row, without padding.
        """
        ops.need_whole("sound")
        limit, frames = self.waves.shape[0], inputs.shape[1]
        if frames % 2 or frames > 2 * limit:
            raise ValueError(
                f"inputs have {frames} frames; the model takes an even number of at most {2 * limit}; pad them, cut them, or raise model.max_source_len"
            )
        each = None if segment_ids is None else jnp.repeat(segment_ids, 2, axis=1)
        x = shard(self.conv1(inputs, each, stride=1), "batch", "seq", "mlp")
        x = gelu(self.conv2(gelu(x), each, stride=2))
        positions = ops.row_places(x.shape[:2])
        if segment_ids is not None:
            positions = positions - _starts(segment_ids, positions)
        x = x + ops.embed(jax.lax.stop_gradient(self.waves[...]), positions)
        x = ops.dropout(x, self.dropout, site=0)
        return self.encoder_norm(self.encoder(x, segment_ids))

    def hidden(
        self,
        decoder_inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        memory: Float[Array, "B S D"] | None,
        memory_segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the decoder's normalised last hidden states."""
        if positions is None:
            length, limit = decoder_inputs.shape[1], self.positions.shape[0]
            if length > limit:
                raise ValueError(
                    f"decoder_inputs have {length} tokens; the model has {limit} positions; raise model.max_seq_len"
                )
            positions = ops.row_places(decoder_inputs.shape)
        x = ops.embed(self.embed, decoder_inputs)
        x = x + ops.embed(self.positions, positions)
        x = ops.dropout(x, self.dropout, site=1)
        x = self.decoder(x, segment_ids, memory, memory_segment_ids)
        return self.decoder_norm(x)

    def output_embedding(self) -> Parameter:
        """Returns the decoder's input embedding: it is tied."""
        return self.embed

    def __call__(
        self,
        inputs: Float[Array, "B F M"],
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


def _starts(
    segment_ids: Int[Array, "B S"], positions: Int[Array, "B S"]
) -> Int[Array, "B S"]:
    """Returns where the segment of each position begins."""
    before = jnp.pad(segment_ids, [(0, 0), (1, 0)])[:, :-1]
    return jax.lax.cummax(jnp.where(segment_ids != before, positions, 0), axis=1)


def _read_config(hf: Mapping[str, Any]) -> Config:
    setting(hf, "activation_function", ("gelu",), "gelu")
    setting(hf, "scale_embedding", (False,), False)
    setting(hf, "tie_word_embeddings", (True,), True)
    for name in ("attention_heads", "ffn_dim"):
        encoder, decoder = (hf.get(f"{x}_{name}") for x in ("encoder", "decoder"))
        if encoder != decoder:
            raise ConfigError(
                f"config.json: encoder_{name}={encoder} and decoder_{name}={decoder}: this family has the same in both"
            )
    return Config(
        vocab_size=required(hf, "vocab_size"),
        num_mel_bins=required(hf, "num_mel_bins"),
        max_source_len=required(hf, "max_source_positions"),
        max_seq_len=required(hf, "max_target_positions"),
        num_layers=required(hf, "encoder_layers"),
        num_decoder_layers=required(hf, "decoder_layers"),
        num_heads=required(hf, "encoder_attention_heads"),
        d_model=required(hf, "d_model"),
        d_ff=required(hf, "encoder_ffn_dim"),
        pad_id=required(hf, "pad_token_id"),
        end_id=required(hf, "eos_token_id"),
        start_id=required(hf, "decoder_start_token_id"),
    )


def _write_config(cfg: Config) -> dict[str, Any]:
    return {
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "activation_function": "gelu",
        "vocab_size": cfg.vocab_size,
        "num_mel_bins": cfg.num_mel_bins,
        "max_source_positions": cfg.max_source_len,
        "max_target_positions": cfg.max_seq_len,
        "encoder_layers": cfg.num_layers,
        "decoder_layers": cfg.num_decoder_layers,
        "encoder_attention_heads": cfg.num_heads,
        "decoder_attention_heads": cfg.num_heads,
        "d_model": cfg.d_model,
        "encoder_ffn_dim": cfg.d_ff,
        "decoder_ffn_dim": cfg.d_ff,
        "dropout": cfg.dropout,
        "tie_word_embeddings": True,
        "pad_token_id": cfg.pad_id,
        "bos_token_id": cfg.end_id,
        "eos_token_id": cfg.end_id,
        "decoder_start_token_id": cfg.start_id,
        # Its defaults there are ids of the published vocabularies.
        "begin_suppress_tokens": None,
    }


def _companions(cfg: Config) -> dict[str, Any]:
    """Returns how `jaxspeed.data.audio` makes spectrograms, as Hugging Face says it: for whole seconds only."""
    if cfg.max_source_len % 50:
        return {}
    return {
        "preprocessor_config.json": {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": cfg.num_mel_bins,
            "sampling_rate": 16_000,
            "hop_length": 160,
            "n_fft": 400,
            "chunk_length": cfg.max_source_len // 50,
            "padding_value": 0.0,
        }
    }


def _rows(cfg: Config) -> list[Row]:
    rows = [
        Row(f"model.encoder.conv{i}.{theirs}", f"conv{i}.{ours}", form)
        for i in (1, 2)
        for theirs, ours, form in (
            ("weight", "w", "D M X -> X M D"),
            ("bias", "bias", ""),
        )
    ]
    rows += [
        Row("model.encoder.embed_positions.weight", "waves"),
        Row("model.decoder.embed_tokens.weight", "embed"),
        Row("model.decoder.embed_positions.weight", "positions"),
    ]
    for stack in ("encoder", "decoder"):
        there, here = "model." + stack + ".layers.{layer}.", stack + ".block."
        attentions = [("self_attn", "attn")]
        attentions += [("encoder_attn", "cross")] * (stack == "decoder")
        for theirs, ours in attentions:
            at, to = f"{there}{theirs}.", f"{here}{ours}."
            for x in "qkv":
                rows.append(
                    Row(f"{at}{x}_proj.weight", f"{to}w{x}", "(N H) D -> D N H")
                )
            for x in "qv":
                rows.append(Row(f"{at}{x}_proj.bias", f"{to}b{x}", "(N H) -> N H"))
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
        norms[f"model.{stack}.layer_norm"] = f"{stack}_norm"
        for theirs, ours in norms.items():
            rows += [
                Row(f"{theirs}.weight", f"{ours}.scale"),
                Row(f"{theirs}.bias", f"{ours}.bias"),
            ]
    return rows


EXCHANGE = Exchange(
    architectures={"whisper": "WhisperForConditionalGeneration"},
    read_config=_read_config,
    write_config=_write_config,
    rows=_rows,
    prefix=r"model\.",
    companions=_companions,
    ignored=r"(model\.)?proj_out\.weight",
)
