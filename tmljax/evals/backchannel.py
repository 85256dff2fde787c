"""The model's backchannels: Full-Duplex-Bench v1, and whether one came where one belonged.

Their evaluator, quirks included, over the voiced segments of the output in the order of time:
- a segment longer than 3 s is a turn: take-over 1, and nothing after it is looked at;
- every other segment is an event, and gives a verdict on its words that overwrites the one before: take-over
  unless it lasts less than 1 s and has at most two words. The last verdict stays;
- frequency is events per second of output;
- the distance to the human timing is scipy's `jensenshannon` (the square root of the divergence, natural
  logarithm) between event counts in 200 ms bins (+1e-10, normalised) and the reference distribution, linearly
  resampled to as many bins; 1 where there is no event.
Their reference (ICC) may not be passed on, so ours is the truth windows; theirs is taken where it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import jensenshannon

from tmljax.evals import intervals
from tmljax.evals.intervals import EPSILON, Interval
from tmljax.evals.item import Item, Measurement, Truth, gather, samples_of, segments
from tmljax.evals.take_over import takes_over
from tmljax.stream.record import Word
from tmljax.stream.text import spoken_form

BIN = 0.2  # seconds
FLOOR = 1e-10
LONGEST = 3.0  # seconds
SHORT = 1.0
SHORT_WORDS = 2
ACKNOWLEDGEMENTS = frozenset(
    {"mm", "hm", "hmm", "mhm", "uh", "huh", "uhhuh", "ah", "aha", "oh", "wow", "yeah", "yes", "okay", "right", "sure"}
)
VAD_GAP = 0.1  # seconds; Silero's default minimum silence


class Verdict(NamedTuple):
    take_over: bool
    events: tuple[Interval, ...]


def judge(voiced: Sequence[Interval], words: Sequence[Word]) -> Verdict:
    """The walk over the voiced segments."""
    events: list[Interval] = []
    take_over = False
    for start, end in voiced:
        if end - start > LONGEST + EPSILON:
            return Verdict(True, tuple(events))
        inside = sum(heard_in(w, start, end) for w in words)
        take_over = end - start >= SHORT - EPSILON or inside > SHORT_WORDS
        events.append((start, end))
    return Verdict(take_over, tuple(events))


def heard_in(word: Word, start: float, end: float) -> bool:
    """Their test of a word against a segment: touching an edge counts, but for a word ending at the start."""
    return word.start <= end and (word.end > start or word.start >= start)


def histogram(events: Sequence[Interval], seconds: float) -> np.ndarray:
    """float64 [bins], sums to 1: each event counts in every 200 ms bin it touches."""
    counts = np.zeros(int(seconds / BIN) + 1)
    for start, end in events:
        counts[int(start / BIN) : int(end / BIN) + 1] += 1
    counts += FLOOR
    return counts / counts.sum()


def distance(events: Sequence[Interval], seconds: float, reference: Sequence[float]) -> float:
    """Jensen-Shannon distance of the events' timing to a reference distribution of any length."""
    if not events:
        return 1.0
    found = histogram(events, seconds)
    place = np.linspace(0, 1, len(reference))
    wanted = np.interp(np.linspace(0, 1, len(found)), place, np.asarray(reference, np.float64))
    return float(jensenshannon(found, wanted))


def reference_of(item: Item, truth: Truth) -> np.ndarray:
    """The truth windows as a distribution over the span."""
    begin, end = truth["span"]
    return histogram([(a - begin, b - begin) for a, b in truth["windows"]], end - begin)


def in_span(item: Item, truth: Truth) -> tuple[list[Interval], list[Word], float]:
    """Voiced segments, words and length of the output cropped to the span; times from its start."""
    begin, end = truth["span"]
    voiced = segments(item.performance.audio[samples_of(begin) : samples_of(end)], VAD_GAP)
    words = intervals.crop(item.performance.words, begin, end)
    return voiced, [Word(w.text, w.start - begin, w.end - begin) for w in words], end - begin


def hit(item: Item, window: Interval) -> bool:
    """An acknowledgement and no more than that begins in the window, by the claimed words."""
    words = intervals.starting(item.performance.words, *window)
    said = spoken_form(" ".join(w.text for w in words)).split()
    return bool(said) and not takes_over(words) and ACKNOWLEDGEMENTS.issuperset(said)


def strays(item: Item, truth: Truth) -> float:
    """Utterances in the span that begin in no window, per minute."""
    begin, end = truth["span"]
    said = intervals.spans(intervals.crop(item.performance.words, begin, end), VAD_GAP)
    outside = [s for s, _ in said if not any(a - EPSILON <= s <= b + EPSILON for a, b in truth["windows"])]
    return 60 * len(outside) / (end - begin)


def measure(items: Sequence[Item], references: Mapping[str, Sequence[float]] | None = None) -> list[Measurement]:
    """`references`: session id -> distribution over the span, in place of the truth windows."""
    listening = [(i, t) for i in items for t in i.truths("backchannel")]
    verdicts = [(i, t, judge(voiced, words), s) for i, t in listening for voiced, words, s in [in_span(i, t)]]
    windows = [(i, w) for i, t in listening for w in t["windows"]]
    chosen = references or {}
    return [
        *gather("backchannel_take_over", "rate", "lower", ((i, v.take_over) for i, _, v, _ in verdicts)),
        *gather("backchannel_frequency", "1/s", "higher", ((i, len(v.events) / s) for i, _, v, s in verdicts)),
        *gather(
            "backchannel_distance",
            "distance",
            "lower",
            ((i, distance(v.events, s, chosen.get(i.session.id, reference_of(i, t)))) for i, t, v, s in verdicts),
        ),
        *gather("backchannel_in_window", "rate", "higher", ((i, hit(i, w)) for i, w in windows)),
        *gather("backchannel_stray", "1/min", "lower", ((i, strays(i, t)) for i, t in listening)),
    ]
