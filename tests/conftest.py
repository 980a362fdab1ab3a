# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: eight virtual CPU devices and strict JAX settings.

Set through `jax.config` where that is possible, not through the environment, so that a
process started by a test sees the machine as a user's process does. `JAX_PLATFORMS` is
the exception: without it jax prints about the accelerators that it does not find.

A GPU machine runs its own tests by `JAX_PLATFORMS=cuda pytest -m gpu`.
"""

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path


os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices on two busy cores can keep each other waiting for longer than the 40 s
# after which XLA ends the process.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jaxtyping import install_import_hook


# Checks shapes, dtypes and types at every call into these packages. Here and not in addopts,
# where jaxtyping 0.3 cannot take an option: an int is a float, as PEP 484 has it.
assert "jaxspeed" not in sys.modules
install_import_hook(
    ["jaxspeed", "models"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

CACHE = Path(__file__).parents[1] / ".cache" / "xla"
SPILL = "Involuntary full rematerialization"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A program from the cache has the HLO text, memory analysis and results of a fresh one.
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def mesh() -> Callable[..., Mesh]:
    """Returns `mesh(data=1, fsdp=1, expert=1, context=1, tensor=1)`, a mesh over the first devices."""

    def build(
        data: int = 1, fsdp: int = 1, expert: int = 1, context: int = 1, tensor: int = 1
    ) -> Mesh:
        sizes = (1, data, fsdp, expert, context, tensor)
        devices = np.array(jax.devices()[: math.prod(sizes)])
        types = (AxisType.Auto,) * len(sizes)
        axes = ("stage", "data", "fsdp", "expert", "context", "tensor")
        return Mesh(devices.reshape(sizes), axes, axis_types=types)

    return build


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with a reason, the tests whose hardware or packages are not here."""
    missing = [p for p in ("torch", "transformers") if not importlib.util.find_spec(p)]
    for item in items:
        if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("hf") and missing:
            reason = f"needs {' and '.join(missing)}: pip install 'jaxspeed[hf]'"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fails a test in which XLA replicated an array because it found no better way.

    XLA says so once, when it compiles, so the cache is emptied for the next run to hear
    it again.
    """
    report = yield
    if call.when == "call" and report.passed and SPILL in report.capstderr:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: XLA reports '{SPILL}' (see stderr)"
        shutil.rmtree(CACHE, ignore_errors=True)
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the size of the equivalence matrix."""
    parser.addoption(
        "--matrix",
        choices=["covering", "full"],
        default="covering",
        help="equivalence tests: a selection that covers all pairs, or the whole product",
    )
