# SPDX-License-Identifier: Apache-2.0
"""Every key of a DeepSpeed JSON (DeepSpeed 0.19 and its deprecated names), as a table.

A key is mapped to fields of `RunConfig`, not needed, or refused; the table also holds
which values of a refused key ask for nothing. Nothing is decided here that needs two
keys at once: that, and the walk, is `jaxspeed.deepspeed_json`. The words of the table
are in `jaxspeed.deepspeed_rules`. Layer 2: standard library only.
"""

import math
from collections.abc import Mapping

from jaxspeed.deepspeed_rules import (
    AMOUNT,
    COUNT,
    DECAY,
    DTYPE,
    IGNORED,
    SHORT_DTYPE,
    SIZE,
    SWITCH,
    Choice,
    Node,
    Option,
    Rule,
    anything,
    array,
    becomes,
    decays,
    flag,
    groups,
    maps,
    must_be_off,
    named,
    number,
    one_of,
    refuses,
    section,
    shards,
    table,
    text,
    unneeded,
    warmup,
    whole,
)


ALWAYS = "metrics.jsonl and TensorBoard events are always written"
BACKGROUND = "Orbax writes in the background (checkpoint.asynchronous)"
BUFFERS = "XLA plans the buffers"
CHECKPOINTS = "a checkpoint holds whole arrays and loads on any mesh and stage"
COLLECTIVES = "XLA cuts, orders and overlaps the collectives itself"
COMPILED = "every step is compiled by XLA"
DIMS = "each parameter names its dims, and mesh.tensor splits them in every model"
GATHERED = "a layer is gathered where it is used, in an order fixed at compile time"
MODULES = "there are no module hooks: the step is one compiled function"
ONE_BY_ONE = "its parts are answered one by one"
ONE_PROGRAM = "the step is one compiled program"
PERF = "perf/step_seconds and perf/tokens_per_second are always logged"
RECOMPUTED = "layers are computed again in the backward pass"
REPORT = "the report of a run lists the collectives of its step"
SUMMED = "gradients are summed in float32 and divided once, by the number of tokens"
WORKDIR = "they lie in the run directory (workdir)"
FLOAT32_STATE = "master weights, their gradients and the optimizer state are float32"
SHARD_IT = FLOAT32_STATE + "; set it to false (zero.stage shards them)"
NO_NVME = "tunes offloading to NVMe, which is refused where it is asked for"
NO_OFFLOAD = (
    "state is not offloaded; remove it, and spread the state over more devices "
    "(ZeRO stage 3, mesh.fsdp)"
)


# The optimizer.

FUSED = unneeded(flag, "XLA fuses the update")

ADAM: Mapping[str, Rule] = {
    "lr": maps("optim.lr", AMOUNT),
    "betas": maps("optim.b1 optim.b2", decays),
    "eps": maps("optim.eps", AMOUNT),
    "weight_decay": maps("optim.weight_decay", AMOUNT),
    "bias_correction": maps("optim.bias_correction", flag),
    "adam_w_mode": unneeded(flag, "the type says so already"),
    "torch_adam": unneeded(flag, "the same formula; there is one implementation"),
    "amsgrad": refuses(flag, False, "there is no AMSGrad; set it to false"),
    "maximize": refuses(flag, False, "the loss is minimised; set it to false"),
    "max_grad_norm": refuses(
        AMOUNT, 0, "DeepSpeed refuses it here too; use gradient_clipping"
    ),
    "fp32_optimizer_states": refuses(
        flag, True, FLOAT32_STATE + "; set it to true", FLOAT32_STATE
    ),
    "set_grad_none": unneeded(flag, "gradients are values, not buffers"),
    **dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), FUSED),
}


def _adam(names: str) -> dict[str, Rule]:
    return {name: ADAM[name] for name in names.split()}


LION = _adam("lr betas weight_decay max_grad_norm set_grad_none fp32_optimizer_states")

LAMB = _adam("lr betas eps weight_decay bias_correction amsgrad max_grad_norm") | {
    "max_coeff": maps("optim.max_coeff", AMOUNT),
    "min_coeff": maps("optim.min_coeff", AMOUNT),
    "eps_inside_sqrt": refuses(
        flag, False, "eps is added outside the root; set it to false"
    ),
}

