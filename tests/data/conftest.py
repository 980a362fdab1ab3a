# SPDX-License-Identifier: Apache-2.0
"""Configurations whose cache is the test's own, and text to fill files with."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxspeed.config import DataConfig
from jaxspeed.data.documents import Source


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """Returns `make_config(*paths, **fields)`."""

    def make(*paths: str | Path, **fields: Any) -> DataConfig:
        known: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")} | fields
        return DataConfig(path=tuple(map(str, paths)), **known)

    return make


@pytest.fixture(scope="session")
def texts() -> Callable[[Source], list[str]]:
    """Returns `texts(source)`: its documents in order."""
    return lambda source: [source[index] for index in range(len(source))]


@pytest.fixture(scope="session")
def prose() -> Callable[[int], str]:
    """Returns `prose(size, seed=0)`: paragraphs of about `size` characters in all."""

    def write(size: int, seed: int = 0) -> str:
        draw = random.Random(seed)
        words = ["".join(draw.choices("abcdefghi\u00e9", k=5)) for _ in range(200)]
        text = ""
        while len(text) < size:
            text += " ".join(draw.choices(words, k=draw.randint(5, 60))) + ".\n\n"
        return text

    return write
