# SPDX-License-Identifier: Apache-2.0
"""jaxspeed: DeepSpeed for JAX. ZeRO stages 0 to 3 as placements on a device mesh, one compiled step, exact resume."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from jaxspeed.config import (
        CheckpointConfig as CheckpointConfig,
        ConfigError as ConfigError,
        DataConfig as DataConfig,
        DTypeConfig as DTypeConfig,
        EvalConfig as EvalConfig,
        LossScaleConfig as LossScaleConfig,
        MeshConfig as MeshConfig,
        OptimConfig as OptimConfig,
        RunConfig as RunConfig,
        ScheduleConfig as ScheduleConfig,
        ZeroConfig as ZeroConfig,
    )
    from jaxspeed.engine import Engine as Engine, initialize as initialize
    from jaxspeed.ledger import Ledger as Ledger, read_ledger as read_ledger
    from jaxspeed.loop import fit as fit
    from jaxspeed.program import Program as Program, build_program as build_program
    from jaxspeed.types import Sums as Sums

__version__ = "0.1.0"

_HOME = {
    "config": (
        "CheckpointConfig", "ConfigError", "DTypeConfig", "DataConfig", "EvalConfig", "LossScaleConfig", "MeshConfig",
        "OptimConfig", "RunConfig", "ScheduleConfig", "ZeroConfig",
    ),
    "engine": ("Engine", "initialize"),
    "ledger": ("Ledger", "read_ledger"),
    "loop": ("fit",),
    "program": ("Program", "build_program"),
    "types": ("Sums",),
}  # fmt: skip

__all__ = sorted(name for names in _HOME.values() for name in names)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that reading a recipe does not start jax."""
    import importlib

    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"jaxspeed.{module}"), name)
    raise AttributeError(f"module 'jaxspeed' has no attribute {name!r}")
