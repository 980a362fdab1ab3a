# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings run and print what they say."""

import doctest
import importlib

import pytest

from tests.command import ROOT


WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "jaxspeed").rglob("*.py")
    if ">>> " in path.read_text()
)


def test_there_are_examples() -> None:
    assert "jaxspeed.engine" in WITH_EXAMPLES


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_of_the_docstrings(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed, capsys.readouterr().out
