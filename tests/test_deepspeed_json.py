# SPDX-License-Identifier: Apache-2.0
"""Whole DeepSpeed JSONs: mapped value by value, and what needs several keys at once."""

import base64
import dataclasses
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jaxspeed.config import (
    ConfigError,
    LossScaleConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    to_dict,
)
from jaxspeed.deepspeed_json import (
    Answer,
    answers_json,
    answers_table,
    apply_deepspeed,
    explain,
    load_deepspeed_json,
)


@dataclass(frozen=True)
class Model:
    max_seq_len: int = 64


RUN = RunConfig(model=Model(), steps=100, seq_len=64, global_batch_size=64)


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            both = isinstance(value, Mapping) and isinstance(whole.get(name), Mapping)
            whole[name] = merge(whole[name], value) if both else value
    return whole


def by_key(ds: Mapping[str, Any]) -> dict[str, Answer]:
    return {answer.key: answer for answer in explain(ds)}


def apply(ds: Mapping[str, Any], run: RunConfig[Any] = RUN) -> RunConfig[Any]:
    return apply_deepspeed(run, ds)[0]


def choice(section: str, kind: str, **params: Any) -> dict[str, Any]:
    return {section: {"type": kind, "params": params}}


def message(ds: Mapping[str, Any], run: RunConfig[Any] = RUN) -> str:
    with pytest.raises(ConfigError) as caught:
        apply_deepspeed(run, ds)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ZERO2: dict[str, Any] = json.loads("""
{
  "fp16": {
    "enabled": "auto", "loss_scale": 0, "loss_scale_window": 500,
    "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1
  },
  "bf16": {"enabled": "auto"},
  "optimizer": {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
  },
  "scheduler": {
    "type": "WarmupDecayLR",
    "params": {
      "total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto",
      "warmup_num_steps": "auto"
    }
  },
  "zero_optimization": {
    "stage": 2,
    "offload_optimizer": {"device": "none", "pin_memory": true},
    "allgather_partitions": true, "allgather_bucket_size": 2e8,
    "overlap_comm": true, "reduce_scatter": true, "reduce_bucket_size": "auto",
    "contiguous_gradients": true
  },
  "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
  "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
  "steps_per_print": 2000, "wall_clock_breakdown": false
}
""")

RECIPE = dataclasses.replace(
    RUN,
    micro_batch_size=2,
    optim=OptimConfig(lr=5e-5, b2=0.98, eps=1e-6, weight_decay=0.01, clip_norm=0.5),
    schedule=ScheduleConfig(name="warmup", warmup_steps=50),
)


def test_auto_leaves_what_the_recipe_says() -> None:
    run = apply(ZERO2, RECIPE)
    assert run.optim == dataclasses.replace(RECIPE.optim, decay="all")
    assert run.schedule == ScheduleConfig(name="warmup_decay", warmup_steps=50)
    assert run.dtype == RECIPE.dtype
    assert run.loss_scale == LossScaleConfig()
    assert (run.global_batch_size, run.micro_batch_size, run.accumulate) == (
        64,
        2,
        None,
    )
    assert (run.zero.stage, run.log_every) == (2, 2000)


def test_auto_names_the_field_that_the_recipe_gives() -> None:
    answer = by_key(ZERO2)["optimizer.params.lr"]
    assert (answer.status, answer.to) == ("not_needed", "")
    assert "the recipe gives optim.lr" in answer.why


def test_loss_scale_of_an_auto_fp16_depends_on_the_recipe() -> None:
    half = dataclasses.replace(
        RECIPE,
        dtype=dataclasses.replace(RECIPE.dtype, compute="float16"),
        loss_scale=LossScaleConfig(hysteresis=5),
    )
    run, answers = apply_deepspeed(half, ZERO2)
    assert run.loss_scale == LossScaleConfig(window=500)
    window = {a.key: a for a in answers}["fp16.loss_scale_window"]
    assert window.to == "loss_scale.window = 500"
    window = {a.key: a for a in apply_deepspeed(RECIPE, ZERO2)[1]}[window.key]
    assert (window.status, window.why) == ("not_needed", "bfloat16 needs no loss scale")
    assert "where the recipe computes" in by_key(ZERO2)[window.key].why


