# SPDX-License-Identifier: Apache-2.0
"""A folder of another model, with tensors too many, too few or of another shape, is one line that names them."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxspeed import cli
from jaxspeed.config import ConfigError, RunConfig
from jaxspeed.hf import (
    export_params,
    find_exchange,
    import_params,
    is_hugging_face,
)
from jaxspeed.pretrained import export_run, model_config, open_model
from jaxspeed.program import Program, build_program
from models import gpt2, llama
from tests.command import losses, write_recipe


CONFIG = gpt2.Config(
    vocab_size=264, max_seq_len=16, num_layers=2, num_heads=2, d_model=8
)


def program_of(cfg: Any = CONFIG) -> Program:
    run = RunConfig(model=cfg, steps=1, seq_len=8, micro_batch_size=1, seed=7)
    return build_program(run, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a small GPT-2."""
    folder = tmp_path_factory.mktemp("hf")
    export_params(program_of().init_state()["params"], CONFIG, folder)
    return folder


def changed(source: Path, folder: Path, change: Any = None, **settings: Any) -> Path:
    """Returns a copy with `change` applied to its tensors and these settings in config.json."""
    tensors = dict(safetensors.numpy.load_file(source / "model.safetensors"))
    if change:
        change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path, cfg: Any = CONFIG) -> Any:
    return import_params(folder, cfg, program_of(cfg).abstract_state["params"])


FC = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FC), f"lacks {FC}, which the model needs"),
        (
            lambda t: t.update(odd=np.zeros(1)),
            "holds odd, which the model has no place",
        ),
        (
            lambda t: t.update({FC: t[FC].T.copy()}),
            rf"{FC} is of shape \(32, 8\), the model's is \(8, 32\)",
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if ".h.1." in n],
            "lacks .* and 9 more, which the model needs",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    source: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(changed(source, tmp_path, change))


@pytest.mark.parametrize(
    "extra",
    ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias", "lm_head.weight"],
)
def test_what_holds_no_parameter_is_passed_over(
    source: Path, tmp_path: Path, extra: str
) -> None:
    add = lambda tensors: tensors.update({extra: np.ones((1, 1, 4, 4), np.float32)})
    theirs = read(changed(source, tmp_path, add))
    jax.tree.map(np.testing.assert_array_equal, theirs, read(source))


def test_model_without_its_head_has_shorter_names(source: Path, tmp_path: Path) -> None:
    def shorten(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    theirs = read(changed(source, tmp_path, shorten))
    jax.tree.map(np.testing.assert_array_equal, theirs, read(source))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "gpt3"},
            "model_type='gpt3': no such family. Did you mean 'gpt2'",
        ),
        ({"model_type": None}, "family=None is not in the package 'models'"),
        (
            {"activation_function": "relu"},
            "activation_function='relu' is not done here",
        ),
        ({"n_layer": None}, "has no n_layer, which this family needs"),
        ({"n_layer": 3}, "its model has num_layers=3, the run's model.num_layers is 2"),
    ],
)
def test_configuration_that_does_not_fit_is_named(
    source: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = changed(source, tmp_path, **settings)

    def take() -> None:
        model_config(folder)
        read(folder)

    with pytest.raises(ConfigError, match=message):
        take()


def test_family_of_another_is_refused(source: Path) -> None:
    cfg = llama.Config(
        vocab_size=264, max_seq_len=16, num_layers=1, num_heads=2, num_kv_heads=2,
        d_model=8, head_dim=4, d_ff=8,
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match="a model of type 'gpt2', the run's family does llama"
    ):
        read(source, cfg)


def test_package_of_families_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="'no_models' of model families cannot"):
        find_exchange("gpt2", "no_models")


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}'])
def test_folder_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert not is_hugging_face(tmp_path)
    with pytest.raises(ConfigError, match=r"config.json"):
        model_config(tmp_path)


def test_config_of_a_run_names_only_families(tmp_path: Path) -> None:
    """No other module is imported because a file says so."""
    (tmp_path / "config.json").write_text('{"family": "this", "model": {}}')
    with pytest.raises(ConfigError, match="family='this' is not in the package"):
        model_config(tmp_path)
    assert "this" not in sys.modules


def test_run_starts_from_a_folder_and_goes_back_to_one(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    text = recipe.path.read_text()
    text = text.replace(
        "from tests.toy import Config", "from models.gpt2 import Config"
    )
    sizes = "vocab_size=264, max_seq_len=16"
    assert sizes in text
    sizes_here = f"{sizes}, num_layers=2, num_heads=2, d_model=8"
    recipe.path.write_text(text.replace(sizes, sizes_here))
    flags = ["--steps", "1", "--optim.lr", "0.0", "--virtual_devices", "2"]
    flags += ["--data.tokenizer", "byte"]
    recipe.run(tmp_path / "warm", *flags, "--init", str(source))
    recipe.run(tmp_path / "cold", *flags)
    assert losses(tmp_path / "warm") != losses(tmp_path / "cold")
    exported = tmp_path / "exported"
    assert (
        cli.main(["export", str(tmp_path / "warm"), "--to", "hf", str(exported)]) == 0
    )
    assert str(exported / "model.safetensors") in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, read(exported), read(source))
    scores = []
    for model in (source, tmp_path / "warm", exported):
        assert (
            cli.main(
                [
                    "score",
                    str(model),
                    "--ids",
                    "5,17,3",
                    "--json",
                    "--compile_cache",
                    "",
                ]
            )
            == 0
        )
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[1] == scores[2]
    assert scores[0]["ids"] == [[5, 17, 3]]
    assert len(scores[0]["logprobs"][0]) == 2


def test_scores_are_the_log_probabilities_of_the_model(source: Path) -> None:
    from jaxspeed.ambient import Ambient, ambient
    from jaxspeed.generate import token_logprobs
    from jaxspeed.nn import merge

    program, params = open_model(source)
    ids = np.array([5, 17, 3, 8, 200, 1])
    with ambient(Ambient()):
        whole = jax.device_put(params, jax.devices()[0])
        logits = merge(program.spec.graphdef, whole)(jnp.asarray(ids[None], jnp.int32))[
            0
        ]
    expected = jax.nn.log_softmax(logits)[np.arange(5), ids[1:]]
    np.testing.assert_allclose(
        token_logprobs(program, params, ids), expected, atol=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "HF", "--ids", "5,x"], "ids='5,x': not token ids"),
        (["score", "HF", "--ids", "5"], "ids=1: that many tokens cannot be scored"),
        (["score", "HF", "--ids", "5,264"], "ids=264: the model has no such token"),
        (["score", "HF", "--ids", "5,-1"], "ids=-1: the model has no such token"),
        (["score", "HF", "--ids", "5,6", "--dtype", "int8"], "int8"),
        (["score", "nowhere", "--ids", "5,6"], "nowhere/config.json"),
        (["export", "HF", "--to", "gguf", "out"], "to='gguf': no such format"),
        (["export", "HF", "--to", "hf", "HF"], "holds model.safetensors already"),
        (["export", "HF", "--to", "hf", "x", "--shard-gb", "0"], "shard-gb=0.0"),
    ],
)
def test_bad_arguments_are_one_line(
    source: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(source) if x == "HF" else x for x in arguments]
    assert cli.main(given) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_export_of_a_folder_is_a_copy(source: Path, tmp_path: Path) -> None:
    export_run(source, tmp_path / "copy", shard_bytes=2000)
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    copy = read(tmp_path / "copy")
    jax.tree.map(np.testing.assert_array_equal, copy, read(source))
