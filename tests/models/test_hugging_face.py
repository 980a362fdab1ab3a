# SPDX-License-Identifier: Apache-2.0
"""Every family is the model of the same name in transformers: logits, loss, gradients, and folders both ways."""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxspeed.ambient import Ambient, ambient
from jaxspeed.config import DTypeConfig, MeshConfig, RunConfig, ZeroConfig
from jaxspeed.generate import Encoded, Writer
from jaxspeed.hf import export_params, import_params, named_tensors, read_config
from jaxspeed.losses import (
    classification_loss,
    masked_lm_loss,
    next_token_loss,
    seq2seq_loss,
    span_loss,
    tagging_loss,
)
from jaxspeed.nn import merge
from jaxspeed.program import Program, build_program
from jaxspeed.sampling import SamplingConfig
from jaxspeed.types import LossFn, Sums


pytestmark = pytest.mark.hf

torch: Any = pytest.importorskip("torch", reason="needs pip install 'jaxspeed[hf]'")
transformers: Any = pytest.importorskip("transformers")

B, T, V, M = 2, 12, 96, 10

Arrays = Mapping[str, Any]


class Task(NamedTuple):
    """What a model with some head is asked, in our words and in the peer's."""

    auto: str
    """The class of transformers that makes the peer."""
    batch: Callable[[np.random.Generator], Arrays]
    """Our batch, of numpy arrays."""
    asked: Callable[[Arrays], Arrays]
    """From our batch to the arguments of the peer, those that make it return a loss included."""
    loss: LossFn
    outputs: Callable[[Any, Arrays], Any]
    """From our model and batch to arrays."""
    answered: Callable[[Any], Any] = lambda out: out.logits
    """From what the peer returns to the same arrays."""
    its_loss: Callable[[Any], Any] = lambda out: out.loss
    by_token: bool = False
    """Outputs are of each token; those of padding are nobody's."""


def ids(rng: np.random.Generator) -> np.ndarray:
    # Not a token that some peer takes for padding, whose embedding it does not train.
    return rng.integers(3, V, (B, T), np.int32)


def pairs(rng: np.random.Generator) -> Arrays:
    whole = np.ones((B, T), np.int32)
    shorter = np.array([[T], [T - 4]])
    return {
        "inputs": ids(rng),
        "segment_ids": np.where(np.arange(T) < shorter, whole, 0),
        "decoder_inputs": ids(rng)[:, :8],
        "targets": ids(rng)[:, :8],
        "mask": rng.random((B, 8)) < 0.8,
    }


def sounds(rng: np.random.Generator) -> Arrays:
    """Returns full spectrograms, as the peer wants them, and no padding token among the targets."""
    made = pairs(rng)
    given = {name: made[name] % (V - 6) for name in ("decoder_inputs", "targets")}
    frames = rng.normal(size=(B, 2 * T, M)).astype(np.float32)
    return {"inputs": frames, "mask": made["mask"], **given}


def seq2seq_logits(model: Any, batch: Arrays) -> jax.Array:
    segments = batch.get("segment_ids")
    memory = model.encode(batch["inputs"], segments)
    given = {"memory": memory, "memory_segment_ids": segments}
    return model.hidden(batch["decoder_inputs"], **given) @ model.output_embedding().T


PIXELS = 16


def images(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(B, PIXELS, PIXELS, 3)).astype(np.float32)


def theirs_of(images: np.ndarray) -> np.ndarray:
    """Returns images with the channels first."""
    return images.transpose(0, 3, 1, 2)


def descriptions(rng: np.random.Generator) -> Arrays:
    texts = {n: x for n, x in pairs(rng).items() if n != "segment_ids"}
    return texts | {"inputs": images(rng)}


def row(rng: np.random.Generator) -> Arrays:
    """Returns what an encoder reads; the second row ends in padding, token 0."""
    segments = pairs(rng)["segment_ids"]
    return {
        "inputs": ids(rng) * segments,
        "segment_ids": segments,
        "token_types": rng.integers(0, 2, (B, T), np.int32),
    }