ZERO3: dict[str, Any] = json.loads("""
{
  "bf16": {"enabled": true},
  "optimizer": {
    "type": "AdamW",
    "params": {"lr": 3e-05, "betas": [0.8, 0.95], "eps": 1e-07, "weight_decay": 0.1}
  },
  "scheduler": {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-05, "warmup_num_steps": 500}
  },
  "zero_optimization": {
    "stage": 3, "overlap_comm": true, "contiguous_gradients": true,
    "sub_group_size": 1e9, "reduce_bucket_size": 1e6,
    "stage3_prefetch_bucket_size": 9.4e5,
    "stage3_param_persistence_threshold": 1e4,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": true
  },
  "gradient_accumulation_steps": 4, "gradient_clipping": 0.8,
  "train_micro_batch_size_per_gpu": 2,
  "activation_checkpointing": {"partition_activations": true},
  "tensor_parallel": {"autotp_size": 2}
}
""")


def test_zero3_with_everything_given_is_mapped_value_by_value() -> None:
    run = apply(ZERO3)
    assert run.optim == OptimConfig(
        name="adamw",
        lr=3e-5,
        b1=0.8,
        b2=0.95,
        eps=1e-7,
        weight_decay=0.1,
        decay="all",
        clip_norm=0.8,
    )
    assert run.schedule == ScheduleConfig(name="warmup", warmup_steps=500)
    assert (run.zero.stage, run.zero.param_persistence_threshold) == (3, 10_000)
    assert (run.global_batch_size, run.micro_batch_size, run.accumulate) == (None, 2, 4)
    assert (run.dtype.compute, run.dtype.reduce) == ("bfloat16", "float32")
    assert (run.mesh, run.remat) == (MeshConfig(tensor=2), "full")
    assert run.validate(8).global_size == 2 * 4 * 4
    assert (run.model, run.steps, run.data) == (RUN.model, RUN.steps, RUN.data)


@pytest.mark.parametrize(
    ("given", "remat"),
    [
        ({"cpu_checkpointing": True}, "offload"),
        ({"cpu_checkpointing": True, "partition_activations": True}, "offload"),
        ({"number_checkpoints": 4, "cpu_checkpointing": True}, "offload"),
        ({"cpu_checkpointing": False, "partition_activations": True}, "full"),
        ({"cpu_checkpointing": False}, "none"),
    ],
)
def test_what_the_host_keeps_is_computed_again(given: Any, remat: str) -> None:
    assert (
        apply({"train_batch_size": 8, "activation_checkpointing": given}).remat == remat
    )


CHAT: dict[str, Any] = json.loads("""
{
  "train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "steps_per_print": 10,
  "zero_optimization": {
    "stage": 3, "overlap_comm": true,
    "offload_param": {"device": "none"},
    "offload_optimizer": {"device": "none"},
    "stage3_param_persistence_threshold": 1e4,
    "stage3_max_live_parameters": 3e7, "stage3_prefetch_bucket_size": 3e7,
    "memory_efficient_linear": false
  },
  "fp16": {"enabled": true, "loss_scale_window": 100},
  "gradient_clipping": 1.0, "prescale_gradients": false, "wall_clock_breakdown": false,
  "hybrid_engine": {
    "enabled": false, "max_out_tokens": 512, "inference_tp_size": 1,
    "release_inference_cache": false, "pin_parameters": true,
    "tp_gather_partition_size": 8
  },
  "tensorboard": {"enabled": true, "output_path": "out/", "job_name": "step1"}
}
""")


def test_chat_json_keeps_the_optimizer_of_the_script() -> None:
    run, answers = apply_deepspeed(RECIPE, CHAT)
    assert run.optim == dataclasses.replace(RECIPE.optim, clip_norm=1.0)
    assert run.schedule == RECIPE.schedule
    assert run.dtype.compute == "float16"
    assert run.loss_scale == LossScaleConfig(window=100)
    assert (run.global_batch_size, run.micro_batch_size, run.accumulate) == (
        32,
        4,
        None,
    )
    said = {a.key: a for a in answers}
    assert said["optimizer (default)"].status == "not_needed"
    assert said["scheduler (default)"].status == "not_needed"
    assert "workdir" in said["tensorboard.output_path"].why


