# SPDX-License-Identifier: Apache-2.0
"""The collectives of a program: kind, mesh axes, bytes, and how often each one runs.

`read_ledger` reads what the backend made (optimised HLO of a CPU, TPU or GPU compile);
`read_partitioned` reads what was asked for (a lowered `shard_map` program, before any
backend saw it). Loops are multiplied out, which XLA's `cost_analysis` does not do. Bytes, no seconds.

The one design decision: what cannot be determined is an error, or is shown as unknown
(`axes=("?",)`); a collective that cannot be parsed is never skipped. Layer 1.
"""

import dataclasses
import io
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from jaxspeed.hlo import (
    BETWEEN_SLICES,
    KINDS,
    Computation,
    Instruction,
    LedgerError,
    arrays_of,
    integers,
    parse_module,
    size_of,
)
from jaxspeed.mesh import slice_grid


UNKNOWN_AXES = ("?",)
"""The axes of a collective whose device groups are no product of whole mesh axes."""

Axes = Mapping[str, int]
"""A mesh's axes and sizes, outermost first, as in `dict(mesh.shape)`."""

AxisQuery = str | tuple[str, ...] | None
"""An axis name: every entry that spans it. A tuple: entries that span exactly these."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of a program. Sizes are of one execution, on one device."""

    kind: str
    """One of `KINDS`."""
    axes: tuple[str, ...]
    """Mesh axes that a group spans, in mesh order; ("?",) if no axes fit the groups."""
    group_size: int
    """Devices that take part together."""
    dtype: str
    """XLA's name of the element type: f32, bf16, s32."""
    elements: int
    """Elements of the payload."""
    payload_bytes: int
    """all-gather: the gathered result. Others: the operand (a reduce-scatter's is whole)."""
    wire_bytes: int
    """Bytes a device sends by the ring algorithm."""
    trips: int
    """Executions per run of the program: the product of the trip counts around it."""
    is_async: bool
    """Other work can run between its start and its end."""
    sliced: bool = False
    """An all-reduce whose readers each take their own shard: a reduce-scatter not formed."""
    name: str
    """Source scope (op_name metadata), or the instruction's name where there is none."""


