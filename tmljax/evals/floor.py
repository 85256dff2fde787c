"""Who holds the floor: yield to an interruption, keep it under a backchannel, leave it alone when nobody asks.

Holding and stopping are judged on what is heard (energy of the output), taking a turn on the claimed words.
If the model was not talking when the event came, the event tried nothing: not applicable.
"""

from __future__ import annotations

from collections.abc import Sequence

from tmljax.evals import intervals
from tmljax.evals.item import MODEL_GAP, Item, Measurement, Truth, gather
from tmljax.evals.take_over import takes_over
from tmljax.evals.timing import reaction

HEED = 1.0  # seconds after the onset; an interrupted reply has at least as much left, so that its own end is later
SLACK = 0.4  # seconds that a reply may end before its time, by grid and pace


def stopped(item: Item, truth: Truth) -> bool | None:
    """The speech that the interruption met ended within HEED of its onset."""
    lasted = reaction(item, truth["at"])
    return None if lasted is None else lasted <= HEED + intervals.EPSILON


def takes_new_turn(item: Item, truth: Truth) -> bool | None:
    """It stopped, and then took the turn with words that begin after the interruption."""
    gave_way = stopped(item, truth)
    if not gave_way:
        return gave_way
    silent_from = max(truth["end"], truth["at"] + (reaction(item, truth["at"]) or 0.0))
    return takes_over(intervals.starting(item.performance.words, silent_from, float("inf")))


def keeps_floor(item: Item, truth: Truth) -> bool | None:
    """It goes on talking past the user's backchannel to its end: the truth's, or its own in the clean run if that
    comes first. Not applicable where that end comes before the backchannel is over."""
    begin, over = truth["window"]
    held = intervals.at(item.model_segments, begin)
    end = truth["until"]
    if item.clean_segments is not None:
        own = intervals.at(item.clean_segments, begin)
        end = min(end, own[1]) if own else end
    if held is None or end < over:
        return None
    return held[1] >= end - SLACK - intervals.EPSILON


def speaks_unasked(item: Item, truth: Truth) -> bool:
    """A take-over by words that begin inside the silence window."""
    return takes_over(intervals.starting(item.performance.words, *truth["window"]))


def utters(item: Item, truth: Truth) -> bool:
    """Any word at all inside the silence window."""
    return bool(intervals.starting(item.performance.words, *truth["window"]))


def claimed_reaction(item: Item, truth: Truth) -> float | None:
    """The stop latency by the claimed words instead of the sound."""
    spurt = intervals.at(intervals.spans(item.performance.words, MODEL_GAP), truth["at"])
    return None if spurt is None else spurt[1] - truth["at"]


def measure(items: Sequence[Item]) -> list[Measurement]:
    interruptions = [(i, t) for i in items for t in i.truths("yield")]
    backchannels = [(i, t) for i in items for t in i.truths("keep_floor")]
    silences = [(i, t) for i in items for t in i.truths("silence")]
    return [
        *gather("yields", "rate", "higher", ((i, stopped(i, t)) for i, t in interruptions)),
        *gather("takes_new_turn", "rate", "higher", ((i, takes_new_turn(i, t)) for i, t in interruptions)),
        *gather("stop_latency", "s", "lower", ((i, reaction(i, t["at"])) for i, t in interruptions)),
        *gather("stop_latency_claimed", "s", "lower", ((i, claimed_reaction(i, t)) for i, t in interruptions)),
        *gather("keeps_floor", "rate", "higher", ((i, keeps_floor(i, t)) for i, t in backchannels)),
        *gather("false_take_over", "rate", "lower", ((i, speaks_unasked(i, t)) for i, t in silences)),
        *gather("false_utterance", "rate", "lower", ((i, utters(i, t)) for i, t in silences)),
    ]
