# SPDX-License-Identifier: Apache-2.0
"""Parameters by name: dotted paths such as `layers.block.attn.wq`, and patterns over them.

In a pattern `*` stands for any characters, dots too, `?` for one, `[ab]` for one of these. A
pattern that matches nothing is an error, never a setting without effect. Layer 1.
"""

import difflib
import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from jaxspeed.config import config_error
from jaxspeed.types import PyTree


V = TypeVar("V")


def dotted(path: Sequence[Any]) -> str:
    """Returns the name of a leaf from its path as jax gives it."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".")


def paths_of(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
    """Returns the leaves of a tree by their dotted paths."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {dotted(path): leaf for path, leaf in found}


def subtree(
    tree: Mapping[Any, Any], paths: Collection[str], prefix: str = ""
) -> dict[Any, Any]:
    """Returns the part of a nested dict that lies at these dotted paths (under a prefix)."""
    part = {}
    for key, below in tree.items():
        path = f"{prefix}{key}"
        if isinstance(below, Mapping):
            inner = subtree(below, paths, f"{path}.")
            part |= {key: inner} if inner else {}
        elif path in paths:
            part[key] = below
    return part


def with_part(tree: Mapping[Any, Any], part: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns a nested dict with all values of both; where both have one, that of `part`."""
    both = lambda key: isinstance(tree.get(key), Mapping)
    inner = {k: with_part(tree[k], v) if both(k) else v for k, v in part.items()}
    return {**tree, **inner}


def matching(where: str, pattern: str, paths: Iterable[str]) -> list[str]:
    """Returns the paths that a pattern matches.

    Args:
        where: the field that holds the pattern, for the message.
        pattern: see the head of this module.
        paths: to choose from.

    Raises:
        ConfigError: it matches none; the message names the nearest.
    """
    paths = list(paths)
    found = fnmatch.filter(paths, pattern)
    if found:
        return found
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
    raise config_error(
        where,
        pattern,
        "matches none of the parameters that it may choose from",
        f"near it are {', '.join(near) or 'none'}; * stands for any characters",
    )


def by_pattern(
    where: str, pairs: Iterable[tuple[str, V]], paths: Iterable[str]
) -> dict[str, V]:
    """Returns the value for each path that a pattern matches; of several patterns the last decides.

    Raises:
        ConfigError: a pattern matches no path.
    """
    paths = list(paths)
    return {
        path: value
        for pattern, value in pairs
        for path in matching(where, pattern, paths)
    }
