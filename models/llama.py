# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783), as Hugging Face's LlamaForCausalLM.

RMS norm before attention and MLP, rotary positions, grouped-query attention, SwiGLU, no biases,
embeddings tied or not.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspeed import ops
from jaxspeed.nn import Layers, param
from jaxspeed.sharding import shard


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
    tie_embeddings: bool = False
    """One matrix for input and output embedding."""
    dropout: float = 0.0
    """Share dropped after attention and MLP."""

    def __post_init__(self) -> None:
        """Checks the head counts."""
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
        D, N, K, H, F = (
            self.d_model,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.d_ff,
        )
        block = 2 * D * N * H + 2 * D * K * H + 3 * D * F + 2 * D
        return (
            (1 if self.tie_embeddings else 2) * self.vocab_size * D
            + self.num_layers * block
            + D
        )

    def flops_per_token(self, seq_len: int) -> float:
        """Returns model FLOPs of forward and backward for one token, attention counted causally."""
        D, N, K, H, F = (
            self.d_model,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.d_ff,
        )
        matmul = (
            self.num_layers * (2 * D * N * H + 2 * D * K * H + 3 * D * F)
            + self.vocab_size * D
        )
        return 6.0 * matmul + 6.0 * self.num_layers * seq_len * N * H


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


class RMSNorm(nnx.Module):
    """RMS norm with scale."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.eps = cfg.norm_eps
        self.scale = param(ONES, rngs, (cfg.d_model,), ("embed",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
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

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """Returns what each position gathers from the earlier ones of its document."""
        q = shard(ops.linear(x, self.wq[...]), "batch", "seq", "heads", "head_dim")
        k = shard(ops.linear(x, self.wk[...]), "batch", "seq", "kv_heads", "head_dim")
        v = shard(ops.linear(x, self.wv[...]), "batch", "seq", "kv_heads", "head_dim")
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
        self.attn_norm = RMSNorm(cfg, rngs)
        self.attn = Attention(cfg, rngs)
        self.mlp_norm = RMSNorm(cfg, rngs)
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
        self.tied = cfg.tie_embeddings
        self.embed = param(
            NORMAL, rngs, (cfg.vocab_size, cfg.d_model), ("vocab", "embed")
        )
        self.layers = Layers(lambda rngs: Block(cfg, rngs), cfg.num_layers, rngs)
        self.final_norm = RMSNorm(cfg, rngs)
        if not cfg.tie_embeddings:
            self.lm_head = param(
                NORMAL, rngs, (cfg.vocab_size, cfg.d_model), ("vocab", "embed")
            )

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
        return self.embed[...] if self.tied else self.lm_head[...]

    def __call__(
        self,
        inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns the logits."""
        return ops.linear(
            self.hidden(inputs, positions, segment_ids), self.output_embedding().T
        )
