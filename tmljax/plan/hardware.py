"""The machines that a plan can be made for: chips, slices of them, and the links along each mesh axis.

Numbers are the makers' (cloud.google.com/tpu/docs, NVIDIA data sheets); the speed of an ICI link is what collectives
reach on it according to "How to Scale Your Model" (jax-ml.github.io/scaling-book). FLOP/s are dense bfloat16. Memory
of TPUs is in GB where some pages say GiB: what there may be beyond it is left to the runtime.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Literal

from tmljax.config import UserError
from tmljax.train.speed import PEAKS


@dataclass(frozen=True)
class Chip:
    """One JAX device; bandwidths in bytes/s."""

    name: str
    flops: float
    memory: float  # bytes
    memory_bandwidth: float
    link: float  # of one ICI link, one way; on GPUs of NVLink, one way
    host_link: float  # each chip's share of the network between hosts or slices, one way
    kind: Literal["tpu", "gpu"] = "tpu"
    dims: int = 3  # of the torus
    wraps_at: int = 4  # rings close along dims that are a multiple of this; of three dims, where all of them are
    largest: int = 9216  # chips in a slice
    devices: int = 1  # JAX devices that a chip of this name is

    @property
    def per_device(self) -> Chip:
        n = self.devices
        return Chip(
            self.name, self.flops / n, self.memory / n, self.memory_bandwidth / n, self.link / n, self.host_link / n,
            self.kind, self.dims, self.wraps_at, self.largest, 1,
        )  # fmt: skip


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", PEAKS["TPU v4"], 32e9, 1.228e12, 4.5e10, 3.1e9, largest=4096),
        Chip("v5e", PEAKS["TPU v5e"], 16e9, 8.19e11, 4.5e10, 3.1e9, dims=2, wraps_at=16),
        Chip("v5p", PEAKS["TPU v5p"], 95e9, 2.765e12, 9e10, 6.2e9, largest=6144),
        Chip("v6e", PEAKS["TPU v6"], 32e9, 1.64e12, 9e10, 1.25e10, dims=2, wraps_at=16),
        Chip("tpu7x", 2 * PEAKS["TPU7x"], 192e9, 7.37e12, 9e10, 1.25e10, devices=2),
        Chip("a100", PEAKS["NVIDIA A100"], 80e9, 2.04e12, 3e11, 2.5e10, "gpu"),
        Chip("h100", PEAKS["NVIDIA H100"], 80e9, 3.35e12, 4.5e11, 5e10, "gpu"),
        Chip("h200", PEAKS["NVIDIA H200"], 141e9, 4.8e12, 4.5e11, 5e10, "gpu"),
        Chip("b200", PEAKS["NVIDIA B200"], 180e9, 7.7e12, 9e11, 5e10, "gpu"),
    )
}

# Shapes worth offering; of tori of three dims, others that slices are made in are taken as well (`is_made`).
SHAPES = {
    "v4": ("2x2x1", "2x2x4", "4x4x4", "4x4x8", "8x8x8", "8x8x16"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("2x2x1", "2x2x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}


PARTS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # of a cube of 4


@dataclass(frozen=True)
class Slice:
    """A topology by name. `shape` of a TPU slice is its torus in chips, of GPUs (nodes, GPUs in a node)."""

    name: str
    chip: Chip  # of one device
    shape: tuple[int, ...]
    devices_per_chip: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.devices_per_chip

    @property
    def compiles(self) -> bool:
        """Whether a compiler for it runs on a machine without it."""
        return self.chip.kind == "tpu"


def find_slice(name: str) -> Slice:
    """Of "v5p:4x8x8" (a TPU's torus) or "h200:8x8" (nodes x GPUs). Raises UserError listing what is known."""
    kind, _, text = name.partition(":")
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=1)
        raise UserError(f"--topology={name}: {f'did you mean {near[0]}? ' if near else ''}known are {known()}")
    sizes = text.split("x")
    chip = CHIPS[kind]
    dims = chip.dims if chip.kind == "tpu" else 2
    if not all(size.isdecimal() and int(size) for size in sizes) or len(sizes) != dims:
        raise UserError(
            f"--topology={name}: a shape of {kind} is {dims} whole numbers from 1 on; known are {known(kind)}"
        )
    shape = tuple(map(int, sizes))
    if chip.kind == "tpu" and not is_made(chip, shape):
        made = next((turned for turned in permutations(shape) if is_made(chip, turned)), None)
        near = f"did you mean {kind}:{'x'.join(map(str, made))}? " if made else ""
        raise UserError(f"--topology={name}: no slice of {kind} has this shape; {near}known are {known(kind)}")
    return Slice(name, chip.per_device, shape, chip.devices)


