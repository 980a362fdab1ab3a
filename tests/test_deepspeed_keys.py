# SPDX-License-Identifier: Apache-2.0
"""The table of DeepSpeed's keys: each answered, each default legal, errors in one line."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jaxspeed.config import (
    ConfigError,
    RunConfig,
    to_dict,
)
from jaxspeed.deepspeed_json import (
    Answer,
    apply_deepspeed,
    explain,
)
from jaxspeed.deepspeed_keys import KEYS
from jaxspeed.deepspeed_rules import Choice, Node, Rule, Section


@dataclass(frozen=True)
class Model:
    max_seq_len: int = 64


RUN = RunConfig(model=Model(), steps=100, seq_len=64, global_batch_size=64)

# Every key of DeepSpeed 0.19, each with DeepSpeed's default where it has one.
DEFAULTS: dict[str, Any] = json.loads("""
{
  "train_batch_size": null, "train_micro_batch_size_per_gpu": null,
  "gradient_accumulation_steps": null, "managed_gradient_accumulation": true,
  "steps_per_print": null, "dump_state": false, "log_level": null,
  "vocabulary_size": null, "disable_allgather": false, "communication_data_type": null,
  "seq_parallel_communication_data_type": "fp32", "prescale_gradients": false,
  "gradient_predivide_factor": 1.0, "gradient_allreduce_op": "mean",
  "sparse_gradients": false, "gradient_clipping": 1.0, "graph_harvesting": false,
  "zero_allow_untested_optimizer": false, "zero_force_ds_cpu_optimizer": true,
  "wall_clock_breakdown": false, "memory_breakdown": false,
  "dataloader_drop_last": false, "use_data_before_expert_parallelism": false,
  "sequence_parallel_size": 1, "data_parallel_size": 8, "allgather_size": 5e8,
  "fp32_allreduce": false,
  "zero_optimization": {
    "stage": 0, "reduce_scatter": true, "reduce_bucket_size": 5e8,
    "allgather_partitions": true, "allgather_bucket_size": 5e8,
    "overlap_comm": null, "contiguous_gradients": true, "round_robin_gradients": false,
    "use_multi_rank_bucket_allreduce": true, "load_from_fp32_weights": true,
    "elastic_checkpoint": false, "ignore_unused_parameters": true,
    "legacy_stage1": false, "sub_group_size": 1e9, "grad_hooks": true,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_model_persistence_threshold": 9223372036854775807,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": false,
    "stage3_gather_fp16_weights_on_model_save": false,
    "stage3_module_granularity_threshold": 0,
    "stage3_use_all_reduce_for_fetch_params": false,
    "stage3_allgather_sequential": false, "prefetch_bucket_size": 5e7,
    "param_persistence_threshold": 1e5,
    "model_persistence_threshold": 9223372036854775807,
    "max_live_parameters": 1e9, "max_reuse_distance": 1e9,
    "gather_16bit_weights_on_model_save": false, "module_granularity_threshold": 0,
    "use_all_reduce_for_fetch_params": false, "allgather_sequential": false,
    "memory_efficient_linear": true, "override_module_apply": true,
    "log_trace_cache_warnings": false, "enable_sanity_checks": false,
    "pipeline_loading_checkpoint": false, "save_muon_momentum_buffer_in_memory": false,
    "leaf_module": {"classes": ["Moe"], "names": [], "name_suffixes": []},
    "zero_hpz_partition_size": 1, "zero_quantized_weights": false,
    "zero_quantized_nontrainable_weights": false, "zero_quantized_gradients": false,
    "zeropp_loco_param": {"err_beta": 0.8, "reset_T": 1024},
    "mics_shard_size": -1, "mics_hierarchical_params_gather": false,
    "cpu_offload": false, "cpu_offload_param": false, "cpu_offload_params": false,
    "cpu_offload_use_pin_memory": false, "zenflow": null,
    "offload_optimizer": {
      "device": "none", "nvme_path": null, "buffer_count": 4, "pin_memory": true,
      "pipeline_read": false, "pipeline_write": false, "fast_init": false, "ratio": 1.0,
      "super_offload": false, "cpuadam_cores_perc": 0.8
    },
    "offload_param": {
      "device": "none", "nvme_path": null, "buffer_count": 5,
      "buffer_size": 1e8, "max_in_cpu": 1e9, "pin_memory": true
    }
  },
  "aio": {
    "block_size": 1048576, "queue_depth": 8, "intra_op_parallelism": 1,
    "thread_count": 1, "single_submit": false, "overlap_events": true, "use_gds": false
  },
  "fp16": {
    "enabled": false, "auto_cast": false, "loss_scale": 0, "initial_scale_power": 16,
    "loss_scale_window": 1000, "hysteresis": 2, "consecutive_hysteresis": false,
    "min_loss_scale": 1, "fp16_master_weights_and_grads": false
  },
  "bf16": {
    "enabled": false, "immediate_grad_update": false, "check_grad_overflow": true,
    "check_overflow": true, "bf16_master_weights_and_grads": false,
    "bf16_optimizer_states": false
  },
  "bfloat16": {"enabled": false},
  "torch_autocast": {
    "enabled": false, "dtype": "bfloat16",
    "lower_precision_safe_modules": ["torch.nn.Linear"]
  },
  "amp": {"enabled": false, "opt_level": "O1"},
  "data_types": {"grad_accum_dtype": null, "param_dtype": null, "buffer_dtype": null},
  "activation_checkpointing": {
    "partition_activations": false, "cpu_checkpointing": false,
    "contiguous_memory_optimization": false, "number_checkpoints": null,
    "synchronize_checkpoint_boundary": false, "profile": false
  },
  "sparse_attention": {
    "mode": "dense", "block": 16, "different_layout_per_head": false,
    "num_local_blocks": 4, "num_global_blocks": 1, "attention": "bidirectional",
    "horizontal_global_attention": false, "num_different_global_patterns": 1,
    "num_random_blocks": 0, "local_window_blocks": [4], "global_block_indices": [0],
    "global_block_end_indices": null, "num_sliding_window_blocks": 3
  },
  "pipeline": {
    "stages": "auto", "partition": "best", "seed_layers": false,
    "activation_checkpoint_interval": 0, "pipe_partitioned": true,
    "grad_partitioned": true
  },
  "tensor_parallel": {
    "autotp_size": 0, "tp_size": 1, "preset_model": null, "tp_overlap_comm": false,
    "dtype": "fp16",
    "tensor_parallel": {"tp_size": 1, "tp_grain_size": 1, "mpu": null},
    "tp": {"tp_size": 1, "tp_group": null},
    "partition_config": {"use_default_specs": true, "layer_specs": []},
    "injection_policy_tuple": null, "keep_module_on_host": false,
    "replace_with_kernel_inject": false
  },
  "expert_parallel": {
    "enabled": false, "autoep_size": 1, "preset": "mixtral", "preset_model": null,
    "use_grouped_mm": true, "score_func": "auto", "score_apply": "auto",
    "route_norm": null, "route_scale": 1.0, "top_k": "auto", "num_expert_groups": null,
    "num_limited_groups": null
  },
  "data_efficiency": {
    "enabled": false, "seed": 1234,
    "data_sampling": {
      "enabled": false, "num_epochs": 1000, "num_workers": 0, "pin_memory": false,
      "curriculum_learning": {
        "enabled": false, "data_cluster_path": "clusters",
        "curriculum_metrics": {
          "rarity": {
            "index_to_sample_path": "a", "index_to_metric_path": "b",
            "difficulty_type": "value", "clustering_type": "single_cluster",
            "min_difficulty": 1, "max_difficulty": 100, "schedule_type": "fixed_root",
            "schedule_config": {
              "total_curriculum_step": 10, "difficulty_step": 8, "root_degree": 2
            }
          }
        }
      },
      "dynamic_batching": {
        "enabled": false, "lr_scaling_method": "linear", "min_batch_size": 1,
        "max_batch_size": null, "sequence_picking_order": "dataloader",
        "max_tokens": 4096
      }
    },
    "data_routing": {
      "enabled": false,
      "random_ltd": {
        "enabled": false, "total_layer_num": 24, "random_ltd_layer_num": 22,
        "random_ltd_layer_id": [1, 2], "model_mask_name": "mask",
        "model_type": "decoder", "hidden_state_order": "batch_seq_dim",
        "random_ltd_layer_token_lr_schedule": null,
        "random_ltd_schedule": {
          "min_value": 128, "max_value": 1024, "schedule_type": "fixed_linear",
          "schedule_config": {"require_steps": 100, "seq_per_step": 16}
        }
      }
    }
  },
  "curriculum_learning": {
    "enabled": false, "curriculum_type": "seqlen", "min_difficulty": 8,
    "max_difficulty": 1024, "schedule_type": "fixed_linear",
    "schedule_config": {
      "total_curriculum_step": 10, "difficulty_step": 8, "root_degree": 2
    }
  },
  "progressive_layer_drop": {"enabled": false, "theta": 1.0, "gamma": 0.001},
  "eigenvalue": {
    "enabled": false, "verbose": false, "max_iter": 100, "tol": 0.01,
    "stability": 1e-06, "gas_boundary_resolution": 1,
    "layer_name": "bert.encoder.layer", "layer_num": 0
  },
  "compression_training": {
    "weight_quantization": {
      "shared_parameters": {
        "enabled": false, "quantizer_kernel": false, "schedule_offset": 0,
        "quantize_groups": 1, "quantize_verbose": false,
        "quantization_type": "symmetric", "quantize_weight_in_forward": false,
        "rounding": "nearest",
        "fp16_mixed_quantize": {"enabled": false, "quantize_change_ratio": 0.001}
      },
      "different_groups": {
        "g1": {
          "params": {"start_bits": 8, "target_bits": 4, "quantization_period": 1},
          "modules": ["mlp"], "related_modules": null
        }
      }
    },
    "activation_quantization": {
      "shared_parameters": {
        "enabled": false, "quantization_type": "symmetric",
        "range_calibration": "dynamic", "schedule_offset": 1000
      },
      "different_groups": {"g": {"params": {"bits": 8}, "modules": ["*"]}}
    },
    "sparse_pruning": {
      "shared_parameters": {
        "enabled": false, "method": "l1", "schedule_offset": 1000, "dense_ratio": 0.1
      }
    },
    "row_pruning": {"shared_parameters": {"enabled": false, "method": "l1"}},
    "head_pruning": {"shared_parameters": {"enabled": false, "num_heads": 12}},
    "channel_pruning": {"shared_parameters": {"enabled": false, "method": "l1"}},
    "layer_reduction": {
      "enabled": false, "keep_number_layer": 6, "module_name_prefix": "h",
      "teacher_layer": [1], "other_module_name": ["wte"]
    }
  },
  "quantize_training": {"enabled": false, "quantize_groups": 1},
  "weight_quantization": null,
  "flops_profiler": {
    "enabled": false, "recompute_fwd_factor": 0.0, "profile_step": 1,
    "module_depth": -1, "top_modules": 1, "detailed": true, "output_file": null
  },
  "timers": {"throughput": {"enabled": true, "synchronized": true}},
  "comms_logger": {
    "enabled": false, "verbose": false, "prof_all": true, "debug": false, "prof_ops": []
  },
  "tensorboard": {"enabled": false, "output_path": "", "job_name": "DeepSpeedJobName"},
  "csv_monitor": {"enabled": false, "output_path": "", "job_name": "DeepSpeed"},
  "wandb": {"enabled": false, "group": null, "team": null, "project": "deepspeed"},
  "comet": {
    "enabled": false, "samples_log_interval": 100, "project": null, "workspace": null,
    "api_key": null, "experiment_name": null, "experiment_key": null, "online": null,
    "mode": null
  },
  "autotuning": {
    "enabled": false, "results_dir": "autotuning_results",
    "exps_dir": "autotuning_exps", "overwrite": true, "metric": "throughput",
    "start_profile_step": 3, "end_profile_step": 5, "fast": true,
    "max_train_batch_size": null, "mp_size": 1, "num_tuning_micro_batch_sizes": 3,
    "tuner_type": "gridsearch", "tuner_early_stopping": 5, "tuner_num_trials": 50,
    "min_train_micro_batch_size_per_gpu": 1, "max_train_micro_batch_size_per_gpu": 1024,
    "arg_mappings": {"lr": "--lr"}
  },
  "checkpoint": {
    "tag_validation": "Warn", "load_universal": false, "use_node_local_storage": false,
    "parallel_write": {"pipeline_stage": false},
    "checkpoint_serialization": true,
    "writer": {
      "type": "FAST", "io_buffer_size": 67108864, "io_buffer_double": true,
      "io_multiplier": 1, "show_statistics": false, "data_parallel": null,
      "decoupled": false
    }
  },
  "nebula": {
    "enabled": false, "persistent_storage_path": null, "persistent_time_interval": 100,
    "num_of_version_in_retention": 2, "enable_nebula_load": true, "load_path": null,
    "nebula_load_path": null
  },
  "datastates_ckpt": false,
  "elasticity": {
    "enabled": false, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4, 6],
    "min_gpus": 1, "max_gpus": 10000, "min_time": 0, "version": 0.2,
    "prefer_larger_batch": true, "prefer_large_batch": true,
    "ignore_non_elastic_batch_info": false, "num_gpus_per_node": 1,
    "model_parallel_size": 1
  },
  "compile": {
    "deepcompile": false, "free_activation": false, "offload_activation": false,
    "offload_opt_states": false, "double_buffer": true, "symmetric_memory": false,
    "debug_log": false, "offload_parameters": false, "passes": null
  },
  "hybrid_engine": {
    "enabled": false, "max_out_tokens": 512, "inference_tp_size": 1,
    "release_inference_cache": false, "pin_parameters": true,
    "tp_gather_partition_size": 8, "enable_cuda_graph": false
  }
}
""")

ADAM = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0}
ONE_BIT = ADAM | {"freeze_step": 9, "cuda_aware": False, "comm_backend_name": "nccl"}

# Every optimizer and scheduler, with all of its parameters at DeepSpeed's defaults.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": ADAM
    | {"bias_correction": True, "adam_w_mode": True, "amsgrad": False}
    | {"torch_adam": False, "set_grad_none": True, "fp32_optimizer_states": True},
    "AdamW": ADAM | {"bias_correction": True, "amsgrad": False},
    "Lamb": ADAM
    | {"bias_correction": True, "eps_inside_sqrt": False, "max_grad_norm": 0.0}
    | {"max_coeff": 10.0, "min_coeff": 0.01, "amsgrad": False},
    "Lion": {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0},
    "Adagrad": {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0, "amsgrad": False}
    | {"lr_decay": 0, "initial_accumulator_value": 0},
    "SGD": {"lr": 1e-3, "momentum": 0, "dampening": 0, "weight_decay": 0}
    | {"nesterov": False, "maximize": False},
    "Muon": {"betas": [0.9, 0.95], "eps": 1e-10, "weight_decay": 0, "momentum": 0.95}
    | {"muon_lr": 0.02, "adam_lr": 3e-4, "ns_method": "gram"},
}

REFUSED_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "OneBitAdam": ONE_BIT,
    "ZeroOneAdam": ADAM
    | {"var_freeze_step": 100000, "var_update_scaler": 16}
    | {"local_step_scaler": 32678, "local_step_clipper": 16},
    "OneBitLamb": ONE_BIT
    | {"max_coeff": 10, "min_coeff": 0.01, "coeff_beta": 0.9}
    | {"factor_max": 4, "factor_min": 0.5, "factor_threshold": 0.1},
    "MuAdam": ADAM,
    "MuAdamW": ADAM,
    "MuSGD": {"lr": 0.1},
    "RMSprop": {"lr": 0.1, "alpha": 0.9},
}

WARMUP = {"warmup_num_steps": 1000, "warmup_type": "log", "last_batch_iteration": -1}

SCHEDULERS: dict[str, dict[str, Any]] = {
    "WarmupLR": WARMUP | {"warmup_min_lr": 0, "warmup_max_lr": None},
    "WarmupDecayLR": WARMUP
    | {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "total_num_steps": 5000},
    "WarmupCosineLR": WARMUP
    | {"warmup_min_ratio": 0, "cos_min_ratio": 1e-4, "total_num_steps": 5000},
    "OneCycle": {
        "cycle_min_lr": 1e-4,
        "cycle_max_lr": 1e-3,
        "decay_lr_rate": 0,
        "cycle_first_step_size": 2000,
        "cycle_second_step_size": None,
        "cycle_first_stair_count": 0,
        "cycle_second_stair_count": None,
        "decay_step_size": 0,
        "cycle_momentum": True,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.9,
        "decay_mom_rate": 0,
        "last_batch_iteration": -1,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": 1e-3,
        "lr_range_test_step_size": 2000,
        "lr_range_test_step_rate": 1.0,
        "lr_range_test_staircase": False,
    },
}


def leaves(ds: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in ds.items():
        if isinstance(value, Mapping) and name != "arg_mappings":
            yield from leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


def nest(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


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


@pytest.mark.parametrize("section", DEFAULTS)
def test_every_key_is_answered_once_and_its_default_accepted(section: str) -> None:
    ds = {section: DEFAULTS[section]}
    answers = [a for a in explain(ds) if not a.key.endswith("(default)")]
    assert [a.key for a in answers] == [key for key, _ in leaves(ds)]
    assert {a.status for a in answers} <= {"mapped", "not_needed"}
    assert all(a.to or a.why for a in answers)
    assert explain(ds) == explain(ds)


def test_json_of_all_defaults_is_accepted() -> None:
    run = apply(DEFAULTS)
    assert (run.zero.stage, run.dtype.compute, run.optim.clip_norm) == (0, "float32", 1)


@pytest.mark.parametrize(
    ("section", "kind"),
    [("optimizer", kind) for kind in OPTIMIZERS]
    + [("scheduler", kind) for kind in SCHEDULERS],
)
def test_every_parameter_at_its_default_is_accepted(section: str, kind: str) -> None:
    params = (OPTIMIZERS | SCHEDULERS)[kind]
    ds = choice(section, kind, **params)
    answers = by_key(ds)
    assert {f"{section}.params.{name}" for name in params} <= answers.keys()
    apply(ds)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_left_at_defaults_has_those_of_deepspeed(kind: str) -> None:
    given = apply(choice("optimizer", kind, **OPTIMIZERS[kind])).optim
    assert apply({"optimizer": {"type": kind}}).optim == given
    assert given.decay == "all"


@pytest.mark.parametrize("kind", ["WarmupLR", "LRRangeTest"])
def test_scheduler_left_at_defaults_has_those_of_deepspeed(kind: str) -> None:
    given = apply(choice("scheduler", kind, **SCHEDULERS[kind])).schedule
    assert apply({"scheduler": {"type": kind}}).schedule == given


@pytest.mark.parametrize("kind", REFUSED_OPTIMIZERS)
def test_refused_optimizer_says_what_to_use(kind: str) -> None:
    ds = choice("optimizer", kind, **REFUSED_OPTIMIZERS[kind])
    assert "use " in message(ds)
    assert "more" not in message(ds)
    assert {a.status for a in explain(ds) if a.key.startswith("optimizer.")} == {
        "refused"
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("amp.enabled", True),
        ("autotuning.enabled", True),
        ("bf16.bf16_master_weights_and_grads", True),
        ("bf16.bf16_optimizer_states", True),
        ("checkpoint.use_node_local_storage", True),
        ("comet.enabled", True),
        ("compile.offload_activation", True),
        ("compression_training.layer_reduction.enabled", True),
        ("compression_training.row_pruning.shared_parameters.enabled", True),
        ("curriculum_learning.enabled", True),
        ("data_efficiency.data_routing.random_ltd.enabled", True),
        ("data_efficiency.data_sampling.curriculum_learning.enabled", True),
        ("data_efficiency.data_sampling.dynamic_batching.enabled", True),
        ("data_types.grad_accum_dtype", "bf16"),
        ("eigenvalue.enabled", True),
        ("elasticity.enabled", True),
        ("flops_profiler.enabled", True),
        ("fp16.fp16_master_weights_and_grads", True),
        ("gradient_allreduce_op", "sum"),
        ("hybrid_engine.enabled", True),
        ("managed_gradient_accumulation", False),
        ("nebula.enabled", True),
        ("progressive_layer_drop.enabled", True),
        ("quantize_training.enabled", True),
        ("sparse_attention.mode", "fixed"),
        ("tensor_parallel.kernel_inject", True),
        ("wandb.enabled", True),
        ("weight_quantization.num_bits", 8),
        ("zero_optimization.cpu_offload", True),
        ("zero_optimization.offload_optimizer.device", "cpu"),
        ("zero_optimization.offload_param.device", "nvme"),
        ("zero_optimization.zenflow.topk_ratio", 0.1),
        ("zero_optimization.zero_quantized_gradients", True),
        ("zero_optimization.zero_quantized_weights", True),
    ],
)  # fmt: skip
def test_feature_that_is_on_is_refused_with_an_alternative(
    key: str, value: object
) -> None:
    parent, _, name = key.rpartition(".")
    on = nest(f"{parent}.enabled", True) if name.startswith(("bf16_", "fp16_")) else {}
    for outer in ("data_efficiency", "data_efficiency.data_sampling"):
        on = merge(on, nest(f"{outer}.enabled", True) if key.startswith(outer) else {})
    on = merge(on, nest("data_efficiency.data_routing.enabled", True)) if on else on
    ds = merge(on, nest(key, value))
    answer = by_key(ds)[key]
    assert answer.status == "refused"
    assert answer.to == ""
    assert f"deepspeed {key}=" in message(ds)
    words = ("set it to", "remove", "use ", "keep ")
    assert any(word in answer.why for word in words)


def test_section_that_is_off_answers_its_keys_and_still_finds_typos() -> None:
    ds = {"autotuning": {"enabled": False, "metric": "flops", "metrc": 1}}
    answers = by_key(ds)
    assert answers["autotuning.metric"].why == "off: autotuning.enabled is false"
    assert answers["autotuning.metrc"].status == "unknown"
    assert by_key({"fp16": {"loss_scale": 1}})["fp16.loss_scale"].why == (
        "off: fp16.enabled is not set"
    )


def test_keys_of_a_refused_section_go_with_its_switch() -> None:
    ds = {
        "autotuning": {"metric": "flops", "enabled": True},
        "wandb": {"enabled": True},
    }
    why = "goes with autotuning.enabled"
    assert by_key(ds)["autotuning.metric"] == Answer(
        "autotuning.metric", "refused", "", why
    )
    text = message(ds)
    assert text.startswith("deepspeed autotuning.enabled=true: sizes are not searched")
    assert text.endswith("(1 more: jaxspeed config explain lists them)")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("gradient_acumulation_steps", "gradient_accumulation_steps"),
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimisation", "zero_optimization"),
        ("zero_optimization.overlap_com", "overlap_comm"),
        ("zero_optimization.offload_optimizer.devise", "device"),
        ("activation_checkpointing.partitioned_activations", "partition_activations"),
        ("elasticity.max_train_batchsize", "max_train_batch_size"),
        ("optimizer.parms", "params"),
        ("stage", "zero_optimization.stage"),
        ("loss_scale", "fp16.loss_scale"),
    ],
)
def test_typo_is_unknown_with_a_suggestion(key: str, meant: str) -> None:
    ds = merge(nest(key, 1), {"optimizer": {"type": "Adam"}})
    answer = by_key(ds)[key]
    assert answer.status == "unknown"
    assert f"Did you mean {meant!r}?" in answer.why
    assert key in message(ds)


def test_typo_in_parameters_names_the_type() -> None:
    ds = choice("optimizer", "AdamW", learning_rate=1e-3)
    text = message(ds)
    assert "optimizer.params.learning_rate=0.001: DeepSpeed's AdamW has no such" in text
    assert "Did you mean 'AdamW'?" in message(choice("optimizer", "AdmW"))
    assert "WarmupLR, WarmupDecayLR" in message(choice("scheduler", "Zigzag"))


def test_unknown_key_is_shown_short_and_on_one_line() -> None:
    text = message({"zzz": {"text": "a\nb" * 500}})
    assert len(text) < 200
    assert "hidden" not in message({"comet": {"apikey": "hidden"}})


WRONG = [
    ("train_batch_size", 0, "whole number of at least 1"),
    ("train_batch_size", "32", "whole number"),
    ("train_batch_size", 32.5, "whole number"),
    ("train_batch_size", True, "whole number"),
    ("train_batch_size", [32], "whole number"),
    ("train_batch_size", 10**400, "whole number"),
    ("gradient_clipping", -1, "at least 0"),
    ("gradient_clipping", None, "number"),
    ("gradient_clipping", math.nan, "number"),
    ("gradient_clipping", math.inf, "number"),
    ("steps_per_print", 0, "at least 1"),
    ("wall_clock_breakdown", 1, "true or false"),
    ("wall_clock_breakdown", "false", "true or false"),
    ("log_level", 3, "string"),
    ("communication_data_type", "fp8", "one of fp32, fp16, bf16"),
    ("zero_optimization", 3, "object"),
    ("zero_optimization", [], "object"),
    ("zero_optimization.stage", 4, "one of 0, 1, 2, 3"),
    ("zero_optimization.stage", "3", "one of"),
    ("zero_optimization.stage", True, "one of"),
    ("zero_optimization.stage", None, "one of"),
    ("zero_optimization.reduce_bucket_size", "5e8", "whole number"),
    ("zero_optimization.overlap_comm", "yes", "true or false"),
    ("zero_optimization.offload_optimizer", "cpu", "object"),
    ("zero_optimization.offload_optimizer.device", "gpu", "one of none, cpu, nvme"),
    ("zero_optimization.mics_shard_size", 2.5, "whole number"),
    ("fp16", True, "object"),
    ("fp16.enabled", "true", "true or false"),
    ("autotuning.enabled", 1, "true or false"),
    ("optimizer", "Adam", "type and params"),
    ("optimizer.type", 5, "string"),
    ("optimizer.params", {"lr": 1e-3}, "no type"),
    ("scheduler.type", "StepLR", "five"),
    ("comms_logger.prof_ops", "all", "list"),
    ("checkpoint.tag_validation", "Sometimes", "one of Warn, Ignore, Fail"),
    ("tensor_parallel.autotp_size", -2, "at least 1"),
    ("datastates_ckpt", "yes", "object"),
]


@pytest.mark.parametrize(("key", "value", "what"), WRONG)
def test_illegal_value_names_key_and_what_is_legal(
    key: str, value: object, what: str
) -> None:
    text = message(nest(key, value))
    assert text.startswith(f"deepspeed {key}")
    assert what in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", "1e-4"),
        ("lr", -1),
        ("lr", None),
        ("betas", 0.9),
        ("betas", [0.9]),
        ("betas", [0.9, 1.0]),
        ("betas", [0.9, "0.95"]),
        ("eps", [1e-8]),
        ("weight_decay", True),
        ("amsgrad", True),
        ("max_grad_norm", 1.0),
        ("fp32_optimizer_states", False),
        ("bias_correction", 1),
    ],
)
def test_illegal_parameter_names_key(name: str, value: object) -> None:
    text = message(choice("optimizer", "Adam", **{name: value}))
    assert text.startswith(f"deepspeed optimizer.params.{name}=")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_scale", -1),
        ("initial_scale_power", 40),
        ("loss_scale_window", 0),
        ("hysteresis", 0),
        ("min_loss_scale", 0),
        ("consecutive_hysteresis", "no"),
    ],
)
def test_illegal_loss_scale_names_key(name: str, value: object) -> None:
    text = message({"fp16": {"enabled": True, name: value}})
    assert text.startswith(f"deepspeed fp16.{name}=")


def rules(keys: Mapping[str, Node]) -> Iterator[Rule]:
    for node in keys.values():
        if isinstance(node, Rule):
            yield node
        elif isinstance(node, Choice):
            for option in node.options.values():
                yield from option.params.values()
        else:
            yield from rules(node.keys)


def test_mapped_fields_exist_and_take_what_the_table_gives() -> None:
    known = dict(leaves(to_dict(RUN)))
    fields = {name for rule in rules(KEYS) for name in rule.fields}
    assert fields <= known.keys()
    assert len(fields) > 45


def test_keys_of_sections_without_a_default_are_answered() -> None:
    ds = {
        "zero_optimization": {
            "zenflow": {
                "topk_ratio": 0.1, "select_strategy": "auto", "select_interval": "auto",
                "update_interval": "auto", "overlap_step": False, "offload": False,
                "auto_ratio": 0.99, "full_warm_up_rounds": 0,
                "pt_reserved_cores_perc": 0.5,
            }
        },
        "weight_quantization": {
            "num_bits": 8, "q_type": "symmetric", "q_groups": 1,
            "quantized_initialization": {}, "post_init_quant": {},
        },
    }  # fmt: skip
    answers = [a for a in explain(ds) if not a.key.endswith("(default)")]
    assert {a.status for a in answers} == {"refused"}
    assert len(answers) == 9 + 5


def rule_of(key: str) -> Rule:
    """Returns the rule of a key, of a parameter that of the first type that has it."""
    keys: Mapping[str, Node] = KEYS
    *path, name = key.split(".")
    for part in path:
        node = keys[part]
        if isinstance(node, Choice):
            return next(
                o.params[name] for o in node.options.values() if name in o.params
            )
        assert isinstance(node, Section)
        keys = node.keys
    rule = keys[name]
    assert isinstance(rule, Rule)
    return rule


def test_names_on_the_documentation_page_are_those_of_the_table() -> None:
    page = Path(__file__).parents[1].joinpath("docs", "deepspeed.md").read_text("utf-8")
    names = page.partition("## Names")[2].partition("## ")[0]
    rows = re.findall(r"^\| `(\S+)` \| (`.*`) \|$", names, re.MULTILINE)
    fields = {key: tuple(to.replace("`", "").split()) for key, to in rows}
    assert fields == {key: rule_of(key).fields for key in fields}
    mapped = {f for rule in rules(KEYS) for f in rule.fields}
    assert mapped == {f for each in fields.values() for f in each}
