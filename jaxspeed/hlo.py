# SPDX-License-Identifier: Apache-2.0
"""XLA's program text taken apart: computations, instructions, and what each one calls and reads.

Only as far as `jaxspeed.ledger` needs it. What is not understood is an error, never skipped. Layer 1.
"""

import functools
import math
import re
from dataclasses import dataclass


KINDS = tuple(
    "all-gather reduce-scatter all-reduce all-to-all ragged-all-to-all "
    "collective-permute collective-broadcast".split()
)
"""Every kind a ledger can hold, in the order of its table."""


class LedgerError(ValueError):
    """A program whose collectives cannot be counted: says which instruction and why."""


def integers(text: str) -> tuple[int, ...]:
    """Returns the numbers of a list with commas."""
    return tuple(int(part) for part in text.split(",") if part.strip())


@dataclass(frozen=True, slots=True)
class Instruction:
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    """What stands between the parentheses: the operands, or a constant's value."""
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """Returns an attribute that names one thing."""
        if match := re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes):
            return match[1]
        raise LedgerError(f"instruction {self.name} has no {name}")

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        return re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(self.attributes)))

    @property
    def kind(self) -> str | None:
        """The kind of a collective or of its start; None for all others."""
        kind = self.opcode.removesuffix("-start")
        if kind == "send" and (between := BETWEEN_SLICES.search(self.attributes)):
            what = between[1].lower().replace("_", "-")
            kind = "collective-permute" if what == "one-to-one" else what
        if kind == "send" and "is_host_transfer=true" not in self.attributes:
            return "collective-permute"
        if kind in KINDS:
            return kind
        if _COLLECTIVE.match(kind) and not kind.endswith("-done"):
            raise LedgerError(f"instruction {self.name}: no rule for collective {kind}")
        return None

    @property
    def is_async(self) -> bool:
        """Whether it starts something. GPU marks a start that its done follows at once."""
        if self.opcode == "send":
            return True
        return self.opcode.endswith("-start") and 'is_sync":true' not in self.attributes


@dataclass
class Computation:
    """A function of a module."""

    name: str
    instructions: dict[str, Instruction]
    module: dict[str, "Computation"]
    """All computations of the module, by name."""
    caller: tuple["Computation", Instruction] | None = None
    """The first one."""

    def __getitem__(self, name: str) -> Instruction:
        if name not in self.instructions:
            raise LedgerError(f"{name} is not defined in computation {self.name}")
        return self.instructions[name]

    def called(self, i: Instruction) -> list["Computation"]:
        """Returns what an instruction calls."""
        return [self.module[name] for name in i.called if name in self.module]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose value it returns."""
        return next(i for i in self.instructions.values() if i.is_root)

    def parameter(self, number: int) -> Instruction:
        """Returns the parameter of this number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return next(i for i in found if int(i.literal) == number)

    @functools.cached_property
    def readers(self) -> dict[str, list[Instruction]]:
        """The instructions that read each one."""
        found: dict[str, list[Instruction]] = {n: [] for n in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found


BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
"""What a transfer between slices of TPUs is a part of. It is a pair of send and recv by way of the hosts."""

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_ASSIGNMENT = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_END = re.compile(r"\}(\s*$|, execution_thread=)")  # others end a kernel's metadata
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\]")
_BITS = re.compile(r"(?:bf|[sufc])(\d+)")
_COLLECTIVE = re.compile(r"all-|ragged-all|collective-|reduce-scatter")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|called_computations|branch_computations"
    r"|true_computation|false_computation)=(\{[^{}]*\}|%?[\w.\-]+)"
)


def parse_module(text: str) -> tuple[Computation, int | None, set[str]]:
    """Returns the entry, the number of devices, and the names of all collectives."""
    computations: dict[str, Computation] = {}
    entry, devices, current = None, None, None
    for line in text.splitlines():
        if line.startswith("HloModule"):
            counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", line)
            devices = math.prod(map(int, counts)) if counts else None
        elif current is None:
            if match := _HEADER.match(line.rstrip()):
                current = Computation(match[2], {}, computations)
                computations[current.name] = current
                entry = current if match[1] else entry
            elif _ASSIGNMENT.match(line):
                raise LedgerError(f"instruction outside a computation: {line[:200]!r}")
        elif _END.match(line):
            current = None
        elif match := _ASSIGNMENT.match(line):
            instruction = _parse_instruction(match[2], match[3], bool(match[1]))
            current.instructions[instruction.name] = instruction
        elif _COLLECTIVE.search(line):
            raise LedgerError(f"line not understood: {line[:200]!r}")
    if entry is None or current is not None:
        raise LedgerError("no whole ENTRY computation; give the HLO text of a module")
    every = [(c, i) for c in computations.values() for i in c.instructions.values()]
    for computation, i in every:
        for called in computation.called(i):
            called.caller = called.caller or (computation, i)
    return entry, devices, {i.name for _, i in every if i.kind}


def _parse_instruction(name: str, text: str, is_root: bool) -> Instruction:
    text = _COMMENT.sub("", text)
    cut = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    shape, rest = text[:cut], text[cut:].lstrip()
    opcode = rest.partition("(")[0]
    if not re.fullmatch(r"[\w\-]+", opcode):
        raise LedgerError(f"instruction {name}: no opcode in {text[:200]!r}")
    end = _closing(rest, len(opcode))
    literal = rest[len(opcode) + 1 : end]
    operands: list[str] = []
    if opcode not in ("constant", "parameter", "iota"):
        # A name may follow its shape, whose commas stand inside brackets or braces.
        plain = re.sub(r"\[[^\]]*\]|\{[^{}]*\}", "", literal)
        words = (part.split() for part in plain.split(","))
        operands = [word[-1].lstrip("%").rstrip(")") for word in words if word]
    what = (name, shape, opcode, tuple(operands), literal, rest[end + 1 :], is_root)
    return Instruction(*what)


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r'[()]|"(?:[^"\\]|\\.)*"').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise LedgerError(f"unbalanced parentheses in {text[:200]!r}")


def arrays_of(shape: str) -> list[tuple[str, int]]:
    """Returns (dtype, elements) of each array in a shape; a tuple shape has several."""
    return [
        (dtype, math.prod(integers(dims.replace("<=", ""))))
        for dtype, dims in _ARRAY.findall(shape)
        if dtype not in ("token", "opaque")
    ]


def size_of(dtype: str, elements: int) -> int:
    """Returns the bytes of an array."""
    if (match := _BITS.match(dtype.replace("pred", "u8"))) is None:
        raise LedgerError(f"dtype {dtype!r} of a collective is unknown")
    return math.ceil(elements * int(match[1]) / 8)
