# SPDX-License-Identifier: Apache-2.0
"""A model may begin from a checkpoint with another head, whose own is then left out; all else stays strict."""

import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxspeed import nn
from jaxspeed.checkpoint import Checkpointer
from jaxspeed.config import ConfigError, RunConfig, to_dict
from jaxspeed.hf import export_params, head_paths, import_params, read_config
from jaxspeed.paths import subtree
from jaxspeed.pretrained import export_run, read_params
from jaxspeed.program import Program, build_program
from models import bert, gpt2, llama
from models.heads import last_token


BERT = bert.Config(
    vocab_size=16, max_seq_len=8, num_layers=1, num_heads=2, d_model=8, d_ff=8
)
GPT2 = gpt2.Config(vocab_size=16, max_seq_len=8, num_layers=1, num_heads=2, d_model=8)
LLAMA = llama.Config(
    vocab_size=16, max_seq_len=8, num_layers=1, num_heads=2, num_kv_heads=2, d_model=8,
    head_dim=4, d_ff=8,
)  # fmt: skip

CASES = {
    # family, its head there and here, what is new, and which of theirs is left out
    "bert for labels": (BERT, "none", "classify", {"labels.w", "labels.b"}, set()),
    "masked bert for labels": (
        BERT,
        "mlm",
        "classify",
        {"labels.w", "labels.b", "pool.w", "pool.b"},
        {"cls.predictions.bias", "cls.predictions.transform.dense.weight"},
    ),
    "labels of another kind": (
        BERT,
        "classify",
        "tag",
        {"labels.w", "labels.b"},
        {"classifier.bias", "bert.pooler.dense.weight"},
    ),
    "gpt2 for labels": (GPT2, "lm", "classify", {"head.labels.w"}, set()),
    "llama for values": (
        LLAMA,
        "lm",
        "value",
        {"head.labels.w", "head.labels.b"},
        {"lm_head.weight"},
    ),
}


def with_head(cfg: Any, head: str, **settings: Any) -> Any:
    return dataclasses.replace(cfg, head=head, **settings)


@functools.cache
def program_of(cfg: Any) -> Program:
    run = RunConfig(model=cfg, steps=1, seq_len=8, micro_batch_size=1)
    return build_program(run, devices=jax.devices()[:1])


def abstract_of(cfg: Any) -> Any:
    return program_of(cfg).abstract_state["params"]


