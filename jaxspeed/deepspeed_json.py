# SPDX-License-Identifier: Apache-2.0
"""Reads a DeepSpeed JSON: every key is mapped, not needed, or refused with a reason.

`explain` answers key by key, `apply_deepspeed` puts the mapped ones into a `RunConfig`.
The table of keys is `jaxspeed.deepspeed_keys`; here is the walk, and what needs several
keys: parameters that depend on each other, defaults of DeepSpeed that a JSON leaves
unsaid, contradictions. Not here: anything of DeepSpeed or PyTorch; neither is needed.

The one design decision: a JSON is taken whole. What it does not say has DeepSpeed's
default where that changes the training, and stands in the answers as `KEY (default)`.
"auto", which Hugging Face's Trainer fills in, leaves a field as the recipe has it.
"""

import base64
import binascii
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.table import Table
from rich.text import Text

from jaxspeed.config import (
    ConfigError,
    LossScaleConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    suggest,
)
from jaxspeed.deepspeed_keys import KEYS, OPTIMIZER, SCHEDULER
from jaxspeed.deepspeed_rules import (
    AMOUNT,
    IGNORED,
    SIZE,
    Choice,
    Node,
    Option,
    Rule,
    Section,
    becomes,
    flag,
    maps,
    refuses,
    same,
    text,
    unneeded,
)


Status = Literal["mapped", "not_needed", "refused", "unknown"]


@dataclass(frozen=True)
class Answer:
    """What becomes of one key of the JSON."""

    key: str
    """Its path, with dots. "KEY (default)" is not in the JSON but holds all the same."""
    status: Status
    to: str
    """Of a mapped key, `field = value` for each field of RunConfig that it sets."""
    why: str