SGD = _adam("lr weight_decay max_grad_norm maximize foreach fused differentiable") | {
    "momentum": maps("optim.momentum", DECAY),
    "nesterov": maps("optim.nesterov", flag),
    "dampening": refuses(AMOUNT, 0, "momentum is not dampened; set it to 0"),
}

ADAGRAD = _adam(
    "lr eps weight_decay max_grad_norm maximize foreach fused differentiable amsgrad "
    "fp32_optimizer_states"
) | {
    "lr_decay": refuses(AMOUNT, 0, "set it to 0 and use a scheduler"),
    "initial_accumulator_value": refuses(AMOUNT, 0, "it starts at 0; set it to 0"),
}

MUON = _adam("lr betas eps weight_decay max_grad_norm") | {
    "momentum": maps("optim.momentum", DECAY),
    "muon_lr": maps("optim.muon_lr", AMOUNT, "of the matrices"),
    "adam_lr": maps("optim.lr", AMOUNT, "of what Muon leaves to Adam"),
    "ns_method": unneeded(
        one_of("gram", "standard"), "the same function of a matrix in another order"
    ),
}

ADAM_DEFAULTS = {"lr": 1e-3, "betas": [0.9, 0.999]}

OPTIMIZER = Choice(
    "optim",
    {
        "Adam": Option("adamw", ADAM, ADAM_DEFAULTS),
        "AdamW": Option("adamw", ADAM, ADAM_DEFAULTS),
        "Lamb": Option("lamb", LAMB, ADAM_DEFAULTS),
        "Lion": Option("lion", LION, ADAM_DEFAULTS),
        "SGD": Option("sgd", SGD, {"lr": 1e-3, "momentum": 0.0}),
        "Adagrad": Option("adagrad", ADAGRAD, {"lr": 1e-2, "eps": 1e-10}),
        "Muon": Option(
            "muon",
            MUON,
            {"betas": [0.9, 0.95], "eps": 1e-10, "momentum": 0.95},
            sets={"optim.nesterov": True},
        ),
    },
    {
        "OneBitAdam": "gradients are not compressed; use Adam",
        "ZeroOneAdam": "gradients are not compressed; use Adam",
        "OneBitLamb": "gradients are not compressed; use Lamb",
        "MuAdam": "learning rates are not scaled by width; use Adam",
        "MuAdamW": "learning rates are not scaled by width; use AdamW",
        "MuSGD": "learning rates are not scaled by width; use SGD",
        "Adafactor": "PyTorch's is not optim.name adafactor; to use that one, set it "
        "in the recipe and remove this section",
    }
    | dict.fromkeys(
        "RMSprop NAdam RAdam Adadelta Adamax ASGD Rprop LBFGS SparseAdam".split(),
        "jaxspeed does not have it; use Adam, AdamW, SGD, Lamb, Lion, Adagrad or Muon",
    ),
    {"legacy_fusion": FUSED},
    # Biases and norms too.
    sets={"optim.decay": "all"},
)

RESUME = refuses(whole(), -1, "the checkpoint says where a run goes on; remove it")

PEAK = "schedules scale optim.lr"

WARMUP: Mapping[str, Rule] = {
    "warmup_num_steps": maps("schedule.warmup_steps", warmup),
    "warmup_type": maps("schedule.warmup_shape", one_of("log", "linear")),
    "last_batch_iteration": RESUME,
}

WARMUP_LR: Mapping[str, Rule] = {
    "warmup_min_lr": maps("schedule.warmup_min_lr", AMOUNT),
    "warmup_max_lr": maps("optim.lr", AMOUNT, PEAK, off=(None,)),
    **WARMUP,
}

TOTAL: Mapping[str, Rule] = {"total_num_steps": maps("schedule.total_steps", COUNT)}

WARMUP_COSINE_LR: Mapping[str, Rule] = {
    "warmup_min_ratio": maps("schedule.warmup_min_ratio", AMOUNT),
    "cos_min_ratio": maps("schedule.min_ratio", AMOUNT),
    **WARMUP,
    **TOTAL,
}

