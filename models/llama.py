# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783) and their kin, as Hugging Face's LlamaForCausalLM and its other heads.

RMS norm before attention and MLP, rotary positions, grouped-query attention, SwiGLU, no biases,
embeddings tied or not. By configuration also Mistral without a sliding window (2310.06825), Qwen2
(2407.10671: biases on queries, keys and values), Qwen3 (2505.09388: a norm on each head's queries
and keys) and SmolLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspeed import ops
from jaxspeed.config import ConfigError
from jaxspeed.hf import Exchange, Heads, Row, required, setting
from jaxspeed.nn import Layers, param
from jaxspeed.sharding import shard
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
    """Sizes of a Llama."""

    vocab_size: int = 32_000
    """Rows of the embedding (V)."""
    max_seq_len: int = 4096
    """Longest sequence it is meant for."""
    num_layers: int = 32
    """Blocks (L)."""
    num_heads: int = 32
    """Query heads (N)."""
    num_kv_heads: int = 32
    """Key and value heads (K); divides num_heads."""
    d_model: int = 4096
    """Width of the residual stream (D)."""
    head_dim: int = 128
    """Width of one head (H)."""
    d_ff: int = 11_008
    """Width of the MLP (F)."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-5
    """Added to the mean square in norms."""
    qkv_bias: bool = False
    """Biases on queries, keys and values."""
    qk_norm: bool = False
    """RMS norm on each head's queries and keys, before the rotation."""
    tie_embeddings: bool = False
    """One matrix for input and output embedding."""
    dropout: float = 0.0
    """Share dropped after attention and MLP."""
    head: DecoderHead = "lm"
    """What it gives: logits of the next token, of the row's label, of each token's label, or a value a token."""
    num_labels: int = 2
    """Labels (C) of the heads classify and tag."""
    labels: tuple[str, ...] = ()
    """Their names, if known."""

    def __post_init__(self) -> None:
        """Checks the head counts and the labels."""
        check_labels(self.num_labels, len(self.labels))
        for name in ("num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: give 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} does not divide by model.num_kv_heads={self.num_kv_heads}; give a divisor of num_heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim={self.head_dim} is odd; rotary embedding pairs its halves, so give an even number"
            )

    def build(self, rngs: nnx.Rngs) -> "Llama":
        """Returns a new model."""
        return Llama(self, rngs)

    def num_params(self) -> int:
        """Returns the number of parameters."""
        D, N, K, H = self.d_model, self.num_heads, self.num_kv_heads, self.head_dim
        block = self._matrices() + 2 * D
        block += (N + 2 * K) * H * self.qkv_bias + 2 * H * self.qk_norm
        head = num_head_params(self.head, D, self.num_labels)
        return (
            (2 if self.unties else 1) * self.vocab_size * D
            + self.num_layers * block
            + D
            + head
        )

    @property
    def unties(self) -> bool:
        """Whether the output embedding is a matrix of its own."""
        return self.head == "lm" and not self.tie_embeddings

    def flops_per_token(self, seq_len: int) -> float:
        """Returns model FLOPs of forward and backward for one token, attention counted causally."""
        matmul = self.num_layers * self._matrices()
        matmul += self.vocab_size * self.d_model * (self.head == "lm")
        heads = self.num_heads * self.head_dim
        return 6.0 * matmul + 6.0 * self.num_layers * seq_len * heads

    def _matrices(self) -> int:
        """Returns the number of weights that a token is multiplied by in one block."""
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.d_model * (heads + 3 * self.d_ff)


LLAMA2_7B = Config()
LLAMA3_8B = Config(
    vocab_size=128_256,
    max_seq_len=8192,
    num_kv_heads=8,
    d_ff=14_336,
    rope_theta=500_000.0,
)

NORMAL = jax.nn.initializers.normal(0.02)
ONES = jax.nn.initializers.ones
ZEROS = jax.nn.initializers.zeros


