# SPDX-License-Identifier: Apache-2.0
"""One tiny model of each kind, with its loss and batches: what the laws of the families are checked on.

A family joins by an entry in `ZOO` (laws that hold for any family, `test_family.py` and
`tests/dist/test_equivalence.py`) and one in `PEERS` of `test_hugging_face.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from jaxspeed.losses import (
    classification_loss,
    masked_lm_loss,
    next_token_loss,
    seq2seq_loss,
    span_loss,
    tagging_loss,
)
from jaxspeed.types import LossFn
from models import (
    bart,
    bert,
    gpt2,
    image_text,
    llama,
    mixtral,
    opt,
    rnn,
    t5,
    vit,
    whisper,
)


T, V, D, L = 16, 64, 32, 2
"""Tokens, vocabulary, width and layers of every member that has them."""

S, M = 10, 8
"""Positions and channels of a sound."""

Kind = Literal["decoder", "recurrent", "encoder", "seq2seq", "vision"]
"""Which further laws hold.

decoder: `hidden(inputs, positions, segment_ids)` is causal, packs, and writes with a cache.
recurrent: the same, without positions. encoder: `hidden(inputs, positions, segment_ids,
token_types)` packs. seq2seq: `encode(inputs, segment_ids)`, and `hidden(decoder_inputs, positions,
segment_ids, memory=, memory_segment_ids=)` is causal and writes with a cache. vision: none.
"""

Maker = Callable[[np.random.Generator, int], dict[str, np.ndarray]]
"""`(rng, rows) -> batch`; another rng gives other rows of the same, learnable, kind."""


@dataclass(frozen=True)
class Member:
    """A tiny model and how it is trained."""

    cfg: Any
    """Its Config; layers are `L` where it has them."""
    kind: Kind
    loss: LossFn
    batch: Maker
    initial_loss: float | None = math.log(V)
    """Of the parameters drawn; None: no formula gives it."""
    stds: Mapping[str, float | None] = field(default_factory=dict)
    """Standard deviations of the initial parameters by (last) name; 0.02 where it says none.

    Names that begin with b are biases, 0; those that end in scale are 1; None: they are not drawn.
    """
    large: Mapping[str, int] = field(
        default_factory=lambda: {"vocab_size": 10**8, "num_layers": 1000}
    )
    """Sizes with which no machine could hold it."""
    variant: bool = False
    """A family that is here already, with another head or setting: the laws that cost much are not repeated."""


def text(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Returns packed documents of learnable text with ragged masks."""
    inputs = (rng.integers(0, V, (rows, 1)) + 3 * np.arange(T)) % V
    return {
        "inputs": inputs.astype(np.int32),
        "mask": rng.random((rows, T)) < rng.random((rows, 1)),
        "segment_ids": np.sort(rng.integers(1, 4, (rows, T)), axis=1).astype(np.int32),
    }


