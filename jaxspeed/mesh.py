# SPDX-License-Identifier: Apache-2.0
"""The device mesh: named axes, outermost (slowest link) first. Layer 1."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxspeed.config import config_error


logger = logging.getLogger(__name__)

BETWEEN_SLICES = ("stage", "data")
"""Axes that send little, and seldom: those to go between slices of TPUs, which the data center's network joins (DCN)."""


def build_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with these axes over these devices (all of the process group's by default).

    Neighbours on the last axis are neighbours on the hardware where its topology is known. Several slices of
    TPUs are split by the outermost axes that their number divides.

    Args:
        sizes: axis name to size, outermost first; multiplies to the number of devices.
        devices: local, distributed or ahead-of-time (`jaxspeed.topology`) devices.

    Raises:
        ConfigError: the axes do not divide by the number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    outer = slice_grid(sizes, count_slices(devices))
    between = [axis for axis, n in outer.items() if n > 1]
    if not between:
        grid = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
    else:
        for axis in (axis for axis in between if axis not in BETWEEN_SLICES):
            logger.warning(
                "mesh.%s=%d goes over %d slices, whose network is far slower than a slice's: --mesh.data %d keeps it inside",
                axis, sizes[axis], math.prod(outer.values()), math.prod(outer.values()),
            )  # fmt: skip
        grid = mesh_utils.create_hybrid_device_mesh(
            tuple(n // outer[axis] for axis, n in sizes.items()),
            tuple(outer.values()),
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def count_slices(devices: Sequence[Any]) -> int:
    """Returns how many slices of TPUs these devices are of; 1 for all other devices."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def slice_grid(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """Returns by how much each axis is split between slices: the outermost ones by as much as they divide.

    Args:
        sizes: axis name to size, outermost first.
        slices: how many there are.

    Raises:
        ConfigError: the axes do not divide by it.
    """
    outer, left = {}, slices
    for axis, size in sizes.items():
        outer[axis] = math.gcd(size, left)
        left //= outer[axis]
    if left > 1:
        axes = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        why = f"there are {slices} slices, which the axes ({axes}) do not divide by"
        raise config_error("mesh.data", sizes.get("data", 1), why, f"give {slices}")
    return outer
