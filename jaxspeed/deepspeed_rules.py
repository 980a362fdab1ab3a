# SPDX-License-Identifier: Apache-2.0
"""What the table of DeepSpeed's keys (`jaxspeed.deepspeed_keys`) is written in.

A `Rule` answers one key, a `Section` an object of keys, a `Choice` an object whose keys
depend on its type. A kind checks and converts a value, so that the table itself says
what is legal. Not here: any key of DeepSpeed's, and how a JSON is walked
(`jaxspeed.deepspeed_json`). Layer 2: standard library only.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias


Kind: TypeAlias = Callable[[Any], Any]
"""Checks a value of the JSON and converts it; raises ValueError: what it must be."""


@dataclass(frozen=True)
class Rule:
    """What becomes of one key."""

    status: Literal["mapped", "not_needed", "refused"]
    kind: Kind
    why: str = ""
    """Shown to the user; of a refusal, also what to use instead."""
    fields: tuple[str, ...] = ()
    """The fields of RunConfig that take the value, or its parts."""
    off: tuple[Any, ...] = ()
    """Values that ask for nothing."""
    off_why: str = "off"


@dataclass(frozen=True)
class Section:
    """A JSON object with keys of its own."""

    keys: "Mapping[str, Node]"
    """`*` stands for any key."""
    switch: str = ""
    """The key that turns it on: a path from here, or from the top after a slash."""
    off: tuple[Any, ...] = (False,)
    """Values of the switch that turn it off."""
    on: bool = False
    """Whether it is on where the switch is not given."""
    refuse: str = ""
    """Why it cannot be on, and what to use instead; empty if it can."""
    scalar: Rule | None = None
    """How to read a value that is not an object."""


@dataclass(frozen=True)
class Option:
    """One type of optimizer or scheduler."""

    name: str
    """Its name in jaxspeed."""
    params: Mapping[str, Rule]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """DeepSpeed's values of what is not given, where those of config.py differ."""
    required: tuple[str, ...] = ()
    sets: Mapping[str, Any] = field(default_factory=dict)
    """Fields that the type itself sets."""


@dataclass(frozen=True)
class Choice:
    """A JSON object of `type` and `params`: the optimizer or the scheduler."""

    part: str
    """The part of RunConfig that it replaces."""
    options: Mapping[str, Option]
    refused: Mapping[str, str]
    """Types that jaxspeed does not have, with what to use instead."""
    extra: Mapping[str, Rule] = field(default_factory=dict)
    """Keys beside type and params."""
    sets: Mapping[str, Any] = field(default_factory=dict)
    """Fields that every type sets."""


Node: TypeAlias = Rule | Section | Choice


def same(value: Any, other: Any) -> bool:
    """Whether two JSON values are equal; 1.0 is 1, but true is not."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def anything(value: Any) -> Any:
    """Accepts every value."""
    return value


def flag(value: Any) -> bool:
    """Accepts true and false."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def text(value: Any) -> str:
    """Accepts a string."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


def array(value: Any) -> list[Any]:
    """Accepts a list."""
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list")
    return list(value)


def number(
    low: float = -math.inf, high: float = math.inf, *, below: float = math.inf
) -> Kind:
    """Returns the kind of finite numbers in [low, high], and less than `below`."""
    bounds = f" of at least {low:g}" if low > -math.inf else ""
    bounds += f" and at most {high:g}" if high < math.inf else ""
    bounds += f" and less than {below:g}" if below < math.inf else ""

    def check(value: Any) -> float:
        legal = isinstance(value, int | float) and not isinstance(value, bool)
        legal = legal and abs(value) <= sys.float_info.max
        if not legal or not low <= value <= high or not value < below:
            raise ValueError(f"must be a number{bounds}")
        return value

    return check


def whole(low: float = -math.inf, high: float = math.inf) -> Kind:
    """Returns the kind of whole numbers in [low, high]; 5e8 is one."""
    in_range = number(low, high)

    def check(value: Any) -> int:
        try:
            if in_range(value) == int(value):
                return int(value)
        except ValueError as error:
            raise ValueError(str(error).replace("number", "whole number")) from None
        raise ValueError("must be a whole number")

    return check


def one_of(*values: Any) -> Kind:
    """Returns the kind of these values; letters may be of either case."""
    return named({value: value for value in values})


def named(values: Mapping[Any, Any]) -> Kind:
    """Returns the kind of the keys of `values`, each converted to its value."""

    def check(value: Any) -> Any:
        for legal, converted in values.items():
            letters = isinstance(value, str) and isinstance(legal, str)
            if same(value, legal) or (letters and value.lower() == legal.lower()):
                return converted
        raise ValueError(f"must be one of {', '.join(map(str, values))}")

    return check


def becomes(converted: Any, kind: Kind) -> Kind:
    """Returns the kind of `kind`'s values, each converted to one and the same."""

    def check(value: Any) -> Any:
        kind(value)
        return converted

    return check


def shards(value: Any) -> list[int]:
    """Accepts a number of shards; as many replicas of them as there are devices."""
    return [whole(1)(value), -1]


def groups(value: Any) -> list[int | bool]:
    """Accepts the devices of a group; as many groups as there are devices, and a second copy in each."""
    return [whole(1)(value), -1, True]


def decays(value: Any) -> list[float]:
    """Accepts [b1, b2], each at least 0 and less than 1."""
    try:
        first, second = map(number(0, below=1), array(value))
    except ValueError:
        what = "must be two numbers of at least 0 and less than 1"
        raise ValueError(what) from None
    return [first, second]


def warmup(value: Any) -> int:
    """Accepts a number of steps; DeepSpeed warms up for no fewer than two."""
    return max(2, whole(0)(value))


def maps(fields: str, kind: Kind, why: str = "", *, off: tuple[Any, ...] = ()) -> Rule:
    """Returns the rule of a key whose value goes to `fields`, apart by spaces."""
    return Rule("mapped", kind, why, tuple(fields.split()), off)


def unneeded(kind: Kind, why: str) -> Rule:
    """Returns the rule of a key that has nothing to say here."""
    return Rule("not_needed", kind, why)


def refuses(kind: Kind, off: Any, why: str, off_why: str = "off") -> Rule:
    """Returns the rule of a key that can have no value but `off`."""
    return Rule("refused", kind, why, off=(off,), off_why=off_why)


def table(entries: Mapping[str, Node]) -> dict[str, Node]:
    """Returns one entry per name: names with one entry are apart by spaces.

    DeepSpeed takes some names with a prefix and without it: `[stage3_]name` is both.
    """
    keys: dict[str, Node] = {}
    for names, node in entries.items():
        for name in names.split():
            if name.startswith("[stage3_]"):
                keys["stage3_" + name.removeprefix("[stage3_]")] = node
            keys[name.removeprefix("[stage3_]")] = node
    return keys


def section(
    entries: Mapping[str, Node], *, switch: str = "", scalar: Rule | None = None
) -> Section:
    """Returns a section of which some keys are mapped, others not needed or refused."""
    return Section(table(entries), switch, scalar=scalar)


def must_be_off(
    why: str,
    names: str,
    parts: Mapping[str, Node] | None = None,
    *,
    switch: str = "enabled",
    off: tuple[Any, ...] = (False,),
    on: bool = False,
) -> Section:
    """Returns a section that is refused unless its switch is off.

    Args:
        why: what jaxspeed has not, and what to use instead.
        names: its keys, apart by spaces; their values are not looked at.
        parts: its keys whose values are.
        switch: `Section.switch`.
        off: `Section.off`.
        on: `Section.on`.
    """
    keys: dict[str, Node] = {"enabled": SWITCH} if switch == "enabled" else {}
    keys |= {names: IGNORED, **(parts or {})}
    return Section(table(keys), switch, off, on, why)


SIZE, COUNT, AMOUNT, DECAY = whole(0), whole(1), number(0), number(0, below=1)

SHORT_DTYPE = one_of("fp32", "fp16", "bf16")

DTYPE = named(
    dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "float32")
    | dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bfloat16")
    | dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "float16")
)

SWITCH = unneeded(flag, "")
IGNORED = unneeded(anything, "")