def load_deepspeed_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the JSON of a file. Comments and trailing commas are allowed.

    Args:
        path: the file; or, as DeepSpeed has it, the JSON itself as URL-safe base64.

    Raises:
        ConfigError: it is not there, cannot be read, is not a JSON object, or has a key
            twice.
    """
    name = os.fspath(path)
    content = None if os.path.exists(name) else _from_base64(name)
    if content is None:
        content = _read_text(Path(name))
    where = _show_path(name)
    if not content.strip():
        raise ConfigError(f"deepspeed={where}: the file is empty; put a JSON object in")
    try:
        ds = json.loads(_without_comments(content), object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        why = f"{error.msg} in line {error.lineno}, column {error.colno}"
        raise ConfigError(f"deepspeed={where}: not JSON: {why}; correct it") from None
    except (RecursionError, ValueError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"deepspeed={where}: {why}; correct it") from None
    return dict(_object(ds, where))


def explain(ds: Mapping[str, Any]) -> list[Answer]:
    """Returns an answer for each key that is not a section, in the order of the JSON.

    DeepSpeed's defaults that the JSON leaves unsaid follow. An illegal value is answered
    as refused. Where an answer depends on the recipe (a JSON with OneCycle and without
    an optimizer, say), it is that of a recipe with AdamW; `apply_deepspeed` knows it.

    Raises:
        ConfigError: `ds` is not a mapping.
    """
    return _read(ds, None).answers


def apply_deepspeed(
    run: RunConfig[Any], ds: Mapping[str, Any]
) -> tuple[RunConfig[Any], list[Answer]]:
    """Returns `run` with the fields that the JSON sets, and the answers.

    The JSON wins over `run`. An optimizer or scheduler in it replaces that of `run` as a
    whole, as does a batch size all three; what is not in the JSON and has no DeepSpeed
    default (model, data, steps, mesh) stays.

    Raises:
        ConfigError: names the first key that is refused or unknown and counts the rest,
            or the first setting that contradicts `run`.
    """
    reading = _read(ds, run)
    _raise_problems(reading)
    return _configure(run, reading), reading.answers


def answers_json(answers: list[Answer]) -> list[dict[str, str]]:
    """Returns the answers as JSON objects with keys key, status, to and why."""
    return [dataclasses.asdict(answer) for answer in answers]


_COLOURS: Mapping[Status, str] = {
    "mapped": "green",
    "not_needed": "dim",
    "refused": "red",
    "unknown": "red",
}


def answers_table(answers: list[Answer]) -> Table:
    """Returns the answers as a table for a terminal, with the number of each status."""
    counts = {s: sum(a.status == s for a in answers) for s in _COLOURS}
    caption = ", ".join(f"{n} {s.replace('_', ' ')}" for s, n in counts.items() if n)
    table = Table("DeepSpeed", "", "jaxspeed", caption=caption, caption_justify="left")
    for answer in answers:
        both = f"{answer.to} ({answer.why})" if answer.to and answer.why else ""
        table.add_row(
            Text(answer.key, overflow="fold"),
            Text(answer.status.replace("_", " "), _COLOURS[answer.status]),
            Text(both or answer.to or answer.why, overflow="fold"),
        )
    return table


class _State(NamedTuple):
    """The answer to every key of a section that is off or refused."""

    status: Literal["not_needed", "refused"]
    why: str
    leader: str = ""
    """The key that says why; the others refer to it."""


_INCLUDES = {("remat", "offload", "full")}
"""Fields, and values of them that do what another value asks for, and more."""


@dataclass
class _Reading:
    """What is known of a JSON while it is walked."""

    ds: Mapping[str, Any]
    recipe: RunConfig[Any] | None
    answers: list[Answer] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """The value at each answered key."""
    fields: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Our fields that are set, each with the key that set it."""
    kept: set[str] = field(default_factory=set)
    """Our fields that an "auto" leaves as the recipe has them."""
    parts: set[str] = field(default_factory=set)
    """The parts of RunConfig that begin from their defaults."""
    dependent: set[str] = field(default_factory=set)
    """Refused keys that go with another one."""

    def add(self, key: str, status: Status, to: str, why: str, value: Any) -> None:
        self.answers.append(Answer(key, status, to, why))
        self.values[key] = value

    def change(self, key: str, status: Status, why: str, *, to: str = "") -> None:
        """Replaces the answer to a key that is in the JSON."""
        for index, answer in enumerate(self.answers):
            if answer.key == key:
                self.answers[index] = Answer(key, status, to, why)

    def assign(self, key: str, fields: Mapping[str, Any], why: str, value: Any) -> None:
        """Sets our fields, unless another key has given one of them another value."""
        fields = {
            name: self.get(name) if (name, self.get(name), new) in _INCLUDES else new
            for name, new in fields.items()
        }
        for name, new in fields.items():
            old, source = self.fields.get(name, (new, ""))
            if old != new and (name, new, old) not in _INCLUDES:
                why = f"contradicts {source}, which sets {name} = {old}; remove one"
                return self.add(key, "refused", "", why, value)
        self.fields.update({name: (new, key) for name, new in fields.items()})
        to = ", ".join(f"{name} = {new}" for name, new in fields.items())
        self.add(key, "mapped", to, why, value)

    def get(self, name: str, otherwise: Any = None) -> Any:
        """Returns the value that the JSON gives to one of our fields."""
        return self.fields.get(name, (otherwise, ""))[0]

    def problems(self) -> list[Answer]:
        return [
            answer
            for answer in self.answers
            if answer.status in ("refused", "unknown")
            and answer.key not in self.dependent
        ]


def _read(ds: Mapping[str, Any], recipe: RunConfig[Any] | None) -> _Reading:
    r = _Reading(_object(ds, "config"), recipe)
    _walk(r, KEYS, ds, "", None)
    _settle_dtype(r)
    _settle_shards(r)
    _settle_cycle(r)
    _say_defaults(r)
    return r


def _walk(
    r: _Reading,
    keys: Mapping[str, Node],
    node: Mapping[str, Any],
    path: str,
    state: _State | None,
) -> None:
    for name, value in node.items():
        key = f"{path}.{name}" if path else f"{name}"
        rule = keys.get(name, keys.get("*"))
        if rule is None:
            r.add(key, "unknown", "", _why_unknown(r, keys, path, f"{name}"), value)
        elif isinstance(rule, Choice):
            _choose(r, rule, key, value)
        elif isinstance(rule, Section):
            _enter(r, rule, key, value, state)
        else:
            _answer(r, rule, key, value, state)


def _why_unknown(r: _Reading, keys: Mapping[str, Any], path: str, name: str) -> str:
    where = f"DeepSpeed's {path}" if path else "DeepSpeed"
    if path in ("optimizer.params", "scheduler.params"):
        where = f"DeepSpeed's {_lookup(r.ds, path.replace('params', 'type'))}"
    why = f"{where} has no such key; remove it."
    homes = [
        other
        for other, rule in KEYS.items()
        if isinstance(rule, Section) and name in rule.keys and other != path
    ]
    if not path and len(homes) == 1:
        return f"{why} Did you mean {homes[0] + '.' + name!r}?"
    return why + suggest(name, (key for key in keys if key != "*"))


