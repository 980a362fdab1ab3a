# SPDX-License-Identifier: Apache-2.0
"""The mesh has the axes it is told, outermost first, over each device once."""

import math

import jax
import pytest
from jax.sharding import AxisType

from jaxspeed.config import MESH_AXES, MeshConfig
from jaxspeed.mesh import build_mesh


SIZES = [
    (1, 1, 8, 1, 1, 1), (1, 8, 1, 1, 1, 1), (1, 2, 2, 1, 1, 2), (1, 2, 2, 1, 2, 1), (1, 2, 4, 1, 1, 1),
    (1, 1, 4, 1, 1, 2), (1, 1, 1, 1, 1, 1), (1, 1, 2, 2, 2, 1), (2, 2, 2, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES)
def test_mesh_has_its_axes_in_order_over_each_device_once(
    sizes: tuple[int, ...],
) -> None:
    devices = jax.devices()[: math.prod(sizes)]
    mesh = build_mesh(dict(zip(MESH_AXES, sizes, strict=True)), devices)
    assert mesh.axis_names == MESH_AXES
    assert tuple(mesh.shape.values()) == mesh.devices.shape == sizes
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in devices]
    assert mesh.axis_types == (AxisType.Auto,) * len(sizes)


def test_all_devices_are_taken_by_default() -> None:
    assert build_mesh(MeshConfig().sizes(8)).shape == {
        "stage": 1,
        "data": 1,
        "fsdp": 8,
        "expert": 1,
        "context": 1,
        "tensor": 1,
    }


def test_neighbours_on_the_last_axis_are_neighbours_in_the_list() -> None:
    ids = [[d.id for d in row] for row in build_mesh({"data": 4, "tensor": 2}).devices]
    assert ids == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_devices_are_those_given() -> None:
    chosen = jax.devices()[4:6]
    assert (
        list(build_mesh({"data": 1, "fsdp": 2, "tensor": 1}, chosen).devices.flat)
        == chosen
    )


def test_sizes_that_do_not_multiply_to_the_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="must equal the product"):
        build_mesh({"data": 3, "fsdp": 1, "tensor": 1}, jax.devices())
