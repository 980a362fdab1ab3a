# SPDX-License-Identifier: Apache-2.0
"""The device mesh: named axes, outermost (slowest link) first. Layer 1."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh


def build_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with these axes over these devices (all of the process group's by default).

    Neighbours on the last axis are neighbours on the hardware where its topology is known.

    Args:
        sizes: axis name to size, outermost first; multiplies to the number of devices.
        devices: local, distributed or ahead-of-time (`jaxspeed.topology`) devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
