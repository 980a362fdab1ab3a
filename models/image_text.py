# SPDX-License-Identifier: Apache-2.0
"""Text about an image: a ViT (arXiv 2010.11929) that a GPT-2 reads, as Hugging Face's VisionEncoderDecoderModel.

The image's tokens are the memory of a GPT-2 decoder that attends to them in every block, between
its self-attention and its MLP; where the widths differ, a projection is between. A caption is
text from the start token on; a question about the image is the decoder's prompt, its answer the
continuation. Pixels come as (height, width, channels), normalised by whoever reads the image.
Differs: dropout is one rate; the encoder's pooler, which nothing reads, is left out.
"""

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
    """Sizes of an image encoder and of the decoder that reads it, and the text's special tokens."""

    image_size: int = 224
    """Height and width of an image."""
    patch_size: int = 16
    """Height and width of a patch; divides image_size."""
    num_channels: int = 3
    """Values per pixel."""
    num_image_layers: int = 12
    """Blocks of the encoder."""
    num_image_heads: int = 12
    """Attention heads of the encoder."""
    d_image: int = 768
    """Width of the encoder's residual stream."""
    d_image_ff: int = 3072
    """Width of the encoder's MLP."""
    image_norm_eps: float = 1e-12
    """Added to the variance in the encoder's layer norms."""
    vocab_size: int = 50_257
    """Rows of the embedding (V)."""
    max_seq_len: int = 1024
    """Learned positions of the text."""
    num_layers: int = 12
    """Blocks of the decoder (L)."""
    num_heads: int = 12
    """Attention heads of the decoder (N); head_dim is d_model / num_heads."""
    d_model: int = 768
    """Width of the decoder's residual stream (D)."""
    d_ff: int = 0
    """Width of the decoder's MLP (F); 0 means 4 * d_model."""
    norm_eps: float = 1e-5
    """Added to the variance in the decoder's layer norms."""
    dropout: float = 0.0
    """Share dropped after embeddings, attention and MLP."""
    pad_id: int = 50_256
    """Fills rows."""
    end_id: int = 50_256
    """Ends a text."""
    start_id: int = 50_256
    """The decoder's first input."""

    def __post_init__(self) -> None:
        """Checks that patches fill the image, and heads the widths."""
        for name in ("patch_size", "num_image_heads", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: give 1 or more")
        pairs = (
            ("image_size", "patch_size"),
            ("d_image", "num_image_heads"),
            ("d_model", "num_heads"),
        )
        for name, by in pairs:
            size, part = getattr(self, name), getattr(self, by)
            if size % part:
                raise ValueError(
                    f"model.{name}={size} does not divide by model.{by}={part}; nearest legal: {size // part * part or part}"
                )

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """Shape of one image: height, width, channels."""
        return self.image_size, self.image_size, self.num_channels

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def ff(self) -> int:
        """Width of the decoder's MLP (F), resolved."""
        return self.d_ff or 4 * self.d_model

    @property
    def projected(self) -> bool:
        """Whether encoder and decoder have different widths."""
        return self.d_image != self.d_model

    def build(self, rngs: nnx.Rngs) -> "ImageText":
        """Returns a new model."""
        return ImageText(self, rngs)

    def num_params(self) -> int:
        """Returns the number of parameters."""
        I, D, S = self.d_image, self.d_model, self.num_patches + 1
        norm = lambda width: 2 * width
        attention = lambda width: 4 * width * width + 4 * width
        mlp = lambda width, ff: 2 * width * ff + ff + width
        image = self._patch_values() * I + I + (S + 1) * I + norm(I)
        image += self.num_image_layers * (
            2 * norm(I) + attention(I) + mlp(I, self.d_image_ff)
        )
        bridge = (I * D + D) * self.projected
        text = (self.vocab_size + self.max_seq_len) * D + norm(D)
        text += self.num_layers * (3 * norm(D) + 2 * attention(D) + mlp(D, self.ff))
        return image + bridge + text

    def flops_per_token(self, seq_len: int) -> float:
        """Returns model FLOPs of forward and backward for a token of text and its share of the image, one per `seq_len`.

        The pixels have no gradient, so of the patches' product only two thirds are done.
        """
        I, D, S = self.d_image, self.d_model, self.num_patches + 1
        image = self.num_patches * self._patch_values() * I * 2 / 3
        image += (
            self.num_image_layers
            * S
            * (4 * I * I + 2 * I * self.d_image_ff + 2 * S * I)
        )
        image += S * I * D * self.projected + self.num_layers * S * 2 * D * D
        text = self.num_layers * (6 * D * D + 2 * D * self.ff + 2 * S * D)
        text += self.vocab_size * D
        return 6.0 * (image / seq_len + text) + 6.0 * self.num_layers * seq_len * D

    def _patch_values(self) -> int:
        return self.patch_size**2 * self.num_channels


VIT_GPT2 = Config()

NORMAL = jax.nn.initializers.normal(0.02)
ZEROS = jax.nn.initializers.zeros
ONES = jax.nn.initializers.ones


def residual(blocks: int) -> jax.nn.initializers.Initializer:
    """Returns GPT-2's initialiser of what writes to the residual stream of so many blocks; here the encoder's too."""
    return jax.nn.initializers.normal(0.02 / (2 * blocks) ** 0.5)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias."""

    def __init__(self, size: int, rngs: nnx.Rngs, *, eps: float) -> None:
        self.eps = eps
        self.scale = param(ONES, rngs, (size,), ("embed",))
        self.bias = param(ZEROS, rngs, (size,), ("embed",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns x normalised."""
        return ops.layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


class Attention(nnx.Module):
    """Multi-head attention of a sequence to itself or to another one."""

    def __init__(
        self,
        D: int,
        N: int,
        rngs: nnx.Rngs,
        *,
        out: jax.nn.initializers.Initializer,
    ) -> None:
        H = D // N
        self.wq = param(NORMAL, rngs, (D, N, H), ("embed", "heads", "head_dim"))
        self.wk = param(NORMAL, rngs, (D, N, H), ("embed", "heads", "head_dim"))
        self.wv = param(NORMAL, rngs, (D, N, H), ("embed", "heads", "head_dim"))
        self.wo = param(out, rngs, (N, H, D), ("heads", "head_dim", "embed"))
        self.bq = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bk = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bv = param(ZEROS, rngs, (N, H), ("heads", "head_dim"))
        self.bo = param(ZEROS, rngs, (D,), ("embed",))

    def within(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        causal: bool,
    ) -> Float[Array, "B T D"]:
        """Returns what each position gathers from its document, from earlier positions only if causal."""
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
        """Returns what each position gathers from the memory of its segment; without such, from all of it."""
        (q,) = ops.linears(x, (self.wq,), (self.bq[...],))
        k, v = ops.remember(lambda: self._keys_and_values(memory))
        if memory_segment_ids is None:
            segment_ids = None
        attended = ops.attention(
            q, k, v, segment_ids, key_segment_ids=memory_segment_ids, causal=False
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
    """Two products with a GELU between: ViT's exact one, or GPT-2's approximation by tanh."""

    def __init__(
        self,
        D: int,
        F: int,
        rngs: nnx.Rngs,
        *,
        exact: bool,
        out: jax.nn.initializers.Initializer,
    ) -> None:
        self.exact = exact
        self.w_up = param(NORMAL, rngs, (D, F), ("embed", "mlp"))
        self.b_up = param(ZEROS, rngs, (F,), ("mlp",))
        self.w_down = param(out, rngs, (F, D), ("mlp", "embed"))
        self.b_down = param(ZEROS, rngs, (D,), ("embed",))

    @in_tiles
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns w_down gelu(w_up x), with biases."""
        up = shard(ops.linear(x, self.w_up, self.b_up[...]), "batch", "seq", "mlp")
        inner = jax.nn.gelu(up, approximate=False) if self.exact else ops.gelu(up)
        return ops.linear(inner, self.w_down, self.b_down[...])


class Patches(nnx.Module):
    """An image as a class token and a token per patch, with positions."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        size, D = cfg.patch_size, cfg.d_image
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


class ImageBlock(nnx.Module):
    """Attention of all patches to all, and MLP, each behind a norm and around a residual."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, eps = cfg.d_image, cfg.image_norm_eps
        self.dropout = cfg.dropout
        self.attn_norm = LayerNorm(D, rngs, eps=eps)
        out = residual(cfg.num_image_layers)
        self.attn = Attention(D, cfg.num_image_heads, rngs, out=out)
        self.mlp_norm = LayerNorm(D, rngs, eps=eps)
        self.mlp = MLP(D, cfg.d_image_ff, rngs, exact=True, out=out)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns the residual stream after this block."""
        y = self.attn.within(self.attn_norm(x), causal=False)
        x = x + ops.dropout(y, self.dropout, site=0)
        return x + ops.dropout(self.mlp(self.mlp_norm(x)), self.dropout, site=1)


class TextBlock(nnx.Module):
    """Causal attention, attention to the memory and MLP, each behind a norm and around a residual."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, N, eps = cfg.d_model, cfg.num_heads, cfg.norm_eps
        out = residual(cfg.num_layers)
        self.dropout = cfg.dropout
        self.attn_norm = LayerNorm(D, rngs, eps=eps)
        self.attn = Attention(D, N, rngs, out=out)
        self.cross_norm = LayerNorm(D, rngs, eps=eps)
        self.cross = Attention(D, N, rngs, out=out)
        self.mlp_norm = LayerNorm(D, rngs, eps=eps)
        self.mlp = MLP(D, cfg.ff, rngs, exact=False, out=out)

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


class ImageText(nnx.Module):
    """The encoder of images and the decoder of text, a `jaxspeed.types.Seq2Seq`."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D, V = cfg.d_model, cfg.vocab_size
        self.dropout, self.projected = cfg.dropout, cfg.projected
        self.patches = Patches(cfg, rngs)
        self.encoder = Layers(
            lambda rngs: ImageBlock(cfg, rngs), cfg.num_image_layers, rngs
        )
        self.encoder_norm = LayerNorm(cfg.d_image, rngs, eps=cfg.image_norm_eps)
        if cfg.projected:
            self.w_bridge = param(NORMAL, rngs, (cfg.d_image, D), ("embed", "embed"))
            self.b_bridge = param(ZEROS, rngs, (D,), ("embed",))
        self.embed = param(NORMAL, rngs, (V, D), ("vocab", "embed"))
        self.positions = param(NORMAL, rngs, (cfg.max_seq_len, D), ("seq", "embed"))
        self.decoder = Layers(lambda rngs: TextBlock(cfg, rngs), cfg.num_layers, rngs)
        self.decoder_norm = LayerNorm(D, rngs, eps=cfg.norm_eps)

    def encode(
        self,
        inputs: Float[Array, "B height width channels"],
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Returns the memory: the encoder's normalised last hidden states, in the decoder's width."""
        del segment_ids
        x = ops.dropout(self.patches(inputs), self.dropout, site=5)
        x = self.encoder_norm(self.encoder(x))
        if self.projected:
            x = ops.linear(x, self.w_bridge, self.b_bridge[...])
        return x

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
        x = self.decoder(
            ops.dropout(x, self.dropout, site=6),
            segment_ids,
            memory,
            memory_segment_ids,
        )
        return self.decoder_norm(x)

    def output_embedding(self) -> Parameter:
        """Returns the decoder's input embedding: it is tied."""
        return self.embed

    def __call__(
        self,
        inputs: Float[Array, "B height width channels"],
        decoder_inputs: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """Returns the logits of the texts, an image each."""
        last = self.hidden(decoder_inputs, memory=self.encode(inputs))
        return ops.linear(last, self.output_embedding().T)


def _read_config(hf: Mapping[str, Any]) -> Config:
    image, text = required(hf, "encoder"), required(hf, "decoder")
    setting(image, "model_type", ("vit",))
    setting(image, "hidden_act", ("gelu",), "gelu")
    setting(image, "qkv_bias", (True,), True)
    setting(text, "model_type", ("gpt2",))
    setting(text, "activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    setting(text, "scale_attn_weights", (True,), True)
    setting(text, "scale_attn_by_inverse_layer_idx", (False,), False)
    setting(text, "reorder_and_upcast_attn", (False,), False)
    setting(text, "add_cross_attention", (True,), False)
    setting(text, "cross_attention_hidden_size", (None,))
    setting(text, "tie_word_embeddings", (True,), True)
    special = lambda name, default: next(
        x for x in (hf.get(name), text.get(name), default) if x is not None
    )
    end = special("eos_token_id", 50_256)
    return Config(
        image_size=required(image, "image_size"),
        patch_size=required(image, "patch_size"),
        num_channels=image.get("num_channels", 3),
        num_image_layers=required(image, "num_hidden_layers"),
        num_image_heads=required(image, "num_attention_heads"),
        d_image=required(image, "hidden_size"),
        d_image_ff=required(image, "intermediate_size"),
        image_norm_eps=image.get("layer_norm_eps", 1e-12),
        vocab_size=required(text, "vocab_size"),
        max_seq_len=required(text, "n_positions"),
        num_layers=required(text, "n_layer"),
        num_heads=required(text, "n_head"),
        d_model=required(text, "n_embd"),
        d_ff=text.get("n_inner") or 0,
        norm_eps=text.get("layer_norm_epsilon", 1e-5),
        pad_id=special("pad_token_id", end),
        end_id=end,
        start_id=special("decoder_start_token_id", special("bos_token_id", end)),
    )


def _write_config(cfg: Config) -> dict[str, Any]:
    image = {
        "model_type": "vit",
        "hidden_act": "gelu",
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "num_channels": cfg.num_channels,
        "num_hidden_layers": cfg.num_image_layers,
        "num_attention_heads": cfg.num_image_heads,
        "hidden_size": cfg.d_image,
        "intermediate_size": cfg.d_image_ff,
        "layer_norm_eps": cfg.image_norm_eps,
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": True,
    }
    text = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "add_cross_attention": True,
        "is_decoder": True,
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
        "bos_token_id": cfg.start_id,
        "eos_token_id": cfg.end_id,
        "pad_token_id": cfg.pad_id,
    }
    return {
        "model_type": "vision-encoder-decoder",
        "is_encoder_decoder": True,
        "encoder": image,
        "decoder": text,
        "tie_word_embeddings": False,
        "pad_token_id": cfg.pad_id,
        "eos_token_id": cfg.end_id,
        "decoder_start_token_id": cfg.start_id,
    }


def _rows(cfg: Config) -> list[Row]:
    rows = _image_rows() + _text_rows()
    if cfg.projected:
        rows += [
            Row("enc_to_dec_proj.weight", "w_bridge", "D I -> I D"),
            Row("enc_to_dec_proj.bias", "b_bridge"),
        ]
    return rows


def _norm(theirs: str, ours: str) -> list[Row]:
    return [
        Row(theirs + ".weight", ours + ".scale"),
        Row(theirs + ".bias", ours + ".bias"),
    ]


def _image_rows() -> list[Row]:
    root, there, here = "encoder.", "encoder.encoder.layer.{layer}.", "encoder.block."
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
    return [
        *rows,
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
        *_norm(there + "layernorm_before", here + "attn_norm"),
        *_norm(there + "layernorm_after", here + "mlp_norm"),
        *_norm(root + "layernorm", "encoder_norm"),
    ]


def _text_rows() -> list[Row]:
    root, here = "decoder.transformer.", "decoder.block."
    there = root + "h.{layer}."
    of = lambda part, names: tuple(f"{here}{part}.{x}" for x in names)
    return [
        Row(root + "wte.weight", "embed"),
        Row(root + "wpe.weight", "positions"),
        Row(
            there + "attn.c_attn.weight",
            of("attn", ("wq", "wk", "wv")),
            "D (P N H) -> P D N H",
        ),
        Row(
            there + "attn.c_attn.bias",
            of("attn", ("bq", "bk", "bv")),
            "(P N H) -> P N H",
        ),
        Row(there + "attn.c_proj.weight", here + "attn.wo", "(N H) D -> N H D"),
        Row(there + "attn.c_proj.bias", here + "attn.bo"),
        Row(
            there + "crossattention.q_attn.weight",
            here + "cross.wq",
            "D (N H) -> D N H",
        ),
        Row(there + "crossattention.q_attn.bias", here + "cross.bq", "(N H) -> N H"),
        Row(
            there + "crossattention.c_attn.weight",
            of("cross", ("wk", "wv")),
            "D (P N H) -> P D N H",
        ),
        Row(
            there + "crossattention.c_attn.bias",
            of("cross", ("bk", "bv")),
            "(P N H) -> P N H",
        ),
        Row(
            there + "crossattention.c_proj.weight",
            here + "cross.wo",
            "(N H) D -> N H D",
        ),
        Row(there + "crossattention.c_proj.bias", here + "cross.bo"),
        Row(there + "mlp.c_fc.weight", here + "mlp.w_up"),
        Row(there + "mlp.c_fc.bias", here + "mlp.b_up"),
        Row(there + "mlp.c_proj.weight", here + "mlp.w_down"),
        Row(there + "mlp.c_proj.bias", here + "mlp.b_down"),
        *_norm(there + "ln_1", here + "attn_norm"),
        *_norm(there + "ln_cross_attn", here + "cross_norm"),
        *_norm(there + "ln_2", here + "mlp_norm"),
        *_norm(root + "ln_f", "decoder_norm"),
    ]


EXCHANGE = Exchange(
    architectures={"vision-encoder-decoder": "VisionEncoderDecoderModel"},
    read_config=_read_config,
    write_config=_write_config,
    rows=_rows,
    ignored=r"encoder\.pooler\..*|decoder\.lm_head\.weight|.*\.(attn|crossattention)\.(masked_)?bias",
)