def is_made(chip: Chip, shape: tuple[int, ...]) -> bool:
    """Whether slices come in this shape: tori of three dims are built of cubes of 4, sizes in order, or are a part of
    one (cloud.google.com/tpu/docs/v5p)."""
    name = "x".join(map(str, shape))
    if chip.dims == 2:
        return name in SHAPES[chip.name]
    of_cubes = (
        all(size % 4 == 0 for size in shape) and list(shape) == sorted(shape) and math.prod(shape) <= chip.largest
    )
    return name in PARTS or of_cubes


def known(kind: str | None = None) -> str:
    """The names to choose from, on one line."""
    tpus = [f"{k}:{shape}" for k, shapes in SHAPES.items() if kind in (None, k) for shape in shapes]
    gpus = [f"{c.name}:NODESxGPUS" for c in CHIPS.values() if c.kind == "gpu" and kind in (None, c.name)]
    return ", ".join([*tpus, *gpus])


@dataclass(frozen=True)
class Run:
    """A stretch of one torus dim that a mesh axis lies along; of GPUs, those in a node (a ring) or the nodes."""

    size: int
    ring: bool  # closed, so that both ways round are open


def runs_of(where: Slice, axes: Mapping[str, int]) -> dict[str, tuple[Run, ...]]:
    """Which torus dims each mesh axis lies along, as `jax.make_mesh` lays them: later axes choose first.

    An axis takes the largest set of whole dims of its size. Where there is none, dims are split.
    """
    if where.chip.kind == "gpu":
        return gpu_runs(where, axes)
    free = dict(enumerate(where.shape))
    if where.devices_per_chip > 1:
        free[len(free)] = where.devices_per_chip
    placed: dict[str, tuple[Run, ...]] = {}
    for axis, size in reversed(axes.items()):
        whole = next(
            (
                dims
                for count in range(len(where.shape) + 1, 0, -1)
                for dims in combinations(free, count)
                if math.prod(free[d] for d in dims) == size and all(free[d] > 1 for d in dims)
            ),
            None,
        )
        if size == 1:
            placed[axis] = ()
        elif whole is not None:
            placed[axis] = tuple(Run(free.pop(d), is_ring(where, d)) for d in whole)
        else:
            placed[axis] = split_runs(free, size)
    return {axis: placed[axis] for axis in axes}


def gpu_runs(where: Slice, axes: Mapping[str, int]) -> dict[str, tuple[Run, ...]]:
    """Nodes are filled from the last axis on."""
    stride, runs = 1, dict[str, tuple[Run, ...]]()
    for axis, size in reversed(axes.items()):
        inside = min(size, max(1, where.shape[1] // stride))
        runs[axis] = (Run(inside, True), Run(size // inside, False)) if size > 1 else ()
        stride *= size
    return runs


def is_ring(where: Slice, dim: int) -> bool:
    closed = [size % where.chip.wraps_at == 0 for size in where.shape]
    return dim < len(where.shape) and (all(closed) if where.chip.dims == 3 else closed[dim])


def split_runs(free: dict[int, int], size: int) -> tuple[Run, ...]:
    """Parts of dims, open at both ends; `free` keeps the rest."""
    runs = []
    for d in sorted(free, key=lambda d: -free[d]):
        part = math.gcd(free[d], size)
        if part > 1:
            runs.append(Run(part, False))
            free[d], size = free[d] // part, size // part
    return (*runs, Run(size, False)) if size > 1 else tuple(runs)
