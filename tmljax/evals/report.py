"""report.json for programs, report.html for people: one file, no network, light or dark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tmljax import files
from tmljax.config import UserError
from tmljax.evals import charts, glossary, headline, timeline
from tmljax.evals.gallery import Example
from tmljax.evals.headline import Cell, Row
from tmljax.evals.statistics import Estimate, Summary
from tmljax.evals.suite import ALL, Tally

FORMAT = 1
MODEL = "model"
TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Report:
    """All that the two files hold."""

    title: str
    facts: Mapping[str, str]  # label -> value, for the summary of the run
    config: Mapping[str, Any]  # as config.json
    sessions: Mapping[str, int]  # family -> test sessions performed
    tallies: Sequence[Tally]  # the model's first
    summaries: Mapping[str, Sequence[Summary]]  # system -> its summaries
    training: Sequence[Mapping[str, Any]] = ()  # rows of metrics.jsonl
    examples: Sequence[Example] = ()
    notes: Sequence[str] = field(default=())


def make(
    title: str,
    tallies: Sequence[Tally],
    *,
    facts: Mapping[str, str],
    config: Mapping[str, Any],
    sessions: Mapping[str, int],
    training: Sequence[Mapping[str, Any]] = (),
    examples: Sequence[Example] = (),
    notes: Sequence[str] = (),
) -> Report:
    summaries = {t.system: t.summaries() for t in tallies}
    return Report(title, facts, config, sessions, tallies, summaries, training, examples, notes)


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Returns the paths of report.json and report.html. Raises UserError when they cannot be written."""
    paths = folder / "report.json", folder / "report.html"
    for path, text in zip(paths, (to_json(report), to_html(report)), strict=True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files.write_text(path, text)
        except OSError as e:
            raise UserError(f"cannot write {path}: {e.strerror or e}") from None
    return paths


def to_json(report: Report) -> str:
    rows = [
        {
            **row._asdict(),
            "systems": {name: as_json(headline.find(s, row)[1]) for name, s in report.summaries.items()},
        }
        for row in headline.ROWS
    ]
    values = {
        t.system: {
            family: {m.name: [list(v) for v in m.values] for m in names.values() if m.unit != "ms"}
            for family, names in t.families.items()
        }
        for t in report.tallies
    }
    tree = {
        "format": FORMAT,
        "title": report.title,
        "facts": dict(report.facts),
        "sessions": dict(report.sessions),
        "notes": list(report.notes),
        "headline": rows,
        "measurements": {name: [as_json(s) for s in summaries] for name, summaries in report.summaries.items()},
        "values": values,
        "config": report.config,
    }
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def as_json(thing: Summary | Cell) -> dict[str, Any]:
    return {k: v._asdict() if isinstance(v, Estimate) else v for k, v in thing._asdict().items()}


def to_html(report: Report) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "interval": interval, "band": band}
    template = environment.from_string(resources.files("tmljax.evals").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    systems = list(report.summaries)
    ticks = ticks_of(report)
    return template.render(
        report=report,
        systems=systems,
        arrows={"higher": "↑", "lower": "↓", "neither": ""},
        families=[(name, glossary.family(name), count) for name, count in report.sessions.items()],
        headline=[(row, headline_cells(report, row)) for row in headline.ROWS if headline_cells(report, row)],
        tables=[(name, glossary.family(name), table(report, name)) for name in (*report.sessions, ALL)],
        curves=[Markup(svg) for svg in charts.curves(report.training)],
        ticks=Markup(ticks) if ticks else None,
        examples=[(e, Markup(e.figure)) for e in report.examples],
        style=Markup(timeline.STYLE),
        light=Markup(timeline.LIGHT),
        dark=Markup(timeline.DARK),
        config=json.dumps(report.config, indent=2, ensure_ascii=False),
    )


def headline_cells(report: Report, row: Row) -> dict[str, Any] | None:
    """Cells by system with unit and direction; None where the model was not measured."""
    found = {name: headline.find(s, row) for name, s in report.summaries.items()}
    known = next((s for s, _ in found.values() if s is not None), None)
    if known is None:
        return None
    cells = {name: cell for name, (_, cell) in found.items()}
    return {"unit": known.unit, "better": known.better, "cells": cells, "term": glossary.measurement(row.name)}


def table(report: Report, family: str) -> list[dict[str, Any]]:
    """A row for each measurement of the family: its term, unit and the summary of each system."""
    by_system = {n: {s.name: s for s in summaries if s.family == family} for n, summaries in report.summaries.items()}
    names = list(dict.fromkeys(name for found in by_system.values() for name in found))
    return [
        {
            "term": glossary.measurement(name),
            "any": next(found[name] for found in by_system.values() if name in found),
            "cells": {system: found.get(name) for system, found in by_system.items()},
        }
        for name in names
    ]


def ticks_of(report: Report) -> str | None:
    model = report.tallies[0]
    values = [v.value for names in model.families.values() if "tick" in names for v in names["tick"].values]
    summary = next((s for s in report.summaries[model.system] if (s.name, s.family) == ("tick", ALL)), None)
    if summary is None or summary.median is None or summary.p99 is None:
        return None
    return charts.histogram(values, summary.median.value, summary.p99.value)


def number(value: float, unit: str) -> str:
    if unit in ("rate", "share"):
        return f"{value:.1%}" if 0 < value < 1 else f"{value:.0%}"
    if unit == "ms":
        return f"{value:.3g} ms"
    return f"{value:.2f}" + {"s": " s", "1/s": "/s", "1/min": "/min"}.get(unit, "")


def interval(estimate: Estimate, unit: str) -> str:
    """The bounds, their unit said once."""
    low, high = number(estimate.low, unit), number(estimate.high, unit)
    mark = high.lstrip("0123456789.-")
    return f"{low.removesuffix(mark)}–{high}"


def band(estimate: Estimate) -> Markup:
    """A little bar from 0 to 1 with the interval on it."""
    low, point, high = (round(100 * min(max(v, 0.0), 1.0), 1) for v in (estimate.low, estimate.value, estimate.high))
    return Markup(
        f'<span class="band"><i style="left:{low}%;width:{max(high - low, 1):.1f}%"></i>'
        f'<b style="left:{point}%"></b></span>'
    )


def to_text(report: Report) -> str:
    """The headline table for a terminal."""
    lines = [["", *report.summaries]]
    for row in headline.ROWS:
        found = headline_cells(report, row)
        if found:
            cells = [found["cells"][name] for name in report.summaries]
            shown = [number(c.estimate.value, found["unit"]) if c.estimate else "-" for c in cells]
            lines.append([row.label, *shown])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        line[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )
