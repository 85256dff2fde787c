"""plan.json for programs, plan.html for people, and the lines that a terminal shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from tmljax.config import UserError
from tmljax.plan.forecast import COMPILER, Forecast, as_json
from tmljax.plan.parts import add, count_parts
from tmljax.plan.roofline import MATMUL_SHARE, MEMORY_SHARE
from tmljax.plan.search import describe
from tmljax.stream.microturn import MICROTURN_SECONDS

TEMPLATE = "report.html.j2"
KINDS = ("parameters", "optimizer", "gradients", "activations", "buffers")


def write(folder: Path, title: str, ranked: Sequence[Forecast], serving: Mapping[str, Any] | None) -> tuple[Path, Path]:
    """Of the plan (first) and its alternatives. Raises UserError when the files cannot be written."""
    plans = [as_json(f) for f in ranked]
    paths = folder / "plan.json", folder / "plan.html"
    tree = {"format": 1, "title": title, "plan": plans[0] if plans else None, "alternatives": plans[1:]}
    texts = json.dumps(tree | {"serving": serving}, indent=1) + "\n", to_html(title, ranked, serving)
    for path, text in zip(paths, texts, strict=True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as e:
            raise UserError(f"cannot write {path}: {e.strerror or e}") from None
    return paths


def to_html(title: str, ranked: Sequence[Forecast], serving: Mapping[str, Any] | None) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": size, "seconds": seconds}
    template = environment.from_string(resources.files("tmljax.plan").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    scale = max([max(f.memory.total, f.setting.where.chip.memory) for f in ranked], default=1.0)
    return template.render(
        title=title,
        plan=ranked[0] if ranked else None,
        ranked=ranked[:12],
        kinds=KINDS,
        scale=scale,
        lines=to_lines(ranked[0]) if ranked else [],
        parts=[*(p := count_parts(ranked[0].setting.definition)), add(p)] if ranked else [],
        bars=roofline(ranked[0]) if ranked else [],
        serving=serving,
        serving_lines=serving_lines(serving) if serving else [],
        describe=describe,
    )


def roofline(forecast: Forecast) -> list[tuple[str, float, bool]]:
    """(what, seconds, whether it binds), longest first."""
    t = forecast.terms
    named = {"matmul": t.matmul, "memory": t.memory} | {f"links of {axis}": s for axis, s in t.links.items()}
    return [(name, s, name == t.binds) for name, s in sorted(named.items(), key=lambda item: -item[1])]


def to_lines(forecast: Forecast) -> list[tuple[str, str, str]]:
    """(label, value, source) of everything that a plan says."""
    where, setting, memory, source = forecast.setting.where, forecast.setting, forecast.memory, forecast.sources
    chip, t = where.chip, forecast.terms
    verdict = "fits" if forecast.fits else "DOES NOT FIT"
    axes = " x ".join(f"{axis} {n}" for axis, n in setting.axes.items() if n > 1) or "one device"
    of = f"of {size(chip.memory)} a device"
    kinds = ", ".join(f"{kind} {size(getattr(memory, kind))}" for kind in KINDS)
    links = ", ".join(f"{axis} {seconds(s)}" for axis, s in t.links.items()) or "none"
    moved = ", ".join(f"{x.operation} along {x.axis} {size(x.bytes)}" for x in largest(forecast)) or "nothing"
    bandwidth, saving = size(chip.memory_bandwidth), seconds(forecast.checkpoint_seconds)
    parameters = add(count_parts(setting.definition))
    lines = [
        ("parameters", f"{amount(parameters.total)}, {amount(parameters.active)} active", "config"),
        ("mesh", f"{axes}, remat {setting.experiment.model.remat}", "config"),
        ("positions", f"{setting.positions * setting.experiment.optimizer.accumulate:,.0f} a device", "config"),
        ("memory", f"{verdict}: {size(memory.total)} {of}, {forecast.margin}", source["memory"]),
        ("  by kind", kinds, source["memory"]),
        ("step", f"{seconds(forecast.step_seconds)}, bound by {t.binds}", "formula"),
        ("  matmul", f"{seconds(t.matmul)} at {MATMUL_SHARE:.0%} of {chip.flops / 1e12:.0f} TFLOP/s", source["flops"]),
        ("  memory", f"{seconds(t.memory)} at {MEMORY_SHARE:.0%} of {bandwidth}/s", source["memory traffic"]),
        ("  links", f"{links}; {seconds(t.waits)} of it not hidden", source["link traffic"]),
        ("  moved", moved, source["link traffic"]),
        ("MFU", f"{forecast.mfu:.1%}", "formula"),
        ("conversation", f"{forecast.rate:,.0f} s a second", "formula"),
        ("checkpoint", f"{size(forecast.checkpoint_bytes)}, {saving} at 1 GB/s a host", "formula"),
    ]  # fmt: skip
    lines += [("complaint", text, COMPILER) for text in forecast.complaints]
    if forecast.per_dollar is not None:
        lines.append(("  for a dollar", f"{forecast.per_dollar:,.0f} s of conversation", "formula"))
    if forecast.days is not None:
        cost = "" if forecast.cost is None else f", {forecast.cost:,.0f} dollars"
        lines.append(("training", f"{forecast.days:,.3g} days for {forecast.tokens:.3g} positions{cost}", "formula"))
    return lines


def largest(forecast: Forecast) -> list[Any]:
    return sorted(forecast.work.traffic, key=lambda x: -x.bytes)[:6]


def serving_lines(serving: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    late = ", TOO LATE" if serving["turn_seconds"] > MICROTURN_SECONDS else ""
    axes = " x ".join(f"{axis} {n}" for axis, n in serving["mesh"].items() if n > 1) or "one device"
    ring, weights = size(serving["session_bytes"]), size(serving["weight_bytes"])
    memory, in_time = serving["sessions_per_device_by_memory"], serving["sessions_per_device_by_time"]
    full, alone = seconds(serving["turn_seconds"]), seconds(serving["turn_seconds_of_one"])
    terms = ", ".join(f"{name} {seconds(value)}" for name, value in serving["terms"].items())
    tensor = serving["mesh"]["tensor"]
    unit = f"{tensor} tensor neighbours" if tensor > 1 else "a device"
    lines = [
        ("mesh", axes),
        ("live sessions", f"{serving['sessions']:,} on the slice, bound by {serving['binds']}"),
        ("  in memory", f"{memory:,} for {unit}; on each device {ring} a session beside {weights} of weights"),
        ("  in time", f"{in_time:,} for {unit}"),
        ("a micro-turn", f"{full} of 200 ms{late}; {alone} with one for {unit}"),
        ("  by term", terms),
    ]
    return [(label, value, "formula") for label, value in lines]


def to_text(lines: Sequence[tuple[str, str, str]]) -> str:
    width = max(len(label) for label, _, _ in lines)
    return "\n".join(f"{label.ljust(width)}  {value}  [{source}]" for label, value, source in lines)


def amount(count: float) -> str:
    return f"{count / 1e9:,.1f}B" if count >= 1e9 else f"{count / 1e6:,.1f}M"


def size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def seconds(value: float) -> str:
    if value >= 120:
        return f"{value / 60:,.1f} min"
    if value < 1e-4:
        return f"{value * 1e6:.1f} µs"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
