"""Parameters by part of the model, all of them and those that one position uses."""

from __future__ import annotations

from typing import NamedTuple

import jax

from tmljax.model.interaction import Definition
from tmljax.plan.setting import shapes_of


class Part(NamedTuple):
    name: str
    total: int
    active: float  # routed experts count for the share of them that a position is sent to


ROUTED = ("gate", "up", "down")


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


def count_parts(definition: Definition) -> list[Part]:
    """Largest first."""
    moe, totals = definition.model.moe, dict[str, int]()
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes_of(definition).abstract()):
        name = part_of([key.key for key in path])
        totals[name] = totals.get(name, 0) + leaf.size
    share = moe.top_k / moe.experts
    parts = [Part(name, n, n * share if name == "routed experts" else float(n)) for name, n in totals.items()]
    return sorted(parts, key=lambda part: -part.total)


def add(parts: list[Part]) -> Part:
    return Part("total", sum(p.total for p in parts), sum(p.active for p in parts))