ONE_CYCLE: Mapping[str, Rule] = {
    "cycle_min_lr": maps("schedule.cycle_min_lr", AMOUNT),
    "cycle_max_lr": maps("optim.lr", AMOUNT, PEAK),
    "cycle_first_step_size": maps("schedule.cycle_first_steps", COUNT),
    "cycle_second_step_size": maps("schedule.cycle_second_steps", COUNT, off=(None,)),
    "cycle_first_stair_count": maps("schedule.cycle_first_stairs", SIZE),
    "cycle_second_stair_count": maps("schedule.cycle_second_stairs", SIZE, off=(None,)),
    "decay_step_size": maps("schedule.decay_steps", SIZE),
    "decay_lr_rate": maps("schedule.decay_lr_rate", AMOUNT),
    "cycle_momentum": maps("schedule.cycle_momentum", flag),
    "cycle_min_mom": maps("schedule.cycle_min_momentum", DECAY),
    "cycle_max_mom": maps("schedule.cycle_max_momentum", DECAY),
    "decay_mom_rate": maps("schedule.decay_momentum_rate", AMOUNT),
    "last_batch_iteration": RESUME,
}

LR_RANGE_TEST: Mapping[str, Rule] = {
    "lr_range_test_min_lr": maps("schedule.range_min_lr", AMOUNT),
    "lr_range_test_step_size": maps("schedule.range_step_size", COUNT),
    "lr_range_test_step_rate": maps("schedule.range_step_rate", AMOUNT),
    "lr_range_test_staircase": maps("schedule.range_staircase", flag),
    "last_batch_iteration": RESUME,
}

LONG = {"warmup_num_steps": 1000}

SCHEDULER = Choice(
    "schedule",
    {
        "WarmupLR": Option("warmup", WARMUP_LR, LONG),
        "WarmupDecayLR": Option(
            "warmup_decay", {**WARMUP_LR, **TOTAL}, LONG | {"warmup_max_lr": 1e-3}
        ),
        "WarmupCosineLR": Option(
            "warmup_cosine", WARMUP_COSINE_LR, LONG | {"cos_min_ratio": 1e-4}
        ),
        "OneCycle": Option(
            "one_cycle", ONE_CYCLE, required=("cycle_min_lr", "cycle_max_lr")
        ),
        "LRRangeTest": Option("lr_range_test", LR_RANGE_TEST),
    },
    {
        "CosineAnnealingLR": "use WarmupCosineLR",
        "OneCycleLR": "PyTorch's is another curve; use OneCycle",
        "LinearLR": "use WarmupLR with warmup_type linear",
    }
    | dict.fromkeys(
        "LambdaLR MultiplicativeLR StepLR MultiStepLR ConstantLR ExponentialLR "
        "PolynomialLR ReduceLROnPlateau CyclicLR CosineAnnealingWarmRestarts "
        "SequentialLR ChainedScheduler".split(),
        "jaxspeed does not have it; use one of DeepSpeed's five, or set schedule.* in "
        "the recipe and remove this section",
    ),
)


# Precision.

FP16 = section(
    {
        "enabled": maps("dtype.compute", becomes("float16", flag), off=(False,)),
        "auto_cast": unneeded(flag, "inputs are token ids"),
        "loss_scale": maps("loss_scale.static", AMOUNT),
        "initial_scale_power": maps("loss_scale.initial_power", whole(0, 32)),
        "loss_scale_window": maps("loss_scale.window", COUNT),
        "hysteresis": maps("loss_scale.hysteresis", COUNT),
        "consecutive_hysteresis": maps("loss_scale.consecutive_hysteresis", flag),
        "min_loss_scale": maps("loss_scale.minimum", COUNT),
        "fp16_master_weights_and_grads": refuses(flag, False, SHARD_IT),
    },
    switch="enabled",
)

BF16 = section(
    {
        "enabled": maps("dtype.compute", becomes("bfloat16", flag), off=(False,)),
        "immediate_grad_update": unneeded(flag, SUMMED),
        "check_grad_overflow check_overflow": unneeded(
            flag, "a step with a gradient that is not finite is skipped and counted"
        ),
        "bf16_master_weights_and_grads bf16_optimizer_states": refuses(
            flag, False, SHARD_IT
        ),
    },
    switch="enabled",
)

