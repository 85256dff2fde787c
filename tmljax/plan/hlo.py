"""Reads a compiled program's text: what it moves, how often, and whether it waits for it.

XLA's own cost analysis counts the body of a loop once. Here each computation counts as often as it runs: the product
of the trip counts of the loops around it, which the compiler writes beside a loop or, where it does not, the loop's
condition compares its counter with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
WIDTHS |= {"s64": 8, "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5}

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?")
IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
CALLED = re.compile(r"(?:calls|body|to_apply|called_computations|branch_computations)=\{?(%[\w.\-]+(?:, *%[\w.\-]+)*)")
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "after-all"}
FREE |= {"copy-done", "partition-id", "replica-id", "async-done", "call-done", "all-gather-done", "all-reduce-done"}


class Array(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    space: str  # "" is HBM

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * WIDTHS.get(self.kind, 0)


class Instruction(NamedTuple):
    name: str
    kind: str  # the operation, as all-gather
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str  # the text after the operands
    root: bool

    @property
    def called(self) -> list[str]:
        return [name.strip().lstrip("%") for found in CALLED.findall(self.rest) for name in found.split(",")]


class Collective(NamedTuple):
    operation: str  # one of COLLECTIVES
    bytes: float  # of the whole: the result of a gather, the operand of a reduction
    shape: tuple[int, ...]  # of the largest result
    members: tuple[int, ...]  # the first group of devices
    times: int  # in a run of the program
    beside: float  # FLOPs of the products that run beside each one: all it needs where it is part of one, else 0
    name: str
    source: str  # op_name, as "jit(take_step)/jvp()/while/body/..."

    @property
    def waits(self) -> bool:
        """Whether the program stands still for it from its beginning to its end."""
        return self.beside == 0


@dataclass(frozen=True)
class Program:
    """Computations by name, in the order of the text."""

    computations: Mapping[str, Sequence[Instruction]]
    entry: str

    @cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs in a run of the program; fused ones count with their caller."""
        found = {self.entry: 1}
        todo = [self.entry]
        while todo:
            name = todo.pop()
            for instruction in self.computations[name]:
                trips = self.trips(instruction) if instruction.kind == "while" else 1
                for called in instruction.called:
                    if called in self.computations and called not in found:
                        found[called] = found[name] * trips
                        todo.append(called)
        return found

    def trips(self, loop: Instruction) -> int:
        said = re.search(r'known_trip_count[":{ ]+n[": ]+(\d+)', loop.rest)
        if said:
            return int(said[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        numbers = [
            int(number)
            for instruction in self.computations.get(condition[1] if condition else "", ())
            if instruction.kind == "constant"
            for number in re.findall(r"^(\d+)\)", instruction.rest)
        ]
        return max(numbers, default=1)

    def collectives(self, kernels: Mapping[str, float] | None = None) -> Iterator[Collective]:
        """`kernels` has the FLOPs of a call of each, by how its name begins: what one multiplies no text tells."""
        kernels = kernels or {}
        hidden = self._hidden(kernels)
        for name, times in self.times.items():
            if self.goes_on(name):
                continue
            scatters = name.startswith(("all-reduce-scatter", "wrapped_reduce_scatter"))
            for instruction in self.computations[name]:
                operation = instruction.kind.removesuffix("-start")
                if operation not in COLLECTIVES:
                    continue
                shapes = {i.name: i.results for i in self.computations[name]}
                operands = [sum(a.bytes for a in shapes.get(operand, ())) for operand in instruction.operands]
                sent, received = sum(operands), sum(a.bytes for a in instruction.results)
                starts = instruction.kind.endswith("-start")
                whole = max(sent, received - sent if starts and received > sent else received)
                if operation == "ragged-all-to-all":  # rows, the buffer that takes them, offsets: one side has no spare
                    whole = min(operands[:2])
                source = re.search(r'op_name="([^"]*)"', instruction.rest)
                yield Collective(
                    "reduce-scatter" if scatters else operation,
                    whole,
                    max((a.shape for a in instruction.results), key=math.prod, default=()),
                    first_group(instruction.rest),
                    times,
                    beside=hidden.get(name, 0.0) or (self.flops_beside(name, instruction, kernels) if starts else 0.0),
                    name=f"{name}/{instruction.name}",
                    source=source[1] if source else "",
                )

    def _hidden(self, kernels: Mapping[str, float]) -> dict[str, float]:
        """Computations that run beside products, and the FLOPs of those: what an async or call-start names, which may
        be the SparseCore's; or a fusion of the compiler's asynchronous collectives, which it makes of products alone.
        """
        hidden = {name: math.inf for name in self.computations if STEP in name}
        for name, instructions in self.computations.items():
            for i in instructions:
                if "async_collective" in i.name or "async-collective" in i.name:
                    hidden |= dict.fromkeys(i.called, math.inf)
                elif i.kind in ("async-start", "call-start"):
                    hidden |= dict.fromkeys(i.called, self.flops_beside(name, i, kernels))
        return hidden

    def goes_on(self, computation: str) -> bool:
        """Whether its collective was begun by an earlier instruction: an asynchronous one is there at its start, beside
        each product that it goes on under, and at its end."""
        root = next((i for i in self.computations[computation] if i.root), None)
        return computation.startswith(STEP) or (root is not None and "AsyncCollectiveDone" in root.rest)

    def flops_beside(self, computation: str, start: Instruction, kernels: Mapping[str, float]) -> float:
        """Of the products and kernels between the start of something and its end."""
        body = self.computations[computation]
        after = body[body.index(start) + 1 :]
        ends = next((n for n, i in enumerate(after) if i.kind.endswith("-done") and start.name in i.operands), None)
        return sum(self.flops(i, computation, kernels) for i in after[:ends])

    def flops(self, instruction: Instruction, computation: str, kernels: Mapping[str, float]) -> float:
        """Of b products of matrices [m, k] and [k, n], 2 b m k n, or of what a fusion calls."""
        if instruction.kind in ("dot", "convolution"):
            arrays = [self._shapes[computation].get(name, ()) for name in instruction.operands[:2]]
            sides = [math.prod(a.shape) for found in (*arrays, instruction.results) for a in found]
            return 2.0 * math.sqrt(math.prod(sides) / batch_of(instruction, arrays[0]))
        if KERNEL in instruction.rest:
            return next((flops for name, flops in kernels.items() if instruction.name.startswith(name)), 0.0)
        return sum(self.flops(i, name, kernels) for name in instruction.called for i in self.computations.get(name, ()))

    def traffic_bytes(self) -> float:
        """Read from and written to HBM: operands and results of what runs, a slice for its own size."""
        inner = {c for body in self.computations.values() for i in body if i.kind not in LOOPS for c in i.called}
        return sum(
            times * sum(self._bytes_of(i, name) for i in self.computations[name])
            for name, times in self.times.items()
            if name not in inner
        )

    def _bytes_of(self, instruction: Instruction, computation: str) -> float:
        if instruction.kind in FREE or instruction.kind.endswith("-done"):
            return 0.0
        shapes = self._shapes[computation]
        body = next((self.computations[c] for c in instruction.called if c in self.computations), None)
        operands = [shapes.get(operand, ()) for operand in instruction.operands]
        reads = [sum(a.bytes for a in arrays if not a.space) for arrays in operands]
        writes = sum(a.bytes for a in instruction.results if not a.space)
        if instruction.kind in SLICES:
            return 2 * writes
        if instruction.kind == "dynamic-update-slice":
            return 2 * reads[1]
        if body is not None and any(self.goes_on(c) for c in instruction.called):
            reads, writes = self._beside(instruction, body, reads)
        elif instruction.kind == "fusion" and body is not None:
            reads = [min(read, sliced(body, index)) for index, read in enumerate(reads)]
            writes = min(writes, updated(body))
        return sum(reads) + writes

    def _beside(
        self, instruction: Instruction, body: Sequence[Instruction], reads: list[float]
    ) -> tuple[list[float], float]:
        """Of a product with a collective under it: what the collective holds counts where it starts."""
        root = next(i for i in body if i.root)
        if "AsyncCollectiveDone" in root.rest:
            return [], 0.0
        passed = {i.name for i in body if i.kind in COLLECTIVES or i.kind == "parameter"}
        holds = {root.name, *(i.name for i in body if i.kind in COLLECTIVES)}
        free = {
            int(i.rest.partition(")")[0])
            for i in body
            if i.kind == "parameter" and {user.name for user in body if i.name in user.operands} <= holds
        }
        made = [array for name, array in zip(root.operands, instruction.results) if name not in passed]
        kept = [min(read, sliced(body, n)) for n, read in enumerate(reads) if n not in free]
        return kept, sum(a.bytes for a in made if not a.space)

    @cached_property
    def _shapes(self) -> dict[str, dict[str, tuple[Array, ...]]]:
        return {name: {i.name: i.results for i in body} for name, body in self.computations.items()}


def batch_of(product: Instruction, left: Sequence[Array]) -> int:
    """How many products of matrices it is; XLA:TPU writes them as the window of a convolution, and sometimes a sum over
    two dims too, of which so too few FLOPs are counted."""
    window = re.search(r"window=\{size=([\dx]+)", product.rest)
    if window:
        return math.prod(map(int, window[1].split("x")))
    dims = re.search(r"lhs_batch_dims=\{([\d,]+)\}", product.rest)
    return math.prod(a.shape[int(dim)] for a in left for dim in dims[1].split(",")) if dims else 1


STEP = "async_collective_fusion"
KERNEL = 'custom_call_target="tpu_custom_call"'
LOOPS = ("while", "call", "conditional")
SLICES = ("dynamic-slice", "slice", "gather")


def sliced(body: Sequence[Instruction], parameter: int) -> float:
    """Bytes that a fusion reads of its parameter: of the slices where nothing else is done with it."""
    name = next((i.name for i in body if i.kind == "parameter" and i.rest.startswith(f"{parameter})")), None)
    users = [i for i in body if name in i.operands]
    if not users:
        return 0.0
    if all(i.kind in SLICES or (i.kind == "dynamic-update-slice" and i.operands[0] == name) for i in users):
        return sum(a.bytes for i in users if i.kind in SLICES for a in i.results)
    return math.inf


def updated(body: Sequence[Instruction]) -> float:
    """Bytes that a fusion writes where its result is an updated slice of something larger."""
    root = next((i for i in body if i.root), None)
    by_name = {i.name: i for i in body}
    while root is not None and root.kind in ("bitcast", "copy") and root.operands:
        root = by_name.get(root.operands[0])
    if root is None or root.kind != "dynamic-update-slice":
        return math.inf
    return sum(a.bytes for a in by_name[root.operands[1]].results) if root.operands[1] in by_name else math.inf


def read(text: str) -> Program:
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            body = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):  # a kernel's attributes may have lines of their own
            body = None
        elif body is not None and (found := INSTRUCTION.match(line)):
            body.append(parse(found[2], found[3], bool(found[1])))
    return Program(computations, entry)


def parse(name: str, text: str, root: bool) -> Instruction:
    """Of `TYPE kind(operands), attributes`."""
    end = closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    results = tuple(
        Array(kind, tuple(map(int, filter(None, shape.split(",")))), space)
        for kind, shape, space in ARRAY.findall(text[:end])
    )
    kind, _, rest = text[end:].strip().partition("(")
    close = closing("(" + rest, 0) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:close]))
    if kind in ("parameter", "constant"):
        return Instruction(name, kind, results, (), rest, root)
    return Instruction(name, kind, results, operands, rest[close:], root)


def closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text) - 1


def first_group(attributes: str) -> tuple[int, ...]:
    """Devices of the group that holds device 0, of any of the ways in which XLA writes groups; none where it names no
    groups. Raises ValueError for a way that is new."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=" + IOTA, attributes)
    if iota:
        ids = iota_of(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
        return tuple(int(i) for i in next(row for row in ids if 0 in row))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + IOTA + r"\))? \{([^}]*)\}", attributes)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        taken = re.findall(r"'([^']+)'", named[4])
        ids = iota_of(named[2] or str(math.prod(sizes.values())), named[3]).reshape(tuple(sizes.values()))
        return tuple(int(i) for i in ids[tuple(slice(None) if axis in taken else 0 for axis in sizes)].ravel())
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"groups of devices in a way that is not known here: {attributes}")
    return ()


def iota_of(dims: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in an array of these `dims`, which are transposed in this `order`, all as XLA writes them."""
    sizes = tuple(map(int, dims.split(",")))
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(tuple(map(int, order.split(",")))) if order else ids


def shift_of(pair: Sequence[int], axes: Mapping[str, int]) -> int:
    """How many places the second device lies from the first, along the axes in which they differ."""
    first, second = (np.array(np.unravel_index(device, tuple(axes.values()))) for device in pair)
    sizes = [size for size, differs in zip(axes.values(), first != second, strict=True) if differs]
    index = [np.ravel_multi_index(tuple(place[first != second]), sizes) for place in (first, second)]
    return abs(int(index[1] - index[0]))


def axis_of(members: Sequence[int], axes: Mapping[str, int]) -> str:
    """The mesh axes along which these devices lie, as "fsdp+expert"; devices are numbered in mesh order."""
    if len(members) < 2:
        return ""
    places = np.array(np.unravel_index(np.array(members), tuple(axes.values())))
    return "+".join(axis for axis, row in zip(axes, places, strict=True) if len(set(row.tolist())) > 1)