MEGATRON: dict[str, Any] = json.loads("""
{
  "train_batch_size": 256, "train_micro_batch_size_per_gpu": 4, "steps_per_print": 10,
  "zero_optimization": {"stage": 1},
  "gradient_clipping": 1.0, "prescale_gradients": true,
  "fp16": {
    "enabled": true, "loss_scale": 0, "loss_scale_window": 500, "hysteresis": 2,
    "min_loss_scale": 1, "initial_scale_power": 11
  },
  "curriculum_learning": {
    "enabled": false, "curriculum_type": "seqlen", "min_difficulty": 80,
    "max_difficulty": 2048, "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 9, "difficulty_step": 8}
  },
  "wall_clock_breakdown": false
}
""")


def test_megatron_json_with_dynamic_loss_scale() -> None:
    run = apply(MEGATRON)
    assert run.loss_scale == LossScaleConfig(window=500, initial_power=11)
    assert run.zero.stage == 1
    assert run.validate(8).accumulate == 8


MOE = merge(
    MEGATRON,
    {
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "bf16",
        "expert_parallel": {"enabled": False, "autoep_size": 8},
    },
)


def test_moe_json_spreads_experts_once_they_are_enabled() -> None:
    run = apply(MOE)
    assert (run.dtype.compute, run.dtype.reduce) == ("bfloat16", "compute")
    assert (run.loss_scale, run.mesh.expert) == (LossScaleConfig(), 1)
    on = {"enabled": True, "load_balance_coeff": 0.02, "preset": "mixtral"}
    run = apply(merge(MOE, {"expert_parallel": on}))
    assert (run.mesh.expert, run.moe.balance_coef) == (8, 0.02)
    split = on | {"expert_tensor_parallel_size": 2}
    assert "mesh.tensor splits experts" in message(
        merge(MOE, {"expert_parallel": split})
    )


def test_bert_json_with_one_bit_adam_is_refused() -> None:
    ds = {
        "train_batch_size": 4096,
        "train_micro_batch_size_per_gpu": 16,
        "optimizer": {"type": "OneBitAdam", "params": {"lr": 4e-4, "freeze_step": 9}},
        "gradient_clipping": 1.0,
        "fp16": {"enabled": True, "loss_scale": 0},
    }
    assert message(ds) == (
        "deepspeed optimizer.type='OneBitAdam': gradients are not compressed; use Adam"
    )


def test_adam_is_adamw_unless_told_otherwise() -> None:
    assert apply({"optimizer": {"type": "Adam"}}).optim.name == "adamw"
    l2 = choice("optimizer", "adam", adam_w_mode=False, weight_decay=0.1)
    assert apply(l2).optim.name == "adam"
    assert "L2" in by_key(l2)["optimizer.params.adam_w_mode"].why
    assert apply(choice("optimizer", "AdamW", adam_w_mode=False)).optim.name == "adamw"


def test_torch_adam_has_the_weight_decay_of_pytorch() -> None:
    assert (
        apply(choice("optimizer", "AdamW", torch_adam=True)).optim.weight_decay == 0.01
    )
    l2 = choice("optimizer", "Adam", torch_adam=True, adam_w_mode=False)
    assert apply(l2).optim.weight_decay == 0


@pytest.mark.parametrize(
    ("params", "lr", "muon_lr"),
    [
        ({}, 3e-4, 0.02),
        ({"lr": 0.01}, 0.01, 0.0),
        ({"lr": 0.01, "muon_lr": 0.05}, 0.01, 0.05),
        ({"lr": 0.01, "adam_lr": 1e-4}, 1e-4, 0.01),
        ({"lr": 0.01, "adam_lr": 1e-4, "muon_lr": 0.05}, 1e-4, 0.05),
        ({"adam_lr": 1e-4}, 1e-4, 0.02),
    ],
)
def test_muon_has_two_learning_rates(
    params: dict[str, float], lr: float, muon_lr: float
) -> None:
    optim = apply(choice("optimizer", "Muon", **params)).optim
    assert (optim.lr, optim.muon_lr) == (lr, muon_lr)
    assert optim.nesterov
    assert (optim.b2, optim.eps, optim.momentum) == (0.95, 1e-10, 0.95)


