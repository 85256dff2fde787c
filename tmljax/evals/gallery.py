"""The conversations that a report shows: of each family the first one, and the first that went wrong.

The first, not the best: what is shown has to be what a reader would meet.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import soundfile

from tmljax.evals import glossary
from tmljax.evals.item import Item, Measurement, user_audio
from tmljax.evals.timeline import FRAME_SECONDS, timeline_figure, timeline_svg
from tmljax.stream.microturn import SAMPLE_RATE

ROOM = {"first": 8_000_000, "wrong": 4_000_000}  # bytes of sound and drawing in a page
TOLD = (
    "take_over", "latency", "pause_take_over", "takes_new_turn", "stop_latency", "keeps_floor", "false_take_over",
    "content", "verbal_cue", "visual_cue", "backchannel_in_window",
)  # fmt: skip


class Chip(NamedTuple):
    label: str
    state: str  # good, bad, plain or void


class Example(NamedTuple):
    family: str
    session: str
    title: str
    seconds: float
    figure: str  # SVG inside the page
    picture: str  # SVG as a file of its own
    audio: str  # data URI
    chips: list[Chip]


@dataclass
class Gallery:
    frame_seconds: float = FRAME_SECONDS  # of video
    room: dict[str, int] = field(default_factory=lambda: dict(ROOM))
    examples: list[Example] = field(default_factory=list)

    def consider(self, item: Item, found: Sequence[Measurement]) -> None:
        """Takes the item if its family lacks one of its kind and there is room."""
        chips = [c for m in found if m.name in TOLD and (m.unit == "rate" or tells(m)) for c in [chip(m)]]
        shown = [e for e in self.examples if e.family == item.session.family]
        if shown and not (bad(chips) and not any(bad(e.chips) for e in shown)):
            return
        title = glossary.family(item.session.family).label + (", one that went wrong" if shown else "")
        example = Example(
            item.session.family,
            item.session.id,
            title,
            item.seconds,
            timeline_figure(item.session, item.performance, self.frame_seconds),
            timeline_svg(item.session, item.performance, self.frame_seconds),
            flac_uri(item),
            chips,
        )
        kind = "wrong" if shown else "first"
        size = len(example.figure) + len(example.audio)
        if size <= self.room[kind]:
            self.room[kind] -= size
            self.examples.append(example)


def bad(chips: Sequence[Chip]) -> bool:
    return any(c.state == "bad" for c in chips)


def tells(measurement: Measurement) -> bool:
    return any(v.value is not None for v in measurement.values)


def chip(measurement: Measurement) -> Chip:
    label = glossary.measurement(measurement.name).label
    values = [v.value for v in measurement.values if v.value is not None]
    if not values:
        return Chip(f"{label}: not applicable", "void")
    if measurement.unit != "rate":
        return Chip(f"{label} {', '.join(f'{v:.1f} {measurement.unit}' for v in values)}", "plain")
    good = [bool(v) == (measurement.better == "higher") for v in values]
    if len(values) > 1:
        return Chip(f"{label} {sum(map(int, values))}/{len(values)}", "good" if all(good) else "bad")
    answer = "yes" if values[0] else "no"
    return Chip(f"{label}: {answer}", "good" if good[0] else "bad")


def flac_uri(item: Item) -> str:
    """Both voices, the model left and the user right, neither hard to one side."""
    model, user = item.performance.audio, user_audio(item.session)
    samples = min(len(model), len(user))
    both = np.stack([model[:samples], user[:samples]], axis=1)
    mix = both @ np.array([[0.8, 0.35], [0.35, 0.8]], np.float32)
    file = io.BytesIO()
    soundfile.write(file, np.clip(mix, -1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()