AUTOCAST = section(
    {
        "enabled": unneeded(flag, "torch_autocast.dtype says the rest"),
        "dtype": maps("dtype.compute", DTYPE, "parameters stay float32"),
        "lower_precision_safe_modules": unneeded(
            array, "all matrix products run in dtype.compute, the loss in float32"
        ),
    },
    switch="enabled",
)

PRECISION: dict[str, Node] = {
    "fp16": FP16,
    "bf16 bfloat16": BF16,
    "torch_autocast": AUTOCAST,
    "amp": must_be_off(
        "Apex is CUDA; set it to false and use bf16", "", {"*": IGNORED}
    ),
    "communication_data_type": maps(
        "dtype.reduce",
        named({"fp32": "float32", "fp16": "compute", "bf16": "compute"}),
        off=(None,),
    ),
    "fp32_allreduce": maps(
        "dtype.reduce",
        becomes("float32", flag),
        "deprecated: communication_data_type",
        off=(False,),
    ),
    "data_types": section(
        {
            "grad_accum_dtype": refuses(
                SHORT_DTYPE,
                "fp32",
                "gradients accumulate in float32; use fp32 (stage 2 shards the sum)",
                "gradients accumulate in float32",
            ),
            "param_dtype": unneeded(SHORT_DTYPE, "fp16 and bf16 say what computes"),
            "buffer_dtype": unneeded(SHORT_DTYPE, "models have no buffers"),
        }
    ),
}


# Memory and sharding.

OFFLOAD = must_be_off(
    NO_OFFLOAD,
    "nvme_path buffer_count buffer_size max_in_cpu pin_memory pipeline pipeline_read "
    "pipeline_write fast_init ratio super_offload cpuadam_cores_perc",
    {"device": unneeded(one_of("none", "cpu", "nvme"), "")},
    switch="device",
    off=("none",),
)

ZERO = section(
    {
        "stage": maps("zero.stage", one_of(0, 1, 2, 3)),
        "[stage3_]param_persistence_threshold": maps(
            "zero.param_persistence_threshold", SIZE
        ),
        "mics_shard_size": maps(
            "mesh.fsdp mesh.data", shards, "shards, and replicas of them", off=(-1, 0)
        ),
        "reduce_bucket_size allgather_bucket_size": unneeded(SIZE, COLLECTIVES),
        "overlap_comm allgather_partitions reduce_scatter round_robin_gradients "
        "use_multi_rank_bucket_allreduce mics_hierarchical_params_gather "
        "grad_hooks": unneeded(flag, COLLECTIVES),
        "contiguous_gradients": unneeded(flag, BUFFERS),
        "sub_group_size": unneeded(SIZE, ONE_PROGRAM),
        "[stage3_]prefetch_bucket_size [stage3_]max_live_parameters "
        "[stage3_]max_reuse_distance [stage3_]model_persistence_threshold "
        "[stage3_]module_granularity_threshold": unneeded(SIZE, GATHERED),
        "[stage3_]use_all_reduce_for_fetch_params "
        "[stage3_]allgather_sequential": unneeded(flag, GATHERED),
        "[stage3_]gather_16bit_weights_on_model_save "
        "stage3_gather_fp16_weights_on_model_save load_from_fp32_weights "
        "elastic_checkpoint pipeline_loading_checkpoint": unneeded(flag, CHECKPOINTS),
        "ignore_unused_parameters": unneeded(flag, "their gradient is zero"),
        "legacy_stage1": unneeded(flag, "there is one implementation of a stage"),
        "memory_efficient_linear override_module_apply log_trace_cache_warnings "
        "enable_sanity_checks": unneeded(flag, MODULES),
        "leaf_module": section(
            {"classes names name_suffixes": unneeded(anything, MODULES)}
        ),
        "offload_optimizer offload_param": OFFLOAD,
        "cpu_offload cpu_offload_param cpu_offload_params": refuses(
            flag, False, NO_OFFLOAD
        ),
        "cpu_offload_use_pin_memory": unneeded(
            flag, "tunes offloading, which is refused where it is asked for"
        ),
        "save_muon_momentum_buffer_in_memory": unneeded(flag, NO_NVME),
        "zero_hpz_partition_size": maps(
            "mesh.fsdp mesh.data zero.secondary",
            groups,
            "a second copy, sharded inside a group",
            off=(0, 1),
        ),
        "zero_quantized_weights zero_quantized_nontrainable_weights "
        "zero_quantized_gradients": refuses(
            flag, False, "collectives are not quantized; set it to false, use bf16"
        ),
        "zeropp_loco_param": must_be_off(
            "collectives are not quantized; remove it",
            "err_beta reset_T",
            switch="/zero_optimization.zero_quantized_gradients",
        ),
        "zenflow": must_be_off(
            "every parameter is updated at every step, on the devices; remove it",
            "topk_ratio select_strategy select_interval update_interval overlap_step "
            "offload auto_ratio full_warm_up_rounds pt_reserved_cores_perc "
            "steps_per_epoch",
            switch="",
            on=True,
        ),
    },
    scalar=maps("zero.stage", named({True: 1, False: 0}), "deprecated: true is 1"),
)

