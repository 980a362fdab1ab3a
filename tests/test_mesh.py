# SPDX-License-Identifier: Apache-2.0
"""The mesh has the axes it is told, outermost first, over each device once."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import jax
import pytest
from jax.sharding import AxisType

from jaxspeed.config import MESH_AXES, ConfigError, MeshConfig
from jaxspeed.mesh import build_mesh, count_slices, slice_grid


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


@dataclass(frozen=True)
class Chip:
    """A device of one of several slices of 2 x 4 TPUs."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def slices_of_tpus(count: int) -> list[Any]:
    return [
        Chip(8 * s + 2 * y + x, s, (x, y, 0))
        for s in range(count)
        for y in range(4)
        for x in range(2)
    ]


@pytest.mark.parametrize(
    ("sizes", "slices", "outer"),
    [
        ({"stage": 1, "data": 2, "fsdp": 8}, 1, {"stage": 1, "data": 1, "fsdp": 1}),
        ({"stage": 1, "data": 2, "fsdp": 8}, 2, {"stage": 1, "data": 2, "fsdp": 1}),
        ({"stage": 2, "data": 2, "fsdp": 8}, 4, {"stage": 2, "data": 2, "fsdp": 1}),
        ({"stage": 1, "data": 4, "fsdp": 4}, 2, {"stage": 1, "data": 2, "fsdp": 1}),
        ({"stage": 3, "data": 2, "fsdp": 8}, 2, {"stage": 1, "data": 2, "fsdp": 1}),
        ({"stage": 1, "data": 1, "fsdp": 16}, 2, {"stage": 1, "data": 1, "fsdp": 2}),
    ],
)
def test_slices_are_split_by_the_outermost_axes(
    sizes: dict[str, int], slices: int, outer: dict[str, int]
) -> None:
    assert slice_grid(sizes, slices) == outer


def test_slices_that_no_axis_divides_are_refused_with_what_would() -> None:
    with pytest.raises(
        ConfigError, match=r"mesh.data=1: there are 3 slices, .*\(fsdp 16\).*; give 3"
    ):
        slice_grid({"data": 1, "fsdp": 16}, 3)


def test_only_tpus_come_in_slices() -> None:
    assert count_slices(slices_of_tpus(3)) == 3
    assert count_slices(jax.devices()) == 1


@pytest.mark.parametrize(
    ("sizes", "warned"),
    [({"data": 2, "fsdp": 8}, False), ({"data": 1, "fsdp": 16}, True)],
)
def test_what_goes_between_slices_is_data_or_is_said(
    sizes: dict[str, int],
    warned: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "jaxspeed"):
        grid = build_mesh(sizes, slices_of_tpus(2)).devices
    assert [d.slice_index for d in grid.flat] == [0] * 8 + [1] * 8
    assert sorted(d.id for d in grid.flat) == list(range(16))
    said = [r.getMessage() for r in caplog.records]
    assert bool(said) == warned
    assert all("mesh.fsdp=16 goes over 2 slices" in text for text in said)
