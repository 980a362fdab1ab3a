# SPDX-License-Identifier: Apache-2.0
"""Vision Transformer (arXiv 2010.11929) with a class per image, as Hugging Face's ViTForImageClassification and ViTModel.

An image is cut into patches, each a token; before them a class token, whose last hidden state is
classified. Learned positions, pre-layer-norm blocks, biases, erf GELU. Pixels come as (height,
width, channels), normalised by whoever reads the image; images are square and of one size.
Differs: dropout is one rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspeed import ops
from jaxspeed.hf import (
    Exchange,
    Heads,
    Row,
    head_of,
    read_labels,
    required,
    setting,
    write_labels,
)
from jaxspeed.nn import Layers, in_tiles, param
from jaxspeed.sharding import shard
from models.heads import Labels, check_labels


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a ViT."""

    image_size: int = 224
    """Height and width of an image."""
    patch_size: int = 16
    """Height and width of a patch; divides image_size."""
    num_channels: int = 3
    """Values per pixel."""
    num_layers: int = 12
    """Blocks (L)."""
    num_heads: int = 12
    """Attention heads (N); head_dim is d_model / num_heads."""
    d_model: int = 768
    """Width of the residual stream (D)."""
    d_ff: int = 3072
    """Width of the MLP (F)."""
    norm_eps: float = 1e-12
    """Added to the variance in layer norms."""
    dropout: float = 0.0
    """Share dropped after embedding, attention and MLP."""
    head: Literal["classify", "none"] = "classify"
    """What it gives: logits of the image's class, or the last hidden states."""
    num_labels: int = 2
    """Classes (C)."""
    labels: tuple[str, ...] = ()
    """Their names, if known."""

    def __post_init__(self) -> None:
        """Checks that patches fill the image, and heads the width; and the labels."""
        check_labels(self.num_labels, len(self.labels))
        for name in ("patch_size", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: give 1 or more")
        for name, by in (("image_size", "patch_size"), ("d_model", "num_heads")):
            size, part = getattr(self, name), getattr(self, by)
            if size % part:
                raise ValueError(
                    f"model.{name}={size} does not divide by model.{by}={part}; nearest legal: {size // part * part or part}"
                )

    @property
    def head_dim(self) -> int:
        """Width of one head (H)."""
        return self.d_model // self.num_heads

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """Shape of one image: height, width, channels."""
        return self.image_size, self.image_size, self.num_channels

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Values of a patch."""
        return self.patch_size**2 * self.num_channels

    def build(self, rngs: nnx.Rngs) -> "ViT":
        """Returns a new model."""
        return ViT(self, rngs)

    def num_params(self) -> int:
        """Returns the number of parameters."""
        D, F = self.d_model, self.d_ff
        block = 4 * D * D + 4 * D + 2 * D * F + F + D + 4 * D
        embedding = self.patch_values * D + D + (self.num_patches + 2) * D
        head = (D + 1) * self.num_labels * (self.head == "classify")
        return embedding + self.num_layers * block + 2 * D + head

    def flops_per_token(self, seq_len: int) -> float:
        """Returns model FLOPs of forward and backward for an image, spread over `seq_len` tokens.

        The pixels have no gradient, so of the patches' product only two thirds are done.
        """
        D, F, S = self.d_model, self.d_ff, self.num_patches + 1
        blocks = self.num_layers * S * (4 * D * D + 2 * D * F)
        scores = self.num_layers * S * S * 2 * D
        patches = self.num_patches * self.patch_values * D * 2 / 3
        head = D * self.num_labels * (self.head == "classify")
        return 6.0 * (blocks + scores + patches + head) / seq_len


BASE = Config()
LARGE = Config(num_layers=24, num_heads=16, d_model=1024, d_ff=4096)

NORMAL = jax.nn.initializers.normal(0.02)
ZEROS = jax.nn.initializers.zeros
ONES = jax.nn.initializers.ones


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.eps = cfg.norm_eps
        self.scale = param(ONES, rngs, (cfg.d_model,), ("embed",))
        self.bias = param(ZEROS, rngs, (cfg.d_model,), ("embed",))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns x normalised."""
        return ops.layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


class Attention(nnx.Module):
    """Multi-head self-attention of all patches to all."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, N, H = cfg.d_model, cfg.num_heads, cfg.head_dim
        self.wq = param(NORMAL, rngs, (D, N, H), ("embed", "heads", "head_dim"))
        self.wk = param(NORMAL, rngs, (D, N, H), ("embed", "heads", "head_dim"))
        self.wv = param(NORMAL, rngs, (D, N, H), ("embed", "heads", "head_dim"))
        self.wo = param(NORMAL, rngs, (N, H, D), ("heads", "head_dim", "embed"))
        self.bq = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bk = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bv = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bo = param(ZEROS, rngs, (D,), ("embed",))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns what each token gathers from all."""
        heads = ("batch", "seq", "heads", "head_dim")
        q, k, v = ops.linears(
            x,
            (self.wq, self.wk, self.wv),
            (self.bq[...], self.bk[...], self.bv[...]),
        )
        attended = shard(ops.attention(q, k, v, causal=False), *heads)
        return ops.linear(attended, self.wo, self.bo[...], contract=2)


class MLP(nnx.Module):
    """Two products with a GELU between."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, F = cfg.d_model, cfg.d_ff
        self.w_up = param(NORMAL, rngs, (D, F), ("embed", "mlp"))
        self.b_up = param(ZEROS, rngs, (F,), ("mlp",))
        self.w_down = param(NORMAL, rngs, (F, D), ("mlp", "embed"))
        self.b_down = param(ZEROS, rngs, (D,), ("embed",))

    @in_tiles
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns w_down gelu(w_up x), with biases."""
        up = shard(ops.linear(x, self.w_up, self.b_up[...]), "batch", "seq", "mlp")
        inner = jax.nn.gelu(up, approximate=False)
        return ops.linear(inner, self.w_down, self.b_down[...])


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.dropout = cfg.dropout
        self.attn_norm = LayerNorm(cfg, rngs)
        self.attn = Attention(cfg, rngs)
        self.mlp_norm = LayerNorm(cfg, rngs)
        self.mlp = MLP(cfg, rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns the residual stream after this block."""
        x = x + ops.dropout(self.attn(self.attn_norm(x)), self.dropout, site=0)
        return x + ops.dropout(self.mlp(self.mlp_norm(x)), self.dropout, site=1)


class Patches(nnx.Module):
    """An image as a class token and a token per patch, with positions."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        size, D = cfg.patch_size, cfg.d_model
        self.wanted, self.size = cfg.feature_shape, size
        self.w_patch = param(
            NORMAL, rngs, (size, size, cfg.num_channels, D), ("patch",) * 3 + ("embed",)
        )
        self.b_patch = param(ZEROS, rngs, (D,), ("embed",))
        self.class_token = param(NORMAL, rngs, (D,), ("embed",))
        self.positions = param(NORMAL, rngs, (cfg.num_patches + 1, D), ("seq", "embed"))

    def __call__(
        self, pixels: Float[Array, "B height width channels"]
    ) -> Float[Array, "B S D"]:
        """Returns the tokens: patches row by row, one product for all."""
        ops.need_whole("an image")
        B, *shape = pixels.shape
        if tuple(shape) != self.wanted:
            raise ValueError(
                f"inputs are images of {tuple(shape)}, the model's are {self.wanted} (height, width, channels); resize them, or set model.image_size"
            )
        rows = shape[0] // self.size
        cut = pixels.reshape(B, rows, self.size, rows, self.size, shape[2])
        cut = cut.swapaxes(2, 3).reshape(B, rows * rows, self.size, self.size, shape[2])
        x = ops.linear(cut, self.w_patch, self.b_patch[...], contract=3)
        first = jnp.broadcast_to(
            self.class_token[...].astype(x.dtype).reshape(1, 1, -1), (B, 1, x.shape[2])
        )
        x = jnp.concatenate([first, x], axis=1)
        places = ops.row_places(x.shape[:2])
        return x + ops.embed(self.positions, places)


class ViT(nnx.Module):
    """The encoder with its classifier, a `jaxspeed.types.Labeller` of images."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.dropout, self.labelled = cfg.dropout, cfg.head == "classify"
        self.patches = Patches(cfg, rngs)
        self.layers = Layers(lambda rngs: Block(cfg, rngs), cfg.num_layers, rngs)
        self.final_norm = LayerNorm(cfg, rngs)
        if self.labelled:
            self.head = Labels(cfg.d_model, cfg.num_labels, rngs)

    def encode(
        self, inputs: Float[Array, "B height width channels"]
    ) -> Float[Array, "B S D"]:
        """Returns the normalised last hidden states, the class token's first."""
        x = ops.dropout(self.patches(inputs), self.dropout, site=2)
        return self.final_norm(self.layers(x))

    def __call__(
        self,
        inputs: Float[Array, "B height width channels"],
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        token_types: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B ..."]:
        """Returns the head's result; see `Config.head`. Images have no positions, segments or types."""
        del positions, segment_ids, token_types
        hidden = self.encode(inputs)
        return self.head(hidden[:, 0]) if self.labelled else hidden


_HEADS: Heads = [("ViTForImageClassification", "classify"), ("ViTModel", "none")]


def _read_config(hf: Mapping[str, Any]) -> Config:
    setting(hf, "hidden_act", ("gelu",), "gelu")
    setting(hf, "qkv_bias", (True,), True)
    return Config(
        image_size=required(hf, "image_size"),
        patch_size=required(hf, "patch_size"),
        num_channels=hf.get("num_channels", 3),
        num_layers=required(hf, "num_hidden_layers"),
        num_heads=required(hf, "num_attention_heads"),
        d_model=required(hf, "hidden_size"),
        d_ff=required(hf, "intermediate_size"),
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        head=cast(Any, head_of(hf, _HEADS)),
        **read_labels(hf),
    )


def _write_config(cfg: Config) -> dict[str, Any]:
    return {
        "model_type": "vit",
        "hidden_act": "gelu",
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "num_channels": cfg.num_channels,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "layer_norm_eps": cfg.norm_eps,
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": True,
        **write_labels(cfg.num_labels, cfg.labels),
    }


def _rows(cfg: Config) -> list[Row]:
    root = "vit." if cfg.head == "classify" else ""
    there, here = root + "encoder.layer.{layer}.", "layers.block."
    rows = [
        Row(root + "embeddings.cls_token", "patches.class_token", "() () D -> D"),
        Row(
            root + "embeddings.position_embeddings",
            "patches.positions",
            "() S D -> S D",
        ),
        Row(
            root + "embeddings.patch_embeddings.projection.weight",
            "patches.w_patch",
            "D C Y X -> Y X C D",
        ),
        Row(root + "embeddings.patch_embeddings.projection.bias", "patches.b_patch"),
    ]
    for name, x in (("query", "q"), ("key", "k"), ("value", "v")):
        at = f"{there}attention.attention.{name}"
        rows += [
            Row(f"{at}.weight", f"{here}attn.w{x}", "(N H) D -> D N H"),
            Row(f"{at}.bias", f"{here}attn.b{x}", "(N H) -> N H"),
        ]
    rows += [
        Row(
            there + "attention.output.dense.weight",
            here + "attn.wo",
            "D (N H) -> N H D",
        ),
        Row(there + "attention.output.dense.bias", here + "attn.bo"),
        Row(there + "intermediate.dense.weight", here + "mlp.w_up", "F D -> D F"),
        Row(there + "intermediate.dense.bias", here + "mlp.b_up"),
        Row(there + "output.dense.weight", here + "mlp.w_down", "D F -> F D"),
        Row(there + "output.dense.bias", here + "mlp.b_down"),
    ]
    for theirs, ours in (
        (there + "layernorm_before", here + "attn_norm"),
        (there + "layernorm_after", here + "mlp_norm"),
        (root + "layernorm", "final_norm"),
    ):
        rows += [
            Row(theirs + ".weight", ours + ".scale"),
            Row(theirs + ".bias", ours + ".bias"),
        ]
    if cfg.head == "classify":
        rows += [
            Row("classifier.weight", "head.w", "C D -> D C"),
            Row("classifier.bias", "head.b"),
        ]
    return rows


EXCHANGE = Exchange(
    architectures={"vit": _HEADS},
    read_config=_read_config,
    write_config=_write_config,
    rows=_rows,
    prefix=r"vit\.",
    ignored=r"(vit\.)?pooler\..*",
    heads=r"classifier\..*",
)
