"""Runs systems over sessions and keeps what the metrics say: values by system, family and measurement.

Sessions come a family at a time, so that memory holds one family's audio. Every metric looks at one item at a
time; nothing of an item stays but its values, unless `keep` takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from tmljax.evals import audible, backchannel, content, cues, floor, speed, take_over, timing
from tmljax.evals.item import Item, Measurement, Performance
from tmljax.evals.statistics import Summary, summarise
from tmljax.evals.timing import events_of, without_events
from tmljax.stream.record import Session

ALL = "all"  # in place of a family: over all of them

PerformMany = Callable[[Sequence[Session]], Sequence[Performance]]
Measure = Callable[[Sequence[Item]], list[Measurement]]


@dataclass
class Tally:
    """Values of one system: family -> name -> Measurement."""

    system: str
    families: dict[str, dict[str, Measurement]] = field(default_factory=dict)

    def add(self, family: str, measurement: Measurement) -> None:
        names = self.families.setdefault(family, {})
        known = names.get(measurement.name)
        values = (*known.values, *measurement.values) if known else measurement.values
        names[measurement.name] = Measurement(measurement.name, values, measurement.unit, measurement.better)

    def summaries(self) -> list[Summary]:
        """Of every family, then of all together."""
        together = Tally(self.system)
        for names in self.families.values():
            for measurement in names.values():
                together.add(ALL, measurement)
        return [
            summarise(measurement, family)
            for family, names in (*self.families.items(), *together.families.items())
            for measurement in names.values()
        ]


def measures(references: Mapping[str, Sequence[float]] | None = None) -> tuple[Measure, ...]:
    """Every family of metrics. `references`: the human backchannel timing, see backchannel.measure."""
    return (
        take_over.measure,
        floor.measure,
        content.measure,
        cues.measure,
        partial(backchannel.measure, references=references),
        timing.measure,
        audible.measure,
        speed.measure,
    )


def stage(sessions: Sequence[Session], perform: PerformMany) -> list[Item]:
    """Has a system perform all sessions, and those with events once more without them."""
    paired = [s for s in sessions if s.audio is not None and events_of(s)]
    performances = perform([*sessions, *(without_events(s) for s in paired)])
    clean = {s.id: p for s, p in zip(paired, performances[len(sessions) :], strict=True)}
    return [Item(s, p, clean.get(s.id)) for s, p in zip(sessions, performances, strict=False)]


def run(
    tally: Tally,
    family: str,
    items: Iterable[Item],
    metrics: Sequence[Measure],
    keep: Callable[[Item, list[Measurement]], object] | None = None,
) -> None:
    """Measures the items of one family into the tally; `keep` sees each with what was measured on it."""
    for item in items:
        found = [m for measure in metrics for m in measure([item])]
        for measurement in found:
            tally.add(family, measurement)
        if keep is not None:
            keep(item, found)
