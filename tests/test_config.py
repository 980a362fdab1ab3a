# SPDX-License-Identifier: Apache-2.0
"""The configuration: what each class refuses, the batch triad, the mesh, dicts and diffs."""

import dataclasses
import itertools
import json
import re
from typing import Any

import pytest

from jaxspeed import config as configs
from jaxspeed.batch import BatchShape, resolve_batch
from jaxspeed.config import (
    OPTIMIZER_FIELDS,
    SCHEDULE_FIELDS,
    TASK_COLUMNS,
    TASK_FIELDS,
    TASK_METRICS,
    TASK_SETTINGS,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    DTypeConfig,
    EvalConfig,
    LoraConfig,
    LossScaleConfig,
    MeshConfig,
    MoeConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TaskConfig,
    ZeroConfig,
    diff,
    suggest,
    to_dict,
)
from models import gpt2


MODEL = gpt2.Config(
    vocab_size=64, max_seq_len=16, num_layers=2, num_heads=4, d_model=32
)
CLASSES = [
    c
    for c in vars(configs).values()
    if isinstance(c, type) and c.__name__.endswith("Config")
]


def run(**changes: Any) -> RunConfig:
    return RunConfig(
        **{"model": MODEL, "steps": 10, "seq_len": 16, "global_batch_size": 8} | changes
    )


def unchecked(cls: Any, **values: Any) -> Any:
    """Returns cls(**values) as it is without the type checks that conftest.py puts around it."""
    config = object.__new__(cls)
    if cls is RunConfig:
        values = {
            "model": MODEL,
            "steps": 10,
            "seq_len": 16,
            "global_batch_size": 8,
        } | values
    for f in dataclasses.fields(cls):
        default = f.default_factory() if callable(f.default_factory) else f.default
        object.__setattr__(config, f.name, values.pop(f.name, default))
    assert not values
    config.__post_init__()
    return config


