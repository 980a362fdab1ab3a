# SPDX-License-Identifier: Apache-2.0
"""What a setting is checked by, and the error of one that cannot be. Layer 0: standard library only."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin


class ConfigError(ValueError):
    """A setting that cannot be: one line with field, value, why, and what to change."""


def config_error(where: str, value: object, why: str, change: str) -> ConfigError:
    """Returns the one-line error `where=value: why; change`."""
    return ConfigError(f"{where}={value!r}: {why}; {change}")


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_types(config: Any, where: str) -> None:
    """Raises if a value is not what its field's annotation says: nothing else checks a recipe."""
    for f in dataclasses.fields(config):
        name, value = f"{where}.{f.name}".lstrip("."), getattr(config, f.name)
        inner = get_args(f.type)[0] if get_origin(f.type) is tuple else f.type
        if get_origin(inner) is Literal and (
            inner is f.type or isinstance(value, tuple)
        ):
            for choice in value if isinstance(value, tuple) else (value,):
                _check_choice(name, choice, get_args(inner))
        elif not isinstance(f.type, TypeVar) and not _is_of_type(value, f.type):
            wanted = (
                f.type.__name__
                if isinstance(f.type, type) and not get_args(f.type)
                else str(f.type)
            )
            change = (
                f"write ({value!r},)"
                if get_origin(f.type) is tuple and isinstance(value, str)
                else f"give {wanted}"
            )
            raise config_error(
                name, value, f"{type(value).__name__} where {wanted} is due", change
            )


def positive(where: str, value: float, *, allow_zero: bool = False) -> None:
    """Raises if a number is not above zero, or at least zero, or not finite."""
    if not math.isfinite(value) or value < 0 or (value == 0 and not allow_zero):
        bound = ">= 0" if allow_zero else "> 0"
        raise config_error(where, value, f"must be {bound}", f"give a number {bound}")


def no_negatives(config: Any, where: str) -> None:
    """Raises if a number of a section is below zero or not finite."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            positive(f"{where}.{f.name}", value, allow_zero=True)


def divisors(count: int) -> list[int]:
    """Returns the numbers that divide it, for messages that name what would be legal."""
    return [n for n in range(1, count + 1) if count % n == 0]


def reject_unread(
    config: Any, where: str, always: set[str], read: Mapping[str, frozenset[str]]
) -> None:
    """Raises if a field that `config.name` does not read differs from its default.

    Args:
        config: of a class with a field `name`.
        where: what the section is called.
        always: fields that are read whatever the name.
        read: the other fields that are read, by name.
    """
    for f in dataclasses.fields(config):
        unread = f.name not in always | read[config.name]
        if unread and getattr(config, f.name) != f.default:
            users = ", ".join(n for n, fields in read.items() if f.name in fields)
            raise ConfigError(
                f"{where}.{f.name}={getattr(config, f.name)!r} has no effect with {where}.name={config.name!r} "
                f"(it is read by {users}); remove it or change {where}.name"
            )


def _check_choice(name: str, value: Any, legal: tuple[Any, ...]) -> None:
    if not any(value == choice and type(value) is type(choice) for choice in legal):
        raise ConfigError(
            f"{name}={value!r}: unknown; give one of {list(legal)}.{suggest(str(value), map(str, legal))}"
        )


def _is_of_type(value: Any, annotation: Any) -> bool:
    if get_origin(annotation) is tuple:
        kinds = get_args(annotation)
        if not isinstance(value, tuple):
            return False
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        return len(kinds) == len(value) and all(map(_is_of_type, value, kinds))
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if isinstance(annotation, UnionType):
        return any(_is_of_type(value, choice) for choice in get_args(annotation))
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is int if annotation is int else isinstance(value, annotation)
