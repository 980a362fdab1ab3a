# SPDX-License-Identifier: Apache-2.0
"""Decoders with experts: Mixtral (arXiv 2401.04088), Qwen2-MoE (2407.10671) and Qwen3-MoE (2505.09388).

A Llama (`models.llama`) whose MLP is a mixture: a router sends each token to a few of E experts,
SwiGLU each, and adds up what they make of it. By configuration a shared expert beside them, which
every token goes to (Qwen2-MoE), or DeepSpeed's residual mixture (PR-MoE, 2201.05596 section 3.1).
What is dropped, drawn and added to the loss in training is the run's: `jaxspeed.config.MoeConfig`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspeed import ops
from jaxspeed.hf import Row, required, setting
from jaxspeed.nn import param
from models import llama


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """Sizes of a decoder with experts; `d_ff` is the width of each."""

    num_experts: int = 8
    """Experts of a layer (E)."""
    experts_per_token: int = 2
    """Experts that a token goes to (k)."""
    normalise_weights: bool = True
    """Whether the weights of a token's experts sum to 1, or are what the softmax over all gives them."""
    d_shared: int = 0
    """Width of a shared expert beside them, weighted by a sigmoid; 0: none."""
    residual: bool = False
    """A dense MLP beside them, the two weighted by a softmax (PR-MoE)."""

    def __post_init__(self) -> None:
        """Checks the counts of experts, and what `models.llama` checks."""
        super().__post_init__()
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"model.experts_per_token={self.experts_per_token}: there are num_experts={self.num_experts}; give 1 to {self.num_experts}"
            )
        if self.residual and self.d_shared:
            raise ValueError(
                f"model.residual: there is a shared expert of d_shared={self.d_shared} already; give one of them"
            )

    def build(self, rngs: nnx.Rngs) -> "Mixtral":
        """Returns a new model."""
        return Mixtral(self, rngs)

    def active_weights(self) -> int:
        """Returns the number of weights that a token is multiplied by in one block."""
        return self._weights(self.experts_per_token)

    def block_weights(self) -> int:
        """Returns the number of weights in the matrices of one block."""
        biases = 2 * self.residual
        return self._weights(self.num_experts) + biases

    def _weights(self, experts: int) -> int:
        """Returns the weights of a block that has so many experts beside its router."""
        beside = self.d_ff * self.residual + self.d_shared
        gates = self.num_experts + bool(self.d_shared) + 2 * self.residual
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        mlps = 3 * (experts * self.d_ff + beside)
        return self.d_model * (attention + mlps + gates)


MIXTRAL_8X7B = Config(
    max_seq_len=32_768, num_kv_heads=8, d_ff=14_336, rope_theta=1_000_000.0
)
QWEN15_MOE_A2_7B = Config(
    vocab_size=151_936, max_seq_len=8192, num_layers=24, num_heads=16, num_kv_heads=16,
    d_model=2048, d_ff=1408, num_experts=60, experts_per_token=4,
    normalise_weights=False, d_shared=5632, rope_theta=1_000_000.0, norm_eps=1e-6,
    qkv_bias=True,
)  # fmt: skip
QWEN3_30B_A3B = Config(
    vocab_size=151_936, max_seq_len=40_960, num_layers=48, num_heads=32, num_kv_heads=4,
    d_model=2048, head_dim=128, d_ff=768, num_experts=128, experts_per_token=8,
    rope_theta=1_000_000.0, norm_eps=1e-6, qk_norm=True,
)  # fmt: skip

NORMAL = jax.nn.initializers.normal(0.02)
ZEROS = jax.nn.initializers.zeros


class Mixture(nnx.Module):
    """A router and its experts, and what stands beside them."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, E, F = cfg.d_model, cfg.num_experts, cfg.d_ff
        self.each, self.normalise = cfg.experts_per_token, cfg.normalise_weights
        self.router = param(NORMAL, rngs, (D, E), ("embed", "router"))
        wide, narrow = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        self.w_gate = param(NORMAL, rngs, (E, D, F), wide)
        self.w_up = param(NORMAL, rngs, (E, D, F), wide)
        self.w_down = param(NORMAL, rngs, (E, F, D), narrow)
        self.shares, self.residual = bool(cfg.d_shared), cfg.residual
        if cfg.d_shared:
            width = dataclasses.replace(cfg, d_ff=cfg.d_shared)
            self.shared = llama.MLP(width, rngs)
            self.shared_gate = param(NORMAL, rngs, (D, 1), ("embed", "router"))
        if cfg.residual:
            self.dense = llama.MLP(cfg, rngs)
            self.mix = param(NORMAL, rngs, (D, 2), ("embed", "router"))
            self.mix_bias = param(ZEROS, rngs, (2,), ("router",))

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Returns what the experts of each token make of it; padding goes to none."""
        routing = ops.route(
            x,
            self.router[...],
            each=self.each,
            normalise=self.normalise,
            segment_ids=segment_ids,
        )
        y = ops.experts(x, routing, self.w_gate[...], self.w_up[...], self.w_down[...])
        if self.shares:
            gate = jax.nn.sigmoid(ops.linear(x, self.shared_gate))
            y = y + gate * self.shared(x)
        if self.residual:
            mix = ops.linear(x, self.mix, self.mix_bias[...])
            mix = jax.nn.softmax(mix, axis=-1).astype(y.dtype)
            y = y * mix[..., :1] + self.dense(x) * mix[..., 1:]
        return y