def asks(**labels: str) -> Callable[[Arrays], Arrays]:
    """Returns how a peer is asked with these of our arrays for labels; -100 where the mask is False."""

    def asked(batch: Arrays) -> Arrays:
        counts = batch.get("mask", np.ones((), bool))
        return {
            "input_ids": batch["inputs"],
            "attention_mask": batch.get("segment_ids", np.ones((B, T), np.int32)),
            "token_type_ids": batch.get("token_types"),
            **{
                theirs: np.where(counts, batch[ours], -100)
                for theirs, ours in labels.items()
            },
        }

    return asked


def labelled(model: Any, batch: Arrays) -> jax.Array:
    names = ("inputs", "positions", "segment_ids", "token_types")
    return model(*(batch.get(name) for name in names))


def tagged(rng: np.random.Generator) -> Arrays:
    return {
        **row(rng),
        "labels": rng.integers(0, 3, (B, T), np.int32),
        "mask": pairs(rng)["segment_ids"] > 0,
    }


def states(model: Any, batch: Arrays) -> list[jax.Array]:
    """Returns the hidden states of a model without a head, and of the row if it pools one."""
    hidden = model(batch["inputs"], token_types=batch["token_types"])
    return [hidden, model.pooled(hidden)] if hasattr(model, "pool") else [hidden]


def their_states(out: Any) -> list[Any]:
    return [out[name] for name in ("last_hidden_state", "pooler_output") if name in out]


TASKS = {
    "none": Task(
        "AutoModel",
        lambda rng: {"inputs": ids(rng), "token_types": row(rng)["token_types"]},
        asks(),
        lambda model, batch: Sums(
            sum((jnp.sum(jnp.sin(x)) for x in states(model, batch)), jnp.zeros(())),
            jnp.ones(()),
        ),
        states,
        their_states,
        lambda out: sum(x.sin().sum() for x in their_states(out)),
    ),
    "mlm": Task(
        "AutoModelForMaskedLM",
        lambda rng: {**tagged(rng), "targets": ids(rng)},
        asks(labels="targets"),
        masked_lm_loss,
        labelled,
        by_token=True,
    ),
    "classify": Task(
        "AutoModelForSequenceClassification",
        lambda rng: {**row(rng), "labels": np.array([1, 0], np.int32)},
        asks(labels="labels"),
        classification_loss,
        labelled,
    ),
    "tag": Task(
        "AutoModelForTokenClassification",
        tagged,
        asks(labels="labels"),
        tagging_loss,
        labelled,
        by_token=True,
    ),
    "span": Task(
        "AutoModelForQuestionAnswering",
        lambda rng: {
            **row(rng),
            "inputs": ids(rng),
            "segment_ids": np.ones((B, T), np.int32),
            "starts": np.array([2, 5], np.int32),
            "ends": np.array([4, 11], np.int32),
        },
        asks(start_positions="starts", end_positions="ends"),
        span_loss,
        labelled,
        lambda out: torch.stack([out.start_logits, out.end_logits], -1),
    ),
    "lm": Task(
        "AutoModelForCausalLM",
        lambda rng: {"inputs": ids(rng)},
        lambda batch: {"input_ids": batch["inputs"], "labels": batch["inputs"]},
        next_token_loss,
        lambda model, batch: model(batch["inputs"]),
    ),
    "seq2seq": Task(
        "AutoModelForSeq2SeqLM",
        pairs,
        lambda batch: {
            "input_ids": batch["inputs"],
            "attention_mask": batch["segment_ids"],
            "decoder_input_ids": batch["decoder_inputs"],
            "labels": np.where(batch["mask"], batch["targets"], -100),
        },
        seq2seq_loss,
        seq2seq_logits,
    ),
    "speech": Task(
        "AutoModelForSpeechSeq2Seq",
        sounds,
        lambda batch: {
            "input_features": batch["inputs"].swapaxes(1, 2),
            "decoder_input_ids": batch["decoder_inputs"],
            "labels": np.where(batch["mask"], batch["targets"], -100),
        },
        seq2seq_loss,
        seq2seq_logits,
    ),
    "image classes": Task(
        "AutoModelForImageClassification",
        lambda rng: {"inputs": images(rng), "labels": np.array([2, 0], np.int32)},
        lambda batch: {
            "pixel_values": theirs_of(batch["inputs"]),
            "labels": batch["labels"],
        },
        classification_loss,
        lambda model, batch: model(batch["inputs"]),
    ),
    "image to text": Task(
        "AutoModelForImageTextToText",
        descriptions,
        lambda batch: {
            "pixel_values": theirs_of(batch["inputs"]),
            "decoder_input_ids": batch["decoder_inputs"],
            "labels": np.where(batch["mask"], batch["targets"], -100),
        },
        seq2seq_loss,
        seq2seq_logits,
    ),
}