@dataclass(frozen=True)
class Ledger:
    """The collectives of one program, callees where they are called."""

    entries: tuple[Collective, ...]

    def __iter__(self) -> Iterator[Collective]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def select(self, kind: str | None = None, axis: AxisQuery = None) -> "Ledger":
        """Returns the entries of one of `KINDS` and of an axis; None takes all."""
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind={kind!r}: no such collective; give one of {KINDS}")
        kept = (e for e in self if kind in (None, e.kind) and _spans(e, axis))
        return Ledger(tuple(kept))

    def total(self, kind: str | None = None, axis: AxisQuery = None) -> int:
        """Returns payload bytes per device and run, loops multiplied out."""
        return sum(e.payload_bytes * e.trips for e in self.select(kind, axis))

    def wire(self, kind: str | None = None, axis: AxisQuery = None) -> int:
        """Returns bytes sent per device and run, loops multiplied out."""
        return sum(e.wire_bytes * e.trips for e in self.select(kind, axis))

    def elements(self, kind: str | None = None, axis: AxisQuery = None) -> int:
        """Returns payload elements per device and run, loops multiplied out.

        Elements compare across backends where bytes do not: XLA's CPU backend widens
        bfloat16 collectives to float32.
        """
        return sum(e.elements * e.trips for e in self.select(kind, axis))

    def by_kind_and_axis(self) -> dict[tuple[str, tuple[str, ...]], "Ledger"]:
        """Returns the entries grouped by (kind, axes), kinds in the order of `KINDS`."""
        groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
        for entry in sorted(self, key=lambda e: (KINDS.index(e.kind), e.axes)):
            groups.setdefault((entry.kind, entry.axes), []).append(entry)
        return {key: Ledger(tuple(entries)) for key, entries in groups.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Returns a plain dict per (kind, axes), for tables and JSON."""
        return [
            {
                "kind": kind,
                "axes": list(axes),
                "dtypes": sorted({e.dtype for e in group}),
                "count": sum(e.trips for e in group),
                "elements": group.elements(),
                "payload_bytes": group.total(),
                "wire_bytes": group.wire(),
                "async_wire_bytes": group._where("is_async").wire(),
                "sliced_payload_bytes": group._where("sliced").total(),
            }
            for (kind, axes), group in self.by_kind_and_axis().items()
        ]

    def _where(self, flag: str) -> "Ledger":
        return Ledger(tuple(e for e in self if getattr(e, flag)))

    def to_json(self) -> str:
        """Returns a JSON object: `rows` (the table) and `entries` (each collective)."""
        entries = [dataclasses.asdict(entry) for entry in self]
        return json.dumps({"rows": self.rows(), "entries": entries}, indent=1)

    def table(self, title: str | None = None) -> Any:
        """Returns the rows as a `rich.table.Table`."""
        from rich.table import Table

        table = Table(title=title, box=None, pad_edge=False)
        for heading in "collective axes dtype".split():
            table.add_column(heading, no_wrap=True)
        for heading in "count elements payload wire overlapped".split():
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows():
            table.add_row(
                row["kind"] + (" (sliced)" if row["sliced_payload_bytes"] else ""),
                " ".join(row["axes"]),
                " ".join(row["dtypes"]),
                f"{row['count']:,}",
                f"{row['elements']:,}",
                _human(row["payload_bytes"]),
                _human(row["wire_bytes"]),
                f"{row['async_wire_bytes'] / max(1, row['wire_bytes']):.0%}",
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=200).print(self.table())
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


Branch = Literal["most", "least"]

_PICK: Mapping[Branch, Callable[..., Any]] = {"most": max, "least": min}


def read_ledger(
    program: jax.stages.Compiled | str,
    axes: Axes,
    *,
    unknown_trips: int | None = None,
    branch: Branch = "most",
) -> Ledger:
    """Returns the collectives of a compiled program: what the backend made.

    A collective over groups of one device moves nothing and is left out.

    Args:
        program: a compiled program, or its optimised HLO text.
        axes: of the mesh it was compiled for. The device numbers in a program are
            positions in the mesh, whatever the devices' own ids are.
        unknown_trips: trip count assumed for a loop whose count depends on data; with
            None such a loop is an error if a collective is inside.
        branch: which one of a conditional is counted: that which sends most, or least.

    Raises:
        LedgerError: a collective that cannot be parsed, or a loop that cannot be counted.

    Example:
        >>> read_ledger('''
        ... ENTRY %main (p: f32[8,4]) -> f32[8,4] {
        ...   %p = f32[8,4] parameter(0)
        ...   ROOT %r = f32[8,4] all-reduce(%p), replica_groups={{0,1},{2,3}}
        ... }
        ... ''', {"data": 2, "fsdp": 2}).total("all-reduce", "fsdp")
        128
    """
    text = program if isinstance(program, str) else program.as_text()
    if text is None:
        raise LedgerError("the compiled program has no HLO text on this backend")
    return _read(text, axes, unknown_trips, branch)


def read_cycles(
    program: jax.stages.Compiled | str,
    *,
    unknown_trips: int | None = None,
    branch: Branch = "most",
) -> int:
    """Returns the clock cycles that a TPU's compiler expects of a program, loops multiplied out.

    The sum of what it wrote beside each operation (`estimated_cycles`): a comparison of two programs
    for one chip, no step time. Collectives and kernels written by hand (Pallas) carry none. Divided by
    the chip's `clock_hz`: seconds.

    Args:
        program: a program compiled for a TPU, or its optimised HLO text.
        unknown_trips: as in `read_ledger`.
        branch: which one of a conditional is counted: that which takes most, or least.

    Raises:
        LedgerError: the program carries no estimates, or a loop cannot be counted.
    """
    text = program if isinstance(program, str) else program.as_text() or ""
    if not _CYCLES.search(text):
        raise LedgerError("no estimated_cycles in it: was it compiled for a TPU?")
    entry, _, _ = parse_module(text)
    return _cycles(entry, unknown_trips, _PICK[branch], {})


def read_partitioned(
    lowered: jax.stages.Lowered,
    axes: Axes,
    *,
    unknown_trips: int | None = None,
) -> Ledger:
    """Returns the collectives written in a lowered program: what was asked for.

    It holds the collectives of `shard_map` and none that XLA's partitioner adds later.
    Inside a `shard_map` that leaves an axis automatic, shapes are whole over that axis,
    and so are the sizes here. Arguments and errors are those of `read_ledger`.
    """
    return _read(lowered.as_text("hlo", debug_info=True), axes, unknown_trips, "most")


def axes_of_groups(groups: Iterable[Sequence[int]], axes: Axes) -> tuple[str, ...]:
    """Returns the mesh axes that every group spans, or `UNKNOWN_AXES`.

    Args:
        groups: lists of the devices that take part together, as row-major positions in
            the mesh.
        axes: of the mesh.
    """
    groups = list(groups)
    names = _varying_axes(groups, axes)
    size = math.prod(axes[name] for name in names)
    # Devices of a group agree on all other axes, so the right number of them is all.
    whole = all(len(group) == len(set(group)) == size for group in groups)
    return names if whole else UNKNOWN_AXES


def _spans(entry: Collective, axis: AxisQuery) -> bool:
    if isinstance(axis, str):
        return axis in entry.axes
    return axis is None or axis == entry.axes


def _human(size: int) -> str:
    power = min(4, (len(str(size)) - 1) // 3)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _read(text: str, axes: Axes, unknown_trips: int | None, branch: Branch) -> Ledger:
    entry, devices, collectives = parse_module(text)
    whole, grid = math.prod(axes.values()), dict.fromkeys(axes, 1)
    if devices and BETWEEN_SLICES.search(text):  # a program of one slice
        grid = slice_grid(axes, whole // devices)
        axes = {axis: size // grid[axis] for axis, size in axes.items()}
    if devices not in (None, math.prod(axes.values())):
        raise LedgerError(
            f"axes={dict(axes)!r} are {math.prod(axes.values())} devices but the program "
            f"was compiled for {devices}; give the axes of its own mesh"
        )
    reader = _Reader(axes, grid, unknown_trips, branch)
    found = tuple(f.collective for f in reader.collect(entry))
    if missed := collectives - reader.parsed:
        raise LedgerError(
            f"collectives {sorted(missed)} are not reached from the entry"
        )
    return Ledger(found)


# Device groups -> mesh axes


_GROUP_LIST = re.compile(r"\breplica_groups=\{((?:\{[\d, ]*\},? ?)*)\}")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_GROUP_IOTA = re.compile(rf"\breplica_groups=\[([\d,]+)\]<={_IOTA}")
_GROUP_MESH = re.compile(
    rf"\breplica_groups=mesh\[((?:'\w+'=\d+,?)+)\](?:, device_ids=\({_IOTA}\))?"
    r" ?\{((?:'\w+',?)+)\}"
)
_AXIS, _QUOTED = re.compile(r"'(\w+)'=(\d+)"), re.compile(r"'(\w+)'")
_PAIRS = re.compile(r"source_target_pairs=\"?\{((?:\{\d+, ?\d+\},? ?)*)\}")
_BRACES = re.compile(r"\{([\d, ]*)\}")


def _varying_axes(groups: Iterable[Sequence[int]], axes: Axes) -> tuple[str, ...]:
    """Returns the axes along which any two devices of a group differ."""
    sizes = tuple(axes.values())
    varying: set[int] = set()
    for group in groups:
        if max(group) >= math.prod(sizes):
            raise LedgerError(f"devices {group} are not all in the mesh {dict(axes)!r}")
        places = np.array(np.unravel_index(group, sizes))
        varying |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    return tuple(name for i, name in enumerate(axes) if i in varying)


def _parse_groups(attributes: str, devices: int) -> list[tuple[int, ...]] | None:
    """Returns the device groups of an instruction; None if their form is not known."""
    if match := _GROUP_LIST.search(attributes):
        groups = [integers(group) for group in _BRACES.findall(match[1])]
        return [g for g in groups if g] or [tuple(range(devices))]
    if match := _GROUP_IOTA.search(attributes):
        ids = _iota(match[2], match[3]).reshape(integers(match[1]))
        return [tuple(group) for group in ids.tolist()]
    if match := _GROUP_MESH.search(attributes):
        sizes = {name: int(size) for name, size in _AXIS.findall(match[1])}
        used = [list(sizes).index(name) for name in _QUOTED.findall(match[4])]
        ids = _iota(match[2] or str(math.prod(sizes.values())), match[3])
        ids = np.moveaxis(ids.reshape(*sizes.values()), used, range(-len(used), 0))
        shape = -1, math.prod(ids.shape[-len(used) :])
        return [tuple(group) for group in ids.reshape(shape).tolist()]
    return None


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(integers(dims))).reshape(integers(dims))
    return ids.transpose(integers(order)) if order else ids


# Instructions -> collectives


_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLERS = frozenset({"while", "conditional", "call", "async-start"})
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class _Found:
    collective: Collective
    chain: str | None = None
    """TPU: one collective is spread over several fusions, which share this id."""

    @property
    def sent(self) -> int:
        return self.collective.wire_bytes * self.collective.trips

    def replace(self, **changes: Any) -> "_Found":
        collective = dataclasses.replace(self.collective, **changes)
        return dataclasses.replace(self, collective=collective)


class _Reader:
    """Collects the collectives of a module, callees first."""

    def __init__(
        self, axes: Axes, grid: Axes, unknown_trips: int | None, branch: Branch
    ) -> None:
        """Reads a program of the devices with these axes, of which there are as many as a grid of slices has."""
        self.axes = axes
        self.grid = grid
        self.pick = _PICK[branch]
        self.unknown_trips = unknown_trips
        self.parsed: set[str] = set()
        self.done: dict[str, list[_Found]] = {}

    def collect(self, computation: Computation) -> list[_Found]:
        """Returns the collectives of one run of a computation."""
        if computation.name not in self.done:
            found: list[_Found] = []
            steps: set[tuple[str, str, int]] = set()
            for i in computation.instructions.values():
                for new in self.of_instruction(computation, i):
                    if i.opcode == "fusion" and new.chain is not None:
                        c = new.collective
                        if (step := (new.chain, c.name, c.elements)) in steps:
                            continue
                        steps.add(step)
                        new = new.replace(is_async=True)
                        new = dataclasses.replace(new, chain=None)
                    found.append(new)
            self.done[computation.name] = found
        return self.done[computation.name]

    def of_instruction(self, home: Computation, i: Instruction) -> list[_Found]:
        if i.kind is not None:
            return self.parse(i.kind, home, i)
        if i.opcode.endswith(("-done", "-update")):
            return []
        parts = [self.collect(called) for called in home.called(i)]
        if not any(parts):
            return []
        if i.opcode == "while":
            return self.repeat(home, i)
        if i.opcode == "conditional":
            return self.pick(parts, key=lambda part: sum(f.sent for f in part))
        found = [new for part in parts for new in part]
        if i.is_async:
            found = [new.replace(is_async=True) for new in found]
        if i.opcode == "fusion" and _is_reduce_scatter_fusion(i):
            found = [_as_reduce_scatter(new) for new in found]
        return found

    def repeat(self, home: Computation, loop: Instruction) -> list[_Found]:
        """Returns the collectives of a loop; its condition runs once more than its body."""
        trips = _trips_of(home, loop, self.unknown_trips)
        return [
            new.replace(trips=new.collective.trips * n)
            for part, n in (("condition", trips + 1), ("body", trips))
            for new in self.collect(home.module[loop.attribute(part)])
        ]

    def parse(self, kind: str, home: Computation, i: Instruction) -> list[_Found]:
        """Returns an entry per dtype (and per `sliced`) of a collective's operands."""
        self.parsed.add(i.name)
        axes, n = self.group(kind, i)
        if n == 1:
            return []
        sums: dict[tuple[str, bool], int] = {}
        operands = i.operands[:1] if kind == "ragged-all-to-all" else i.operands
        for position, operand in enumerate(operands):
            sliced = kind == "all-reduce" and _is_sliced(home, i, position)
            for dtype, count in arrays_of(home[operand].shape):
                sums[dtype, sliced] = sums.get((dtype, sliced), 0) + count
        if not sums:
            raise LedgerError(f"collective {i.name} has no array operands")
        scope, chain = _OP_NAME.search(i.attributes), _CHAIN.search(i.attributes)
        found = []
        for (dtype, sliced), operand_elements in sums.items():
            count = operand_elements * (n if kind == "all-gather" else 1)
            collective = Collective(
                kind=kind,
                axes=axes,
                group_size=n,
                dtype=dtype,
                elements=count,
                payload_bytes=size_of(dtype, count),
                wire_bytes=_wire_bytes(kind, size_of(dtype, count), n),
                trips=1,
                is_async=i.is_async,
                sliced=sliced,
                name=scope[1] if scope else i.name,
            )
            found.append(_Found(collective, chain[1] if chain else None))
        return found

    def group(self, kind: str, i: Instruction) -> tuple[tuple[str, ...], int]:
        """Returns the mesh axes of a collective's groups, and their size."""
        if BETWEEN_SLICES.search(i.attributes):
            return self.group_of_slices(i)
        if kind == "collective-permute":
            if match := _PAIRS.search(i.attributes):
                pairs = [integers(pair) for pair in _BRACES.findall(match[1])]
                names = _varying_axes(pairs, self.axes)
                return names, math.prod(self.axes[name] for name in names)
        else:
            groups = _parse_groups(i.attributes, math.prod(self.axes.values()))
            if groups is not None:
                return axes_of_groups(groups, self.axes), max(map(len, groups))
        raise LedgerError(
            f"collective {i.name}: device groups not understood in {i.attributes[:200]!r}"
        )

    def group_of_slices(self, i: Instruction) -> tuple[tuple[str, ...], int]:
        """Returns the same of a collective between slices of TPUs."""
        match = _SLICES.search(i.attributes)
        if match is None:
            raise LedgerError(f"collective {i.name}: slices not understood")
        if match[1] is not None:
            # These slices, each device with those that stand where it does.
            groups = [integers(match[1])]
        else:
            # Devices: each a slice, and a number there.
            groups = [
                tuple(int(n) // _SLICE for n in re.findall(r"\d+", group))
                for group in re.findall(r"\{([^{}]*)\}", match[2])
            ]
        of = [[slice - 1 for slice in group] for group in groups]
        names = _varying_axes(of, self.grid)
        return names, math.prod(self.grid[name] for name in names)


_SLICE = 100_000
"""Device numbers between one slice and the next, the first of which has number 1."""

_SLICES = re.compile(
    r"_xla_megascale_target=(?:\"?\{([\d,]+)\}x|\{((?:\{[^{}]*\},?)+)\})"
)


def _trips_of(home: Computation, loop: Instruction, unknown: int | None) -> int:
    """Returns how often a loop's body runs."""
    match = _TRIPS.search(loop.attributes)
    trips = int(match[1]) if match else _count_trips(home, loop)
    trips = unknown if trips is None else trips
    if trips is None:
        raise LedgerError(
            f"loop {loop.name} does what is to be counted but its trip count depends on data; "
            "give unknown_trips"
        )
    return trips


def _cycles(
    home: Computation,
    unknown: int | None,
    pick: Callable[..., Any],
    done: dict[str, int],
) -> int:
    """Returns the cycles of one run of a computation, callees first."""
    if home.name not in done:
        total = 0
        for i in home.instructions.values():
            if match := _CYCLES.search(i.attributes):
                total += int(match[1])
            elif i.opcode in _CALLERS:
                parts = [
                    _cycles(called, unknown, pick, done) for called in home.called(i)
                ]
                if i.opcode == "conditional":
                    total += pick(parts)
                elif i.opcode == "while" and any(parts):
                    total += sum(parts) * _trips_of(home, i, unknown)
                else:
                    total += sum(parts)
        done[home.name] = total
    return done[home.name]


def _wire_bytes(kind: str, payload: int, n: int) -> int:
    """Returns the bytes one device sends, by the ring algorithms."""
    if kind in ("collective-permute", "collective-broadcast"):
        return payload
    return (2 if kind == "all-reduce" else 1) * payload * (n - 1) // n


def _is_reduce_scatter_fusion(fusion: Instruction) -> bool:
    """TPU: an all-reduce and its slice in one fusion, which is run as one scatter."""
    return "AllReduceScatterFusion" in fusion.attributes or any(
        name.startswith("all-reduce-scatter") for name in fusion.called
    )


def _as_reduce_scatter(found: _Found) -> _Found:
    c, kind = found.collective, "reduce-scatter"
    if c.kind != "all-reduce":
        return found
    wire = _wire_bytes(kind, c.payload_bytes, c.group_size)
    return found.replace(kind=kind, wire_bytes=wire, sliced=False)


# All-reduces that are reduce-scatters in disguise


_PASS_THROUGH = frozenset(
    "all-reduce-done bitcast convert copy copy-done copy-start get-tuple-element "
    "optimization-barrier reshape transpose".split()
)
"""What may stand between an all-reduce and the slices taken of it."""


def _is_sliced(home: Computation, i: Instruction, position: int) -> bool:
    """True if all that is read of a result are slices at the device's own place."""
    parts = [i]
    if len(i.operands) > 1:
        parts = [r for r in home.readers[i.name] if r.opcode == "get-tuple-element"]
        parts = [r for r in parts if int(r.attribute("index")) == position]
    return bool(parts) and all(_only_slices(home, part.name) for part in parts)


def _only_slices(home: Computation, name: str) -> bool:
    if not home.readers[name] or home[name].is_root:
        return False
    return all(_takes_slice(home, reader, name) for reader in home.readers[name])


def _takes_slice(home: Computation, reader: Instruction, name: str) -> bool:
    if reader.opcode in _PASS_THROUGH:
        return _only_slices(home, reader.name)
    if reader.opcode == "dynamic-slice" and reader.operands[0] == name:
        return any(_reads_partition(home, start) for start in reader.operands[1:])
    if reader.opcode != "fusion":
        return False
    (callee,) = home.called(reader)
    places = [n for n, operand in enumerate(reader.operands) if operand == name]
    return all(_only_slices(callee, callee.parameter(n).name) for n in places)


def _reads_partition(home: Computation, name: str) -> bool:
    """True if a scalar is computed from the device's own number, through all callers."""
    todo: list[tuple[Computation, str, int | None]] = [(home, name, None)]
    seen = set()
    while todo:
        home, name, slot = todo.pop()
        if (home.name, name, slot) in seen:
            continue
        seen.add((home.name, name, slot))
        i = home[name]
        if any(x.opcode == "partition-id" for x in (i, *_inside(home, i))):
            return True
        if i.opcode == "get-tuple-element":
            todo.append((home, i.operands[0], int(i.attribute("index"))))
        elif i.opcode in ("tuple", "while") and slot is not None:
            todo.append((home, i.operands[slot if i.opcode == "tuple" else 0], slot))
        elif i.opcode == "parameter" and home.caller is not None:
            outer, call = home.caller
            number = 0 if call.opcode == "while" else int(i.literal)
            todo.append((outer, call.operands[number], slot))
        else:
            todo.extend((home, operand, None) for operand in i.operands)
    return False


def _inside(home: Computation, i: Instruction) -> Iterator[Instruction]:
    if i.opcode != "while":
        for called in home.called(i):
            yield from called.instructions.values()


# Trip counts


_ARITHMETIC: Mapping[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "and": operator.and_,
    **{name: getattr(operator, name.lower()) for name in "LT LE GT GE EQ NE".split()},
}

_SAME_VALUE = frozenset("bitcast convert copy copy-done copy-start reshape".split())

_Carry = Callable[[int], int | None]
"""The integer in a slot of a loop's carry, or None where it is no known integer."""


def _count_trips(home: Computation, loop: Instruction) -> int | None:
    """Returns how often a loop runs, by running its counters; None if they need data."""
    body, condition = (home.module[loop.attribute(a)] for a in ("body", "condition"))
    if body.root.opcode != "tuple":
        return None
    state: dict[int, int | None] = {}

    def carry(slot: int) -> int | None:
        if slot not in state:
            state[slot] = _initial(home, loop, slot)
        return state[slot]

    for trips in range(1 << 16):
        go_on = _integer(condition, condition.root.name, (carry,))
        if not go_on:
            return trips if go_on is not None else None
        last, after = body.root.operands, {}
        while new := state.keys() - after.keys():  # one slot may grow by another
            after |= {slot: _integer(body, last[slot], (carry,)) for slot in new}
        state |= after
    return None


def _initial(home: Computation, loop: Instruction, slot: int) -> int | None:
    """Returns the integer that a slot of a loop's carry starts from."""
    first = home[loop.operands[0]]
    if first.opcode != "tuple":
        return None
    return _integer(home, first.operands[slot], _outside(home))


def _outside(home: Computation) -> Sequence[_Carry | int | None]:
    """Returns what a computation is called with, as far as that never changes."""
    if home.caller is None:
        return ()
    outer, call = home.caller
    if call.opcode != "while":
        around = _outside(outer)
        return [_integer(outer, name, around) for name in call.operands]

    def constant(slot: int) -> int | None:
        end = home.root
        kept = home[end.operands[slot]] if end.opcode == "tuple" else end
        if kept.opcode != "get-tuple-element" or int(kept.attribute("index")) != slot:
            return None
        return _initial(outer, call, slot)

    return (constant,)


def _integer(
    home: Computation, name: str, arguments: Sequence[_Carry | int | None]
) -> int | None:
    """Returns the value of an integer scalar, or None if it needs data."""
    i = home[name]
    opcode = i.attribute("direction") if i.opcode == "compare" else i.opcode
    if opcode == "constant":
        literal = {"true": "1", "false": "0"}.get(i.literal, i.literal)
        return int(literal) if re.fullmatch(r"-?\d+", literal) else None
    if opcode == "parameter":
        value = dict(enumerate(arguments)).get(int(i.literal))
        return value if isinstance(value, int) else None
    if opcode == "get-tuple-element":
        from_parameter = home[i.operands[0]].opcode == "parameter"
        carry = arguments[0] if arguments and from_parameter else None
        return carry(int(i.attribute("index"))) if callable(carry) else None
    if opcode in _SAME_VALUE or 'target="Sharding"' in i.attributes:
        return _integer(home, i.operands[0], arguments)
    if opcode not in _ARITHMETIC and opcode not in ("fusion", "call"):
        return None
    values = [_integer(home, operand, arguments) for operand in i.operands]
    if opcode in _ARITHMETIC:
        a, b = values
        return None if a is None or b is None else int(_ARITHMETIC[opcode](a, b))
    (callee,) = home.called(i)
    return _integer(callee, callee.root.name, values)
