# SPDX-License-Identifier: Apache-2.0
"""Patterns choose parameters by their dotted paths; one that chooses none is an error that names the nearest."""

import numpy as np
import pytest

from jaxspeed.config import ConfigError
from jaxspeed.paths import by_pattern, matching, paths_of


TREE = {
    "embed": 0,
    "layers": {"block": {"attn": {"wq": 1, "bq": 2}, "mlp": {"w_up": 3}}},
    "list": {0: 4},
}
PATHS = list(paths_of(TREE))


def test_paths_are_dotted() -> None:
    assert paths_of(TREE)["layers.block.attn.wq"] == 1
    assert paths_of({"a": np.zeros(2), "b": {0: 1}}).keys() == {"a", "b.0"}


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("embed", ["embed"]),
        ("layers.*", PATHS[1:4]),
        ("*.attn.*", PATHS[1:3]),
        ("*.w*", ["layers.block.attn.wq", "layers.block.mlp.w_up"]),
        ("*.[wb]q", PATHS[1:3]),
        ("list.?", ["list.0"]),
        ("*", PATHS),
    ],
)
def test_pattern_matches_whole_paths_and_a_star_dots_too(
    pattern: str, found: list[str]
) -> None:
    assert sorted(matching("freeze", pattern, PATHS)) == sorted(found)


@pytest.mark.parametrize("pattern", ["layer.*", "attn.wq", "Embed", "layers.block"])
def test_pattern_without_a_match_names_the_nearest(pattern: str) -> None:
    with pytest.raises(ConfigError, match="matches none of the parameters") as caught:
        matching("freeze", pattern, PATHS)
    words = str(caught.value)
    assert words.startswith(f"freeze={pattern!r}: ")
    assert any(path in words for path in PATHS)
    assert "\n" not in words


def test_last_pattern_decides() -> None:
    chosen = by_pattern("x", [("*", 1), ("layers.*", 2), ("*.wq", 3)], PATHS)
    assert chosen == dict.fromkeys(PATHS, 1) | dict.fromkeys(PATHS[1:4], 2) | {
        "layers.block.attn.wq": 3
    }
    assert by_pattern("x", [], PATHS) == {}