def untyped(task: Task) -> Task:
    """Returns the task for a decoder, which knows no types of texts."""
    make = task.batch
    names = {"inputs", "segment_ids", "labels", "mask"}
    batch = lambda rng: {n: x for n, x in make(rng).items() if n in names}
    return task._replace(batch=batch)


TASKS |= {
    "decoder, classify": untyped(TASKS["classify"]),
    "decoder, tag": untyped(TASKS["tag"]),
    "decoder, value": Task(
        "AutoModelForTokenClassification",
        lambda rng: {"inputs": ids(rng)},
        asks(),
        lambda model, batch: Sums(
            jnp.sum(jnp.sin(model(batch["inputs"]))), jnp.ones(())
        ),
        lambda model, batch: model(batch["inputs"]),
        lambda out: out.logits[..., 0],
        lambda out: out.logits.sin().sum(),
    ),
}


class Peer(NamedTuple):
    """A small random model of transformers, by its configuration."""

    model_type: str
    settings: dict[str, Any]
    task: str = "lm"
    change: Callable[[Any], None] = lambda model: None
    """Of the model made by that."""


def without_pooler(model: Any) -> None:
    """Removes a part that nothing reads."""
    model.encoder.pooler = None


def untie(model: Any) -> None:
    """Gives the model an output embedding of its own, whatever its configuration makes."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def stretched(rope_type: str, **more: float) -> dict[str, Any]:
    """Returns rotary parameters of a model that was made for 4 tokens."""
    rope = {"rope_type": rope_type, "rope_theta": 100.0, "factor": 8.0, **more}
    return (
        rope
        if rope_type == "linear"
        else rope | {"original_max_position_embeddings": 4}
    )


GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
OPT = {
    "vocab_size": V, "hidden_size": 32, "ffn_dim": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": None, "eos_token_id": None,
}  # fmt: skip
VIT = {
    "image_size": PIXELS, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 40, "layer_norm_eps": 1e-6,
}  # fmt: skip
READER = GPT2 | {
    "model_type": "gpt2", "n_layer": 2, "is_decoder": True, "add_cross_attention": True,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 3,
}  # fmt: skip
T5 = {
    "vocab_size": V, "d_model": 32, "d_kv": 16, "d_ff": 56, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 9,
    "decoder_start_token_id": 0,
}  # fmt: skip
FLAN = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BART = {
    "vocab_size": V + 1, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56, "max_position_embeddings": 20, "pad_token_id": V,
    "decoder_start_token_id": 7,
}  # fmt: skip
WHISPER = {
    "vocab_size": V, "num_mel_bins": M, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56, "max_source_positions": T, "max_target_positions": 20,
    "pad_token_id": V - 1, "bos_token_id": V - 2, "eos_token_id": V - 2,
    "decoder_start_token_id": V - 3,
}  # fmt: skip
BERT = {name: x for name, x in SIZES.items() if name != "num_key_value_heads"}
DISTILBERT = {
    "vocab_size": V, "dim": 32, "hidden_dim": 56, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}

PEERS = {
    "bert": Peer("bert", BERT, "mlm"),
    "bert, none": Peer("bert", BERT | {"layer_norm_eps": 1e-3}, "none"),
    "bert, classify": Peer("bert", BERT | {"num_labels": 3}, "classify"),
    "bert, tag": Peer("bert", BERT | {"num_labels": 3}, "tag"),
    "bert, span": Peer("bert", BERT, "span"),
    "distilbert": Peer("distilbert", DISTILBERT, "mlm"),
    "distilbert, none": Peer("distilbert", DISTILBERT, "none"),
    "distilbert, classify": Peer(
        "distilbert",
        DISTILBERT | {"id2label": {0: "bad", 1: "so so", 2: "good"}},
        "classify",
    ),
    "gpt2": Peer("gpt2", GPT2),
    "gpt2, narrow": Peer("gpt2", GPT2 | {"n_inner": 40, "layer_norm_epsilon": 1e-3}),
    "gpt2, classify": Peer(
        "gpt2", GPT2 | {"num_labels": 3, "pad_token_id": 0}, "decoder, classify"
    ),
    "gpt2, tag": Peer("gpt2", GPT2 | {"num_labels": 3}, "decoder, tag"),
    "llama": Peer("llama", SIZES),
    "llama, value": Peer("llama", SIZES | {"num_labels": 1}, "decoder, value"),
    "qwen2, classify": Peer(
        "qwen2", SIZES | {"num_labels": 2, "pad_token_id": 0}, "decoder, classify"
    ),
    "llama, tied": Peer("llama", SIZES | {"tie_word_embeddings": True}),
    "llama 3": Peer(
        "llama",
        SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "mixtral": Peer("mixtral", SIZES | {"num_local_experts": 8, "sliding_window": 5}),
    "qwen2 moe": Peer("qwen2_moe", SIZES | EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen3 moe": Peer("qwen3_moe", SIZES | EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3 moe, classify": Peer(
        "qwen3_moe", SIZES | EXPERTS | {"num_labels": 3, "pad_token_id": 0}, "decoder, classify"
    ),
    "mistral": Peer("mistral", SIZES | {"sliding_window": None, "head_dim": 16}),
    "qwen2": Peer("qwen2", SIZES),
    "qwen3": Peer("qwen3", SIZES | {"head_dim": 16}),
    "llama, biases, linear": Peer(
        "llama", SIZES | {"attention_bias": True, "rope_parameters": stretched("linear")}
    ),
    "mistral, window, llama3": Peer(
        "mistral", SIZES | {
            "sliding_window": 5,
            "rope_parameters": stretched("llama3", low_freq_factor=0.1, high_freq_factor=1.0),
        },
    ),
    "qwen2, some windows, yarn": Peer(
        "qwen2", SIZES | {
            "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
            "rope_parameters": stretched("yarn", beta_slow=0.1, beta_fast=1.0),
        },
    ),
    "smollm3": Peer("smollm3", SIZES | {"no_rope_layer_interval": 2, "pad_token_id": None}),
    "opt": Peer("opt", OPT),
    "opt, norms behind": Peer(
        "opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 24}
    ),
    "vit": Peer("vit", VIT | {"num_labels": 3}, "image classes"),
    "image text": Peer(
        "vision-encoder-decoder",
        {"encoder": {"model_type": "vit"} | VIT, "decoder": READER},
        "image to text",
        without_pooler,
    ),
    "image text, one width": Peer(
        "vision-encoder-decoder",
        {
            "encoder": {"model_type": "vit"} | VIT,
            "decoder": READER | {"n_embd": 24, "n_inner": 40},
        },
        "image to text",
        without_pooler,
    ),
    "t5": Peer("t5", T5 | {"num_decoder_layers": 3}, "seq2seq"),
    "t5 v1.1": Peer("t5", FLAN, "seq2seq", untie),
    "mt5": Peer("mt5", FLAN | {"layer_norm_epsilon": 1e-3}, "seq2seq", untie),
    "whisper": Peer("whisper", WHISPER, "speech"),
    "bart": Peer("bart", BART, "seq2seq"),
    "marian": Peer(
        "marian", BART | {"scale_embedding": True, "activation_function": "swish"}, "seq2seq"
    ),
    "mbart": Peer("mbart", BART, "seq2seq"),
    "pegasus": Peer("pegasus", BART | {"activation_function": "relu"}, "seq2seq"),
}  # fmt: skip


FIRST = list({peer.model_type: name for name, peer in reversed(PEERS.items())}.values())
"""One peer of each type."""


class Case(NamedTuple):
    """The peer's model in a folder, and the program that takes it."""

    task: Task
    model: Any
    folder: Path
    program: Program
    params: Any

    def batch(self) -> dict[str, jax.Array]:
        given = self.task.batch(np.random.default_rng(0))
        return {name: jnp.asarray(x) for name, x in given.items()}

    def ask(self, model: Any) -> Any:
        """Returns what a peer makes of the same batch."""
        given = dict(self.task.asked(self.task.batch(np.random.default_rng(0))))
        # DistilBERT has no types of texts.
        if "token_type_ids" not in inspect.signature(model.forward).parameters:
            given.pop("token_type_ids", None)
        given = {name: x for name, x in given.items() if x is not None}
        tensors = {name: torch.from_numpy(np.array(x)) for name, x in given.items()}
        whole = lambda x: x if x.is_floating_point() else x.long()
        return model(**{name: whole(x) for name, x in tensors.items()})

    def answers(self, model: Any) -> Any:
        """Returns the peer's outputs as numpy arrays."""
        with torch.no_grad():
            outputs = self.task.answered(self.ask(model))
        return jax.tree.map(lambda x: x.numpy(), outputs)