ACTIVATION_CHECKPOINTING = section(
    {
        "partition_activations": maps(
            "remat", becomes("full", flag), RECOMPUTED, off=(False,)
        ),
        "number_checkpoints": maps(
            "remat", becomes("full", SIZE), RECOMPUTED, off=(None, 0)
        ),
        "cpu_checkpointing": maps(
            "remat",
            becomes("offload", flag),
            "the host keeps each layer's input",
            off=(False,),
        ),
        "contiguous_memory_optimization": unneeded(flag, BUFFERS),
        "synchronize_checkpoint_boundary": unneeded(flag, ONE_PROGRAM),
        "profile": unneeded(flag, ONE_PROGRAM + "; jax.profiler traces it"),
    }
)

SPARSE_ATTENTION = must_be_off(
    "attention is dense; use mode dense, or remove the section",
    "block different_layout_per_head num_local_blocks num_global_blocks attention "
    "horizontal_global_attention num_different_global_patterns num_random_blocks "
    "local_window_blocks global_block_indices global_block_end_indices "
    "num_sliding_window_blocks",
    {
        "mode": unneeded(
            one_of("dense", "fixed", "variable", "bigbird", "bslongformer"), ""
        )
    },
    switch="mode",
    off=("dense",),
    on=True,
)

MEMORY: dict[str, Node] = {
    "zero_optimization": ZERO,
    "allgather_size": unneeded(SIZE, COLLECTIVES),
    "disable_allgather": unneeded(flag, COLLECTIVES),
    "activation_checkpointing": ACTIVATION_CHECKPOINTING,
    "sparse_attention": SPARSE_ATTENTION,
    "aio": section(
        {
            "block_size queue_depth intra_op_parallelism thread_count": unneeded(
                COUNT, NO_NVME
            ),
            "single_submit overlap_events use_gds": unneeded(flag, NO_NVME),
        }
    ),
}


# Parallelism beside ZeRO.

TP_SIZE: Mapping[str, Node] = {
    "tp_size": maps("mesh.tensor", COUNT, off=(1,)),
    "tp_grain_size": unneeded(COUNT, "dims are split evenly"),
    "mpu tp_group": unneeded(anything, "the groups are the axes of mesh"),
}

TENSOR_PARALLEL = section(
    {
        "autotp_size": maps("mesh.tensor", COUNT, off=(0,)),
        **TP_SIZE,
        "tensor_parallel tp": section(TP_SIZE),
        "preset_model injection_policy_tuple": unneeded(anything, DIMS),
        "partition_config": section(
            {
                "use_default_specs layer_specs embedding_partition_dim "
                "lm_head_patterns strict_mode tp_size": unneeded(anything, DIMS)
            }
        ),
        "tp_overlap_comm": unneeded(flag, COLLECTIVES),
        "dtype": unneeded(anything, "fp16 and bf16 say what computes"),
        "keep_module_on_host": unneeded(flag, "parameters are made in shards"),
        "replace_with_kernel_inject kernel_inject": refuses(
            flag, False, "DeepSpeed's kernels are CUDA; set it to false"
        ),
    }
)