class RMSNorm(nnx.Module):
    """RMS norm with scale over the last dim."""

    def __init__(
        self, size: int, rngs: nnx.Rngs, *, eps: float, dim: str = "embed"
    ) -> None:
        self.eps = eps
        self.scale = param(ONES, rngs, (size,), (dim,))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns x normalised."""
        return ops.rms_norm(x, self.scale[...], eps=self.eps)


class Attention(nnx.Module):
    """Grouped-query causal self-attention with rotary positions."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, N, K, H = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.theta = cfg.rope_theta
        self.wq = param(NORMAL, rngs, (D, N, H), ("embed", "heads", "head_dim"))
        self.wk = param(NORMAL, rngs, (D, K, H), ("embed", "kv_heads", "head_dim"))
        self.wv = param(NORMAL, rngs, (D, K, H), ("embed", "kv_heads", "head_dim"))
        self.wo = param(NORMAL, rngs, (N, H, D), ("heads", "head_dim", "embed"))
        self.biased, self.normed = cfg.qkv_bias, cfg.qk_norm
        if cfg.qkv_bias:
            self.bq = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
            self.bk = param(ZEROS, rngs, (K, H), ("kv_heads", "head_dim"))
            self.bv = param(ZEROS, rngs, (K, H), ("kv_heads", "head_dim"))
        if cfg.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(H, rngs, eps=cfg.norm_eps, dim="head_dim") for _ in range(2)
            )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """Returns what each position gathers from the earlier ones of its document."""
        bq, bk, bv = (
            (self.bq[...], self.bk[...], self.bv[...])
            if self.biased
            else (None, None, None)
        )
        q = shard(ops.linear(x, self.wq[...], bq), "batch", "seq", "heads", "head_dim")
        k = shard(
            ops.linear(x, self.wk[...], bk), "batch", "seq", "kv_heads", "head_dim"
        )
        v = shard(
            ops.linear(x, self.wv[...], bv), "batch", "seq", "kv_heads", "head_dim"
        )
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (
            ops.rotate(q, positions, theta=self.theta),
            ops.rotate(k, positions, theta=self.theta),
        )
        attended = shard(
            ops.attention(q, k, v, segment_ids), "batch", "seq", "heads", "head_dim"
        )
        return ops.linear(attended, self.wo[...], contract=2)


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, F = cfg.d_model, cfg.d_ff
        self.w_gate = param(NORMAL, rngs, (D, F), ("embed", "mlp"))
        self.w_up = param(NORMAL, rngs, (D, F), ("embed", "mlp"))
        self.w_down = param(NORMAL, rngs, (F, D), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns w_down(silu(w_gate(x)) * w_up(x))."""
        gate, up = ops.linear(x, self.w_gate[...]), ops.linear(x, self.w_up[...])
        return ops.linear(
            shard(ops.silu_gate(gate, up), "batch", "seq", "mlp"), self.w_down[...]
        )


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.dropout = cfg.dropout
        self.attn_norm = RMSNorm(cfg.d_model, rngs, eps=cfg.norm_eps)
        self.attn = Attention(cfg, rngs)
        self.mlp_norm = RMSNorm(cfg.d_model, rngs, eps=cfg.norm_eps)
        self.mlp = MLP(cfg, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream after this block."""
        x = shard(x, "batch", "seq", "embed")
        x = x + ops.dropout(
            self.attn(self.attn_norm(x), positions, segment_ids), self.dropout, site=0
        )
        return x + ops.dropout(self.mlp(self.mlp_norm(x)), self.dropout, site=1)


class Llama(nnx.Module):
    """The decoder. `hidden` and `output_embedding` make it a `jaxspeed.types.CausalLM`."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.unties, self.labelled = cfg.unties, cfg.head != "lm"
        self.embed = param(
            NORMAL, rngs, (cfg.vocab_size, cfg.d_model), ("vocab", "embed")
        )
        self.layers = Layers(lambda rngs: Block(cfg, rngs), cfg.num_layers, rngs)
        self.final_norm = RMSNorm(cfg.d_model, rngs, eps=cfg.norm_eps)
        if cfg.unties:
            self.lm_head = param(
                NORMAL, rngs, (cfg.vocab_size, cfg.d_model), ("vocab", "embed")
            )
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
            positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        return self.final_norm(
            self.layers(ops.embed(self.embed[...], inputs), positions, segment_ids)
        )

    def output_embedding(self) -> Float[Array, "V D"]:
        """Returns the output embedding."""
        if self.labelled:
            refuse_text(self.head.head)
        return self.lm_head[...] if self.unties else self.embed[...]

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


def _heads(name: str) -> Heads:
    return [
        (f"{name}ForCausalLM", "lm"),
        (f"{name}Model", "lm"),
        (f"{name}ForSequenceClassification", "classify"),
        (f"{name}ForTokenClassification", "tag"),
        (f"{name}ForTokenClassification", "value"),
    ]


_HEADS = {
    "llama": _heads("Llama"),
    "mistral": _heads("Mistral"),
    "qwen2": _heads("Qwen2"),
    "qwen3": _heads("Qwen3"),
}


def _read_config(hf: Mapping[str, Any]) -> Config:
    setting(hf, "hidden_act", ("silu",), "silu")
    setting(hf, "mlp_bias", (False,), False)
    kind = hf["model_type"]
    if kind != "qwen2":
        setting(hf, "attention_bias", (False,), False)
    length = hf.get("max_position_embeddings", 4096)
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    if window is not None and window < length:
        raise ConfigError(
            f"config.json: sliding_window={window} is not done here below max_position_embeddings={length}; "
            f"for sequences of at most {window} tokens write {window} for both"
        )
    # Since transformers 5 the rotary settings are one object.
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    setting(rope, "rope_type", ("default",), rope.get("type", "default"))
    heads, width = required(hf, "num_attention_heads"), required(hf, "hidden_size")
    return Config(
        vocab_size=required(hf, "vocab_size"),
        max_seq_len=length,
        num_layers=required(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        d_model=width,
        head_dim=hf.get("head_dim") or width // heads,
        d_ff=required(hf, "intermediate_size"),
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tie_embeddings=hf.get("tie_word_embeddings", False),
        **read_decoder_head(hf, _HEADS[kind]),
    )


def _write_config(cfg: Config) -> dict[str, Any]:
    if cfg.qkv_bias and cfg.qk_norm:
        raise ConfigError(
            "model.qkv_bias and model.qk_norm: no Hugging Face model has both, so this one cannot be exported"
        )
    return {
        "model_type": "qwen2" if cfg.qkv_bias else "qwen3" if cfg.qk_norm else "llama",
        "hidden_act": "silu",
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_seq_len,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "hidden_size": cfg.d_model,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.d_ff,
        "rope_theta": cfg.rope_theta,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        **write_decoder_head(cfg.head, cfg.num_labels, cfg.labels),
    }


def _rows(cfg: Config) -> list[Row]:
    there, here = "model.layers.{layer}.", "layers.block."
    rows = [
        Row("model.embed_tokens.weight", "embed"),
        Row(there + "input_layernorm.weight", here + "attn_norm.scale"),
        Row(there + "self_attn.q_proj.weight", here + "attn.wq", "(N H) D -> D N H"),
        Row(there + "self_attn.k_proj.weight", here + "attn.wk", "(N H) D -> D N H"),
        Row(there + "self_attn.v_proj.weight", here + "attn.wv", "(N H) D -> D N H"),
        Row(there + "self_attn.o_proj.weight", here + "attn.wo", "D (N H) -> N H D"),
        Row(there + "post_attention_layernorm.weight", here + "mlp_norm.scale"),
        Row(there + "mlp.gate_proj.weight", here + "mlp.w_gate", "F D -> D F"),
        Row(there + "mlp.up_proj.weight", here + "mlp.w_up", "F D -> D F"),
        Row(there + "mlp.down_proj.weight", here + "mlp.w_down", "D F -> F D"),
        Row("model.norm.weight", "final_norm.scale"),
    ]
    if cfg.qkv_bias:
        rows += [
            Row(f"{there}self_attn.{x}_proj.bias", f"{here}attn.b{x}", "(N H) -> N H")
            for x in "qkv"
        ]
    if cfg.qk_norm:
        rows += [
            Row(f"{there}self_attn.{x}_norm.weight", f"{here}attn.{x}_norm.scale")
            for x in "qk"
        ]
    if cfg.unties:
        rows.append(Row("lm_head.weight", "lm_head"))
    return rows + decoder_rows(cfg.head, "score")


EXCHANGE = Exchange(
    architectures=_HEADS,
    read_config=_read_config,
    write_config=_write_config,
    rows=_rows,
    prefix=r"model\.",
    ignored=r".*\.rotary_emb\.inv_freq",
    heads=r"(lm_head|score)\..*",
)
