# SPDX-License-Identifier: Apache-2.0
"""A run of adapters: what lies in its directory, how it goes on, and what comes out of it."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed import cli, loop
from jaxspeed.checkpoint import Checkpointer, names_in
from jaxspeed.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    DTypeConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    ZeroConfig,
    to_dict,
)
from jaxspeed.frozen import save_frozen
from jaxspeed.generate import token_logprobs
from jaxspeed.hf import export_params
from jaxspeed.loop import fit
from jaxspeed.lora import folded, without
from jaxspeed.metrics import read_metrics
from jaxspeed.paths import paths_of
from jaxspeed.pretrained import read_params, refuse_frozen_head, run_config
from jaxspeed.program import Program, build_program
from jaxspeed.sharding import part_of
from jaxspeed.tasks import evaluate_at
from jaxspeed.types import Sums
from models import bert, gpt2
from tests import toy
from tests.command import records, write_recipe
from tests.toy import assert_same, host


LORA = LoraConfig(rank=2, alpha=8.0)
MATRIX = "layers.block.w"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of the toy's adapters that saves at 2 and 4, on two devices at stage 3."""
    folder = tmp_path_factory.mktemp("lora")
    return RunConfig(
        model=toy.Config(vocab_size=264, max_seq_len=16),
        steps=4,
        seq_len=16,
        global_batch_size=8,
        mesh=MeshConfig(data=4, fsdp=2),
        zero=ZeroConfig(stage=3, param_persistence_threshold=0),
        lora=dataclasses.replace(LORA, dropout=0.1),
        dtype=DTypeConfig(compute="float32"),
        optim=OptimConfig(lr=0.05, lr_groups=(("lora.*.b", 2.0),)),
        schedule=ScheduleConfig(name="constant"),
        data=DataConfig(
            path=(str(write_recipe(folder).text),), tokenizer="byte", cache_dir=str(folder / "cache"),
        ),
        checkpoint=CheckpointConfig(every=2),
        eval=EvalConfig(every=2, batches=1, sample_tokens=0),
        log_every=1,
        workdir=str(folder / "run"),
        compile_cache="",
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(run: RunConfig) -> Path:
    return fit(run, name="lora").workdir


def moved(run: RunConfig, workdir: Path, **changes: Any) -> RunConfig:
    return dataclasses.replace(run, workdir=str(workdir), **changes)


def abstract(cfg: Any, devices: int = 1) -> Any:
    return made(cfg, devices).abstract_state["params"]


def made(cfg: Any, devices: int = 1, **how: Any) -> Program:
    run = RunConfig(model=cfg, steps=1, seq_len=8, micro_batch_size=1, **how)
    return build_program(run, devices=jax.devices()[:devices])


def test_checkpoints_hold_the_adapters_and_the_run_its_model_once(done: Path) -> None:
    for step in ("2", "4"):
        held = names_in(done / "checkpoints" / step)
        assert held == {f"lora.{MATRIX}.a", f"lora.{MATRIX}.b"}
    frozen = names_in(done / "frozen" / "0")
    assert frozen == {"embed", MATRIX, "layers.block.b"}


def test_run_goes_on_exactly(run: RunConfig, done: Path, tmp_path: Path) -> None:
    half = moved(run, tmp_path, steps=2)
    fit(half, name="lora")
    # As if it had been killed before its first checkpoint.
    shutil.rmtree(tmp_path / "checkpoints")
    fit(half, name="lora")
    fit(dataclasses.replace(half, steps=4), name="lora")
    assert records(tmp_path) == records(done)
    assert [path.name for path in (tmp_path / "frozen").iterdir()] == ["0"]
    shapes = abstract(run.model)
    ours, theirs = (read_params(x, run.model, shapes) for x in (tmp_path, done))
    assert_same(ours, theirs)


def test_run_begins_with_another_ones_model_its_adapters_added(
    run: RunConfig, done: Path, tmp_path: Path
) -> None:
    still = {"steps": 1, "optim": OptimConfig(lr=0.0)}
    fit(moved(run, tmp_path, init=str(done), **still), name="lora")
    ended, again = (read_metrics(x)[-1]["eval/loss"] for x in (done, tmp_path))
    assert again == pytest.approx(ended, rel=1e-6)
    shapes = abstract(run.model)
    ours, theirs = (read_params(x, run.model, shapes) for x in (tmp_path, done))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_run_is_evaluated_with_its_adapters(run: RunConfig, done: Path) -> None:
    again = run_config(done, models="tests")
    assert again == run
    evaluation = evaluate_at(done, again)
    ended = read_metrics(done)[-1]["eval/loss"]
    assert evaluation.metrics["eval/loss"] == pytest.approx(ended, rel=1e-6)


def test_run_with_other_adapters_does_not_go_on(run: RunConfig, done: Path) -> None:
    other = dataclasses.replace(run.lora, rank=4)
    with pytest.raises(ConfigError, match="set model, freeze and lora as they were"):
        fit(dataclasses.replace(run, lora=other, steps=9), name="lora")


def test_damaged_model_is_named(run: RunConfig, done: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(done, tmp_path / "run")
    shutil.rmtree(copy / "frozen" / "0" / "params")
    with pytest.raises(ConfigError, match="frozen"):
        fit(moved(run, copy, steps=9), name="lora")


# A GPT-2 with adapters, as a run would have left it.

MODEL = gpt2.Config(vocab_size=32, max_seq_len=8, num_layers=2, num_heads=2, d_model=8)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Returns a run directory and its parameters."""
    program, workdir = made(MODEL, lora=LORA), tmp_path_factory.mktemp("left")
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32)
    params = jax.tree.map(draw, program.abstract_state["params"])
    placed = jax.tree.map(jax.device_put, params, program.shardings["params"])
    trained, frozen = (
        part_of(placed, program.spec.placements, trained=t) for t in (True, False)
    )
    save_frozen(workdir, frozen)
    with Checkpointer(workdir / "checkpoints", keep=0, asynchronous=False) as writer:
        writer.save(3, {"params": trained}, meta={})
    run = dataclasses.replace(program.run, init="the/base")
    settings = {"family": "models.gpt2", **to_dict(run)}
    (workdir / "config.json").write_text(json.dumps(settings))
    return workdir, params


@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/3"])
@pytest.mark.parametrize("devices", [1, 4])
def test_what_is_read_is_the_model_with_its_adapters_added(
    left: tuple[Path, Any], place: str, devices: int
) -> None:
    whole = read_params(left[0] / place, MODEL, abstract(MODEL, devices))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        host(whole), host(folded(left[1], LORA)),
    )  # fmt: skip


def test_exported_model_says_what_the_adapted_one_says(
    left: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.array([5, 17, 3, 9, 30], np.int32)
    program = made(MODEL, lora=LORA, dtype=DTypeConfig(compute="float32"))
    params = jax.tree.map(jax.device_put, left[1], program.shardings["params"])
    expected = token_logprobs(program, params, ids)
    assert cli.main(["export", str(left[0]), "--to", "hf", str(tmp_path)]) == 0
    for model in (tmp_path, left[0]):
        capsys.readouterr()
        text = ",".join(map(str, ids))
        assert cli.main(["score", str(model), "--ids", text, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)["logprobs"][0]
        np.testing.assert_allclose(said, expected, atol=1e-5)


def test_exported_adapters_are_where_a_run_begins(
    left: tuple[Path, Any],
    run: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    export_params(without(left[1]), MODEL, base)
    assert cli.main(["export", str(left[0]), "--to", "peft", str(adapters)]) == 0
    settings = json.loads((adapters / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "the/base"
    one = functools.partial(build_program, devices=jax.devices()[:1])
    monkeypatch.setattr(loop, "build_program", one)
    begun = loop._Run(
        moved(
            run, tmp_path / "run", model=MODEL, seq_len=8, init=str(base), mesh=MeshConfig(),
            lora=dataclasses.replace(LORA, init=str(adapters)),
        ),
        "again",
        (),
    )  # fmt: skip
    begun.progress = SimpleNamespace(phase=lambda _: None)  # pyright: ignore[reportAttributeAccessIssue]
    state = begun._state_at(0)
    assert_same(state["params"], left[1])
    assert names_in(tmp_path / "run" / "frozen" / "0") == set(
        paths_of(without(left[1]))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LORA}, "labels.b is new and would stay so, frozen; name it in lora"),
        ({"freeze": ("labels.*",)}, "labels.b is new and would stay so, frozen"),
    ],
)
def test_new_head_that_would_be_frozen_is_refused(
    changes: Any, message: str, tmp_path: Path
) -> None:
    cfg = bert.Config(
        vocab_size=32, max_seq_len=8, num_layers=1, num_heads=2, d_model=8, d_ff=8, head="mlm",
    )  # fmt: skip
    zeros = lambda x: np.zeros(x.shape, np.float32)
    loss = lambda model, batch: Sums(jnp.float32(0), jnp.float32(1))
    shapes = build_program(
        RunConfig(model=cfg, steps=1, seq_len=8, micro_batch_size=1),
        loss_fn=loss,
        devices=jax.devices()[:1],
    ).abstract_state["params"]
    export_params(jax.tree.map(zeros, shapes), cfg, tmp_path)
    labels = dataclasses.replace(cfg, head="classify")
    run = RunConfig(model=labels, steps=1, seq_len=8, micro_batch_size=1, **changes)
    of = build_program(run, loss_fn=loss, devices=jax.devices()[:1])
    frozen = part_of(of.abstract_state["params"], of.spec.placements, trained=False)
    with pytest.raises(ConfigError, match=message):
        refuse_frozen_head(tmp_path, labels, paths_of(frozen))
    refuse_frozen_head(tmp_path, cfg, paths_of(frozen))
    refuse_frozen_head(
        tmp_path, labels, set(paths_of(frozen)) - {"labels.w", "labels.b"}
    )


def test_run_without_adapters_has_none_to_export(
    left: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_params(without(left[1]), MODEL, tmp_path)
    assert cli.main(["export", str(tmp_path), "--to", "peft", str(tmp_path / "x")]) == 2
    assert "has no adapters (lora.rank=0); give --to hf DIR" in capsys.readouterr().err