@pytest.mark.parametrize(
    ("params", "lr"),
    [({"warmup_max_lr": 7e-4}, 7e-4), ({}, 1e-3), ({"warmup_max_lr": None}, 2e-5)],
)
def test_peak_of_the_scheduler_replaces_the_rates_of_the_optimizer(
    params: dict[str, Any], lr: float
) -> None:
    ds = merge(
        choice("optimizer", "Adam", lr=2e-5),
        choice("scheduler", "WarmupDecayLR", **params),
    )
    run = apply(ds)
    assert run.optim.lr == lr
    replaced = by_key(ds)["optimizer.params.lr"].status == "not_needed"
    assert replaced == (lr != 2e-5)


def test_peak_of_the_scheduler_replaces_both_rates_of_muon() -> None:
    ds = merge(
        choice("optimizer", "Muon", lr=1.0, muon_lr=2.0),
        choice("scheduler", "WarmupLR", warmup_max_lr=0.1),
    )
    assert (apply(ds).optim.lr, apply(ds).optim.muon_lr) == (0.1, 0.0)


def test_warmup_lr_without_a_peak_keeps_the_rate_of_the_optimizer() -> None:
    ds = merge(
        choice("optimizer", "Adam", lr=2e-5), {"scheduler": {"type": "WarmupLR"}}
    )
    assert apply(ds).optim.lr == 2e-5


def test_warmup_cosine_has_its_own_floor() -> None:
    run = apply(choice("scheduler", "WarmupCosineLR", warmup_num_steps=1))
    assert run.schedule == ScheduleConfig(
        name="warmup_cosine", warmup_steps=2, min_ratio=1e-4
    )
    ds = {"scheduler": {"type": "WarmupCosineLR"}}
    assert by_key(ds)["scheduler.params.total_num_steps (default)"].to == (
        "schedule.total_steps = 0"
    )


def test_one_cycle_sets_the_betas_of_the_optimizer() -> None:
    cycle = choice("scheduler", "OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-3)
    adam = apply(merge(cycle, choice("optimizer", "Adam", betas=[0.9, 0.95])))
    assert (adam.optim.lr, adam.optim.b2) == (1e-3, 0.99)
    assert adam.schedule.cycle_momentum
    sgd = apply(merge(cycle, choice("optimizer", "SGD", momentum=0.9)))
    assert not sgd.schedule.cycle_momentum
    still = merge(cycle, {"scheduler": {"params": {"cycle_momentum": False}}})
    assert apply(still).optim.b2 == OptimConfig().b2
    recipe = dataclasses.replace(RUN, optim=OptimConfig(name="sgd"))
    assert not apply(cycle, recipe).schedule.cycle_momentum


def test_one_cycle_needs_both_rates_and_says_so() -> None:
    text = message(choice("scheduler", "OneCycle", cycle_min_lr=1e-4))
    assert "scheduler.params.cycle_max_lr=null: OneCycle needs it" in text
    stairs = {"cycle_first_stair_count": 5, "cycle_second_stair_count": 0}
    ds = choice("scheduler", "OneCycle", cycle_min_lr=0, cycle_max_lr=1, **stairs)
    assert "cycle_second_stair_count=0" in message(ds)


def test_stage_3_has_the_persistence_threshold_of_deepspeed() -> None:
    ds = {"zero_optimization": {"stage": 3}}
    assert apply(ds).zero.param_persistence_threshold == 100_000
    key = "zero_optimization.stage3_param_persistence_threshold (default)"
    assert by_key(ds)[key].to == "zero.param_persistence_threshold = 100000"
    assert key not in by_key({"zero_optimization": {"stage": 2}})


def test_what_a_json_leaves_out_is_said() -> None:
    answers = by_key({})
    assert {key: a.to for key, a in answers.items() if a.status == "mapped"} == {
        "gradient_clipping (default)": "optim.clip_norm = 1.0",
        "zero_optimization.stage (default)": "zero.stage = 0",
        "bf16.enabled (default)": "dtype.compute = float32",
    }
    run = apply({}, dataclasses.replace(RECIPE, mesh=MeshConfig(data=2)))
    assert (run.zero.stage, run.dtype.compute) == (0, "float32")
    assert run.mesh == MeshConfig(data=2)


def test_mics_shards_inside_fsdp_and_replicates_over_data() -> None:
    ds = {"zero_optimization": {"stage": 3, "mics_shard_size": 4}}
    assert apply(ds).mesh == MeshConfig(data=-1, fsdp=4)
    ds = {"zero_optimization": {"stage": 2, "mics_shard_size": 4}}
    assert "stage 3 only" in message(ds)


def test_hpz_shards_over_all_and_keeps_a_copy_in_each_group() -> None:
    ds = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}
    run = apply(ds)
    assert (run.mesh, run.zero.secondary) == (MeshConfig(data=-1, fsdp=4), True)
    ds = {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 4}}
    assert "stage 3 only" in message(ds)
    both = {"stage": 3, "zero_hpz_partition_size": 4, "mics_shard_size": 2}
    assert "contradicts" in message({"zero_optimization": both})