class Mixtral(llama.Llama):
    """The decoder."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        super().__init__(cfg, rngs, Mixture)


_DENSE = {
    "mixtral": ("mistral", "Mixtral", "Mistral"),
    "qwen2_moe": ("qwen2", "Qwen2Moe", "Qwen2"),
    "qwen3_moe": ("qwen3", "Qwen3Moe", "Qwen3"),
}
"""By kind, the kind that it would be without experts, and what the names of their classes begin with."""

_UNSAID: dict[str, dict[str, Any]] = {
    "mixtral": {
        "max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": None,
        "rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "max_position_embeddings": 32_768, "num_key_value_heads": 16,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 5632, "qkv_bias": True,
    },
    "qwen3_moe": {
        "max_position_embeddings": 32_768, "num_key_value_heads": 4, "head_dim": None,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
    },
}  # fmt: skip
"""What transformers takes for a key that config.json lacks."""


def _read_config(hf: Mapping[str, Any]) -> Config:
    kind = hf["model_type"]
    dense, theirs, without = _DENSE[kind]
    hf = _UNSAID[kind] | dict(hf)
    if kind != "mixtral":
        setting(hf, "decoder_sparse_step", (1,), 1)
        setting(hf, "mlp_only_layers", ([], None), [])
        hf["intermediate_size"] = required(hf, "moe_intermediate_size")
    if kind == "qwen2_moe":
        setting(hf, "qkv_bias", (True,), True)
    if hf.get("architectures"):
        hf["architectures"] = [
            name.replace(theirs, without) for name in hf["architectures"]
        ]
    plain = llama.EXCHANGE.read_config(hf | {"model_type": dense})
    return Config(
        **vars(plain),
        num_experts=_num_experts(hf),
        experts_per_token=required(hf, "num_experts_per_tok"),
        normalise_weights=kind == "mixtral" or hf["norm_topk_prob"],
        d_shared=hf["shared_expert_intermediate_size"] if kind == "qwen2_moe" else 0,
    )


def _num_experts(hf: Mapping[str, Any]) -> int:
    """Returns E; transformers has called it one way and the other in all three kinds."""
    given = hf.get("num_experts") or hf.get("num_local_experts")
    return given or {"mixtral": 8, "qwen2_moe": 60, "qwen3_moe": 128}[hf["model_type"]]


def _kind_of(cfg: Config) -> str:
    if cfg.d_shared:
        return "qwen2_moe"
    return "qwen3_moe" if cfg.qk_norm else "mixtral"


def _write_config(cfg: Config) -> dict[str, Any]:
    kind = _kind_of(cfg)
    names = [f.name for f in dataclasses.fields(llama.Config)]
    plain = llama.Config(**{name: getattr(cfg, name) for name in names})
    settings: dict[str, Any] = {
        **llama.EXCHANGE.write_config(plain),
        "model_type": kind,
        "num_local_experts" if kind == "mixtral" else "num_experts": cfg.num_experts,
        "num_experts_per_tok": cfg.experts_per_token,
    }
    if kind == "mixtral":
        settings.setdefault("sliding_window", None)
    else:
        settings |= {
            "moe_intermediate_size": cfg.d_ff,
            "norm_topk_prob": cfg.normalise_weights,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if cfg.d_shared:
        settings |= {"shared_expert_intermediate_size": cfg.d_shared}
    llama.check_written(cfg, settings, _read_config)
    return settings


def _rows(cfg: Config) -> list[Row]:
    kind = _kind_of(cfg)
    here = "layers.block.mlp."
    rows = [row for row in llama.EXCHANGE.rows(cfg) if ".mlp." not in row.theirs]
    there = "model.layers.{layer}.mlp."
    names = ("gate_proj", "up_proj", "down_proj")
    if kind == "mixtral":
        there, names = "model.layers.{layer}.block_sparse_moe.", ("w1", "w3", "w2")
    rows.append(Row(there + "gate.weight", here + "router", "E D -> D E"))
    for name, ours in zip(names, ("w_gate", "w_up", "w_down"), strict=True):
        tensor = there + "experts.{expert}." + name + ".weight"
        rows.append(Row(tensor, here + ours, "N K -> K N"))
        if cfg.d_shared:
            tensor = f"{there}shared_expert.{name}.weight"
            rows.append(Row(tensor, f"{here}shared.{ours}", "N K -> K N"))
    if cfg.d_shared:
        tensor = there + "shared_expert_gate.weight"
        rows.append(Row(tensor, here + "shared_gate", "G D -> D G"))
    return rows


def _grow(dense: llama.Config, experts: int, each: int) -> Config:
    """Returns the Config of a mixture whose experts have the shape of a dense model's MLP."""
    return Config(**vars(dense), num_experts=experts, experts_per_token=each)


EXCHANGE = llama.EXCHANGE._replace(
    architectures={
        kind: [
            (name.replace(without, theirs), head) for name, head in llama.heads(dense)
        ]
        for kind, (dense, theirs, without) in _DENSE.items()
    },
    read_config=_read_config,
    write_config=_write_config,
    rows=_rows,
    grown_from=dict.fromkeys(("llama", "mistral", "qwen3"), _grow),
)
