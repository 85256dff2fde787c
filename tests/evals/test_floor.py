"""Yielding, keeping the floor, leaving it alone; and what does not apply."""

import pytest

from tests.evals.hand import item, reply, say, session, values
from tmljax.evals import floor

INTERRUPTED = session(
    reply(2.0, 4.0, "monday"),
    {"kind": "yield", "at": 4.0, "end": 5.5},
    reply(5.5, 10.0, "nine"),
    user=[*say("list the days", 0.6), *say("wait what is nine", 4.0, 0.375)],
    family="interruption",
)
MURMUR = session(
    reply(2.0, 10.0), {"kind": "keep_floor", "window": [4.0, 4.4], "until": 5.4}, family="user_backchannel"
)


def interrupted(words):
    return values(floor.measure([item(INTERRUPTED, words)]))


def test_stops_and_takes_the_new_turn():
    found = interrupted([*say("monday tuesday", 2.4, 1.0), *say("the answer is nine", 6.0)])
    assert found["yields"] == found["takes_new_turn"] == [1.0]
    assert found["stop_latency"] == pytest.approx([0.4], abs=0.03)
    assert found["stop_latency_claimed"] == pytest.approx([0.4])


def test_stops_and_says_nothing_more():
    found = interrupted(say("monday tuesday", 2.4, 1.0))
    assert found["yields"] == [1.0]
    assert found["takes_new_turn"] == [0.0]


def test_talks_through():
    found = interrupted(say("monday tuesday wednesday thursday friday saturday", 2.4, 1.0))
    assert found["yields"] == found["takes_new_turn"] == [0.0]
    assert found["stop_latency"] == pytest.approx([4.4], abs=0.03)  # until 8.4, not cut at the user's end


def test_who_ends_when_all_is_said_did_not_give_way():
    """Until 5.4, before the interruption is over at 5.5: a list of three days, finished undisturbed."""
    assert interrupted(say("monday tuesday wednesday", 2.4, 1.0))["yields"] == [0.0]


def test_not_talking_is_not_applicable():
    found = interrupted(say("the answer is nine", 6.0))
    assert found["yields"] == found["takes_new_turn"] == found["stop_latency"] == [None]


def murmured(words, clean=None):
    return values(floor.measure([item(MURMUR, words, clean)]))["keeps_floor"]


def test_keeps_the_floor():
    long_, cut = say("a b c d e f g h i", 2.4), say("a b c d e", 2.4)
    assert murmured(long_) == [1.0]  # until 6.0
    assert murmured(cut) == [0.0]  # stops at 4.4
    assert murmured(say("a b", 2.4)) == [None]  # had finished before
    assert murmured([]) == [None]
    assert murmured([*say("a b c d e", 2.4), *say("f g h", 5.2)]) == [0.0]  # falls silent for 0.8 s


def test_its_own_end_counts_where_it_comes_first():
    shorter = say("a b c d e f", 2.4)  # until 4.8
    assert murmured(shorter) == [0.0]  # against the truth's 5.4
    assert murmured(shorter, clean=shorter) == [1.0]  # it would have ended there anyway
    assert murmured(say("a b c d e", 2.2), clean=say("a b c d e", 2.2)) == [None]  # ends before the murmur is over


def test_false_take_over():
    made = session({"kind": "silence", "window": [1.0, 4.0]}, family="no_answer")
    found = lambda words: values(floor.measure([item(made, words)]))  # noqa: E731
    assert found(say("the answer is nine", 2.0))["false_take_over"] == [1.0]
    assert found(say("okay", 2.0))["false_take_over"] == [0.0]
    assert found(say("okay", 2.0))["false_utterance"] == [1.0]
    assert found(say("the answer is nine", 4.4))["false_utterance"] == [0.0]
