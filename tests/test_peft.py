# SPDX-License-Identifier: Apache-2.0
"""Adapters go to PEFT's files and come back, bit for bit, onto any mesh; PEFT itself says the same with them."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxspeed.ambient import Ambient, ambient
from jaxspeed.config import ConfigError, LoraConfig, MeshConfig, ZeroConfig
from jaxspeed.hf import export_params
from jaxspeed.lora import without
from jaxspeed.paths import paths_of
from jaxspeed.peft import read_adapters, write_adapters
from jaxspeed.program import Program, build_program
from jaxspeed.sharding import part_of
from jaxspeed.step import model_of
from tests.models.zoo import ZOO
from tests.toy import assert_same, run_of


R = 4
LORA = LoraConfig(rank=R, alpha=6.0)
NAMES = ["gpt2", "llama", "bert, classify"]
TRAINED = {"bert, classify": ("labels.*",)}


def lora_of(name: str, **changes: Any) -> LoraConfig:
    return dataclasses.replace(LORA, trained=TRAINED.get(name, ()), **changes)


@functools.cache
def program(name: str, lora: LoraConfig, devices: int = 1) -> Program:
    run = run_of(
        model=ZOO[name].cfg, seq_len=16, lora=lora, mesh=MeshConfig(fsdp=-1),
        zero=ZeroConfig(stage=3, param_persistence_threshold=0),
    )  # fmt: skip
    return build_program(run, loss_fn=ZOO[name].loss, devices=jax.devices()[:devices])


def drawn(of: Program) -> Any:
    """Returns parameters that are all random, adapters' B too."""
    rng = np.random.default_rng(0)
    make = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)
    return jax.tree.map(make, of.abstract_state["params"])


def trained(of: Program) -> set[str]:
    params = without(of.abstract_state["params"])
    return set(paths_of(part_of(params, without(of.spec.placements))))


def write(
    of: Program, params: Any, folder: Path, dtype: Any = np.float32
) -> list[Path]:
    run = of.run
    how = {"base": "there/is a model", "dtype": dtype}
    return write_adapters(params, run.model, run.lora, trained(of), folder, **how)


