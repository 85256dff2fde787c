"""A conversation as a picture: both waveforms, the words at their times, what ought to happen when.

Pure SVG strings. Colours are CSS variables, so that a page restyles the drawing; `timeline_svg` adds them for a
file of its own, light or dark by the viewer's preference.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from tmljax.config import Stream
from tmljax.evals import intervals
from tmljax.evals.item import Performance, Truth, user_audio
from tmljax.stream.microturn import MICROTURN_SECONDS, SAMPLE_RATE
from tmljax.stream.record import Session, Word

GUTTER = 70  # px left of the clock's zero
SCALE = 84  # px a second
MARGIN = 14
WAVE = 46  # height of a waveform
ROW = 15  # height of a row of words
BAR = 16  # height of a row of truth
LETTER = 6.1  # px, width of a letter at 11 px, roughly
FRAME_SECONDS = Stream().video_every * MICROTURN_SECONDS
PAUSE = 1.0  # seconds between typed words that begin a new line
STEP = 1.5  # px between points of a waveform
THUMB = 24
QUIET = 0.05  # amplitude that fills a lane in which nothing is louder

STYLE = """
.tl{font:11px ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
.tl text{fill:var(--ink)} .tl .faint{fill:var(--faint)} .tl .lane{font-weight:600}
.tl .grid{stroke:var(--line);stroke-width:1} .tl .base{stroke:var(--line)}
.tl .user{fill:var(--user)} .tl .model{fill:var(--model)}
.tl text.user{fill:var(--user-ink)} .tl text.model{fill:var(--model-ink)}
.tl .stem{stroke-width:1;opacity:.45} .tl .stem.user{stroke:var(--user)} .tl .stem.model{stroke:var(--model)}
.tl .reply{fill:var(--reply)} .tl .silence{fill:var(--silence)} .tl .yield{fill:var(--yield)}
.tl .keep_floor{fill:var(--keep)} .tl .backchannel{fill:var(--back)} .tl .cue{fill:var(--cue)}
.tl .shade{opacity:.13} .tl .bar{opacity:.85} .tl text.on{fill:#fff;font-size:10px;font-weight:600}
.tl .playhead{stroke:var(--ink);stroke-width:1.5}
"""

LIGHT = (
    "--paper:#fff;--ink:#1c2330;--faint:#6b7686;--line:#e3e7ed;--user:#3b76d6;--user-ink:#2459ad;--model:#e0702d;"
    "--model-ink:#b04d10;--reply:#2c8f5a;--silence:#c23b4a;--yield:#a8730a;--keep:#17839b;--back:#7a55c7;--cue:#b43a95"
)
DARK = (
    "--paper:#12161d;--ink:#e6eaf1;--faint:#93a0b2;--line:#2a313d;--user:#6ea0f0;--user-ink:#9cc0fa;--model:#f0904e;"
    "--model-ink:#f8b482;--reply:#2f9a63;--silence:#d0505e;--yield:#b98418;--keep:#2496af;--back:#8d6bd8;--cue:#c653a8"
)


class Mark(NamedTuple):
    """A stretch of truth, ready to draw."""

    kind: str
    start: float
    end: float
    label: str


def timeline_svg(session: Session, performance: Performance, frame_seconds: float = FRAME_SECONDS) -> str:
    """A file that stands alone. Video frame i is shown at i x `frame_seconds`."""
    width, height, body = drawing(session, performance, frame_seconds)
    style = (
        f"<style>.tl{{{LIGHT}}}@media (prefers-color-scheme:dark){{.tl{{{DARK}}}}}{STYLE}</style>"
        f'<rect width="{width}" height="{height}" rx="8" style="fill:var(--paper)"/>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="tl" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(session.id)}">{style}{body}</svg>'
    )


def timeline_figure(session: Session, performance: Performance, frame_seconds: float = FRAME_SECONDS) -> str:
    """The same for a page that has STYLE and the colours, with a playhead."""
    width, height, body = drawing(session, performance, frame_seconds)
    head = f'<line class="playhead" x1="{GUTTER}" x2="{GUTTER}" y1="{MARGIN}" y2="{height - 4}"/>'
    return (
        f'<svg class="tl" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(session.id)}" data-gutter="{GUTTER}" data-scale="{SCALE}">{body}{head}</svg>'
    )


def drawing(session: Session, performance: Performance, frame_seconds: float) -> tuple[int, int, str]:
    """Width, height and elements, from top to bottom: clock, user, video, typed, model, truth."""
    seconds = session.frames * intervals.FRAME_SECONDS
    width = round(GUTTER + seconds * SCALE + MARGIN)
    marks, parts, y = marks_of(session), [], MARGIN + 8
    lane, y = voice_lane("user", y, user_audio(session), session.user_words)
    parts.append(lane)
    if session.video is not None and len(session.video):
        parts.append(video_strip(session.video[: math.ceil(seconds / frame_seconds)], frame_seconds, y))
        y += THUMB + 8
    if session.typed:
        parts.append(typed_lane(session.typed, y))
        y += ROW + 6
    top = y
    lane, y = voice_lane("model", y, performance.audio, performance.words)
    shades = "".join(
        f'<rect class="shade {m.kind}" x="{place(m.start)}" y="{top - 2}" width="{length(m)}" height="{y - top}"/>'
        for m in marks
    )
    parts += [shades, lane]
    if marks:
        lane, y = truth_lane(marks, y)
        parts.append(lane)
    return width, y + 6, clock(seconds, y) + "".join(parts)


def place(seconds: float) -> float:
    return round(GUTTER + seconds * SCALE, 1)


def length(mark: Mark) -> float:
    return round(max((mark.end - mark.start) * SCALE, 2), 1)


def clock(seconds: float, bottom: int) -> str:
    ticks = range(int(seconds) + 1)
    return "".join(
        f'<line class="grid" x1="{place(s)}" x2="{place(s)}" y1="{MARGIN + 2}" y2="{bottom}"/>'
        f'<text class="faint" x="{place(s)}" y="{MARGIN - 2}" text-anchor="middle">{s}{" s" if s == 0 else ""}</text>'
        for s in ticks
    )


def voice_lane(who: str, y: int, samples: np.ndarray, words: Sequence[Word]) -> tuple[str, int]:
    """A waveform with its words under it, as many rows as they need; and where the next lane begins."""
    rows = seat([(place(w.start), place(w.start) + LETTER * len(w.text) + 5) for w in words])
    middle = y + WAVE / 2
    parts = [
        f'<text class="lane {who}" x="8" y="{middle + 4}">{who}</text>',
        f'<line class="base" x1="{GUTTER}" x2="{place(len(samples) / SAMPLE_RATE)}" y1="{middle}" y2="{middle}"/>',
        f'<path class="{who}" d="{envelope(samples, middle)}"/>',
    ]
    for word, row in zip(words, rows, strict=True):
        x, base = place(word.start), y + WAVE + 11 + ROW * row
        parts.append(
            f'<line class="stem {who}" x1="{x}" x2="{x}" y1="{y + 4}" y2="{base}"/>'
            f'<text class="{who}" x="{x + 2}" y="{base}">{escape(word.text)}</text>'
        )
    return "".join(parts), y + WAVE + ROW * (max(rows, default=0) + 1) + 10


def envelope(samples: np.ndarray, middle: float) -> str:
    """The path around the extremes of each STEP pixels."""
    per = round(SAMPLE_RATE * STEP / SCALE)
    whole = np.pad(np.asarray(samples, np.float32), (0, -len(samples) % per)).reshape(-1, per)
    full = max(float(np.quantile(np.abs(whole).max(1), 0.99)), QUIET) if whole.size else QUIET
    reach = np.clip(np.stack([whole.max(1), whole.min(1)]) / full, -1, 1) * WAVE / 2
    xs = [f"{GUTTER + i * STEP:.1f}" for i in range(whole.shape[0])]
    above = [f"{x},{middle - max(r, 0.4):.1f}" for x, r in zip(xs, reach[0], strict=True)]
    below = [f"{x},{middle - min(r, -0.4):.1f}" for x, r in zip(xs, reach[1], strict=True)]
    return "M" + "L".join([*above, *reversed(below)]) + "Z" if xs else ""


def seat(extents: Sequence[tuple[float, float]]) -> list[int]:
    """For things from left to right: the first row in which each finds room."""
    ends: list[float] = []
    rows = []
    for start, end in extents:
        row = next((r for r, taken in enumerate(ends) if taken <= start), len(ends))
        ends[row : row + 1] = [end]
        rows.append(row)
    return rows


def marks_of(session: Session) -> list[Mark]:
    return sorted((m for t in session.truth for m in marks_of_truth(t)), key=lambda m: m.start)


def marks_of_truth(truth: Truth) -> list[Mark]:
    kind = truth["kind"]
    wanted = " ".join(truth.get("content", ()))
    if kind == "yield":
        return [Mark(kind, truth["at"], truth["end"], "stop")]
    if kind == "keep_floor":
        return [Mark(kind, truth["window"][0], max(truth["until"], truth["window"][1]), "go on")]
    if kind == "backchannel":
        return [Mark(kind, a, b, "mm-hm") for a, b in truth["windows"]]
    label = {"reply": f"reply: {wanted}" if wanted else "reply", "silence": "silence"}.get(kind, f"say: {wanted}")
    return [Mark(kind, *truth["window"], label)]


def truth_lane(marks: Sequence[Mark], y: int) -> tuple[str, int]:
    rows = seat([(m.start, m.end + 0.02) for m in marks])
    parts = [f'<text class="lane faint" x="8" y="{y + 12}">ought to</text>']
    for mark, row in zip(marks, rows, strict=True):
        top = y + row * (BAR + 3)
        room = int((length(mark) - 8) / LETTER)
        shown = mark.label if len(mark.label) <= room else mark.label[: max(room - 1, 0)] + "…" if room > 3 else ""
        parts.append(
            f"<g><title>{escape(mark.label)} ({mark.start:.2f} to {mark.end:.2f} s)</title>"
            f'<rect class="bar {mark.kind}" x="{place(mark.start)}" y="{top}" width="{length(mark)}" height="{BAR}" '
            'rx="3"/>'
            f'<text class="on" x="{place(mark.start) + 4}" y="{top + 11.5}">{escape(shown)}</text></g>'
        )
    return "".join(parts), y + (max(rows) + 1) * (BAR + 3) + 2


def typed_lane(typed: Sequence[Word], y: int) -> str:
    lines: list[list[Word]] = []
    for word in typed:
        if lines and word.start - lines[-1][-1].start < PAUSE:
            lines[-1].append(word)
        else:
            lines.append([word])
    return f'<text class="lane user" x="8" y="{y + 11}">typed</text>' + "".join(
        f'<text class="user" x="{place(line[0].start)}" y="{y + 11}">⌨ {escape(" ".join(w.text for w in line))}</text>'
        for line in lines
    )


def video_strip(video: np.ndarray, frame_seconds: float, y: int) -> str:
    """Frames at the time they are seen, as many as there is room for."""
    parts, free = [f'<text class="lane user" x="8" y="{y + THUMB / 2 + 4}">video</text>'], 0.0
    for i, frame in enumerate(video):
        x = place(i * frame_seconds)
        if x < free:
            continue
        free = x + THUMB + 2
        parts.append(f'<image x="{x}" y="{y}" width="{THUMB}" height="{THUMB}" href="{png_uri(frame)}"/>')
    return "".join(parts)


def png_uri(frame: np.ndarray) -> str:
    """uint8 [H, W, 3] as a data URI."""
    height, width, _ = frame.shape
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(frame))
    chunks: Iterable[tuple[bytes, bytes]] = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()
