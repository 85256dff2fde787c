"""Parameters by part of the model, all of them and those that one position uses."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from tmljax.fingerprint import flatten
from tmljax.model.block import ROUTED
from tmljax.model.interaction import Definition
from tmljax.plan.setting import shapes_of


class Part(NamedTuple):
    name: str
    total: int
    active: float  # routed experts count for the share of them that a position is sent to


def part_of(path: list[str]) -> str:
    """The name under which a report adds up the parameter at this path."""
    if path[0] != "trunk":
        tables = dict.fromkeys(("tokens", "slots", "senses", "sense_scales"), "token table")
        heads = tables | {"patches": "video input", "flow_head": "flow head"}
        return heads.get(path[0], "text heads" if path[0].endswith("_head") else "audio input")
    if path[-1] in ROUTED:
        return "routed experts"
    if path[-1].startswith("shared_"):
        return "shared expert"
    return "attention" if "attention" in path else "routers and norms"


def by_part(params: Any) -> dict[str, list[jax.ShapeDtypeStruct]]:
    """The leaves of each part."""
    parts = collections.defaultdict(list)
    for name, leaf in flatten(params).items():
        parts[part_of(name.split("."))].append(leaf)
    return dict(parts)


def add_bytes(leaves: Iterable[jax.ShapeDtypeStruct]) -> float:
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))


def count_parts(definition: Definition) -> list[Part]:
    """Largest first."""
    moe = definition.model.moe
    leaves = by_part(shapes_of(definition).abstract())
    totals = {name: sum(leaf.size for leaf in parts) for name, parts in leaves.items()}
    share = moe.top_k / moe.experts
    parts = [Part(name, n, n * share if name == "routed experts" else float(n)) for name, n in totals.items()]
    return sorted(parts, key=lambda part: -part.total)


def add(parts: list[Part]) -> Part:
    return Part("total", sum(p.total for p in parts), sum(p.active for p in parts))
