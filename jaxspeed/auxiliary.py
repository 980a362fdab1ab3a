# SPDX-License-Identifier: Apache-2.0
"""What routers add to the loss of a training step, and what is measured of them, on its way out of the model.

While a model is traced for training, `ambient(auxiliary=...)` is in force. `jaxspeed.ops.route`
adds a loss for each row; `jaxspeed.nn.Layers` carries it out of its scan; the loss function weighs
each row by the targets that it has (`with_auxiliary`), so that the sum over micro-steps and
devices, divided once by all targets, is the same mean however the batch is cut. Layer 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxspeed.ambient import current
from jaxspeed.types import Sums


@dataclass
class Auxiliary:
    """What has been added so far. It lives for one trace."""

    rows: Float[Array, " B"] | None = None
    """The loss of each row, summed over layers; None: nothing adds any."""
    measured: dict[str, Sums] = field(default_factory=dict)
    """By name, for the metrics."""
    added: Float[Array, ""] | None = None
    """What a loss function has added of it to the loss; None: it has not taken account of it."""

    def add(self, rows: Float[Array, " B"]) -> None:
        """Adds a loss for each row."""
        self.rows = rows if self.rows is None else self.rows + rows

    def measure(self, name: str, total: Any, count: Any) -> None:
        """Adds to what the metrics show as total / count."""
        sums = Sums(*(jnp.asarray(x, jnp.float32) for x in (total, count)))
        if name in self.measured:
            sums = jax.tree.map(jnp.add, self.measured[name], sums)
        self.measured[name] = jax.lax.stop_gradient(sums)

    def arrays(self) -> tuple[Float[Array, " B"] | None, dict[str, Sums]]:
        """Returns what leaves the body of a scan."""
        return self.rows, self.measured

    def add_layers(
        self, stacked: tuple[Float[Array, "L B"] | None, Mapping[str, Sums]]
    ) -> None:
        """Adds what `arrays` gave in each layer."""
        rows, measured = stacked
        if rows is not None:
            self.add(jnp.sum(rows, 0))
        for name, sums in measured.items():
            self.measure(name, jnp.sum(sums.total), jnp.sum(sums.count))


def with_auxiliary(sums: Sums, targets: Float[Array, " B"]) -> Sums:
    """Returns the loss with what routers add to it; outside training, or without routers, the loss.

    Args:
        sums: of the targets.
        targets: how many of those each row has.
    """
    auxiliary = current().auxiliary
    if auxiliary is None or auxiliary.rows is None:
        return sums
    auxiliary.added = added = jnp.sum(auxiliary.rows * targets)
    auxiliary.measure("auxiliary_loss", added, sums.count)
    return Sums(sums.total + added, sums.count)