def _enter(
    r: _Reading, section: Section, key: str, value: Any, state: _State | None
) -> None:
    if value is None or value == "auto":
        r.add(key, "not_needed", "", f"{_show(value)} is off", value)
    elif not isinstance(value, Mapping):
        if section.scalar is None or not isinstance(value, bool):
            r.add(key, "refused", "", "must be an object", value)
        else:
            _answer(r, section.scalar, key, value, state)
    else:
        if key == "bfloat16" and isinstance(r.ds.get("bf16"), Mapping):
            state = _State("not_needed", "DeepSpeed reads bf16 instead")
        state = state or _switched(r, section, key, value)
        if value:
            _walk(r, section.keys, value, key, state)
        elif state:
            r.add(key, state.status, "", state.why, value)
        else:
            r.add(key, "not_needed", "", "empty", value)


def _switched(
    r: _Reading, section: Section, key: str, value: Mapping[str, Any]
) -> _State | None:
    """Returns the answer to all keys of a section that is off or cannot be on."""
    absolute = section.switch.startswith("/")
    switch = section.switch.lstrip("/")
    given = _lookup(r.ds if absolute else value, switch) if switch else None
    full = switch if absolute or not switch else f"{key}.{switch}"
    if given is None:
        on = section.on or not switch
    elif given == "auto" and section.refuse:
        on = False
    else:
        on = not _among(given, section.off)
    if not on:
        is_what = "not set" if given is None else _show(given)
        return _State("not_needed", f"off: {full} is {is_what}", full)
    if section.refuse:
        leader = _first_key(key, value) if absolute or given is None else full
        return _State("refused", section.refuse, leader)
    return None


def _answer(
    r: _Reading, rule: Rule, key: str, value: Any, state: _State | None
) -> None:
    if state:
        _answer_in_state(r, rule, key, value, state)
        return
    if value is None and (rule.status != "mapped" or None in rule.off):
        r.add(key, "not_needed", "", "null is DeepSpeed's default", value)
        return
    if _among(value, rule.off):
        r.add(key, "not_needed", "", rule.off_why, value)
        return
    try:
        converted = rule.kind(value)
    except ValueError as error:
        if value == "auto":
            _keep(r, rule, key)
        else:
            r.add(key, "refused", "", str(error), value)
        return
    if rule.status == "mapped":
        values = converted if len(rule.fields) > 1 else [converted]
        r.assign(key, dict(zip(rule.fields, values, strict=True)), rule.why, value)
    else:
        r.add(key, rule.status, "", rule.why, value)


def _answer_in_state(
    r: _Reading, rule: Rule, key: str, value: Any, state: _State
) -> None:
    why = state.why
    if key == state.leader:
        if state.status == "not_needed":
            why = "off"
        try:
            rule.kind(value)
        except ValueError as error:
            why = why if value == "auto" else str(error)
    elif state.status == "refused":
        why = f"goes with {state.leader}"
        r.dependent.add(key)
    r.add(key, state.status, "", why, value)


def _keep(r: _Reading, rule: Rule, key: str) -> None:
    """Answers "auto": Hugging Face's Trainer would put its own argument there."""
    r.kept.update(rule.fields)
    why = f"auto, for Hugging Face's Trainer; the recipe gives {' and '.join(rule.fields)}"
    if not rule.fields:
        why = rule.why if rule.status == "not_needed" else "auto is off"
    r.add(key, "not_needed", "", why, "auto")


def _choose(r: _Reading, choice: Choice, name: str, value: Any) -> None:
    if value is None or value == {}:
        r.add(name, "not_needed", "", "empty", value)
        return
    if not isinstance(value, Mapping):
        r.add(name, "refused", "", "must be an object with type and params", value)
        return
    params = value.get("params")
    params = params if isinstance(params, Mapping) else {}
    given = value.get("type")
    kind = _find(choice.options, given)
    state = None if kind else _bad_type(choice, name, value)
    if kind is None:
        keys = {"type": unneeded(text, ""), "params": Section({"*": IGNORED})}
        _walk(r, keys | dict(choice.extra), value, name, state)
        return
    option = _adjust(r, kind, choice.options[kind], params)
    sets = {f"{choice.part}.name": option.name, **option.sets, **choice.sets}
    values = list(sets.values())
    keys = {
        "type": maps(
            " ".join(sets), becomes(values if len(sets) > 1 else values[0], text)
        ),
        "params": Section(option.params),
    }
    r.parts.add(choice.part)
    _walk(r, keys | dict(choice.extra), value, name, None)
    _fill(r, kind, option, f"{name}.params", params)


