"""Take-over rate and latency: Full-Duplex-Bench v1 (arXiv 2503.04721), smooth turn-taking, pauses, interruptions.

The rules are those of its evaluators: no words 0; words that span less than 1 s and are at most three 0 (a
backchannel is no take-over); otherwise 1. Latency counts only where the turn was taken, from the reference
to the first word, and is never negative. Where nobody takes a turn it has no value (theirs divides by zero).
"""

from __future__ import annotations

from collections.abc import Sequence

from tmljax.evals import intervals
from tmljax.evals.item import Item, Measurement, Truth, Turn, gather, turns
from tmljax.stream.record import Word

SHORTEST_TURN = 1.0  # seconds
BACKCHANNEL_WORDS = 3


def takes_over(words: Sequence[Word]) -> bool:
    """The take-over decision on words in the order of time."""
    if not words:
        return False
    return words[-1].end - words[0].start >= SHORTEST_TURN - intervals.EPSILON or len(words) > BACKCHANNEL_WORDS


def latency(words: Sequence[Word], reference: float) -> float | None:
    """Seconds from the reference to the first word, at least 0; None without a take-over."""
    return max(words[0].start - reference, 0.0) if takes_over(words) else None


def starts_early(words: Sequence[Word], reference: float) -> bool | None:
    """Its first word begins before the reference; not applicable where it says nothing."""
    return words[0].start < reference - intervals.EPSILON if words else None


def after_interruption(words: Sequence[Word], end: float) -> list[Word]:
    """What an ASR hears of an output that was cropped at the end of the interruption."""
    return intervals.crop(words, end, float("inf"))


def words_of(item: Item, turn: Turn) -> list[Word]:
    """What was said in this turn, before the user had finished included."""
    return [w for w in item.performance.words if turn.begin - intervals.EPSILON <= w.start < turn.end]


def user_turn(item: Item, turn: Turn) -> intervals.Interval:
    """From the user's first word of this turn to the moment of its end."""
    starts = [w.start for w in item.session.user_words if turn.begin - intervals.EPSILON <= w.start < turn.after]
    return min(starts, default=turn.begin), turn.after


def silences(item: Item, turn: Turn) -> list[Truth]:
    """The pauses in the middle of this turn of the user."""
    begin, after = user_turn(item, turn)
    inside = (t for t in item.truths("silence") if begin + intervals.EPSILON < t["window"][0])
    return [t for t in inside if t["window"][1] <= after + intervals.EPSILON]


def measure(items: Sequence[Item]) -> list[Measurement]:
    replies = [(i, turn) for i in items for turn in turns(i.session)]
    taken = [(i, turn, words_of(i, turn)) for i, turn in replies]
    interruptions = [(i, t["end"]) for i in items for t in i.truths("yield")]
    interrupted = [(i, end, after_interruption(i.performance.words, end)) for i, end in interruptions]
    pauses = [(i, turn) for i, turn in replies if silences(i, turn)]
    return [
        *gather("take_over", "rate", "higher", ((i, takes_over(w)) for i, _, w in taken)),
        *gather("latency", "s", "lower", ((i, latency(w, turn.after)) for i, turn, w in taken)),
        *gather("starts_early", "rate", "lower", ((i, starts_early(w, turn.after)) for i, turn, w in taken)),
        *gather(
            "pause_take_over",
            "rate",
            "lower",
            ((i, takes_over(intervals.overlapping(i.performance.words, *user_turn(i, t)))) for i, t in pauses),
        ),
        *gather("interruption_take_over", "rate", "higher", ((i, takes_over(w)) for i, _, w in interrupted)),
        *gather("interruption_latency", "s", "lower", ((i, latency(w, end)) for i, end, w in interrupted)),
    ]