def make_peer(peer: Peer) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(peer.model_type, **peer.settings)
    auto = getattr(transformers, TASKS[peer.task].auto)
    model = auto.from_config(config, attn_implementation="eager")
    peer.change(model)
    with (
        torch.no_grad()
    ):  # biases and norms start at 0 and 1, where mistakes do not show
        for parameter in model.parameters():
            if parameter.requires_grad:  # sinusoids are what they are
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def program_for(folder: Path, task: Task, devices: int = 1, **changes: Any) -> Program:
    cfg = read_config(folder)
    how = {"dtype": DTypeConfig(compute="float32"), "global_batch_size": 8, **changes}
    run = RunConfig(model=cfg, steps=1, seq_len=T, **how)
    return build_program(run, loss_fn=task.loss, devices=jax.devices()[:devices])


@pytest.fixture(scope="module", params=PEERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Case:
    peer = PEERS[request.param]
    model, task = make_peer(peer), TASKS[peer.task]
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    program = program_for(folder, task)
    abstract = program.abstract_state["params"]
    params = import_params(folder, program.run.model, abstract)
    return Case(task, model, folder, program, params)


def test_config_is_read(case: Case) -> None:
    cfg = case.program.run.model
    theirs = named_tensors(case.folder, cfg).values()
    assert cfg.num_params() == sum(math.prod(info.shape) for info in theirs)


def test_outputs_are_the_peers(case: Case) -> None:
    with ambient(Ambient()):
        model = merge(case.program.spec.graphdef, case.params)
        ours = case.task.outputs(model, case.batch())
    theirs = case.answers(case.model)
    if case.task.by_token:
        real = np.asarray(case.batch()["segment_ids"] > 0)
        ours, theirs = ours[real], theirs[real]
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), rtol=0)