def _bad_type(choice: Choice, name: str, value: Mapping[str, Any]) -> _State:
    given = value.get("type")
    if given is None:
        why = "there is no type; give one, or remove the section"
        return _State("refused", why, _first_key(name, value))
    if refused := _find(choice.refused, given):
        return _State("refused", choice.refused[refused], f"{name}.type")
    why = f"no such {name}; give one of {', '.join(choice.options)}."
    why += suggest(f"{given}", (*choice.options, *choice.refused))
    return _State("refused", why, f"{name}.type")


def _adjust(
    r: _Reading, kind: str, option: Option, params: Mapping[str, Any]
) -> Option:
    """Returns the option with what some of its parameters say about others."""
    rules, defaults = dict(option.params), dict(option.defaults)
    name = option.name
    if kind == "Adam" and params.get("adam_w_mode") is False:
        name = "adam"
        rules["adam_w_mode"] = unneeded(flag, "decay is added to the gradient (L2)")
    if name == "adamw" and params.get("torch_adam") is True:
        defaults["weight_decay"] = 1e-2
    if name == "muon" and "lr" not in params:
        defaults |= {"adam_lr": 3e-4, "muon_lr": 0.02}
    elif name == "muon" and {"adam_lr", "muon_lr"} <= params.keys():
        rules["lr"] = unneeded(AMOUNT, "adam_lr and muon_lr take its place")
    elif name == "muon" and "adam_lr" in params:
        rules["lr"] = rules["muon_lr"]
    if name == "one_cycle" and params.get("cycle_first_stair_count"):
        if same(params.get("cycle_second_stair_count"), 0):
            why = "0 would be as many as in the first half; give one stair per step"
            rules["cycle_second_stair_count"] = refuses(SIZE, None, why)
    if "optim.lr" in {f for rule in rules.values() for f in rule.fields}:
        if kind in OPTIMIZER.options and (peak := _peak(r.ds)):
            rule = unneeded(AMOUNT, f"{peak} takes its place")
            rules |= dict.fromkeys({"lr", "adam_lr", "muon_lr"} & rules.keys(), rule)
    return replace(option, name=name, params=rules, defaults=defaults)


def _peak(ds: Mapping[str, Any]) -> str:
    """Returns the key by which the scheduler overrides the optimizer's rates, if any."""
    kind = _find(SCHEDULER.options, _lookup(ds, "scheduler.type"))
    if kind is None:
        return ""
    option = SCHEDULER.options[kind]
    params = _lookup(ds, "scheduler.params")
    params = params if isinstance(params, Mapping) else {}
    for name in ("warmup_max_lr", "cycle_max_lr"):
        if name in params and name in option.params:
            return "" if params[name] in (None, "auto") else f"scheduler.params.{name}"
        if name in option.defaults:
            return f"scheduler.params.{name} (default)"
    return ""


def _fill(
    r: _Reading, kind: str, option: Option, path: str, params: Mapping[str, Any]
) -> None:
    """Sets the parameters that the JSON leaves out."""
    for name, value in option.defaults.items():
        rule = option.params[name]
        if name not in params and rule.fields:
            values = value if len(rule.fields) > 1 else [value]
            fields = dict(zip(rule.fields, values, strict=True))
            r.assign(f"{path}.{name} (default)", fields, f"{kind}'s default", value)
    for name in option.required:
        if name not in params:
            r.add(f"{path}.{name}", "refused", "", f"{kind} needs it; add it", None)
    if "total_num_steps" in option.params and "total_num_steps" not in params:
        why = "DeepSpeed requires it; here 0 is the steps of the run"
        key = f"{path}.total_num_steps (default)"
        r.assign(key, {"schedule.total_steps": 0}, why, 0)


def _compute(r: _Reading) -> str | None:
    """Returns the compute dtype, or None if only the recipe knows it."""
    if "dtype.compute" in r.fields:
        return r.get("dtype.compute")
    if "dtype.compute" in r.kept:
        return r.recipe.dtype.compute if r.recipe else None
    return "float32"