BAD_VALUES: list[tuple[type, dict[str, Any], str]] = [
    (MeshConfig, {"data": 0}, "mesh.data=0: an axis size is at least 1"),
    (MeshConfig, {"tensor": -2}, "mesh.tensor=-2: an axis size is at least 1"),
    (MeshConfig, {"data": -1}, "['data', 'fsdp'] are both -1"),
    (MeshConfig, {"data": -1, "tensor": -1}, "give all but one a size"),
    (MeshConfig, {"fsdp": 2.0}, "mesh.fsdp=2.0: float where int is due"),
    (ZeroConfig, {"stage": 4}, "zero.stage=4: unknown; give one of [0, 1, 2, 3]"),
    (ZeroConfig, {"stage": True}, "zero.stage=True: unknown"),
    (ZeroConfig, {"stage": "3"}, "zero.stage='3': unknown"),
    (ZeroConfig, {"param_persistence_threshold": -1}, "must be >= 0"),
    (DTypeConfig, {"compute": "bfloat61"}, "Did you mean 'bfloat16'?"),
    (DTypeConfig, {"compute": "fp8"}, "['float32', 'bfloat16', 'float16']"),
    (DTypeConfig, {"activations": "bfloat16"}, "dtype.activations='bfloat16': unknown"),
    (DTypeConfig, {"frozen": "bfloat16"}, "dtype.frozen='bfloat16': unknown"),
    (DTypeConfig, {"reduce": "fp32"}, "dtype.reduce='fp32': unknown"),
    (LossScaleConfig, {"static": -1.0}, "loss_scale.static=-1.0: must be >= 0"),
    (LossScaleConfig, {"initial_power": 33}, "give 0 to 32"),
    (LossScaleConfig, {"initial_power": -1}, "give 0 to 32"),
    (LossScaleConfig, {"window": 0}, "loss_scale.window=0: must be > 0"),
    (LossScaleConfig, {"hysteresis": 0}, "loss_scale.hysteresis=0: must be > 0"),
    (LossScaleConfig, {"minimum": 0.0}, "loss_scale.minimum=0.0: must be > 0"),
    (LossScaleConfig, {"consecutive_hysteresis": 1}, "int where bool is due"),
    (OptimConfig, {"name": "adamv"}, "Did you mean 'adam"),
    (OptimConfig, {"name": "rmsprop"}, "optim.name='rmsprop': unknown"),
    (OptimConfig, {"lr": -1e-3}, "optim.lr=-0.001: must be >= 0"),
    (OptimConfig, {"lr": float("nan")}, "optim.lr=nan: must be >= 0"),
    (OptimConfig, {"lr": "1e-3"}, "optim.lr='1e-3': str where float is due"),
    (OptimConfig, {"weight_decay": float("inf")}, "optim.weight_decay=inf"),
    (OptimConfig, {"clip_norm": -1.0}, "optim.clip_norm=-1.0"),
    (OptimConfig, {"eps": -1.0}, "optim.eps=-1.0"),
    (OptimConfig, {"b1": 1.0}, "optim.b1=1.0: a decay lies in [0, 1)"),
    (OptimConfig, {"b2": -0.1}, "optim.b2=-0.1: a decay lies in [0, 1)"),
    (OptimConfig, {"name": "sgd", "momentum": 1.5}, "optim.momentum=1.5"),
    (OptimConfig, {"name": "muon", "ns_steps": 0}, "optim.ns_steps=0"),
    (OptimConfig, {"name": "muon", "muon_lr": -1.0}, "optim.muon_lr=-1.0"),
    (OptimConfig, {"name": "lamb", "max_coeff": -1.0}, "optim.max_coeff=-1.0"),
    (OptimConfig, {"lr_groups": (("a", 0.0),)}, "optim.lr_groups: a=0.0: must be > 0"),
    (OptimConfig, {"decay_groups": (("a", -1.0),)}, "optim.decay_groups: a=-1.0"),
    (OptimConfig, {"lr_groups": (("a",),)}, "tuple where tuple[tuple[str, float]"),
    (OptimConfig, {"lr_groups": ("a", 1.0)}, "tuple where tuple[tuple[str, float]"),
    (OptimConfig, {"decay": "none"}, "optim.decay='none': unknown"),
    (ScheduleConfig, {"name": "cosin"}, "Did you mean 'cosine'?"),
    (ScheduleConfig, {"warmup_steps": -1}, "schedule.warmup_steps=-1: must be >= 0"),
    (ScheduleConfig, {"warmup_steps": 1e3}, "float where int is due"),
    (
        ScheduleConfig,
        {"name": "warmup", "warmup_shape": "cubic"},
        "schedule.warmup_shape='cubic'",
    ),
    (DataConfig, {"path": ()}, "there is nothing to read"),
    (DataConfig, {"path": "my.txt"}, "write ('my.txt',)"),
    (DataConfig, {"path": ["my.txt"]}, "data.path=['my.txt']: list where tuple"),
    (DataConfig, {"weights": (0.5, 0.5)}, "there are 1 paths"),
    (
        DataConfig,
        {"path": ("a", "b"), "weights": (1.0, 0.0)},
        "data.weights=0.0: must be > 0",
    ),
    (MoeConfig, {"capacity_factor": -1.0}, "moe.capacity_factor=-1.0: must be >= 0"),
    (MoeConfig, {"noise": "rsample"}, "moe.noise='rsample': unknown"),
    (DataConfig, {"eval_fraction": 1.0}, "a share lies between 0 and 1"),
    (DataConfig, {"eval_fraction": 0.0}, "a share lies between 0 and 1"),
    (DataConfig, {"prefetch": 0}, "data.prefetch=0: must be > 0"),
    (LoraConfig, {"rank": -1}, "lora.rank=-1: must be >= 0"),
    (LoraConfig, {"rank": 8, "alpha": 0.0}, "lora.alpha=0.0: must be > 0"),
    (
        LoraConfig,
        {"rank": 8, "dropout": 1.0},
        "lora.dropout=1.0: a share lies in [0, 1)",
    ),
    (LoraConfig, {"dropout": 0.1}, "lora.dropout=0.1 has no effect with lora.rank=0"),
    (LoraConfig, {"rank": 8, "targets": "*"}, "write ('*',)"),
    (CheckpointConfig, {"every": -1}, "checkpoint.every=-1: must be >= 0"),
    (CheckpointConfig, {"keep": -1}, "checkpoint.keep=-1: must be >= 0"),
    (EvalConfig, {"every": -1}, "eval.every=-1: must be >= 0"),
    (EvalConfig, {"temperature": -0.5}, "eval.temperature=-0.5"),
    (EvalConfig, {"batches": 0.5}, "eval.batches=0.5: float where int is due"),
    (TaskConfig, {"name": "classify"}, "Did you mean 'classification'?"),
    (TaskConfig, {"labels": "no"}, "write ('no',)"),
    (TaskConfig, {"name": "masked_lm", "mask_rate": 1.0}, "between 0 and 1"),
    (TaskConfig, {"name": "span_corruption", "mean_span": 0.5}, "a token at least"),
    (TaskConfig, {"name": "seq2seq", "buckets": (64, 32)}, "lengths ascend from 1"),
    (TaskConfig, {"name": "seq2seq", "buckets": (0,)}, "lengths ascend from 1"),
    (TaskConfig, {"name": "seq2seq", "metrics": ("blue",)}, "task.metrics"),
    (TaskConfig, {"name": "seq2seq", "max_target_len": 0}, "must be > 0"),
    (TaskConfig, {"name": "question_answering", "stride": -1}, "must be >= 0"),
    (RunConfig, {"steps": 0}, "steps=0: must be > 0"),
    (RunConfig, {"steps": 1.5}, "steps=1.5: float where int is due"),
    (RunConfig, {"seq_len": -16}, "seq_len=-16: must be > 0"),
    (RunConfig, {"log_every": 0}, "log_every=0: must be > 0"),
    (RunConfig, {"global_batch_size": 0}, "global_batch_size=0: must be > 0"),
    (RunConfig, {"global_batch_size": 8.0}, "float where int | None is due"),
    (RunConfig, {"micro_batch_size": -1}, "micro_batch_size=-1: must be > 0"),
    (RunConfig, {"accumulate": 0}, "accumulate=0: must be > 0"),
    (RunConfig, {"virtual_devices": -1}, "virtual_devices=-1: must be >= 0"),
    (RunConfig, {"remat": "dot"}, "Did you mean 'dots'?"),
    (RunConfig, {"attention": "flash"}, "attention='flash': unknown"),
    (RunConfig, {"resume": "always"}, "resume='always': unknown"),
    (RunConfig, {"zero": 3}, "zero=3: int where ZeroConfig is due"),
    (RunConfig, {"mesh": {"fsdp": 8}}, "dict where MeshConfig is due"),
]


