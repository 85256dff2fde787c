"""How long a tick took. A micro-turn is 200 ms of wall clock; what a tick needs of it is the reserve."""

from __future__ import annotations

from collections.abc import Sequence

from tmljax.evals.item import Item, Measurement, gather


def measure(items: Sequence[Item]) -> list[Measurement]:
    """Baselines have no ticks and so no measurement."""
    return [
        *gather("tick", "ms", "lower", ((i, ms) for i in items for ms in i.performance.tick_ms)),
        *gather("vocoder", "ms", "lower", ((i, ms) for i in items for ms in i.performance.vocoder_ms)),
    ]
