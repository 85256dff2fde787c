"""What a training step asks of a device, and how long its three parts need for it.

Matrix products, memory and each mesh axis's links have a speed of their own (tmljax/plan/hardware.py). What can run
at once is as long as the longest of it; what the program waits for is added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tmljax.plan.hardware import Chip, Run, Slice, runs_of

MATMUL_SHARE = 0.8  # of a chip's peak that large matrix products reach; an assumption, stated in every report
MEMORY_SHARE = 0.85  # of the memory's peak that streaming reaches; likewise


class Traffic(NamedTuple):
    """A kind of collective of a step, as one device sees it."""

    axis: str  # mesh axis or axes, "fsdp+expert"
    operation: str  # all-gather, reduce-scatter, all-reduce, all-to-all, ragged-all-to-all, collective-permute
    bytes: float  # of the whole result (of the operand of a reduction), over the step
    waits: float  # the share of its time in which no product runs: 1 where the program stands still for it
    count: float = 1
    hops: float = 1  # of a collective-permute: messages that the busiest link carries (`hops_of`)


class Work(NamedTuple):
    """Of a device in one step."""

    flops: float  # executed, recomputation included
    memory: float  # bytes read and written
    traffic: Sequence[Traffic]


class Terms(NamedTuple):
    """Seconds, each alone."""

    matmul: float
    memory: float
    links: Mapping[str, float]  # by mesh axis
    waits: float  # the part of `links` that nothing hides

    @property
    def step(self) -> float:
        """What overlaps is as long as its longest part; what waits is added."""
        hidden = sum(self.links.values()) - self.waits
        return max(self.matmul, self.memory, hidden) + self.waits

    @property
    def binds(self) -> str:
        named = {"matmul": self.matmul, "memory": self.memory}
        named |= {f"links of {axis}": seconds for axis, seconds in self.links.items()}
        return max(named, key=named.__getitem__)


def terms(work: Work, where: Slice, axes: Mapping[str, int]) -> Terms:
    links, waits = dict[str, float](), 0.0
    for traffic in work.traffic:
        seconds = traffic_seconds(traffic, where, axes)
        links[traffic.axis] = links.get(traffic.axis, 0.0) + seconds
        waits += seconds * traffic.waits
    return Terms(
        product_seconds(work.flops, where.chip),
        work.memory / (where.chip.memory_bandwidth * MEMORY_SHARE),
        links,
        waits,
    )


def product_seconds(flops: float, chip: Chip) -> float:
    return flops / (chip.flops * MATMUL_SHARE)


def traffic_seconds(traffic: Traffic, where: Slice, axes: Mapping[str, int]) -> float:
    """Of all of it, alone."""
    names, placed = traffic.axis.split("+"), runs_of(where, axes)
    runs = [run for name in names for run in placed[name]]
    return collective_seconds(traffic, math.prod(axes[name] for name in names), runs, where)


def collective_seconds(traffic: Traffic, members: int, runs: Sequence[Run], where: Slice) -> float:
    """At the speed of the links; what a collective needs to start is left out."""
    if members == 1:
        return 0.0
    if traffic.operation == "collective-permute":
        return shift_seconds(traffic, runs, where.chip)
    passes = 2 if traffic.operation == "all-reduce" else 1
    moved = passes * traffic.bytes * (members - 1) / members
    if where.chip.kind == "gpu":
        return gpu_seconds(
            traffic.operation, moved, math.prod(run.size for run in runs if run.ring), members, where.chip
        )
    if traffic.operation.endswith("all-to-all"):
        return max(bisection_seconds(traffic.bytes, run, where.chip) for run in runs)
    return moved / sum(where.chip.link * (2 if run.ring else 1) for run in runs)


def shift_seconds(traffic: Traffic, runs: Sequence[Run], chip: Chip) -> float:
    """Each device sends to one other, one way round; of GPUs in several nodes some send all of it to another node."""
    if chip.kind == "gpu":
        return traffic.bytes / (chip.host_link if any(not run.ring for run in runs if run.size > 1) else chip.link)
    return traffic.bytes * traffic.hops / chip.link


def hops_of(shift: int, runs: Sequence[Run]) -> int:
    """The messages that the busiest link carries where each device sends to the one `shift` places on in the order of
    `runs`, the last of which varies fastest. For a shift by n along a run of m they are min(n, m - n): on a ring that
    is the shorter way, and on a line there are no more senders. Who leaves an inner run goes on by one in the outer."""
    busiest, leaves = 1, False
    for run in reversed(runs):
        shift, along = divmod(shift, run.size)
        busiest = max(busiest, *(min(n % run.size, -n % run.size) for n in {along, along + leaves}))
        leaves = leaves or along > 0
    return busiest


def bisection_seconds(sent: float, run: Run, chip: Chip) -> float:
    """`sent` bytes of each device spread evenly over a run: the links across its middle carry a quarter of them all,
    each way; a ring has two such places."""
    return sent * run.size / 4 / (chip.link * (2 if run.ring else 1))


def gpu_seconds(operation: str, moved: float, inside: int, members: int, chip: Chip) -> float:
    """`inside` members are in one node, at NVLink's speed; to other nodes each GPU has one network card."""
    nodes = members / inside
    crossing = moved * (nodes - 1) / nodes if operation.endswith("all-to-all") else moved / inside
    return max(moved / chip.link, crossing / chip.host_link if nodes > 1 else 0.0)
