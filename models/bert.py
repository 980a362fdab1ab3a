# SPDX-License-Identifier: Apache-2.0
"""BERT (arXiv 1810.04805), as Hugging Face's BertModel and its heads.

Bidirectional attention, learned positions, types of texts, a norm behind each residual, exact
GELU. By configuration also MiniLM (2002.10957) and DistilBERT (1910.01108: no types, and the first
token is pooled by relu in the classification head alone). Differs: dropout is one rate, and
attention weights are not dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspeed import ops
from jaxspeed.config import ConfigError
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
from jaxspeed.types import Parameter
from models.heads import Dense, Labels, MaskedTokens, check_labels, refuse_text


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a BERT."""

    vocab_size: int = 30_522
    """Rows of the embedding (V)."""
    max_seq_len: int = 512
    """Learned positions."""
    num_token_types: int = 2
    """Types of texts in a row; 0: they are not told apart."""
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
    pooler: bool = True
    """Pool the first token by tanh, as BERT does; False: by relu, and to classify only, as DistilBERT."""
    head: Literal["none", "mlm", "classify", "tag", "span"] = "none"
    """Result: hidden states, logits of masked tokens, of the row's label, of each token's label, of an answer's ends."""
    num_labels: int = 2
    """Labels (C) of the heads classify and tag."""
    labels: tuple[str, ...] = ()
    """Their names, if known."""
    dropout: float = 0.0
    """Share dropped after embedding, attention and MLP, and before the labels."""

    def __post_init__(self) -> None:
        """Checks that heads divide the width, and the labels."""
        if self.num_heads < 1:
            raise ValueError(f"model.num_heads={self.num_heads}: give 1 or more")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.d_model={self.d_model} does not divide by model.num_heads={self.num_heads}; "
                f"nearest legal: {self.d_model // self.num_heads * self.num_heads or self.num_heads}"
            )
        if self.head == "span" and self.num_labels != 2:
            raise ValueError(
                f"model.num_labels={self.num_labels}: a span has a first and a last token; give 2"
            )
        check_labels(self.num_labels, len(self.labels))

    @property
    def head_dim(self) -> int:
        """Width of one head (H)."""
        return self.d_model // self.num_heads

    @property
    def pools(self) -> bool:
        """Whether the first token is pooled."""
        return self.head == "classify" or (self.head == "none" and self.pooler)

    @property
    def labelled(self) -> bool:
        """Whether the head gives labels."""
        return self.head in ("classify", "tag", "span")

    def build(self, rngs: nnx.Rngs) -> "Bert":
        """Returns a new model."""
        return Bert(self, rngs)

    def num_params(self) -> int:
        """Returns the number of parameters."""
        D, F, V, C = self.d_model, self.d_ff, self.vocab_size, self.num_labels
        block = 4 * D * D + 4 * D + 2 * D * F + F + D + 4 * D
        embeddings = (V + self.max_seq_len + self.num_token_types + 2) * D
        head = (D * D + D) * self.pools + (D * C + C) * self.labelled
        head += (D * D + 3 * D + V) * (self.head == "mlm")
        return embeddings + self.num_layers * block + head

    def flops_per_token(self, seq_len: int) -> float:
        """Returns model FLOPs of forward and backward for one token; a masked model predicts every token."""
        D, F, C = self.d_model, self.d_ff, self.num_labels
        matmul = self.num_layers * (4 * D * D + 2 * D * F)
        head = {
            "none": 0.0,
            "mlm": D * D + self.vocab_size * D,
            "classify": (D * D + D * C) / seq_len,
            "tag": D * C,
            "span": D * C,
        }
        return 6.0 * (matmul + head[self.head]) + 12.0 * self.num_layers * seq_len * D