def read(of: Program, folder: Path) -> Any:
    run = of.run
    return read_adapters(
        folder, run.model, run.lora, trained(of), of.abstract_state["params"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_adapters_come_back_to_the_last_bit_on_any_mesh(
    name: str, tmp_path: Path
) -> None:
    lora = lora_of(name)
    of = program(name, lora)
    params = drawn(of)
    files = write(of, params, tmp_path)
    assert {file.name for file in files} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for there in (of, program(name, lora, 4)):
        again = read(there, tmp_path)
        assert_same(again["lora"], params["lora"])
        places = there.abstract_state["params"]
        jax.tree.map(
            lambda x, like: x.sharding == like.sharding or pytest.fail(str(like)),
            again["lora"], places["lora"],
        )  # fmt: skip
    if name == "bert, classify":
        assert_same(again["labels"], params["labels"])


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def settings_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_files_are_named_and_laid_out_as_peft_has_them(tmp_path: Path) -> None:
    of = program("llama", lora_of("llama", dropout=0.1))
    params = drawn(of)
    write(of, params, tmp_path)
    tensors, settings = tensors_in(tmp_path), settings_in(tmp_path)
    layer = "base_model.model.model.layers.1."
    q = params["lora"]["layers"]["block"]["attn"]["wq"]
    np.testing.assert_array_equal(
        tensors[f"{layer}self_attn.q_proj.lora_A.weight"], q["a"][1].T
    )
    b = tensors[f"{layer}self_attn.q_proj.lora_B.weight"]
    np.testing.assert_array_equal(b, q["b"][1].reshape(R, -1).T)
    o = params["lora"]["layers"]["block"]["attn"]["wo"]["a"]
    a = tensors[f"{layer}self_attn.o_proj.lora_A.weight"]
    np.testing.assert_array_equal(a, o[1].reshape(-1, R).T)
    assert len(tensors) == 2 * 2 * 7
    assert settings["target_modules"] == sorted(
        f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")
    )
    chosen = (
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "task_type",
        "fan_in_fan_out",
    )
    assert [settings[n] for n in chosen] == ["LORA", R, 6.0, 0.1, "CAUSAL_LM", False]
    assert settings["base_model_name_or_path"] == "there/is a model"


def test_three_matrices_in_one_have_one_adapter_in_blocks(tmp_path: Path) -> None:
    of = program("gpt2", LORA)
    params = drawn(of)
    write(of, params, tmp_path)
    tensors, settings = tensors_in(tmp_path), settings_in(tmp_path)
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_{}.weight"
    a, b = tensors[name.format("A")], tensors[name.format("B")]
    assert (a.shape, b.shape) == ((3 * R, 32), (96, 3 * R))
    parts = [params["lora"]["layers"]["block"]["attn"][f"w{x}"] for x in "qkv"]
    whole = [np.tensordot(p["a"][1], p["b"][1], 1).reshape(32, 32) for p in parts]
    np.testing.assert_allclose((b @ a).T, np.concatenate(whole, 1), atol=1e-6)
    assert settings["rank_pattern"] == {"c_attn": 3 * R}
    assert settings["alpha_pattern"] == {"c_attn": 18.0}
    assert settings["fan_in_fan_out"] is True
    assert settings["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    some = program("gpt2", lora_of("gpt2", targets=("*.w_down",)))
    write(some, drawn(some), tmp_path / "some")
    # attn.c_proj has none.
    assert settings_in(tmp_path / "some")["target_modules"] == ["mlp.c_proj"]


def test_adapter_that_three_matrices_share_is_each_ones(tmp_path: Path) -> None:
    of = program("gpt2", lora_of("gpt2", targets=("*.wq", "*.wk", "*.wv")))
    write(of, drawn(of), tmp_path)
    rng = np.random.default_rng(1)
    tensors = {
        name: rng.normal(size=(R, 32) if "_A" in name else (96, R)).astype(np.float32)
        for name in tensors_in(tmp_path)
    }
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = settings_in(tmp_path) | {"rank_pattern": {}, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    again = read(of, tmp_path)["lora"]["layers"]["block"]["attn"]
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_{}.weight"
    a, b = tensors[name.format("A")], tensors[name.format("B")]
    for i, part in enumerate("qkv"):
        mine = again[f"w{part}"]
        np.testing.assert_array_equal(mine["a"][1], a.T)
        np.testing.assert_array_equal(
            mine["b"][1].reshape(R, 32), b[32 * i : 32 * (i + 1)].T
        )


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (lambda t: t.pop(Q), {}, f"lacks {Q}, which lora.targets"),
        (lambda t: t.update(odd=t[Q]), {}, "holds odd, which lora.targets"),
        (lambda t: t.update({Q: t[Q][:, :8].copy()}), {}, r"is of shape \(4, 8\), the run's is \(4, 32\)"),
        (lambda t: t.update({Q: t[Q][:2].copy()}), {}, "q_proj counts 3 times"),
        (None, {"lora_alpha": 8}, r"q_proj counts 2 times .* the run's 1.5 times"),
        (None, {"use_rslora": True}, "counts 3 times"),
        (None, {"use_dora": True}, "use_dora=True is not done here"),
        (None, {"bias": "all"}, "bias='all' is not done here, 'none' is"),
        (None, {"peft_type": "IA3"}, "peft_type='IA3' is not done here"),
    ],
)  # fmt: skip
def test_folder_that_does_not_fit_is_named(
    tmp_path: Path, tensors: Callable[..., Any] | None, settings: Any, message: str
) -> None:
    of = program("llama", LORA)
    write(of, drawn(of), tmp_path)
    held = tensors_in(tmp_path)
    if tensors is not None:
        tensors(held)
    safetensors.numpy.save_file(held, tmp_path / "adapter_model.safetensors")
    changed = settings_in(tmp_path) | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=message) as caught:
        read(of, tmp_path)
    assert "\n" not in str(caught.value)


def test_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    of = program("llama", LORA)
    with pytest.raises(ConfigError, match=r"adapter_config.json: No such file"):
        read(of, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not the settings of an adapter"):
        read(of, tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"targets": ("*.wq",)}, "c_attn is one matrix, of .*wq and .*wk and"),
        ("gpt2", {"trained": ("*.b_up",)}, "mlp.c_fc, which has an adapter"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    name: str, changes: Any, message: str, tmp_path: Path
) -> None:
    of = program(
        name,
        lora_of(name, **changes)
        if "trained" not in changes
        else dataclasses.replace(LORA, **changes),
    )
    with pytest.raises(ConfigError, match=message):
        write(of, drawn(of), tmp_path)


def base_folder(of: Program, params: Any, folder: Path) -> Path:
    export_params(without(params), of.run.model, folder)
    return folder


AUTO = {"bert, classify": "AutoModelForSequenceClassification"}


def theirs(name: str, base: Path) -> Any:
    import transformers

    auto = getattr(transformers, AUTO.get(name, "AutoModelForCausalLM"))
    return auto.from_pretrained(base, attn_implementation="eager").eval()


def asked(of: Program, params: Any, peer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the outputs of our model and of theirs."""
    import torch

    ids = np.random.default_rng(2).integers(3, 64, (2, 12), np.int32)
    with ambient(Ambient()):
        ours = jax.jit(lambda p, x: model_of(of.spec, p)(x))(params, jnp.asarray(ids))
    with torch.no_grad():
        out = peer(input_ids=torch.as_tensor(ids.astype(np.int64)))
    return np.asarray(ours), out.logits.numpy()


# What PEFT 0.21 calls in transformers 5.
of_peft = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@of_peft
@pytest.mark.hf
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_peft_says_the_same_with_our_adapters(
    name: str, rslora: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="needs pip install 'jaxspeed[hf]'")
    of = program(name, lora_of(name, rslora=rslora))
    params = drawn(of)
    base = theirs(name, base_folder(of, params, tmp_path / "base"))
    write(of, params, tmp_path / "adapter")
    ours, plain = asked(of, params, base)
    assert np.abs(ours - plain).max() > 1e-2
    peer = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    np.testing.assert_allclose(*asked(of, params, peer), rtol=1e-4, atol=1e-4)


@of_peft
@pytest.mark.hf
@pytest.mark.parametrize("name", NAMES)
def test_adapters_that_peft_wrote_are_read(name: str, tmp_path: Path) -> None:
    import torch

    peft = pytest.importorskip("peft", reason="needs pip install 'jaxspeed[hf]'")
    of = program(name, lora_of(name))
    params = drawn(of)
    base = theirs(name, base_folder(of, params, tmp_path / "base"))
    write(of, params, tmp_path / "ours")
    chosen = settings_in(tmp_path / "ours")
    own = ("target_modules", "modules_to_save", "fan_in_fan_out", "r", "lora_alpha")
    made = peft.LoraConfig(task_type=chosen["task_type"], **{n: chosen[n] for n in own})
    torch.manual_seed(0)
    peer = peft.get_peft_model(base, made)
    with torch.no_grad():
        for value in peer.parameters():
            if value.requires_grad:
                value.normal_(0, 0.2)
    peer.save_pretrained(tmp_path / "theirs")
    params = {**params, **{k: v for k, v in read(of, tmp_path / "theirs").items()}}
    np.testing.assert_allclose(*asked(of, params, peer.eval()), rtol=1e-4, atol=1e-4)
