"""Verbal and visual cues (CueSpeak): the right content inside the window, otherwise 0.

By the claimed words. A verbal cue wants every word of the content to start inside its window; a visual one
wants the utterance to begin inside, and lets it finish. What is said outside the windows is counted apart, since a
model could try its luck all the time.
"""

from __future__ import annotations

from collections.abc import Sequence

from tmljax.evals import intervals
from tmljax.evals.content import contains, normalise
from tmljax.evals.item import MODEL_GAP, Item, Measurement, Truth, gather
from tmljax.stream.record import Word


def spoken_at_cue(item: Item, truth: Truth) -> bool:
    return contains((w.text for w in words_at_cue(item, truth)), truth["content"])


def words_at_cue(item: Item, truth: Truth) -> list[Word]:
    begin, end = truth["window"]
    if truth["modality"] == "verbal":
        return intervals.starting(item.performance.words, begin, end)
    return [w for a, b in utterances(item, truth) for w in intervals.starting(item.performance.words, a, b)]


def utterances(item: Item, truth: Truth) -> list[intervals.Interval]:
    """Those that begin in the cue's window."""
    begin, end = truth["window"]
    spans = intervals.spans(item.performance.words, MODEL_GAP)
    return [(a, b) for a, b in spans if begin - intervals.EPSILON <= a <= end + intervals.EPSILON]


def answered(item: Item, truth: Truth) -> float:
    """Until when what is said belongs to this cue: the end of its window, or of what began in that of a visual one."""
    begun = utterances(item, truth) if truth["modality"] == "visual" else []
    return max([truth["window"][1], *(b for _, b in begun)])


def delay(item: Item, truth: Truth) -> float | None:
    """Seconds from the window's start to the first word of the content; None where it was not said in time."""
    if not spoken_at_cue(item, truth):
        return None
    words = words_at_cue(item, truth)
    first = normalise(truth["content"])[0]
    return next((max(w.start - truth["window"][0], 0.0) for w in words if first in normalise([w.text])), None)


def stray(item: Item, truth: Truth) -> bool:
    """The content of this cue was said between its window and the cue or reply before it: too early, or too late for
    that one."""
    cues = [answered(item, t) for t in item.truths("cue") if t["window"][0] < truth["window"][0]]
    replies = [t["window"][1] for t in item.truths("reply") if t["window"][0] < truth["window"][0]]
    begin = max(cues + replies, default=0.0)
    words = [w for w in item.performance.words if begin < w.start < truth["window"][0] - intervals.EPSILON]
    return contains((w.text for w in words), truth["content"])


def measure(items: Sequence[Item]) -> list[Measurement]:
    return [
        m
        for modality in ("verbal", "visual")
        for cues in [[(i, t) for i in items for t in i.truths("cue") if t["modality"] == modality and t["content"]]]
        for m in (
            *gather(f"{modality}_cue", "rate", "higher", ((i, spoken_at_cue(i, t)) for i, t in cues)),
            *gather(f"{modality}_cue_delay", "s", "lower", ((i, delay(i, t)) for i, t in cues)),
            *gather(f"{modality}_cue_stray", "rate", "lower", ((i, stray(i, t)) for i, t in cues)),
        )
    ]