BASE = Config(head="mlm")
LARGE = Config(head="mlm", num_layers=24, num_heads=16, d_model=1024, d_ff=4096)
DISTILBERT = Config(head="mlm", num_layers=6, num_token_types=0, pooler=False)
MINILM_L6 = Config(num_layers=6, d_model=384, d_ff=1536)

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
    """Multi-head self-attention in both directions."""

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

    def __call__(
        self, x: Float[Array, "B S D"], segment_ids: Int[Array, "B S"] | None
    ) -> Float[Array, "B S D"]:
        """Returns what each position gathers from all of its document."""
        heads = ("batch", "seq", "heads", "head_dim")
        q, k, v = ops.linears(
            x,
            (self.wq, self.wk, self.wv),
            (self.bq[...], self.bk[...], self.bv[...]),
        )
        attended = ops.attention(q, k, v, segment_ids, causal=False)
        return ops.linear(shard(attended, *heads), self.wo, self.bo[...], contract=2)


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
    """Attention and MLP, each around a residual and before a norm."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.dropout = cfg.dropout
        self.attn = Attention(cfg, rngs)
        self.attn_norm = LayerNorm(cfg, rngs)
        self.mlp = MLP(cfg, rngs)
        self.mlp_norm = LayerNorm(cfg, rngs)

    def __call__(
        self, x: Float[Array, "B S D"], segment_ids: Int[Array, "B S"] | None
    ) -> Float[Array, "B S D"]:
        """Returns the residual stream after this block."""
        attended = ops.dropout(self.attn(x, segment_ids), self.dropout, site=0)
        x = self.attn_norm(x + attended)
        return self.mlp_norm(x + ops.dropout(self.mlp(x), self.dropout, site=1))


class Bert(nnx.Module):
    """The encoder and its head: a `jaxspeed.types.MaskedLM` or `Labeller`."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        D = cfg.d_model
        self.head, self.pooler, self.dropout = cfg.head, cfg.pooler, cfg.dropout
        self.typed = cfg.num_token_types > 0
        self.embed = param(NORMAL, rngs, (cfg.vocab_size, D), ("vocab", "embed"))
        self.positions = param(NORMAL, rngs, (cfg.max_seq_len, D), ("seq", "embed"))
        if self.typed:
            shape = (cfg.num_token_types, D)
            self.token_types = param(NORMAL, rngs, shape, ("vocab", "embed"))
        self.embed_norm = LayerNorm(cfg, rngs)
        self.layers = Layers(lambda rngs: Block(cfg, rngs), cfg.num_layers, rngs)
        if cfg.pools:
            self.pool = Dense(D, rngs)
        if cfg.labelled:
            self.labels = Labels(D, cfg.num_labels, rngs)
        if cfg.head == "mlm":
            self.predictions = MaskedTokens(D, cfg.vocab_size, rngs, eps=cfg.norm_eps)

    def hidden(
        self,
        inputs: Int[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        token_types: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Returns the last hidden states, of the head `mlm` ready for the output embedding.

        A model without types of texts does not read them.
        """
        if positions is None:
            if inputs.shape[1] > (limit := self.positions.shape[0]):
                raise ValueError(
                    f"inputs have {inputs.shape[1]} tokens; the model has {limit} positions; raise model.max_seq_len"
                )
            positions = ops.row_places(inputs.shape)
        x = ops.embed(self.embed, inputs) + ops.embed(self.positions[...], positions)
        if self.typed:
            token_types = jnp.zeros_like(inputs) if token_types is None else token_types
            x = x + ops.embed(self.token_types, token_types)
        x = ops.dropout(self.embed_norm(x), self.dropout, site=2)
        x = self.layers(x, segment_ids)
        return self.predictions(x) if self.head == "mlm" else x

    def pooled(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        """Returns what stands for the row: its first token through a dense layer."""
        ops.need_whole("a label of the row")
        first = self.pool(hidden[:, 0])
        return jnp.tanh(first) if self.pooler else jax.nn.relu(first)

    def output_embedding(self) -> Parameter:
        """Returns the input embedding: it is tied."""
        if self.head != "mlm":
            refuse_text(self.head)
        return self.embed

    def output_bias(self) -> Float[Array, " V"]:
        """Returns the bias of the logits of masked tokens."""
        return self.predictions.b_vocab[...]

    def __call__(
        self,
        inputs: Int[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        token_types: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B ..."]:
        """Returns the head's result; see `Config.head`."""
        x = self.hidden(inputs, positions, segment_ids, token_types)
        if self.head == "none":
            return x
        if self.head == "mlm":
            return ops.linear(x, self.embed.T, self.output_bias())
        x = self.pooled(x) if self.head == "classify" else x
        return self.labels(ops.dropout(x, self.dropout, site=3))


_BERT: Heads = [
    ("BertModel", "none"),
    ("BertForMaskedLM", "mlm"),
    ("BertForPreTraining", "mlm"),
    ("BertForSequenceClassification", "classify"),
    ("BertForTokenClassification", "tag"),
    ("BertForQuestionAnswering", "span"),
]
_DISTILBERT: Heads = [
    ("DistilBertModel", "none"),
    ("DistilBertForMaskedLM", "mlm"),
    ("DistilBertForSequenceClassification", "classify"),
    ("DistilBertForTokenClassification", "tag"),
    ("DistilBertForQuestionAnswering", "span"),
]


def _read_config(hf: Mapping[str, Any]) -> Config:
    setting(hf, "tie_word_embeddings", (True,), True)
    distilled = hf["model_type"] == "distilbert"
    head = head_of(hf, _DISTILBERT if distilled else _BERT)
    labels = read_labels(hf) if head in ("classify", "tag") else {}
    if distilled:
        setting(hf, "activation", ("gelu",), "gelu")
        setting(hf, "sinusoidal_pos_embds", (False, True), False)
        sizes = ("n_layers", "n_heads", "dim", "hidden_dim")
    else:
        setting(hf, "hidden_act", ("gelu",), "gelu")
        setting(hf, "position_embedding_type", ("absolute",), "absolute")
        setting(hf, "is_decoder", (False,), False)
        sizes = (
            "num_hidden_layers",
            "num_attention_heads",
            "hidden_size",
            "intermediate_size",
        )
    layers, heads, width, inner = (required(hf, name) for name in sizes)
    return Config(
        vocab_size=required(hf, "vocab_size"),
        max_seq_len=required(hf, "max_position_embeddings"),
        num_token_types=0 if distilled else hf.get("type_vocab_size", 2),
        num_layers=layers,
        num_heads=heads,
        d_model=width,
        d_ff=inner,
        norm_eps=1e-12 if distilled else hf.get("layer_norm_eps", 1e-12),
        pooler=not distilled,
        head=head,  # pyright: ignore[reportArgumentType]
        **labels,
    )


def _write_config(cfg: Config) -> dict[str, Any]:
    distilled = not cfg.pooler
    if distilled != (cfg.num_token_types == 0) or (distilled and cfg.norm_eps != 1e-12):
        raise ConfigError(
            f"model.pooler={cfg.pooler}, model.num_token_types={cfg.num_token_types}, model.norm_eps={cfg.norm_eps}: "
            "no Hugging Face model has these together, so this one cannot be exported; DistilBERT has no pooler, 0 and 1e-12"
        )
    shared = {
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_seq_len,
        "tie_word_embeddings": True,
        **(write_labels(cfg.num_labels, cfg.labels) if cfg.labelled else {}),
    }
    if distilled:
        return {
            "model_type": "distilbert",
            "activation": "gelu",
            "n_layers": cfg.num_layers,
            "n_heads": cfg.num_heads,
            "dim": cfg.d_model,
            "hidden_dim": cfg.d_ff,
            "dropout": cfg.dropout,
            "attention_dropout": 0.0,
            **shared,
        }
    return {
        "model_type": "bert",
        "hidden_act": "gelu",
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "type_vocab_size": cfg.num_token_types,
        "layer_norm_eps": cfg.norm_eps,
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": 0.0,
        **shared,
    }


_BERT_BLOCK = {
    "attn.wq": "attention.self.query",
    "attn.wk": "attention.self.key",
    "attn.wv": "attention.self.value",
    "attn.wo": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "mlp.w_up": "intermediate.dense",
    "mlp.w_down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_DISTILBERT_BLOCK = {
    "attn.wq": "attention.q_lin",
    "attn.wk": "attention.k_lin",
    "attn.wv": "attention.v_lin",
    "attn.wo": "attention.out_lin",
    "attn_norm": "sa_layer_norm",
    "mlp.w_up": "ffn.lin1",
    "mlp.w_down": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}
_FORMS = {
    "wq": "(N H) D -> D N H",
    "wk": "(N H) D -> D N H",
    "wv": "(N H) D -> D N H",
    "wo": "D (N H) -> N H D",
    "bq": "(N H) -> N H",
    "bk": "(N H) -> N H",
    "bv": "(N H) -> N H",
}


def _norm(theirs: str, ours: str) -> list[Row]:
    return [
        Row(theirs + ".weight", ours + ".scale"),
        Row(theirs + ".bias", ours + ".bias"),
    ]


def _dense(theirs: str, ours: str) -> list[Row]:
    """Returns the rows of a weight, whose name begins with w, and of its bias."""
    module, _, weight = ours.rpartition(".")
    bias = "b" + weight[1:]
    return [
        Row(f"{theirs}.weight", ours, _FORMS.get(weight, "O I -> I O")),
        Row(f"{theirs}.bias", f"{module}.{bias}", _FORMS.get(bias, "")),
    ]


def _rows(cfg: Config) -> list[Row]:
    bert = cfg.pooler
    family = "" if cfg.head == "none" else "bert." if bert else "distilbert."
    there = family + ("encoder" if bert else "transformer") + ".layer.{layer}."
    rows = [
        Row(family + "embeddings.word_embeddings.weight", "embed"),
        Row(family + "embeddings.position_embeddings.weight", "positions"),
        *_norm(family + "embeddings.LayerNorm", "embed_norm"),
    ]
    if cfg.num_token_types:
        rows.append(
            Row(family + "embeddings.token_type_embeddings.weight", "token_types")
        )
    for ours, theirs in (_BERT_BLOCK if bert else _DISTILBERT_BLOCK).items():
        make = _norm if ours.endswith("norm") else _dense
        rows += make(there + theirs, "layers.block." + ours)
    if cfg.pools:
        rows += _dense(family + "pooler.dense" if bert else "pre_classifier", "pool.w")
    if cfg.labelled:
        name = "qa_outputs" if cfg.head == "span" else "classifier"
        rows += _dense(name, "labels.w")
    if cfg.head == "mlm":
        dense, norm, bias = (
            ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias")
            if bert
            else ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")
        )  # fmt: skip
        rows += _dense(dense, "predictions.dense.w") + _norm(norm, "predictions")
        rows.append(Row(bias, "predictions.b_vocab"))
    return rows


EXCHANGE = Exchange(
    architectures={"bert": _BERT, "distilbert": _DISTILBERT},
    read_config=_read_config,
    write_config=_write_config,
    rows=_rows,
    prefix=r"(distil)?bert\.",
    ignored=r".*embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)|vocab_projector\.weight",
    heads=r"(cls|classifier|qa_outputs|vocab_\w+)\..*",
    pooling=r"(pre_classifier|(bert\.)?pooler\.dense)\..*",
    # As the first checkpoints of 2018 have it.
    renamed=[
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    ],
)