def pairs(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Returns sources with padding, and targets that repeat their beginning."""
    inputs = text(rng, rows)["inputs"]
    length = rng.integers(T // 2, T + 1, (rows, 1))
    targets = inputs[:, : T - 2]
    start = np.zeros((rows, 1), np.int32)
    return {
        "inputs": inputs,
        "segment_ids": (np.arange(T) < length).astype(np.int32),
        "decoder_inputs": np.concatenate([start, targets[:, :-1]], axis=1),
        "targets": targets,
        "mask": np.arange(T - 2) < length - 2,
    }


PIXELS, PATCH, CLASSES = 8, 4, 5
"""Height and width of an image and of a patch; classes."""


def images(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Returns images whose brightness is their class."""
    labels = rng.integers(-1, CLASSES, rows)
    noise = rng.normal(size=(rows, PIXELS, PIXELS, 3))
    pixels = noise + labels[:, None, None, None]
    return {"inputs": pixels.astype(np.float32), "labels": labels.astype(np.int32)}


def captions(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Returns images, and texts that begin with their brightness."""
    shown, said = images(rng, rows), text(rng, rows)
    inputs = (said["inputs"] - said["inputs"][:, :1] + shown["labels"][:, None]) % V
    return {
        "inputs": shown["inputs"],
        "decoder_inputs": inputs,
        "targets": np.roll(inputs, -1, axis=1),
        "mask": said["mask"],
    }


def sounds(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Returns `pairs` with two frames for each of the first tokens in place of the source."""
    made = pairs(rng, rows)
    waves = np.cos(made["inputs"][:, :S, None] * np.arange(1, M + 1))
    made["inputs"] = np.repeat(waves, 2, axis=1).astype(np.float32)
    made["segment_ids"] = made["segment_ids"][:, -S:]
    return made


def masked(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Returns padded rows of learnable text with some tokens hidden, to be found out."""
    made = sentences(rng, rows)
    hide = rng.random((rows, T)) < 0.3
    return {
        **made,
        "inputs": np.where(hide, 1, made["inputs"]).astype(np.int32),
        "targets": made["inputs"],
        "mask": hide & (made["segment_ids"] > 0),
    }


def sentences(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Returns rows of learnable text, of two types, with padding behind."""
    length = rng.integers(T // 2, T + 1, (rows, 1))
    return {
        "inputs": text(rng, rows)["inputs"],
        "segment_ids": (np.arange(T) < length).astype(np.int32),
        "token_types": np.tile(np.arange(T, dtype=np.int32) > T // 3, (rows, 1)).astype(
            np.int32
        ),
    }


def classified(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Returns rows with the label that their first token tells; one row does not count."""
    made = sentences(rng, rows)
    labels = made["inputs"][:, 0] % CLASSES
    return {**made, "labels": np.where(np.arange(rows) == 1, -1, labels)}


def tagged(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Returns rows with a label for each token."""
    made = sentences(rng, rows)
    return {**made, "labels": made["inputs"] % CLASSES, "mask": made["segment_ids"] > 0}


def answered(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Returns rows with the first and last token of an answer."""
    starts = rng.integers(0, T // 4, rows).astype(np.int32)
    return {**sentences(rng, rows), "starts": starts, "ends": starts + 2}


RESIDUAL = 0.02 / math.sqrt(2 * L)
RECURRENT = {"w_in": D**-0.5, "w_rec": D**-0.5, "embed": 1.0, "lm_head": 4 * D**-0.5}
IMAGE: Any = {"image_size": PIXELS, "patch_size": PATCH}
OPT: dict[str, float] = dict.fromkeys(
    ("embed", "positions", "wq", "wk", "wv", "w_up"), 0.006
)
OPT |= dict.fromkeys(("wo", "w_down"), 0.006 / math.sqrt(2 * L))

T5_STDS = {name: D**-0.5 for name in ("wk", "wv", "w_up", "lm_head")} | {
    "embed": 1.0,
    "encoder_bias": D**-0.5,
    "decoder_bias": D**-0.5,
    "wq": (D * 8) ** -0.5,
    "wo": D**-0.5,
    "w_down": 64**-0.5,
}

ZOO: dict[str, Member] = {
    "bert": Member(
        bert.Config(
            vocab_size=V, max_seq_len=T, num_layers=L, num_heads=4, d_model=D, d_ff=64,
            head="mlm",
        ),
        "encoder",
        masked_lm_loss,
        masked,
    ),
    "gpt2": Member(
        gpt2.Config(
            vocab_size=V, max_seq_len=T, num_layers=L, num_heads=4, d_model=D
        ),
        "decoder",
        next_token_loss,
        text,
        stds={"wo": RESIDUAL, "w_down": RESIDUAL, "positions": 0.01},
    ),
    "llama": Member(
        llama.Config(
            vocab_size=V, max_seq_len=T, num_layers=L, num_heads=4, num_kv_heads=2,
            head_dim=8, d_model=D, d_ff=64,
        ),
        "decoder",
        next_token_loss,
        text,
    ),
    "llama, windows": Member(
        llama.Config(
            vocab_size=V, max_seq_len=T, num_layers=L, num_heads=4, num_kv_heads=2,
            head_dim=8, d_model=D, d_ff=64, out_bias=True, sliding_window=5,
            num_full_layers=1, no_rope_interval=2, rope_type="yarn", rope_factor=4.0,
            rope_original_len=8, rope_low_turns=0.1, rope_high_turns=1.0,
            rope_attention_factor=1.1,
        ),
        "decoder",
        next_token_loss,
        text,
        variant=True,
    ),
    "mixtral": Member(
        mixtral.Config(
            vocab_size=V, max_seq_len=T, num_layers=L, num_heads=4, num_kv_heads=2,
            head_dim=8, d_model=D, d_ff=32, num_experts=8,
        ),
        "decoder",
        next_token_loss,
        text,
    ),
    "mixtral, shared": Member(
        mixtral.Config(
            vocab_size=V, max_seq_len=T, num_layers=L, num_heads=4, num_kv_heads=2,
            head_dim=8, d_model=D, d_ff=16, num_experts=8, experts_per_token=3,
            normalise_weights=False, d_shared=48, qk_norm=True,
        ),
        "decoder",
        next_token_loss,
        text,
        variant=True,
    ),
    "mixtral, residual": Member(
        mixtral.Config(
            vocab_size=V, max_seq_len=T, num_layers=L, num_heads=4, num_kv_heads=4,
            head_dim=8, d_model=D, d_ff=32, num_experts=4, experts_per_token=1,
            normalise_weights=False, residual=True,
        ),
        "decoder",
        next_token_loss,
        text,
        stds={"mix_bias": 0.0},
        variant=True,
    ),
    "opt": Member(
        opt.Config(
            vocab_size=V, max_seq_len=T, num_layers=L, num_heads=4, d_model=D, d_ff=64
        ),
        "decoder",
        next_token_loss,
        text,
        stds=OPT,
    ),
    "opt, norms behind": Member(
        opt.Config(
            vocab_size=V, max_seq_len=T, num_layers=L, num_heads=4, d_model=D, d_ff=64,
            d_embed=16, norm_first=False,
        ),
        "decoder",
        next_token_loss,
        text,
        variant=True,
    ),
    "lstm": Member(
        rnn.Config(vocab_size=V, num_layers=L, d_model=D),
        "recurrent",
        next_token_loss,
        text,
        initial_loss=None,  # its logits are not small
        stds=RECURRENT,
    ),
    "gru": Member(
        rnn.Config(cell="gru", vocab_size=V, num_layers=L, d_model=D, d_embed=16, tie_embeddings=True),
        "recurrent",
        next_token_loss,
        text,
        initial_loss=None,
        variant=True,
    ),
    "vit": Member(
        vit.Config(
            **IMAGE, num_labels=CLASSES, num_layers=L, num_heads=4, d_model=D, d_ff=64
        ),
        "vision",
        classification_loss,
        images,
        initial_loss=None,  # of two images: their noise decides
        large={"num_labels": 10**8, "num_layers": 1000},
    ),
    "image text": Member(
        image_text.Config(
            **IMAGE, num_image_layers=L, num_image_heads=2, d_image=16, d_image_ff=24,
            vocab_size=V, max_seq_len=T, num_layers=L, num_heads=4, d_model=D,
        ),
        "seq2seq",
        seq2seq_loss,
        captions,
        stds={"wo": RESIDUAL, "w_down": RESIDUAL},
    ),
    "t5": Member(
        t5.Config(
            vocab_size=V, num_layers=L, num_decoder_layers=L, num_heads=4, d_model=D,
            head_dim=8, d_ff=64, num_buckets=8, max_distance=12,
        ),
        "seq2seq",
        seq2seq_loss,
        pairs,
        initial_loss=None,
        stds=T5_STDS,
    ),
    "t5, gated and untied": Member(
        t5.Config(
            vocab_size=V, num_layers=L, num_decoder_layers=L, num_heads=4, d_model=D,
            head_dim=8, d_ff=64, gated=True, tie_embeddings=False,
        ),
        "seq2seq",
        seq2seq_loss,
        pairs,
        initial_loss=None,
        variant=True,
    ),
    "bart": Member(
        bart.Config(
            vocab_size=V, max_seq_len=T, num_layers=L, num_decoder_layers=L, num_heads=4,
            d_model=D, d_ff=64,
        ),
        "seq2seq",
        seq2seq_loss,
        pairs,
    ),
    "bart, as pegasus": Member(
        bart.Config(
            vocab_size=V, max_seq_len=T, num_layers=L, num_decoder_layers=L, num_heads=4,
            d_model=D, d_ff=64, activation="relu", norm_first=True, embed_norm=False,
            sinusoids=True, scale_embedding=True,
        ),
        "seq2seq",
        seq2seq_loss,
        pairs,
        variant=True,
    ),
    "whisper": Member(
        whisper.Config(
            vocab_size=V, num_mel_bins=M, max_source_len=S, max_seq_len=T, num_layers=L,
            num_decoder_layers=L, num_heads=4, d_model=D, d_ff=64,
        ),
        "seq2seq",
        seq2seq_loss,
        sounds,
        initial_loss=None,  # its logits are not small
        # Of a convolution by what it sums, which differs from one to the other.
        stds={
            "waves": None, "w": None, "w_down": 64**-0.5,
            **dict.fromkeys(("wq", "wk", "wv", "wo", "w_up", "embed", "positions"), D**-0.5),
        },
    ),
}  # fmt: skip


def with_head(name: str, head: str, **settings: Any) -> Member:
    """Returns a member with labels for its head."""
    classes = {} if head == "span" else {"num_labels": CLASSES}
    cfg = dataclasses.replace(ZOO[name].cfg, head=head, **classes, **settings)
    loss, batch = LABELLED[head]
    # Of few rows chance decides; a span's by their padding.
    guess = math.log(CLASSES) if head == "tag" else None
    return Member(cfg, ZOO[name].kind, loss, batch, guess, variant=True)


LABELLED: dict[str, tuple[LossFn, Maker]] = {
    "classify": (classification_loss, classified),
    "tag": (tagging_loss, tagged),
    "span": (span_loss, answered),
}

ZOO |= {
    "bert, classify": with_head("bert", "classify"),
    "bert, tag": with_head("bert", "tag"),
    "bert, span": with_head("bert", "span"),
    "distilbert": with_head("bert", "classify", num_token_types=0, pooler=False),
    "gpt2, classify": with_head("gpt2", "classify"),
    "llama, tag": with_head("llama", "tag"),
}

NAMED: dict[str, tuple[Any, int]] = {
    "GPT-2": (gpt2.SMALL, 124_439_808),
    "GPT-2 medium": (gpt2.MEDIUM, 354_823_168),
    "GPT-2 large": (gpt2.LARGE, 774_030_080),
    "GPT-2 XL": (gpt2.XL, 1_557_611_200),
    "BERT base": (bert.BASE, 109_514_298),
    "BERT large": (bert.LARGE, 335_174_458),
    "DistilBERT base": (bert.DISTILBERT, 66_985_530),
    "MiniLM-L6": (bert.MINILM_L6, 22_713_216),
    "Llama 2 7B": (llama.LLAMA2_7B, 6_738_415_616),
    "Llama 3 8B": (llama.LLAMA3_8B, 8_030_261_248),
    "OPT 125M": (opt.OPT_125M, 125_239_296),
    "OPT 350M": (opt.OPT_350M, 331_196_416),
    "OPT 1.3B": (opt.OPT_1_3B, 1_315_758_080),
    "OPT 6.7B": (opt.OPT_6_7B, 6_658_473_984),
    "T5 small": (t5.SMALL, 60_506_624),
    "T5 base": (t5.BASE, 222_903_552),
    "FLAN-T5 small": (t5.FLAN_SMALL, 76_961_152),
    "BART base": (bart.BASE, 139_470_681),
    "BART large": (bart.LARGE, 406_341_721),
    "OPUS-MT en-de": (bart.MARIAN, 73_944_309),
    "Whisper tiny": (whisper.TINY, 37_760_640),
    "Whisper base": (whisper.BASE, 72_593_920),
    "Whisper large v3": (whisper.LARGE_V3, 1_543_490_560),
    "Llama 3.1 8B": (llama.LLAMA31_8B, 8_030_261_248),
    "Mixtral 8x7B": (mixtral.MIXTRAL_8X7B, 46_702_792_704),
    "Qwen1.5 MoE A2.7B": (mixtral.QWEN15_MOE_A2_7B, 14_315_784_192),
    "Qwen3 30B A3B": (mixtral.QWEN3_30B_A3B, 30_532_122_624),
    "Mistral 7B": (llama.MISTRAL_7B, 7_241_732_096),
}
"""Published sizes: Config and number of parameters."""


def members(*kinds: Kind, variants: bool = False) -> list[str]:
    """Returns the names of the members of these kinds (all, if none is named)."""
    return [
        name
        for name, member in ZOO.items()
        if (variants or not member.variant) and (not kinds or member.kind in kinds)
    ]