@pytest.mark.parametrize(
    ("ds", "compute"),
    [
        ({"fp16": {"enabled": True}}, "float16"),
        ({"bfloat16": {"enabled": True}}, "bfloat16"),
        ({"bf16": {"enabled": False}, "bfloat16": {"enabled": True}}, "float32"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": "auto"}}, "bfloat16"),
        ({"torch_autocast": {"enabled": True, "dtype": "half"}}, "float16"),
        ({"torch_autocast": {"enabled": True}}, "bfloat16"),
        ({"fp16": {}}, "float32"),
    ],
)
def test_compute_dtype(ds: dict[str, Any], compute: str) -> None:
    assert apply(ds).dtype.compute == compute


def test_fp16_and_bf16_contradict() -> None:
    text = message({"fp16": {"enabled": True}, "bf16": {"enabled": True}})
    assert text.startswith("deepspeed bf16.enabled=true: contradicts fp16.enabled")


def test_gradients_travel_in_float32_or_the_compute_dtype() -> None:
    bf16 = {"bf16": {"enabled": True}}
    for word, reduce in {"fp32": "float32", "BF16": "compute"}.items():
        run = apply(bf16 | {"communication_data_type": word})
        assert run.dtype.reduce == reduce
    text = message(bf16 | {"communication_data_type": "fp16"})
    assert "compute dtype, bfloat16; use fp32" in text
    assert "communication_data_type=" in message({"communication_data_type": "bf16"})
    assert "sends gradients" in by_key(bf16)["communication_data_type (default)"].why


def test_deprecated_forms_are_read() -> None:
    assert apply({"zero_optimization": True, "allgather_size": 5e8}).zero.stage == 1
    assert apply({"zero_optimization": False}).zero.stage == 0
    assert apply({"fp32_allreduce": True}).dtype.reduce == "float32"
    assert "cpu_offload" in message({"zero_optimization": {"cpu_offload": True}})


def test_two_names_of_one_setting_must_agree() -> None:
    sizes = {"autotp_size": 4, "tp": {"tp_size": 4}}
    assert apply({"tensor_parallel": sizes}).mesh.tensor == 4
    text = message({"tensor_parallel": sizes | {"tp": {"tp_size": 2}}})
    assert "contradicts tensor_parallel.autotp_size, which sets mesh.tensor = 4" in text


def test_sequences_are_split_by_ulysses() -> None:
    run = apply({"sequence_parallel_size": 2})
    assert (run.mesh.context, run.context) == (2, "ulysses")


def test_steps_per_print_of_infinity_never_prints() -> None:
    assert apply({"steps_per_print": math.inf}).log_every == RUN.log_every


TRIAD = ("train_batch_size", "train_micro_batch_size_per_gpu")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((32, None, None), (32, None, None)),
        ((None, 4, None), (None, 4, None)),
        ((None, 4, 2), (None, 4, 2)),
        ((32, 2, 4), (32, 2, 4)),
        ((None, None, 2), (64, None, 2)),
        (("auto", 4, 2), (None, 4, 2)),
        (("auto", 4, "auto"), (64, 4, 8)),
        (("auto", "auto", "auto"), (64, 1, 8)),
    ],
)
def test_batch_sizes_of_the_json_replace_those_of_the_recipe(
    sizes: tuple[Any, ...], expected: tuple[int | None, ...]
) -> None:
    recipe = dataclasses.replace(RUN, micro_batch_size=1, accumulate=8)
    names = (*TRIAD, "gradient_accumulation_steps")
    ds = {name: size for name, size in zip(names, sizes, strict=True) if size}
    run = apply(ds, recipe)
    assert (run.global_batch_size, run.micro_batch_size, run.accumulate) == expected


