# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783) and their kin, as Hugging Face's LlamaForCausalLM and its other heads.

RMS norm before attention and MLP, rotary positions, grouped-query attention, SwiGLU, no biases,
embeddings tied or not. By configuration also Mistral (2310.06825: a sliding window), Qwen2
(2407.10671: biases on queries, keys and values; a window from some layer on), Qwen3 (2505.09388:
a norm on each head's queries and keys), SmolLM, and SmolLM3 (no positions in every fourth layer).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxspeed import ops
from jaxspeed.config import ConfigError
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
    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    """How rotary frequencies are lowered for contexts longer than those of pretraining (`jaxspeed.ops.RopeScaling`)."""
    rope_factor: float = 1.0
    """What low rotary frequencies are divided by."""
    rope_original_len: int = 0
    """Longest sequence of pretraining (llama3, yarn)."""
    rope_low_turns: float = 1.0
    """Turns within it up to which a frequency is low: llama3's low_freq_factor, yarn's beta_slow."""
    rope_high_turns: float = 4.0
    """Turns within it from which a frequency is left alone: llama3's high_freq_factor, yarn's beta_fast (mostly 32)."""
    rope_attention_factor: float = 1.0
    """What rotated queries and keys are multiplied by; for yarn 0.1 ln(rope_factor) + 1."""
    no_rope_interval: int = 0
    """Every layer whose number, from 1, divides by it has no positions (arXiv 2501.18795); 0: none."""
    sliding_window: int = 0
    """Tokens that a query reads, itself included; 0: all before it."""
    num_full_layers: int = 0
    """First layers without the window."""
    norm_eps: float = 1e-5
    """Added to the mean square in norms."""
    qkv_bias: bool = False
    """Biases on queries, keys and values."""
    out_bias: bool = False
    """A bias on what attention gives."""
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
        """Checks the head counts, the labels, and that no rotary or window setting is without effect."""
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
        self._check_rope()
        for name in ("sliding_window", "no_rope_interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)}: give 0 or more")
        if (
            not 0
            <= self.num_full_layers
            < max(1, self.num_layers * bool(self.sliding_window))
        ):
            raise ValueError(
                f"model.num_full_layers={self.num_full_layers}: with sliding_window={self.sliding_window} and {self.num_layers} layers no layer has a window; "
                "give fewer, or 0 for both"
            )

    def _check_rope(self) -> None:
        kinds = ("default", "linear", "llama3", "yarn")
        if self.rope_type not in kinds:
            raise ValueError(
                f"model.rope_type={self.rope_type!r}: give one of {', '.join(kinds)}"
            )
        if (self.rope_type == "default") != (self.rope_factor == 1.0):
            raise ValueError(
                f"model.rope_factor={self.rope_factor} with rope_type={self.rope_type!r}: "
                "default has the factor 1, the others a larger one"
            )
        if self.rope_type in ("llama3", "yarn") and (
            self.rope_original_len < 1 or self.rope_low_turns >= self.rope_high_turns
        ):
            raise ValueError(
                f"model.rope_type={self.rope_type!r} needs rope_original_len, not {self.rope_original_len}, "
                f"and rope_low_turns={self.rope_low_turns} below rope_high_turns={self.rope_high_turns}"
            )

    def rope_scaling(self) -> ops.RopeScaling | None:
        """Returns what is done to the rotary frequencies."""
        if self.rope_type == "default":
            return None
        return ops.RopeScaling(
            kind=self.rope_type,
            factor=self.rope_factor,
            original=self.rope_original_len,
            low_turns=self.rope_low_turns,
            high_turns=self.rope_high_turns,
            attention_factor=self.rope_attention_factor,
        )

    def build(self, rngs: nnx.Rngs) -> "Llama":
        """Returns a new model."""
        return Llama(self, rngs)

    def each_layer(self) -> tuple[tuple[bool, ...] | None, tuple[bool, ...] | None]:
        """Returns which layers have the window, and which have positions; None: all alike."""
        numbers, every = range(1, self.num_layers + 1), self.no_rope_interval
        windowed = tuple(n > self.num_full_layers for n in numbers)
        rotated = tuple(bool(n % every) for n in numbers) if every else None
        return windowed if self.num_full_layers else None, rotated

    def num_params(self) -> int:
        """Returns the number of parameters."""
        D, N, K, H = self.d_model, self.num_heads, self.num_kv_heads, self.head_dim
        block = self.block_weights() + 2 * D
        block += (N + 2 * K) * H * self.qkv_bias + D * self.out_bias
        block += 2 * H * self.qk_norm
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
        matmul = self.num_layers * self.active_weights()
        matmul += self.vocab_size * self.d_model * (self.head == "lm")
        heads = self.num_heads * self.head_dim
        window = min(self.sliding_window or seq_len, seq_len)
        windowed = window * (2 - window / seq_len)  # twice the mean number of keys
        full = self.num_full_layers
        lengths = full * seq_len + (self.num_layers - full) * windowed
        return 6.0 * matmul + 6.0 * lengths * heads

    def active_weights(self) -> int:
        """Returns the number of weights that a token is multiplied by in one block."""
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.d_model * (heads + 3 * self.d_ff)

    def block_weights(self) -> int:
        """Returns the number of weights in the matrices of one block."""
        return self.active_weights()


LLAMA2_7B = Config()
LLAMA3_8B = Config(
    vocab_size=128_256,
    max_seq_len=8192,
    num_kv_heads=8,
    d_ff=14_336,
    rope_theta=500_000.0,
)
LLAMA3_70B = dataclasses.replace(
    LLAMA3_8B, num_layers=80, num_heads=64, d_model=8192, d_ff=28_672
)
LLAMA3_405B = dataclasses.replace(
    LLAMA3_8B, num_layers=126, num_heads=128, d_model=16_384, d_ff=53_248
)
LLAMA31_8B = dataclasses.replace(
    LLAMA3_8B,
    max_seq_len=131_072,
    rope_type="llama3",
    rope_factor=8.0,
    rope_original_len=8192,
)
MISTRAL_7B = Config(
    max_seq_len=32_768, num_kv_heads=8, d_ff=14_336, sliding_window=4096
)
"""Of version 0.1; the later ones have no window."""

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
        self.theta, self.scaling = cfg.rope_theta, cfg.rope_scaling()
        self.window = cfg.sliding_window
        self.wq = param(NORMAL, rngs, (D, N, H), ("embed", "heads", "head_dim"))
        self.wk = param(NORMAL, rngs, (D, K, H), ("embed", "kv_heads", "head_dim"))
        self.wv = param(NORMAL, rngs, (D, K, H), ("embed", "kv_heads", "head_dim"))
        self.wo = param(NORMAL, rngs, (N, H, D), ("heads", "head_dim", "embed"))
        self.biased, self.normed = cfg.qkv_bias, cfg.qk_norm
        if cfg.qkv_bias:
            self.bq = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
            self.bk = param(ZEROS, rngs, (K, H), ("kv_heads", "head_dim"))
            self.bv = param(ZEROS, rngs, (K, H), ("kv_heads", "head_dim"))
        self.bo = param(ZEROS, rngs, (D,), ("embed",)) if cfg.out_bias else None
        if cfg.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(H, rngs, eps=cfg.norm_eps, dim="head_dim") for _ in range(2)
            )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        windowed: Bool[Array, ""] | None,
    ) -> Float[Array, "B T D"]:
        """Returns what each position gathers from the earlier ones of its document."""
        biases = (self.bq[...], self.bk[...], self.bv[...]) if self.biased else ()
        q, k, v = ops.linears(x, (self.wq, self.wk, self.wv), biases)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (
            ops.rotate(x, positions, theta=self.theta, scaling=self.scaling)
            for x in (q, k)
        )
        attended = ops.attention(
            q, k, v, segment_ids, window=self.window, windowed=windowed
        )
        attended = shard(attended, "batch", "seq", "heads", "head_dim")
        bo = None if self.bo is None else self.bo[...]
        return ops.linear(attended, self.wo, bo, contract=2)


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, F = cfg.d_model, cfg.d_ff
        self.w_gate = param(NORMAL, rngs, (D, F), ("embed", "mlp"))
        self.w_up = param(NORMAL, rngs, (D, F), ("embed", "mlp"))
        self.w_down = param(NORMAL, rngs, (F, D), ("mlp", "embed"))

    @in_tiles
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Returns w_down(silu(w_gate(x)) * w_up(x)), of padding too."""
        del segment_ids
        gate, up = ops.linears(x, (self.w_gate, self.w_up))
        return ops.linear(
            shard(ops.silu_gate(gate, up), "batch", "seq", "mlp"), self.w_down
        )


MakeMlp = Callable[[Any, nnx.Rngs], nnx.Module]
"""From a family's Config to what stands behind attention in a block: `(x, segment_ids) -> x`."""


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(
        self,
        cfg: Config,
        rngs: nnx.Rngs,
        make_mlp: MakeMlp = MLP,
    ) -> None:
        self.dropout = cfg.dropout
        self.attn_norm = RMSNorm(cfg.d_model, rngs, eps=cfg.norm_eps)
        self.attn = Attention(cfg, rngs)
        self.mlp_norm = RMSNorm(cfg.d_model, rngs, eps=cfg.norm_eps)
        self.mlp: Any = make_mlp(cfg, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        windowed: Bool[Array, ""] | None = None,
        rotated: Bool[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream after this block."""
        if rotated is not None:
            positions = jnp.where(rotated, positions, 0)
        attended = self.attn(self.attn_norm(x), positions, segment_ids, windowed)
        x = x + ops.dropout(attended, self.dropout, site=0)
        mixed = self.mlp(self.mlp_norm(x), segment_ids)
        return x + ops.dropout(mixed, self.dropout, site=1)


class Llama(nnx.Module):
    """The decoder. `hidden` and `output_embedding` make it a `jaxspeed.types.CausalLM`."""

    def __init__(
        self,
        cfg: Config,
        rngs: nnx.Rngs,
        make_mlp: MakeMlp = MLP,
    ) -> None:
        self.unties, self.labelled = cfg.unties, cfg.head != "lm"
        self.each = cfg.each_layer()
        self.embed = param(
            NORMAL, rngs, (cfg.vocab_size, cfg.d_model), ("vocab", "embed")
        )
        make_block = lambda rngs: Block(cfg, rngs, make_mlp)
        self.layers = Layers(make_block, cfg.num_layers, rngs)
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
            positions = ops.row_places(inputs.shape)
        each = tuple(flags and jnp.asarray(flags) for flags in self.each)
        x = ops.embed(self.embed, inputs)
        return self.final_norm(self.layers(x, positions, segment_ids, each=each))

    def output_embedding(self) -> Parameter:
        """Returns the output embedding."""
        if self.labelled:
            refuse_text(self.head.head)
        return self.lm_head if self.unties else self.embed

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


_HEADS: dict[str, Heads] = {
    "llama": _heads("Llama"),
    "mistral": _heads("Mistral"),
    "qwen2": _heads("Qwen2"),
    "qwen3": _heads("Qwen3"),
    "smollm3": _heads("SmolLM3"),
}


def heads(kind: str) -> Heads:
    """Returns what Hugging Face calls the heads of this kind of model."""
    return _HEADS[kind]


_NOT_WRITTEN = ("dropout", "head", "num_labels", "labels")
"""Fields that config.json has no key for, or that `jaxspeed.hf` writes."""


UNSAID: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
    "smollm3": {
        "max_position_embeddings": 32_768, "num_key_value_heads": 4, "rope_theta": 2e6,
        "no_rope_layer_interval": 4, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""What transformers takes for a key that config.json lacks, where kinds differ."""


def _read_config(hf: Mapping[str, Any]) -> Config:
    kind = hf["model_type"]
    hf = UNSAID[kind] | dict(hf)
    setting(hf, "hidden_act", ("silu",), "silu")
    setting(hf, "mlp_bias", (False,), False)
    bias = False
    if kind in ("llama", "qwen3", "smollm3"):
        bias = hf.get("attention_bias", False)
    heads, width = required(hf, "num_attention_heads"), required(hf, "hidden_size")
    return Config(
        vocab_size=required(hf, "vocab_size"),
        max_seq_len=hf["max_position_embeddings"],
        num_layers=required(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        d_model=width,
        head_dim=hf.get("head_dim") or width // heads,
        d_ff=required(hf, "intermediate_size"),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        qk_norm=kind == "qwen3",
        tie_embeddings=hf.get("tie_word_embeddings", False),
        **read_decoder_head(hf, _HEADS[kind]),
        **_read_rope(hf),
        **_read_layers(hf),
    )


def _read_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary fields. Since transformers 5 they are one object over there."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    kinds = ("default", "linear", "llama3", "yarn")
    setting({"rope_type": kind}, "rope_type", kinds)
    setting(hf, "partial_rotary_factor", (None, 1.0))
    setting(rope, "partial_rotary_factor", (None, 1.0))
    setting(rope, "truncate", (True,), True)
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0)
    fields: dict[str, Any] = {"rope_theta": theta}
    if kind == "default":
        return fields
    original = hf.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings", hf["max_position_embeddings"]
    )
    if kind == "yarn" and rope.get("factor") is None:
        rope = {**rope, "factor": hf["max_position_embeddings"] / original}
    factor = float(required(rope, "factor"))
    if factor == 1:  # it does nothing
        return fields
    fields |= {"rope_type": kind, "rope_factor": factor}
    if kind == "linear":
        return fields
    if kind == "llama3":
        low, high = (required(rope, f"{x}_freq_factor") for x in ("low", "high"))
    else:
        low, high = rope.get("beta_slow") or 1, rope.get("beta_fast") or 32
        fields["rope_attention_factor"] = _yarn_attention_factor(rope, factor)
    return fields | {
        "rope_original_len": original,
        "rope_low_turns": float(low),
        "rope_high_turns": float(high),
    }


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    scaled = lambda by: 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return scaled(above) / scaled(below) if above and below else scaled(1)


def _read_layers(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of what differs between layers: windows, and none of positions."""
    kind, layers = hf["model_type"], required(hf, "num_hidden_layers")
    if kind == "mistral":
        return {"sliding_window": hf["sliding_window"] or 0}
    if kind == "smollm3":
        setting(hf, "use_sliding_window", (False,), False)
        every = hf["no_rope_layer_interval"]
        rotated = [int(bool(n % every)) for n in range(1, layers + 1)]
        if hf.get("no_rope_layers") not in (None, rotated):
            raise ConfigError(
                f"config.json: no_rope_layers={hf['no_rope_layers']} is not done here; this family leaves positions out of every no_rope_layer_interval-th layer"
            )
        return {"no_rope_interval": every}
    window = hf.get("sliding_window", 4096)
    if kind == "llama" or not hf.get("use_sliding_window") or not window:
        return {}
    full = min(hf.get("max_window_layers", 28), layers)
    types = hf.get("layer_types") or _layer_types(full, layers)
    full = types.count("full_attention")
    if types != _layer_types(full, layers):
        raise ConfigError(
            f"config.json: layer_types={types} is not done here; this family has full_attention in its first layers, sliding_attention in the others"
        )
    return {"sliding_window": window, "num_full_layers": full} if full < layers else {}


def _layer_types(full: int, layers: int) -> list[str]:
    return ["full_attention"] * full + ["sliding_attention"] * (layers - full)


def _write_config(cfg: Config) -> dict[str, Any]:
    kinds = {
        "smollm3": cfg.no_rope_interval,
        "qwen3": cfg.qk_norm,
        "qwen2": cfg.qkv_bias and not cfg.out_bias,
        "mistral": cfg.sliding_window,
        "llama": True,
    }
    settings = {
        "model_type": next(kind for kind, holds in kinds.items() if holds),
        "hidden_act": "silu",
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_seq_len,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "hidden_size": cfg.d_model,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.d_ff,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        **write_decoder_head(cfg.head, cfg.num_labels, cfg.labels),
        "attention_bias": cfg.out_bias,
        "rope_theta": cfg.rope_theta,
    }
    if cfg.rope_type != "default":
        settings["rope_scaling"] = _write_rope(cfg)
    if cfg.sliding_window and not cfg.no_rope_interval:
        settings |= {
            "sliding_window": cfg.sliding_window,
            "use_sliding_window": True,
            "max_window_layers": cfg.num_full_layers,
        }
    if cfg.no_rope_interval:
        settings["no_rope_layer_interval"] = cfg.no_rope_interval
        settings["pad_token_id"] = None  # else one beyond a small vocabulary
    check_written(cfg, settings, _read_config)
    return settings


def check_written(
    cfg: Any,
    settings: Mapping[str, Any],
    read_config: Callable[[Mapping[str, Any]], Any],
) -> None:
    """Raises unless the settings are read as the Config that they were written for.

    Raises:
        ConfigError: a field of it is lost.
    """
    outside = {name: getattr(cfg, name) for name in _NOT_WRITTEN}
    again = dataclasses.replace(read_config(settings), **outside)
    if again != cfg:
        fields = (f.name for f in dataclasses.fields(cfg))
        lost = [f for f in fields if getattr(again, f) != getattr(cfg, f)]
        raise ConfigError(
            f"model.{lost[0]}={getattr(cfg, lost[0])} cannot be exported: no Hugging Face model has it together with the other settings ({settings['model_type']} comes nearest)"
        )


def _write_rope(cfg: Config) -> dict[str, Any]:
    """Returns the scaling as transformers 4 writes it and 5 still reads it."""
    rope: dict[str, Any] = {"rope_type": cfg.rope_type, "factor": cfg.rope_factor}
    if cfg.rope_type == "linear":
        return rope
    rope["original_max_position_embeddings"] = cfg.rope_original_len
    low, high = cfg.rope_low_turns, cfg.rope_high_turns
    if cfg.rope_type == "llama3":
        return rope | {"low_freq_factor": low, "high_freq_factor": high}
    factor = cfg.rope_attention_factor
    return rope | {"beta_slow": low, "beta_fast": high, "attention_factor": factor}


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
    if cfg.out_bias:
        rows.append(Row(there + "self_attn.o_proj.bias", here + "attn.bo"))
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
    ignored=r".*\.rotary_emb\.inv_freq|lm_head\.weight",
    heads=r"(lm_head|score)\..*",
)