@pytest.mark.parametrize(("cls", "values", "message"), BAD_VALUES)
def test_bad_value_is_refused_in_one_line(
    cls: type, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        unchecked(cls, **values)
    assert "\n" not in str(caught.value)


def test_every_class_has_a_bad_value() -> None:
    assert {cls for cls, _, _ in BAD_VALUES} == set(CLASSES)


USERS: dict[Any, Any] = {
    OptimConfig: OPTIMIZER_FIELDS,
    ScheduleConfig: SCHEDULE_FIELDS,
    TaskConfig: TASK_FIELDS,
}


@pytest.mark.parametrize(
    ("cls", "users"),
    USERS.items(),
)
def test_tables_of_fields_name_every_choice_and_real_fields(
    cls: type, users: Any
) -> None:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    assert set(users) == set(getattr(fields["name"].type, "__args__", ()))
    assert set().union(*users.values()) <= set(fields)


def other(field: str, value: Any) -> Any:
    """Returns a legal value of a field that is not this one."""
    if isinstance(value, tuple):
        return {"metrics": ("bleu",), "buckets": (8,)}.get(field, ("a",))
    if isinstance(value, str):
        return "linear"
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2 + 0.01


@pytest.mark.parametrize(
    ("cls", "name", "field", "read"),
    [
        (cls, name, field, field in users[name])
        for cls, users in USERS.items()
        for name in users
        for field in sorted(set().union(*users.values()))
    ],
)
def test_field_is_settable_exactly_where_it_is_read(
    cls: Any, name: str, field: str, read: bool
) -> None:
    value = other(field, getattr(cls(), field))
    assert value != getattr(cls(), field)
    if read:
        assert getattr(cls(name=name, **{field: value}), field) == value
        return
    with pytest.raises(ConfigError, match="has no effect with") as caught:
        cls(name=name, **{field: value})
    users = [user for user, fields in USERS[cls].items() if field in fields]
    assert all(user in str(caught.value) for user in users)


def test_tables_of_tasks_name_real_tasks_and_settings() -> None:
    assert set(TASK_COLUMNS) | set(TASK_METRICS) <= set(TASK_FIELDS)
    for setting, tasks in TASK_SETTINGS.items():
        section, _, field = setting.partition(".")
        assert field in {f.name for f in dataclasses.fields(getattr(run(), section))}
        assert tasks < set(TASK_FIELDS)
    for name, fields in TASK_FIELDS.items():
        assert ("metrics" in fields) == (name in TASK_METRICS)
        assert ("target_field" in fields) == (name in TASK_COLUMNS)


@pytest.mark.parametrize(
    ("given", "devices", "sizes"),
    [
        ({}, 8, (1, 1, 8, 1, 1, 1)),
        ({}, 1, (1, 1, 1, 1, 1, 1)),
        ({"data": 4}, 8, (1, 4, 2, 1, 1, 1)),
        ({"tensor": 2}, 8, (1, 1, 4, 1, 1, 2)),
        ({"context": 4, "tensor": 2}, 8, (1, 1, 1, 1, 4, 2)),
        ({"expert": 2, "context": 2}, 8, (1, 1, 2, 2, 2, 1)),
        ({"stage": 4}, 8, (4, 1, 2, 1, 1, 1)),
        ({"data": -1, "fsdp": 2}, 8, (1, 4, 2, 1, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, 8, (1, 2, 2, 1, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, (1, 2, 2, 1, 1, 2)),
        ({"data": 8}, 8, (1, 8, 1, 1, 1, 1)),
    ],
)
def test_mesh_sizes_multiply_to_the_devices(
    given: dict[str, int], devices: int, sizes: tuple[int, ...]
) -> None:
    axes = ("stage", "data", "fsdp", "expert", "context", "tensor")
    assert MeshConfig(**given).sizes(devices) == dict(zip(axes, sizes, strict=True))


@pytest.mark.parametrize(
    ("given", "devices", "message"),
    [
        (
            {"data": 3},
            8,
            "needs a multiple of 3 devices but there are 8; shrink an axis, or run with 6 devices",
        ),
        ({"data": 16}, 8, "needs a multiple of 16 devices but there are 8"),
        ({"data": 2, "fsdp": 2}, 8, "asks for 4 devices but there are 8"),
        ({"data": 4, "fsdp": 4}, 8, "asks for 16 devices but there are 8"),
    ],
)
def test_mesh_that_does_not_fit_names_both_counts(
    given: dict[str, int], devices: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        MeshConfig(**given).sizes(devices)


@pytest.mark.parametrize(
    ("given", "shards", "resolved"),
    [
        ((16, None, None), 8, (16, 2, 1)),
        ((None, 2, None), 8, (16, 2, 1)),
        ((None, 2, 3), 8, (48, 2, 3)),
        ((64, None, 4), 8, (64, 2, 4)),
        ((64, 2, None), 8, (64, 2, 4)),
        ((64, 2, 4), 8, (64, 2, 4)),
        ((1, None, None), 1, (1, 1, 1)),
    ],
)
def test_batch_sizes_that_are_not_given_follow(
    given: Any, shards: int, resolved: Any
) -> None:
    global_size, micro, accumulate = given
    shape = resolve_batch(global_size, micro, accumulate, shards)
    assert dataclasses.astuple(shape) == (*resolved, shards)


@pytest.mark.parametrize(
    ("given", "shards", "message"),
    [
        (
            (None, None, None),
            8,
            "both missing, .* give --global_batch_size or --micro_batch_size",
        ),
        ((None, None, 4), 8, "both missing"),
        (
            (10, None, None),
            8,
            "=10 does not divide by 8 batch shards of the mesh = 8; nearest legal: 8 or 16",
        ),
        ((4, None, None), 8, "nearest legal: 8$"),
        (
            (10, 4, None),
            2,
            "2 batch shards of the mesh x micro_batch_size=4 = 8; nearest legal: 8 or 16",
        ),
        (
            (24, None, 4),
            8,
            "8 batch shards of the mesh x accumulate=4 = 32; nearest legal: 32$",
        ),
        (
            (64, 2, 2),
            8,
            "=64 is not 8 .* x micro_batch_size=2 x accumulate=2 = 32; set .* to 32",
        ),
        ((40, 2, 2), 8, "set global_batch_size to 32, or leave one of the three out"),
    ],
)
def test_batch_that_cannot_be_names_divisor_and_nearest(
    given: Any, shards: int, message: str
) -> None:
    global_size, micro, accumulate = given
    with pytest.raises(ConfigError, match=message):
        resolve_batch(global_size, micro, accumulate, shards)


def test_resolved_batch_keeps_what_was_given_and_multiplies_up() -> None:
    choices = ([None, *range(1, 26)], [None, 1, 2, 3], [None, 1, 2, 4], [1, 2, 3, 8])
    resolved = refused = 0
    for global_size, micro, accumulate, shards in itertools.product(*choices):
        try:
            batch = resolve_batch(global_size, micro, accumulate, shards)
        except ConfigError as error:
            refused += 1
            text = str(error).split("; ")[1]
            for legal in map(int, re.findall(r"\d+", text)):
                assert (
                    resolve_batch(legal, micro, accumulate, shards).global_size == legal
                )
            continue
        resolved += 1
        assert batch.global_size == batch.micro_size * batch.shards * batch.accumulate
        assert min(dataclasses.astuple(batch)) >= 1
        for given, got in (
            (global_size, batch.global_size),
            (micro, batch.micro_size),
            (accumulate, batch.accumulate),
        ):
            assert given in (None, got)
    assert resolved > 200
    assert refused > 200


def test_refused_batch_suggests_the_nearest_on_both_sides() -> None:
    for wrong, shards in itertools.product(range(1, 40), (2, 5, 8)):
        if wrong % shards:
            with pytest.raises(ConfigError) as caught:
                resolve_batch(wrong, None, None, shards)
            nearest = [
                int(n)
                for n in re.findall(
                    r"\d+", str(caught.value).split("nearest legal:")[1]
                )
            ]
            assert nearest == [
                n for n in (wrong // shards * shards, -(-wrong // shards) * shards) if n
            ]


def test_validate_returns_the_batch_of_the_mesh() -> None:
    assert run(mesh=MeshConfig(tensor=2), accumulate=2).validate(8) == BatchShape(
        8, 1, 2, 4
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seq_len": 17},
            "seq_len=17: the model has 16 positions; give --seq_len 16 or less",
        ),
        (
            {"loss_scale": LossScaleConfig(window=5)},
            "loss_scale has no effect with dtype.compute='bfloat16'",
        ),
        (
            {"coordinator": "host:1"},
            "coordinator, num_processes and process_id go together",
        ),
        ({"num_processes": 2}, "coordinator, num_processes and process_id go together"),
        ({"coordinator": "host:1", "num_processes": 2}, "give all three or none"),
        (
            {"coordinator": "host:1", "num_processes": 2, "process_id": 2},
            "process_id=2: there are num_processes=2; give 0 to 1",
        ),
        ({"global_batch_size": 9}, "nearest legal: 8 or 16"),
        (
            {
                "task": TaskConfig(name="classification"),
                "data": DataConfig(text_field="a"),
            },
            "data.text_field='a' has no effect with task.name='classification'",
        ),
        (
            {"task": TaskConfig(name="classification", buckets=(8, 16))},
            "rows of seq_len=16 are there anyway",
        ),
        ({"mesh": MeshConfig(data=16)}, "needs a multiple of 16 devices"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**changes).validate(8)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "dtype": DTypeConfig(compute="float16"),
            "loss_scale": LossScaleConfig(window=5),
        },
        {"coordinator": "host:1", "num_processes": 2, "process_id": 1},
        {"seq_len": 8},
    ],
)
def test_settings_that_agree_are_accepted(changes: dict[str, Any]) -> None:
    assert run(**changes).validate(8).global_size == 8


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("lrr", ["lr", "b1"], " Did you mean 'lr'?"),
        ("stage_", ["stage", "steps"], " Did you mean 'stage'?"),
        ("xyz", ["lr", "b1"], ""),
        ("lr", [], ""),
    ],
)
def test_suggestion_is_the_closest_name_or_none(
    name: str, known: list[str], hint: str
) -> None:
    assert suggest(name, known) == hint