PARALLELISM: dict[str, Node] = {
    "tensor_parallel": TENSOR_PARALLEL,
    "sequence_parallel_size": maps("mesh.context", COUNT, off=(1,)),
    "data_parallel_size": unneeded(COUNT, "it follows from the devices and the mesh"),
    "seq_parallel_communication_data_type": unneeded(
        SHORT_DTYPE, "goes with sequence_parallel_size"
    ),
    "pipeline": section(
        {
            "stages": maps("mesh.stage", COUNT, off=("auto", 0, 1)),
            "partition seed_layers activation_checkpoint_interval pipe_partitioned "
            "grad_partitioned use_reentrant": unneeded(
                anything,
                "stages have equal numbers of layers, keep their inputs and compute all else again",
            ),
        }
    ),
    "expert_parallel": section(
        {
            "enabled": unneeded(flag, "autoep_size says it"),
            "autoep_size": maps("mesh.expert", COUNT, off=(1,)),
            "expert_tensor_parallel_size": refuses(
                COUNT,
                1,
                "mesh.tensor splits experts as it splits all else; set it to 1",
            ),
            "load_balance_coeff": maps("moe.balance_coef", number(0)),
            "preset_model preset moe_layer_pattern expert_pattern router_pattern "
            "use_grouped_mm disable_triton_grouped_mm route_norm route_scale score_apply "
            "combine_impl num_expert_groups num_limited_groups score_func top_k "
            "routed_scaling_factor expert_w1 expert_w2 expert_w3 num_experts_attr "
            "top_k_attr has_shared_experts shared_experts_pattern "
            "shared_experts_gate_pattern validate_folding_routing": unneeded(
                anything, "the model's configuration says it"
            ),
        },
        switch="enabled",
    ),
    "use_data_before_expert_parallelism": unneeded(flag, "goes with expert_parallel"),
}


# Data, regularisation and compression.

SCHEDULE_CONFIG = section(
    {"total_curriculum_step difficulty_step root_degree difficulty max_step": IGNORED}
)

METRIC = section(
    {
        "index_to_sample_path index_to_metric_path difficulty_type clustering_type "
        "min_difficulty max_difficulty schedule_type": IGNORED,
        "schedule_config": SCHEDULE_CONFIG,
    }
)

LTD_SCHEDULE = section(
    {
        "min_value max_value schedule_type": IGNORED,
        "schedule_config": section({"require_steps seq_per_step": IGNORED}),
    }
)

DATA_SAMPLING = section(
    {
        "enabled": unneeded(flag, ONE_BY_ONE),
        "num_epochs": unneeded(COUNT, "data repeat until the last of `steps`"),
        "num_workers": unneeded(SIZE, "data.prefetch says how far to read ahead"),
        "pin_memory": unneeded(flag, "batches are put on the devices ahead of use"),
        "curriculum_learning": must_be_off(
            "there is no curriculum; set it to false",
            "data_cluster_path",
            {"curriculum_metrics": section({"*": METRIC})},
        ),
        "dynamic_batching": must_be_off(
            "a batch has a fixed number of tokens, filled by packing documents; set "
            "it to false",
            "metrics_path lr_scaling_method min_batch_size max_batch_size "
            "sequence_picking_order max_tokens verbose",
        ),
    },
    switch="enabled",
)

DATA_ROUTING = section(
    {
        "enabled": unneeded(flag, ONE_BY_ONE),
        "random_ltd": must_be_off(
            "layers do not drop tokens; set it to false",
            "total_layer_num random_ltd_layer_num random_ltd_layer_id "
            "model_mask_name model_type hidden_state_order micro_batch_size "
            "global_batch_size layer_token_lr_schedule "
            "random_ltd_layer_token_lr_schedule",
            {"random_ltd_schedule": LTD_SCHEDULE},
        ),
    },
    switch="enabled",
)

COMPRESSION_SHARED = section(
    {
        "enabled": SWITCH,
        "schedule_offset schedule_offset_end schedule_offset_stride method "
        "block_pattern dense_ratio excluded_modules num_heads range_calibration "
        "quantizer_kernel quantize_groups quantize_verbose quantization_type "
        "quantize_weight_in_forward rounding": IGNORED,
        "fp16_mixed_quantize": section({"enabled quantize_change_ratio": IGNORED}),
    }
)