def test_recipe_is_not_changed_and_result_is_a_run_config() -> None:
    before = to_dict(RECIPE)
    run = apply(ZERO3, RECIPE)
    assert to_dict(RECIPE) == before
    assert json.loads(json.dumps(to_dict(run))) == to_dict(run)
    assert apply(ZERO3, run) == run


def test_contradiction_with_the_recipe_is_one_line() -> None:
    recipe = dataclasses.replace(RUN, mesh=MeshConfig(fsdp=1, tensor=-1))
    ds = {"zero_optimization": {"stage": 3, "mics_shard_size": 4}}
    assert "both -1" in message(ds, recipe)


def write(path: Path, content: str | bytes) -> Path:
    file = path / "ds.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_file_may_have_comments_and_last_commas(tmp_path: Path) -> None:
    content = """\ufeff{
      // a comment, with "quotes"
      "train_batch_size": 32, # another
      /* and
         a third */
      "tensorboard": {"output_path": "http://x/#y, ]", },
    }"""
    assert load_deepspeed_json(write(tmp_path, content)) == {
        "train_batch_size": 32,
        "tensorboard": {"output_path": "http://x/#y, ]"},
    }


def test_base64_is_read_as_deepspeed_does() -> None:
    coded = base64.urlsafe_b64encode(json.dumps(ZERO3).encode()).decode()
    assert load_deepspeed_json(coded) == ZERO3


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"[1, 2]", "a list, not an object"),
        (b"3", "not an object"),
        (b'"a"', "not an object"),
        (b"{", "not JSON"),
        (b'{"a": 1,, }', "in line 1, column"),
        (b'{"a": FOO}', "not JSON"),
        (b"\x80\x81\x00\xff", "not text"),
        (b'{"a": "\x00"}', "not text"),
        (b"PK\x03\x04\x00\x00", "not text"),
        (b'{"fp16": {"enabled": true, "enabled": false}}', "'enabled' is given twice"),
        (b'{"a":' * 5_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "correct it"),
    ],
)  # fmt: skip
def test_bad_file_is_one_line(tmp_path: Path, content: bytes, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        load_deepspeed_json(write(tmp_path, content))
    assert "\n" not in str(caught.value)
    assert "ds.json" in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.json", "", "a\0b", "x" * 5000, "{}", "."])
def test_missing_file_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_deepspeed_json(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_answers_as_json_and_as_a_table() -> None:
    answers = explain(ZERO3 | {"gradient_cliping": 1})
    objects = json.loads(json.dumps(answers_json(answers)))
    assert [o["key"] for o in objects] == [a.key for a in answers]
    assert {frozenset(o) for o in objects} == {
        frozenset({"key", "status", "to", "why"})
    }
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(answers_table(answers))
    text = console.export_text()
    for answer in answers:
        assert answer.key[:30] in text
    assert "1 unknown" in text


def test_table_shows_square_brackets_of_values() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(answers_table([Answer("a[red]b", "unknown", "", "[bold]why")]))
    text = console.export_text()
    assert "a[red]b" in text
    assert "[bold]why" in text


def test_pipeline_stages() -> None:
    run = apply(
        {
            "pipeline": {"stages": 2, "partition": "uniform"},
            "gradient_accumulation_steps": 4,
        }
    )
    assert run.mesh.stage == 2
    assert run.accumulate == 4
    assert apply({"pipeline": {"stages": "auto"}}).mesh.stage == 1