def _settle_dtype(r: _Reading) -> None:
    autocast = _lookup(r.ds, "torch_autocast")
    if isinstance(autocast, Mapping) and autocast.get("enabled") is True:
        if "dtype" not in autocast:
            key = "torch_autocast.dtype (default)"
            fields = {"dtype.compute": "bfloat16"}
            r.assign(key, fields, "DeepSpeed's default", "bfloat16")
    compute = _compute(r)
    sent = {"fp16": "float16", "bf16": "bfloat16"}
    wire = sent.get(f"{r.ds.get('communication_data_type')}".lower())
    if wire and compute and wire != compute:
        why = f"gradients travel as float32 or in the compute dtype, {compute}"
        r.change("communication_data_type", "refused", why + "; use fp32")
    for name, (value, key) in list(r.fields.items()):
        if name.startswith("loss_scale.") and compute is None:
            why = "where the recipe computes in float16"
            r.change(key, "mapped", why, to=f"{name} = {value}")
        elif name.startswith("loss_scale.") and compute != "float16":
            del r.fields[name]
            r.change(key, "not_needed", f"{compute} needs no loss scale")


def _settle_shards(r: _Reading) -> None:
    name = (
        "zero_hpz_partition_size" if "zero.secondary" in r.fields else "mics_shard_size"
    )
    if "mesh.fsdp" in r.fields and r.get("zero.stage", 0) != 3:
        why = "DeepSpeed does this at stage 3 only; set stage 3, or remove it"
        r.change(f"zero_optimization.{name}", "refused", why)


def _settle_cycle(r: _Reading) -> None:
    """OneCycle also sets the optimizer's betas, where the optimizer has them."""
    cycles = r.get("schedule.cycle_momentum", True)
    if r.get("schedule.name") != "one_cycle" or not cycles:
        return
    name = r.get("optim.name") or (r.recipe.optim.name if r.recipe else "adamw")
    key = "scheduler.params.cycle_momentum (default)"
    if name in ("adam", "adamw", "lamb", "lion"):
        fields = {"optim.b2": 0.99}
        why = "DeepSpeed's OneCycle sets the second beta while it cycles the first"
    else:
        fields = {"schedule.cycle_momentum": False}
        why = f"DeepSpeed's OneCycle leaves the momentum of {name} alone"
    for field_name in fields:
        r.fields.pop(field_name, None)
    r.assign(key, fields, why, cycles)


def _say_defaults(r: _Reading) -> None:
    """Answers DeepSpeed's defaults that differ from those of a recipe."""
    bad = {answer.key.partition(".")[0] for answer in r.problems()}

    def default(key: str, name: str, value: Any, why: str) -> None:
        if name not in r.fields and name not in r.kept and key not in bad:
            r.assign(f"{key} (default)", {name: value}, why, value)

    def stays(section: str, name: str) -> None:
        if name not in r.fields and section not in bad:
            why = "the JSON leaves it to the script: that of the recipe stays"
            r.add(f"{section} (default)", "not_needed", "", why, None)

    if not {name for name in _BATCH if name in r.fields or name in r.kept}:
        stays("train_batch_size", "global_batch_size")
    stays("optimizer", "optim.name")
    stays("scheduler", "schedule.name")
    clip = "DeepSpeed's default since 0.19.3; 0, that of earlier releases, is off"
    default("gradient_clipping", "optim.clip_norm", 1.0, clip)
    if "zero_optimization" not in bad:
        default("zero_optimization.stage", "zero.stage", 0, "DeepSpeed's default")
    if r.get("zero.stage") == 3:
        key = "zero_optimization.stage3_param_persistence_threshold"
        name = "zero.param_persistence_threshold"
        default(key, name, 100_000, "DeepSpeed's default")
    if not bad & {"fp16", "bf16", "bfloat16", "torch_autocast"}:
        why = "neither bf16 nor fp16 is enabled"
        default("bf16.enabled", "dtype.compute", "float32", why)
    if "dtype.reduce" not in r.fields and _compute(r) != "float32":
        why = "DeepSpeed sends gradients in the compute dtype; here dtype.reduce stays "
        why += "as the recipe has it (float32, unless it says otherwise)"
        r.add("communication_data_type (default)", "not_needed", "", why, None)


def _raise_problems(r: _Reading) -> None:
    problems = r.problems()
    if not problems:
        return
    key, why = problems[0].key, problems[0].why
    secret = re.search("api_?key|token|secret|password", key, re.IGNORECASE)
    value = "..." if secret else _show(r.values[key])
    more = len(problems) - 1
    rest = f" ({more} more: jaxspeed config explain lists them)" if more else ""
    raise ConfigError(f"deepspeed {key}={value}: {why}{rest}")


_BATCH = ("global_batch_size", "micro_batch_size", "accumulate")

_DEFAULTS = {
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "loss_scale": LossScaleConfig,
}