COMPRESSION_GROUP = section(
    {
        "modules related_modules": IGNORED,
        "params": section(
            {"start_bits target_bits quantization_period bits dense_ratio": IGNORED}
        ),
    }
)

NO_COMPRESSION = "models are not compressed in training; set it to false"

COMPRESSION = section(
    {
        "weight_quantization activation_quantization sparse_pruning row_pruning "
        "head_pruning channel_pruning": must_be_off(
            NO_COMPRESSION,
            "",
            {
                "shared_parameters": COMPRESSION_SHARED,
                "different_groups": section({"*": COMPRESSION_GROUP}),
            },
            switch="shared_parameters.enabled",
        ),
        "layer_reduction": must_be_off(
            "no layers are taken from a larger model; set it to false, and give "
            "model.num_layers",
            "keep_number_layer module_name_prefix teacher_layer other_module_name",
        ),
    }
)

DATA: dict[str, Node] = {
    "dataloader_drop_last": unneeded(flag, "documents are packed into full batches"),
    "data_efficiency": section(
        {
            "enabled": unneeded(flag, ONE_BY_ONE),
            "seed": maps("seed", SIZE, "one seed, for data order and initialisation"),
            "data_sampling": DATA_SAMPLING,
            "data_routing": DATA_ROUTING,
        },
        switch="enabled",
    ),
    "curriculum_learning": must_be_off(
        "there is no curriculum; set it to false, and begin with a run of a smaller "
        "seq_len that the next one takes as init",
        "curriculum_type min_difficulty max_difficulty schedule_type",
        {"schedule_config": SCHEDULE_CONFIG},
    ),
    "progressive_layer_drop": must_be_off(
        "layers are not dropped; set it to false", "theta gamma"
    ),
    "compression_training": COMPRESSION,
    "quantize_training": must_be_off(NO_COMPRESSION, "", {"*": IGNORED}),
    "weight_quantization": must_be_off(
        "weights are not quantized; remove it",
        "num_bits q_type q_groups quantized_initialization post_init_quant",
        on=True,
    ),
    "eigenvalue": must_be_off(
        "goes with quantize_training; set it to false",
        "verbose max_iter tol stability gas_boundary_resolution layer_name layer_num",
    ),
}


# Logs, measurements, running and saving.

LOGS: dict[str, Node] = {
    "tensorboard csv_monitor": section(
        {
            "enabled": unneeded(flag, ALWAYS),
            "output_path job_name": unneeded(text, WORKDIR),
        }
    ),
    "wandb": must_be_off("set it to false; " + ALWAYS, "group team project"),
    "comet": must_be_off(
        "set it to false; " + ALWAYS,
        "samples_log_interval project workspace api_key experiment_name "
        "experiment_key online mode",
    ),
    "steps_per_print": maps("log_every", COUNT, off=(None, math.inf)),
    "dump_state": unneeded(flag, "the configuration is printed, and kept with a run"),
    "log_level": unneeded(text, "log levels are Python's"),
    "vocabulary_size": unneeded(SIZE, "of a warning only; see model.vocab_size"),
    "wall_clock_breakdown": unneeded(flag, ONE_PROGRAM + "; " + PERF),
    "memory_breakdown": unneeded(flag, "the report of a run has the step's memory"),
    "timers": section(
        {"throughput": section({"enabled synchronized": unneeded(flag, PERF)})}
    ),
    "comms_logger": section(
        {
            "enabled verbose prof_all debug": unneeded(flag, REPORT),
            "prof_ops": unneeded(array, REPORT),
        }
    ),
    "flops_profiler": must_be_off(
        "there is no profile by module; set it to false, and trace with jax.profiler",
        "recompute_fwd_factor profile_step module_depth top_modules detailed "
        "output_file",
    ),
    "autotuning": must_be_off(
        "sizes are not searched for; set it to false, and give "
        "train_micro_batch_size_per_gpu and zero_optimization.stage",
        "fast results_dir exps_dir overwrite metric metric_path start_profile_step "
        "end_profile_step max_train_batch_size min_train_batch_size mp_size "
        "num_tuning_micro_batch_sizes tuner_type tuner_early_stopping "
        "tuner_num_trials max_train_micro_batch_size_per_gpu arg_mappings "
        "min_train_micro_batch_size_per_gpu model_info_path",
        {"model_info": section({"profile num_params hidden_size num_layers": IGNORED})},
    ),
}

