"""What a compiled program does, counted from its text: bytes, kernels and collectives.

The text is XLA's optimized HLO, which looks alike for GPUs and TPUs. Most of its instructions are
kernels: they read their operands from memory and write their results to memory. What is inside of
a fusion is one kernel.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from arguments import Case
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# No kernels: they name what is in memory already, or say what the order is.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "domain"}
FREE |= {"after-all", "partition-id", "replica-id"}
CALLS = {"while", "call", "conditional", "async"}
COLLECTIVES = {"all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute"}
# These read of their first operand only what their result needs.
PASSES_ON = {"bitcast", "reshape", "transpose", "copy", "convert"}
SLICES = {"slice", "dynamic-slice", "gather"}
# These write in place, and of their result only the new values: which operand these are.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}

ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
CALLED = re.compile(r"\b(?:calls|body|condition|\w+_computations?)=(?:%([\w.-]+)|\{([^}]*)\})")


class Counts(NamedTuple):
    """What one device does when the program runs once."""

    bytes: float = 0
    kernels: int = 0
    collectives: int = 0
    collective_bytes: float = 0


def count(compiled: Any) -> Counts:
    """The bytes that kernels read and write, and how many kernels and collectives run.

    A loop counts as often as it runs, of branches the largest, and of an array that is sliced or
    updated in place the slice. What XLA keeps in a TPU's fast memory does not count. The bytes of a
    collective are those of the whole that devices gather, scatter or sum, wherever it is kept.
    """
    computations = _parse(compiled.as_text())
    return _count(computations, computations["ENTRY"])


def collectives(compiled: Any) -> list[str]:
    """The kind of each collective and the shapes of its results, as ``"all-reduce f32[]"``."""
    found = []
    for computation in _parse(compiled.as_text()).values():
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                found.append(f"{kind} {re.sub(r'{[^{}]*}', '', instruction.shape)}")
    return found


def abstract_arguments(
    case: Case, shape: tuple[int, int], dtype: Any, weights: str, mesh: Mesh, *spec: str
) -> list[jax.ShapeDtypeStruct]:
    """Inputs of this shape, or of class ids one for each row, and weights, all sharded alike.

    There are no weights, or weights of "rows", or "full" ones of the shape of the losses.
    """

    def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*spec[: len(shape)]))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    inputs = [
        struct(shape[:1], jnp.int32) if held.domain == "class id" else struct(shape, dtype)
        for held in case.inputs.values()
    ]
    if weights == "none":
        return inputs
    rows = weights == "rows" or has_row_losses(case)
    return [*inputs, struct(shape[:1] if rows else shape, jnp.float32)]


def is_sum(case: Case) -> bool:
    """Whether the losses are added by default, not averaged."""
    return inspect.signature(case.loss).parameters["reduction"].default == "sum"


def num_sums(case: Case, weights: str) -> int:
    """How many sums devices share: the total, and where it is not known, the count."""
    return 1 if weights == "none" or is_sum(case) else 2


def has_row_losses(case: Case) -> bool:
    """Whether a row is one loss, not many."""
    return any(held.inner for held in case.inputs.values())


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # From behind the opening parenthesis on.
    is_root: bool

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        names = [one or several for one, several in CALLED.findall(self.text)]
        return re.findall(r"[\w.-]+", " ".join(names))

    @property
    def elements(self) -> int:
        return sum(elements for _, elements, _ in _arrays(self.shape))

    @property
    def bytes(self) -> float:
        # A layout with S(1) is in a TPU's fast memory.
        return sum(size * n for size, n, layout in _arrays(self.shape) if "S(1)" not in layout)


Computation = dict[str, Instruction]


def _parse(text: str) -> dict[str, Computation]:
    computations: dict[str, Computation] = {}
    current: Computation = {}
    for line in text.splitlines():
        if match := re.match(r"^(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = computations.setdefault("ENTRY" if match[1] else match[2], {})
        elif match := INSTRUCTION.match(line):
            root, name, shape, opcode, rest = match.groups()
            operands = re.findall(r"%([\w.-]+)", rest[: _closing_parenthesis(rest)])
            shape = re.sub(r"/\*.*?\*/", "", shape)
            current[name] = Instruction(name, shape, opcode, tuple(operands), rest, bool(root))
    return computations


def _closing_parenthesis(text: str) -> int:
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _arrays(shape: str) -> Iterator[tuple[float, int, str]]:
    """Of each array its bytes for an element, its elements and its layout."""
    for dtype, sizes, layout in ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+|$", dtype)[0] or 0)
        yield bits / 8, math.prod(int(n) for n in sizes.split(",") if n), layout


def _count(computations: dict[str, Computation], computation: Computation) -> Counts:
    total = Counts()
    for instruction in computation.values():
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith(("-start", "-update")):
            continue
        if '="AllocateBuffer"' in instruction.text:
            continue
        if opcode.endswith("-done"):  # The shape of its start has more than the result.
            start = computation[instruction.operands[0]]
            opcode = opcode.removesuffix("-done")
            instruction = dataclasses.replace(start, opcode=opcode, shape=instruction.shape)
        if opcode in CALLS:
            counts = [_count(computations, computations[name]) for name in instruction.called]
            if opcode == "conditional":
                counts = [max(counts)]
            runs = _trip_count(computations, instruction) if opcode == "while" else 1
            total = _sum(total, *([_sum(*counts)] * runs))
            continue
        moved = _written(computations, computation, instruction)
        for name in set(instruction.operands):
            part = _part_read(computations, instruction, computation[name])
            moved += part * computation[name].bytes
        body = computations[instruction.called[0]].values() if opcode == "fusion" else [instruction]
        talks = [i for i in body if i.opcode.removesuffix("-start") in COLLECTIVES]
        talked = sum(_collective_bytes(computations, i) for i in talks)
        total = _sum(total, Counts(moved, 1, len(talks), talked))
    return total


def _sum(*counts: Counts) -> Counts:
    return Counts(*map(sum, zip(*counts, strict=True)))


def _collective_bytes(computations: dict[str, Computation], instruction: Instruction) -> float:
    """What a collective takes or what it gives, whichever is more, in fast memory too."""
    of_operands = next(c for c in computations.values() if instruction.operands[0] in c)
    shapes = [instruction.shape, *(of_operands[name].shape for name in instruction.operands)]
    given, *taken = (sum(size * n for size, n, _ in _arrays(shape)) for shape in shapes)
    return max(given, sum(taken))


def _trip_count(computations: dict[str, Computation], loop: Instruction) -> int:
    """How often a loop runs, which is said or is the limit of its counter from 0."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if found is None:
        condition = computations[re.findall(r"condition=%([\w.-]+)", loop.text)[0]]
        limits = [i.text for i in condition.values() if i.opcode == "constant"]
        found = re.match(r"(\d+)\)", limits[0]) if len(limits) == 1 else None
    assert found is not None, f"the text does not say how often {loop.name} runs"
    return int(found[1])


