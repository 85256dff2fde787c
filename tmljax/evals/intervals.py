"""Intervals of seconds and words on a clock: the arithmetic that every metric shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tmljax.stream.microturn import FRAME_SAMPLES, SAMPLE_RATE
from tmljax.stream.record import Word

Interval = tuple[float, float]

FRAME_SECONDS = FRAME_SAMPLES / SAMPLE_RATE
EPSILON = 1e-6  # seconds; times come from 25 ms and 200 ms grids and carry rounding
ROUNDING = 1e-3  # seconds; truth is written in milliseconds, word times are finer


def merge(intervals: Iterable[Sequence[float]], gap: float = 0.0) -> list[Interval]:
    """Sorted intervals, joined where the silence between two is at most `gap` seconds."""
    joined: list[Interval] = []
    for start, end in sorted((float(s), float(e)) for s, e in intervals):
        if joined and start - joined[-1][1] <= gap + EPSILON:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def spans(words: Iterable[Word], gap: float = 0.0) -> list[Interval]:
    """The stretches that words fill."""
    return merge(((w.start, w.end) for w in words), gap)


def at(intervals: Iterable[Interval], seconds: float) -> Interval | None:
    """The interval that began before this moment and still lasts, or None."""
    return next((i for i in intervals if i[0] < seconds - EPSILON and i[1] > seconds + EPSILON), None)


def starting(words: Iterable[Word], begin: float, end: float) -> list[Word]:
    """Words that start in [begin, end]."""
    return [w for w in words if begin - EPSILON <= w.start <= end + EPSILON]


def overlapping(words: Iterable[Word], begin: float, end: float) -> list[Word]:
    """Words of which some part lies in (begin, end)."""
    return [w for w in words if w.end > begin + EPSILON and w.start < end - EPSILON]


def crop(words: Iterable[Word], begin: float, end: float) -> list[Word]:
    """Overlapping words cut to [begin, end], as if the audio had been cropped before it was transcribed."""
    return [Word(w.text, max(w.start, begin), min(w.end, end)) for w in overlapping(words, begin, end)]


def mask(intervals: Iterable[Interval], frames: int) -> np.ndarray:
    """bool [frames]: the 25 ms frames whose middle lies in an interval."""
    inside = np.zeros(frames, bool)
    for start, end in intervals:
        inside[max(round(start / FRAME_SECONDS), 0) : max(round(end / FRAME_SECONDS), 0)] = True
    return inside
