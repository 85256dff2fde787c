"""Loss curves and the histogram of tick times, as SVG strings in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from tmljax.evals import glossary

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 330, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 26, 24
SMOOTHING = 0.04  # of the curve's length: the width of the running mean
DECADE = 8.0  # a curve that spans more than this ratio is drawn on a logarithmic scale


def curves(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """A panel for every loss in metrics.jsonl, training as a line and held-out as dots of the same name.

    A row is one logged step; `loss/text` and `heldout/loss/text` (any prefix) belong together.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if "loss/" in name and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, []).append((float(row["step"]), float(value)))
    order = list(glossary.LOSSES)
    known = sorted(n for n in series if n.startswith("loss/"))
    trained = sorted(known, key=lambda n: order.index(n) if n in order else len(order))
    held_out = {name: next((p for n, p in series.items() if n.endswith("/" + name)), []) for name in trained}
    return [panel(glossary.loss(name), series[name], held_out[name]) for name in trained]


def panel(title: str, trained: Points, held_out: Points) -> str:
    values = np.array([v for _, v in (*trained, *held_out)])
    steps = np.array([s for s, _ in (*trained, *held_out)])
    logarithmic = bool(values.min() > 0 and values.max() / values.min() > DECADE)
    scale = np.log10 if logarithmic else np.asarray
    low, high = bounds(scale(values))
    last = max(float(steps.max()), 1.0)

    def spot(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (float(scale(value)) - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<text x="{LEFT}" y="15" class="title">{escape(title)}{" (log)" if logarithmic else ""}</text>']
    for tick in ticks(low, high, logarithmic):
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (float(scale(tick)) - low) / (high - low)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="faint" x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{tick:.3g}</text>'
        )
    parts.append(f'<text class="faint" x="{LEFT}" y="{HEIGHT - 6}">0</text>')
    parts.append(f'<text class="faint" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step {last:,.0f}</text>')
    parts.append(f'<polyline class="raw" points="{" ".join(spot(*p) for p in thin(trained))}"/>')
    parts.append(f'<polyline class="smooth" points="{" ".join(spot(*p) for p in thin(smooth(trained)))}"/>')
    parts += [f'<circle class="held" cx="{x}" cy="{y}" r="3"/>' for p in held_out for x, y in [spot(*p).split(",")]]
    parts.append(f'<text class="faint" x="{WIDTH - RIGHT}" y="15" text-anchor="end">{trained[-1][1]:.3g}</text>')
    return svg(WIDTH, HEIGHT, "".join(parts), f"{title} over steps")


def bounds(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round values in the range of the (scaled) axis."""
    if logarithmic:
        exponents = range(math.floor(low), math.ceil(high) + 1)
        marks = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= math.log10(m * 10.0**e) <= high]
        return marks if len(marks) <= 6 else marks[:: -(-len(marks) // 6)]
    raw = (high - low) / 6
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def smooth(points: Points) -> Points:
    """Running mean, centred, narrower at the ends."""
    values = np.array([v for _, v in points])
    half = max(round(len(values) * SMOOTHING / 2), 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    begin, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return [(s, float(v)) for (s, _), v in zip(points, (sums[end] - sums[begin]) / (end - begin), strict=True)]


def thin(points: Points, most: int = 400) -> Points:
    return points if len(points) <= most else [points[i] for i in np.linspace(0, len(points) - 1, most).astype(int)]


def histogram(milliseconds: Sequence[float], p50: float, p99: float) -> str:
    """Ticks by their time. The axis ends a little beyond p99; what is slower is in the last bar."""
    width, height = 700, 190
    values = np.asarray(milliseconds, np.float64)
    most = max(p99 * 1.25, p50 * 2, 1e-3)
    counts, edges = np.histogram(np.minimum(values, most), bins=60, range=(0, most))
    inner, tall = width - LEFT - RIGHT, height - TOP - BOTTOM
    parts = []
    for count, edge in zip(counts, edges[:-1], strict=True):
        reach = tall * count / max(counts.max(), 1)
        x = LEFT + inner * edge / most
        parts.append(
            f'<rect class="column" x="{x:.1f}" y="{height - BOTTOM - reach:.1f}" '
            f'width="{inner / 60 - 1:.1f}" height="{reach:.1f}"/>'
        )
    for tick in ticks(0, most, False):
        x = LEFT + inner * tick / most
        parts.append(f'<text class="faint" x="{x:.1f}" y="{height - 7}" text-anchor="middle">{tick:.3g}</text>')
    parts.append(f'<text class="faint" x="{LEFT - 8}" y="{height - 7}" text-anchor="end">ms</text>')
    for name, value in (("p50", p50), ("p99", p99)):
        x = LEFT + inner * value / most
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 20}" y2="{height - BOTTOM}"/>'
            f'<text x="{x + 4:.1f}" y="{TOP - 11}">{name} {value:.3g} ms</text>'
        )
    return svg(width, height, "".join(parts), "histogram of tick times")


def svg(width: int, height: int, body: str, label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(label)}">{body}</svg>'
    )