def _configure(run: RunConfig[Any], r: _Reading) -> RunConfig[Any]:
    fields = {name: value for name, (value, _) in r.fields.items()}
    compute = fields.get("dtype.compute", run.dtype.compute)
    fresh = set(r.parts)
    if "dtype.compute" in fields or any(n.startswith("loss_scale.") for n in fields):
        fresh.add("loss_scale")
    groups: dict[str, dict[str, Any]] = {part: {} for part in fresh}
    top: dict[str, Any] = {}
    for name in {**dict.fromkeys(r.kept), **fields}:
        part, _, leaf = name.partition(".")
        if name in fields:
            (groups.setdefault(part, {}) if leaf else top)[leaf or part] = fields[name]
        elif part in fresh and (part != "loss_scale" or compute == "float16"):
            groups[part][leaf] = getattr(getattr(run, part), leaf)
    for part, values in groups.items():
        new = _DEFAULTS[part] if part in fresh else partial(replace, getattr(run, part))
        top[part] = new(**values)
    return replace(run, **top | _batch(run, fields, r.kept))


def _batch(
    run: RunConfig[Any], fields: Mapping[str, Any], kept: set[str]
) -> dict[str, int | None]:
    """Returns the batch sizes: those of the JSON replace those of the recipe.

    One that the JSON leaves as "auto" is the recipe's if that is needed to say how large
    a batch is, and follows from the others if two are given.
    """
    given = [name for name in _BATCH if name in fields]
    if not given:
        return {}
    sizes: dict[str, int | None] = {name: fields.get(name) for name in _BATCH}
    if len(given) == 1:
        sizes |= {name: getattr(run, name) for name in _BATCH if name in kept}
    if sizes["global_batch_size"] is None and sizes["micro_batch_size"] is None:
        known = "global_batch_size" if run.global_batch_size else "micro_batch_size"
        sizes[known] = getattr(run, known)
    return sizes


def _object(ds: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(ds, Mapping):
        what = "a list" if isinstance(ds, list) else f"{_show(ds)}"
        raise ConfigError(
            f"deepspeed={where}: is {what}, not an object; put the keys in {{...}}"
        )
    return ds


def _show(value: Any) -> str:
    """Returns a value as the JSON has it, on one line and cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _show_path(path: str) -> str:
    return repr(path) if len(path) <= 150 else repr("..." + path[-147:])


def _lookup(node: Any, path: str) -> Any:
    """Returns the value at a dotted path, or None."""
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _first_key(key: str, value: Any) -> str:
    """Returns the path of the first key below that is not a section."""
    while isinstance(value, Mapping) and value:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key


def _among(value: Any, options: tuple[Any, ...]) -> bool:
    """Whether a value is one of the options; letters may be of either case."""
    word = value.lower() if isinstance(value, str) else value
    return any(same(word, option) for option in options)


def _find(names: Mapping[str, Any], given: Any) -> str | None:
    """Returns the name that `given` spells, in letters of either case."""
    if not isinstance(given, str):
        return None
    return next((name for name in names if name.lower() == given.lower()), None)


def _from_base64(name: str) -> str | None:
    """Returns the JSON that DeepSpeed's base64 form holds, or None if it is not that."""
    try:
        content = base64.urlsafe_b64decode(name).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return content if content.lstrip().startswith("{") else None


def _read_text(path: Path) -> str:
    where = _show_path(str(path))
    if os.path.isdir(path):
        raise ConfigError(f"deepspeed={where}: is a folder; give the file in it")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"deepspeed={where}: no such file; give the path of a JSON"
        ) from None
    except UnicodeDecodeError:
        content = "\0"
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"deepspeed={where}: cannot be read: {why}; give a JSON"
        ) from None
    if "\0" in content:
        raise ConfigError(f"deepspeed={where}: is not text; give a JSON in UTF-8")
    return content


_STRING = r'"(?:\\.|[^"\\\n])*"'
_COMMENT = re.compile(_STRING + r"|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_LAST_COMMA = re.compile(_STRING + r"|,(?=\s*[}\]])")


def _without_comments(content: str) -> str:
    """Returns plain JSON: DeepSpeed takes comments and commas before a bracket."""

    def blank(match: re.Match[str]) -> str:
        found = match.group()
        return found if found[0] == '"' else re.sub(r"[^\n]", " ", found)

    return _LAST_COMMA.sub(blank, _COMMENT.sub(blank, content))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the key {twice[0]!r} is given twice")
    return dict(pairs)
