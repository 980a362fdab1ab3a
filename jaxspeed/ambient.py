# SPDX-License-Identifier: Apache-2.0
"""What a model need not know: precision, mesh, attention kernel and dropout key, while it is traced.

The step enters `ambient(...)` inside its traced function, the ops read `current()`. So a model
file holds mathematics only, and the same module trains in bfloat16 on a TPU slice and in float32
on a laptop. Nothing here outlives a trace. Layer 1.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxspeed.cache import Cache
from jaxspeed.config_moe import MoeConfig


if TYPE_CHECKING:
    from jaxspeed.auxiliary import Auxiliary
    from jaxspeed.pipeline import Pipe


@dataclass(frozen=True)
class Ambient:
    """Trace-time settings, read by `jaxspeed.ops` and `jaxspeed.sharding.shard`."""

    compute: Any = jnp.float32
    """Dtype of matrix products' operands."""
    activations: Any = jnp.float32
    """Dtype of the residual stream and of what products return."""
    attention: str = "auto"
    """Attention kernel, or auto."""
    platform: str = "cpu"
    """Where the program will run: cpu, gpu or tpu."""
    remat: str = "none"
    """Rematerialisation policy of scanned layers."""
    mlp_tiles: int = 1
    """Parts of a sequence that MLPs work on one after another."""
    tensor: int = 1
    """Size of the tensor axis; 1 makes sharding constraints vanish."""
    context: int = 1
    """Devices that share a sequence, on the mesh axis of that name."""
    context_by: str = "ulysses"
    """How attention reads such a sequence: ulysses or ring."""
    stage: int = 1
    """Devices that share the layers, on the mesh axis of that name."""
    pipe: "Pipe | None" = None
    """Where the layers are cut, while one stage of them is traced; None: all are run, one stage's behind another's."""
    expert: int = 1
    """Devices that share the experts, on the mesh axis of that name."""
    moe: MoeConfig = MoeConfig()
    """What routers drop and draw."""
    auxiliary: "Auxiliary | None" = None
    """Where routers add to the loss; None: they do not."""
    dropout_key: jax.Array | None = None
    """None: no dropout."""
    cache: Cache | None = None
    """What the model keeps between tokens, while it writes text; None: it does not."""


_CURRENT: contextvars.ContextVar[Ambient] = contextvars.ContextVar(
    "ambient",
    default=Ambient(),  # noqa: B039 - it is frozen
)


def current() -> Ambient:
    """Returns the settings in force."""
    return _CURRENT.get()


@contextlib.contextmanager
def ambient(settings: Ambient | None = None, **changes: Any) -> Iterator[Ambient]:
    """Puts settings in force: `settings` (the present ones by default) with `changes`."""
    token = _CURRENT.set(dataclasses.replace(settings or current(), **changes))
    try:
        yield current()
    finally:
        _CURRENT.reset(token)