def _part_read(
    computations: dict[str, Computation], user: Instruction, operand: Instruction
) -> float:
    """Which part of one of its operands an instruction reads, at most 1."""
    part = 0.0
    for position, name in enumerate(user.operands):
        if name != operand.name:
            continue
        if user.opcode == "fusion":
            body = computations[user.called[0]]
            (parameter,) = (
                i
                for i in body.values()
                if i.opcode == "parameter" and i.text.startswith(f"{position})")
            )
            part += _part_used(computations, body, parameter)
        elif position == 0 and user.opcode in SLICES:
            part += user.elements / max(operand.elements, 1)
        elif position > 0 or user.opcode not in UPDATES:
            part += 1
    return min(1, part)


def _part_used(
    computations: dict[str, Computation], body: Computation, value: Instruction
) -> float:
    """Which part of a value in a fusion the fusion's result needs, at most 1."""
    part = 1.0 if value.is_root else 0.0
    for user in body.values():
        if value.name in user.operands:
            passes_on = user.opcode in PASSES_ON
            part += (
                _part_used(computations, body, user)
                if passes_on
                else _part_read(computations, user, value)
            )
    return min(1, part)


def _written(
    computations: dict[str, Computation], computation: Computation, instruction: Instruction
) -> float:
    """Bytes that an instruction writes."""
    operands = [computation[name] for name in instruction.operands]
    if instruction.opcode == "fusion":
        body = computations[instruction.called[0]]
        (root,) = (i for i in body.values() if i.is_root)
        return _written(computations, body, root)
    if instruction.opcode == "tuple":
        return sum(_written(computations, computation, operand) for operand in operands)
    if instruction.opcode in PASSES_ON and operands[0].opcode in UPDATES:
        return _written(computations, computation, operands[0])
    if instruction.opcode in UPDATES:
        return operands[UPDATES[instruction.opcode]].bytes
    return instruction.bytes