def test_loss_and_every_gradient_are_the_peers(case: Case) -> None:
    case.model.zero_grad()
    theirs = case.task.its_loss(case.ask(case.model))
    theirs.backward()

    @jax.jit
    @jax.value_and_grad
    def loss_of(params: Any, batch: Any) -> jax.Array:
        with ambient(Ambient()):
            sums = case.task.loss(merge(case.program.spec.graphdef, params), batch)
        return sums.total / sums.count

    loss, slopes = loss_of(case.params, case.batch())
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    # The peer's gradients in our layout: a folder with them in the place of its parameters.
    for parameter in case.model.parameters():
        if parameter.grad is None:  # it is fixed
            parameter.grad = torch.zeros_like(parameter)
    for parameter in case.model.parameters():
        parameter.data, parameter.grad = parameter.grad, parameter.data
    folder = case.folder / "gradients"
    case.model.save_pretrained(folder)
    for parameter in case.model.parameters():
        parameter.data, parameter.grad = parameter.grad, parameter.data
    abstract = case.program.abstract_state["params"]
    expected = import_params(folder, case.program.run.model, abstract)
    # Some are 0 but for rounding: a bias on all keys changes no attention.
    floor = 1e-6 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(paths, jax.tree.leaves(slopes), strict=True):
        scale = 1e-3 * float(jnp.abs(want).max()) + floor
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(got, want, atol=scale, rtol=0, err_msg=name)