def test_misspelt_field_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        OptimConfig(learning_rate=1e-3)  # pyright: ignore[reportCallIssue]


def test_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        run().steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_dict_holds_every_field_and_is_json() -> None:
    tree = to_dict(run())
    assert set(tree) == {f.name for f in dataclasses.fields(RunConfig)}
    assert tree["model"]["d_model"] == 32
    assert tree["data"]["path"] == ["shakespeare"]
    assert json.loads(json.dumps(tree)) == tree


def test_diff_names_exactly_the_fields_that_differ() -> None:
    changed = run(
        zero=ZeroConfig(stage=1),
        optim=OptimConfig(lr=1e-2),
        data=DataConfig(path=("a.txt", "b.txt")),
        seed=7,
    )
    rows = {field: (value, default) for field, value, default in diff(changed)}
    model = {
        f"model.{f.name}"
        for f in dataclasses.fields(MODEL)
        if getattr(MODEL, f.name) != f.default
    }
    assert set(rows) == model | {
        "steps",
        "seq_len",
        "global_batch_size",
        "zero.stage",
        "optim.lr",
        "data.path",
        "seed",
    }
    assert rows["zero.stage"] == (1, 3)
    assert rows["data.path"] == (("a.txt", "b.txt"), ("shakespeare",))
    assert rows["steps"] == (10, None)


@pytest.mark.parametrize("cls", [c for c in CLASSES if c is not RunConfig])
def test_defaults_are_legal_and_differ_from_nothing(cls: Any) -> None:
    assert diff(cls()) == []
