# SPDX-License-Identifier: Apache-2.0
"""The ledger of a program for several slices of TPUs: what goes between them is a collective of the axes that split them."""

import pytest

from jaxspeed.hlo import LedgerError
from jaxspeed.ledger import read_ledger


def between_slices(what: str, target: str, shape: str) -> str:
    given = f'_xla_megascale_target={target},_xla_megascale_transfer_type="{what}"'
    return f"""HloModule slices, num_partitions=8
ENTRY %main (p: {shape}) -> {shape} {{
  %p = {shape} parameter(0)
  %t = token[] after-all()
  %send = ({shape}, u32[], token[]) send(%p, %t), channel_id=1, is_host_transfer=true, frontend_attributes={{{given}}}
  %recv = ({shape}, u32[], token[]) recv(%t), channel_id=2, is_host_transfer=true, frontend_attributes={{{given}}}
  %g = f32[8,4] all-gather(%p), channel_id=3, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}, use_global_device_ids=true
  %sent = token[] send-done(%send), channel_id=1, is_host_transfer=true
  %done = ({shape}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  ROOT %r = {shape} get-tuple-element(%done), index=0
}}
"""


PAIRS = "{{100000,200000},{100001,200001},{300000,400000}}"
ACROSS = "{{100000,300000},{100001,300001},{200000,400000}}"


@pytest.mark.parametrize(
    ("what", "target", "axes", "kind", "over", "elements", "wire"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:7}"', {"data": 2, "fsdp": 8}, "all-reduce", ("data",), 4, 16),
        ("ALL_GATHER", PAIRS, {"stage": 2, "data": 2, "fsdp": 8}, "all-gather", ("data",), 8, 16),
        ("REDUCE_SCATTER", ACROSS, {"stage": 2, "data": 2, "fsdp": 8}, "reduce-scatter", ("stage",), 4, 8),
        ("ALL_TO_ALL", PAIRS, {"stage": 2, "data": 2, "fsdp": 8}, "all-to-all", ("data",), 4, 8),
        ("ONE_TO_ONE", "{{100000->300000},{200000->400000}}", {"stage": 2, "data": 2, "fsdp": 8}, "collective-permute", ("stage",), 4, 16),
        ("ALL_REDUCE", '"{1,2}x{0:7}"', {"data": 1, "fsdp": 16}, "all-reduce", ("fsdp",), 4, 16),
    ],
)  # fmt: skip
def test_transfers_between_slices_are_collectives_of_the_axes_that_split_them(
    what: str,
    target: str,
    axes: dict[str, int],
    kind: str,
    over: tuple[str, ...],
    elements: int,
    wire: int,
) -> None:
    ledger = read_ledger(between_slices(what, target, "f32[4]"), axes)
    (entry,) = (e for e in ledger if e.name == "send")
    assert (entry.kind, entry.axes, entry.group_size) == (kind, over, 2)
    assert (entry.elements, entry.wire_bytes, entry.is_async) == (elements, wire, True)
    (inside,) = (e for e in ledger if e.name != "send")
    assert (inside.kind, inside.axes) == ("all-gather", ("fsdp",))
    assert inside.group_size == 8


def test_transfer_between_slices_that_is_not_understood_is_an_error() -> None:
    for text in (
        between_slices("ALL_SORTS", PAIRS, "f32[4]"),
        between_slices("ALL_REDUCE", "nobody", "f32[4]"),
    ):
        with pytest.raises(LedgerError, match="send"):
            read_ledger(text, {"stage": 2, "data": 2, "fsdp": 8})