def drawn(cfg: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    make = lambda leaf: jax.device_put(
        rng.normal(size=leaf.shape).astype(np.float32), leaf.sharding
    )
    return jax.tree.map(make, abstract_of(cfg))


def giving(params: Any) -> Any:
    return lambda names: subtree(params, names)


def flat(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    dotted = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {dotted(path): leaf for path, leaf in leaves}


def assert_new_head(made: Any, theirs: Any, fresh: Any, new: set[str]) -> None:
    made, theirs, fresh = map(flat, (made, theirs, fresh))
    assert set(made) == set(fresh)
    for path, leaf in made.items():
        expected = fresh if path in new else theirs
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_run_with_another_head_than_its_folder_gets_a_new_one(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family, there, head, new, left = CASES[case]
    theirs, cfg = with_head(family, there), with_head(family, head, num_labels=2)
    params, fresh = drawn(theirs, 0), drawn(cfg, 1)
    export_params(params, theirs, tmp_path)
    with caplog.at_level(logging.WARNING):
        made = import_params(tmp_path, cfg, abstract_of(cfg), fresh=giving(fresh))
    assert_new_head(made, params, fresh, new)
    said = " ".join(caplog.messages)
    assert ("left out" in said) == bool(left)
    for name in left:
        assert name in said
    with pytest.raises(ConfigError, match=f"head={there}, the run's model.head is"):
        import_params(tmp_path, cfg, abstract_of(cfg))


@pytest.mark.parametrize("case", ["masked bert for labels", "llama for values"])
def test_run_with_another_head_than_the_run_it_begins_from_gets_a_new_one(
    case: str, tmp_path: Path
) -> None:
    family, there, head, new, _ = CASES[case]
    theirs, cfg = with_head(family, there), with_head(family, head)
    params, fresh = drawn(theirs, 0), drawn(cfg, 1)
    write_run(tmp_path, theirs, params)
    made = read_params(tmp_path, cfg, abstract_of(cfg), fresh=giving(fresh))
    assert_new_head(made, params, fresh, new)
    with pytest.raises(ConfigError):
        read_params(tmp_path, cfg, abstract_of(cfg))
    wider = dataclasses.replace(cfg, vocab_size=17)
    with pytest.raises(ConfigError, match="has vocab_size=16, the run's .* is 17"):
        read_params(tmp_path, wider, abstract_of(wider), fresh=giving(drawn(wider, 1)))


def write_run(folder: Path, cfg: Any, params: Any, **task: Any) -> None:
    """Writes what a run leaves behind, as far as a model is made of it."""
    run = {**to_dict(program_of(cfg).run), "family": type(cfg).__module__}
    run["task"] |= task
    (folder / "config.json").write_text(json.dumps(run))
    saver = Checkpointer(folder / "checkpoints", keep=1, asynchronous=False)
    saver.prepare()
    with saver:
        saver.save(1, {"params": params}, meta={})


def change(folder: Path, edit: Any) -> None:
    file = folder / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(file))
    edit(tensors)
    safetensors.numpy.save_file(tensors, file)


@pytest.mark.parametrize(
    ("there", "gone"),
    [("mlm", "bert.embeddings.LayerNorm.bias"), ("classify", "classifier.bias")],
)
def test_all_but_another_head_must_be_there(
    there: str, gone: str, tmp_path: Path
) -> None:
    theirs, cfg = with_head(BERT, there), with_head(BERT, "classify")
    export_params(drawn(theirs, 0), theirs, tmp_path)
    change(tmp_path, lambda tensors: tensors.pop(gone))
    with pytest.raises(ConfigError, match=f"lacks {gone}, which the model needs"):
        import_params(tmp_path, cfg, abstract_of(cfg), fresh=giving(drawn(cfg, 1)))


def test_names_and_heads_of_the_first_checkpoints_are_read(tmp_path: Path) -> None:
    """bert-base-uncased: gamma and beta, a pooler and next-sentence weights beside its masked tokens."""
    cfg = with_head(BERT, "mlm")
    params = drawn(cfg, 0)
    export_params(params, cfg, tmp_path)

    def age(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            old = old.replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        zeros = functools.partial(np.zeros, dtype=np.float32)
        tensors["bert.pooler.dense.weight"] = zeros((8, 8))
        tensors["cls.seq_relationship.bias"] = zeros((2,))
        tensors["bert.embeddings.position_ids"] = np.arange(8)[None]

    change(tmp_path, age)
    made = import_params(tmp_path, cfg, abstract_of(cfg))
    jax.tree.map(np.testing.assert_array_equal, made, params)


@pytest.mark.parametrize("family", [BERT, GPT2])
def test_names_of_labels_survive(family: Any, tmp_path: Path) -> None:
    names = ("bad", "good", "neither")
    cfg = with_head(family, "classify", num_labels=3, labels=names)
    export_params(drawn(cfg, 0), cfg, tmp_path / "named")
    assert read_config(tmp_path / "named") == cfg
    settings = json.loads((tmp_path / "named" / "config.json").read_text())
    assert settings["id2label"] == dict(zip("012", names, strict=True))
    # Those that a task names go into the folder.
    unnamed = dataclasses.replace(cfg, labels=())
    write_run(tmp_path, unnamed, drawn(unnamed, 0), labels=names)
    export_run(tmp_path, tmp_path / "exported")
    assert read_config(tmp_path / "exported") == cfg


def test_exported_folder_says_which_tokens_end_a_text_and_fill_a_row(
    tmp_path: Path,
) -> None:
    """In transformers a row's last token is found by them."""
    write_run(tmp_path, GPT2, drawn(GPT2, 0))
    words = {"[UNK]": 0, "</s>": 3, "[PAD]": 5}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    export_run(tmp_path, tmp_path / "exported")
    settings = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"]) == (3, 5)


def test_a_rows_label_is_that_of_its_last_token() -> None:
    x = np.arange(24.0, dtype=np.float32).reshape(2, 6, 2)
    segments = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]], np.int32)
    got = last_token(jnp.asarray(x), jnp.asarray(segments))
    np.testing.assert_array_equal(got, x[[0, 1], [5, 3]])
    np.testing.assert_array_equal(last_token(jnp.asarray(x), None), x[:, 5])


def test_head_paths_are_those_of_the_head_alone() -> None:
    assert head_paths(with_head(BERT, "classify")) == {"labels.w", "labels.b"}
    assert head_paths(with_head(LLAMA, "lm")) == {"lm_head"}


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        (bert.Config, {"head": "span", "num_labels": 3}, "num_labels=3: a span has"),
        (bert.Config, {"num_labels": 0}, "model.num_labels=0: give 1 or more"),
        (
            gpt2.Config,
            {"labels": ("a",)},
            "model.labels names 1 labels, model.num_labels is 2",
        ),
        (bert.Config, {"d_model": 33, "num_heads": 4}, "nearest legal: 32"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    family: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        family(**values)


def test_architecture_of_another_head_is_named(tmp_path: Path) -> None:
    cfg = with_head(BERT, "mlm")
    export_params(drawn(cfg, 0), cfg, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["architectures"] = ["BertForMultipleChoice"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ConfigError, match="architectures='BertForMultipleChoice' is not done here"
    ):
        read_config(tmp_path)


def test_mixture_of_two_families_cannot_be_exported(tmp_path: Path) -> None:
    cfg = dataclasses.replace(BERT, num_token_types=0)
    with pytest.raises(ConfigError, match="no Hugging Face model has these together"):
        export_params(drawn(cfg, 0), cfg, tmp_path)


def test_model_without_a_language_head_writes_no_text() -> None:
    cfg = with_head(LLAMA, "value")
    model = nn.merge(program_of(cfg).spec.graphdef, drawn(cfg, 0))
    with pytest.raises(ConfigError, match=r"model\.head=value: the model gives that"):
        model.output_embedding()