def test_greedy_text_is_the_peers(case: Case) -> None:
    batch = case.task.batch(np.random.default_rng(0))
    asked = {k: np.array(x) for k, x in case.task.asked(batch).items() if x is not None}
    asked.pop("labels", None)
    reads = "decoder_input_ids" in asked
    begin = "decoder_input_ids" if reads else "input_ids"
    if case.task.loss not in (next_token_loss, seq2seq_loss):
        pytest.skip("it writes nothing")
    asked[begin] = asked[begin][:, :5].astype(np.int64)
    asked[begin][:, 0] = start = 7
    if not reads:  # else its padding token, somewhere in the prompt, would be hidden
        asked["attention_mask"] = np.ones_like(asked[begin])
    settings = case.model.generation_config
    settings.eos_token_id = settings.forced_eos_token_id = None
    settings.decoder_start_token_id = start
    # Past Whisper's own loop over longer sounds.
    theirs = transformers.GenerationMixin.generate(
        case.model,
        **{name: torch.from_numpy(x) for name, x in asked.items()},
        max_new_tokens=7,
        do_sample=False,
        pad_token_id=0,
        use_cache=False,  # it counts the layers of T5's encoder
    )
    encoded = Encoded(batch["inputs"], batch.get("segment_ids")) if reads else None
    texts = Writer(case.program, case.params).write(
        list(asked[begin]),
        SamplingConfig(max_new_tokens=7, temperature=0.0),
        encoded=encoded,
    )
    np.testing.assert_array_equal([text.ids for text in texts], theirs[:, 5:])


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_import_export_import_is_the_same_to_the_bit(
    case: Case, tmp_path: Path, shard_bytes: int
) -> None:
    cfg = case.program.run.model
    files = export_params(case.params, cfg, tmp_path, shard_bytes=shard_bytes)
    assert (len(files) > 2) == (shard_bytes < 10**9)
    assert read_config(tmp_path) == cfg
    again = import_params(tmp_path, cfg, case.program.abstract_state["params"])
    jax.tree.map(np.testing.assert_array_equal, again, case.params)
    # The library of the format reads it, and transformers makes the same model of it.
    for file in files:
        if file.suffix == ".safetensors":
            assert safetensors.numpy.load_file(file)
    auto = getattr(transformers, case.task.auto)
    model = auto.from_pretrained(tmp_path, attn_implementation="eager")
    # Of tokens only the tokenizer tells; a decoder's labels are of the last that is not padding.
    if hasattr(case.model.config, "pad_token_id"):
        model.config.pad_token_id = case.model.config.pad_token_id
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == [type(model).__name__]
    theirs = case.answers(case.model)
    jax.tree.map(np.testing.assert_array_equal, case.answers(model), theirs)


@pytest.mark.parametrize("case", FIRST, indirect=True)
@pytest.mark.parametrize("stage", [1, 3])
def test_shards_of_any_mesh_take_it(case: Case, stage: Literal[1, 3]) -> None:
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    zero = ZeroConfig(stage=stage, param_persistence_threshold=0)
    program = program_for(case.folder, case.task, 8, mesh=mesh, zero=zero)
    abstract = program.abstract_state["params"]
    params = import_params(case.folder, program.run.model, abstract)
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    same = jax.tree.map(lambda p, a: p.sharding == a.sharding, params, abstract)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("case", FIRST, indirect=True)
def test_dtype_is_chosen_on_reading_and_writing(case: Case, tmp_path: Path) -> None:
    cfg, abstract = case.program.run.model, case.program.abstract_state["params"]
    half = jax.tree.map(lambda a: a.update(dtype=jnp.bfloat16), abstract)
    params = import_params(case.folder, cfg, half)
    jax.tree.map(
        lambda p, q: np.testing.assert_array_equal(p, q.astype(jnp.bfloat16)),
        params,
        case.params,
    )
    export_params(case.params, cfg, tmp_path, dtype=jnp.bfloat16)
    again = import_params(tmp_path, cfg, abstract)
    jax.tree.map(
        lambda p, q: np.testing.assert_array_equal(p, q.astype(jnp.float32)),
        again,
        params,
    )