COMPILE = section(
    {
        "deepcompile free_activation double_buffer symmetric_memory debug_log "
        "sync_before_reduce sync_after_reduce sync_before_allgather "
        "sync_after_allgather keep_int_input_tensors keep_all_input_tensors "
        "offload_activation_pin_memory": unneeded(flag, COMPILED),
        "offload_activation offload_opt_states offload_parameters": refuses(
            flag, False, "nothing is offloaded; set it to false"
        ),
        "free_activation_threshold": unneeded(SIZE, COMPILED),
        "passes": unneeded(array, COMPILED),
    }
)

CHECKPOINT = section(
    {
        "tag_validation": unneeded(
            one_of("Warn", "Ignore", "Fail"), "a checkpoint is named by its step"
        ),
        "load_universal checkpoint_serialization": unneeded(flag, CHECKPOINTS),
        "use_node_local_storage": refuses(
            flag,
            False,
            "all hosts write one checkpoint; set it to false, with workdir where "
            "every host sees it",
        ),
        "parallel_write": section({"pipeline_stage": unneeded(flag, CHECKPOINTS)}),
        "writer": section(
            {
                "type io_buffer_size io_buffer_double io_multiplier show_statistics "
                "data_parallel decoupled": unneeded(anything, BACKGROUND)
            }
        ),
    }
)

RUNNING: dict[str, Node] = {
    "graph_harvesting": unneeded(flag, COMPILED),
    "compile": COMPILE,
    "checkpoint": CHECKPOINT,
    "nebula": must_be_off(
        "Nebula is a service of Azure; set it to false (checkpoints are asynchronous; "
        "see checkpoint.every, checkpoint.keep and workdir)",
        "persistent_storage_path persistent_time_interval num_of_version_in_retention "
        "enable_nebula_load load_path nebula_load_path",
    ),
    "datastates_ckpt": section(
        {"*": unneeded(anything, BACKGROUND)}, scalar=unneeded(flag, BACKGROUND)
    ),
    "elasticity": must_be_off(
        "set it to false, and give train_batch_size: accumulation follows from the "
        "devices, and a run resumes on any number of them",
        "max_train_batch_size micro_batch_sizes min_gpus max_gpus min_time version "
        "prefer_larger_batch prefer_large_batch ignore_non_elastic_batch_info "
        "num_gpus_per_node model_parallel_size",
    ),
    "hybrid_engine": must_be_off(
        "there is no second engine for generation; set it to false",
        "max_out_tokens inference_tp_size release_inference_cache pin_parameters "
        "tp_gather_partition_size enable_cuda_graph",
    ),
}

UPDATES: dict[str, Node] = {
    "train_batch_size": maps("global_batch_size", COUNT, off=(None,)),
    "train_micro_batch_size_per_gpu": maps("micro_batch_size", COUNT, off=(None,)),
    "gradient_accumulation_steps": maps("accumulate", COUNT, off=(None,)),
    "managed_gradient_accumulation": refuses(
        flag,
        True,
        "micro-steps are counted inside the step; set it to true",
        "micro-steps are counted inside the step",
    ),
    "optimizer": OPTIMIZER,
    "scheduler": SCHEDULER,
    "gradient_clipping": maps("optim.clip_norm", AMOUNT),
    "prescale_gradients": unneeded(flag, SUMMED),
    "gradient_predivide_factor": unneeded(number(), SUMMED),
    "gradient_allreduce_op": refuses(
        one_of("mean", "sum"),
        "mean",
        "the gradient is the mean over tokens; use mean, and scale the learning rate",
        "the gradient is the mean over tokens",
    ),
    "sparse_gradients": unneeded(flag, "the same gradients, dense"),
    "zero_allow_untested_optimizer": unneeded(flag, "all work at every stage"),
    "zero_force_ds_cpu_optimizer": unneeded(flag, "there is one of each optimizer"),
}

KEYS: Mapping[str, Node] = table(
    UPDATES | PRECISION | MEMORY | PARALLELISM | DATA | LOGS | RUNNING
)
"""The top level of the JSON."""
