"""Full-Duplex-Bench v1's backchannel evaluator with its quirks, and windows."""

import math

import numpy as np
import pytest

from tests.evals.hand import item, reply, say, session, values
from tmljax.evals import backchannel
from tmljax.evals.backchannel import distance, heard_in, histogram, judge
from tmljax.stream.record import Word


def test_last_short_segment_decides():
    short, long_ = (1.0, 1.5), (3.0, 4.5)
    assert judge([long_], []).take_over  # 1.5 s: a take-over, though nothing was said
    assert not judge([long_, (6.0, 6.5)], []).take_over  # …and a later short one takes it back
    assert judge([short, long_], []).take_over
    assert judge([short, long_], []).events == (short, long_)  # both count as events


def test_a_long_segment_ends_the_walk():
    found = judge([(0.0, 0.5), (1.0, 4.5), (6.0, 6.5)], [])
    assert found.take_over
    assert found.events == ((0.0, 0.5),)  # neither the turn nor what follows
    assert not judge([(1.0, 4.0), (5.0, 5.5)], []).take_over  # exactly 3 s is no turn by itself


@pytest.mark.parametrize(("words", "taken"), [(0, False), (2, False), (3, True), (4, True)])
def test_words_in_a_short_segment(words, taken):
    assert judge([(1.0, 1.9)], say("a b c d", 1.0, 0.2)[:words]).take_over is taken


def test_word_against_segment():
    assert heard_in(Word("w", 1.0, 1.2), 1.0, 2.0)
    assert heard_in(Word("w", 1.9, 2.4), 1.0, 2.0)
    assert heard_in(Word("w", 0.5, 1.1), 1.0, 2.0)
    assert heard_in(Word("w", 0.5, 2.5), 1.0, 2.0)
    assert heard_in(Word("w", 2.0, 2.4), 1.0, 2.0)  # begins where the segment ends
    assert not heard_in(Word("w", 0.5, 1.0), 1.0, 2.0)  # ends where it begins
    assert not heard_in(Word("w", 2.1, 2.4), 1.0, 2.0)


def test_histogram_fills_every_bin_touched():
    counts = histogram([(0.25, 0.65), (0.45, 0.5)], 1.0)
    assert len(counts) == 6  # int(1.0 / 0.2) + 1
    assert np.allclose(counts, np.array([0, 1, 2, 1, 0, 0]) / 4, atol=1e-9)


def test_distance_by_hand():
    """Two bins: p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4): sqrt of half of KL(p|m) + KL(q|m), natural logarithm."""
    wanted = math.sqrt(0.5 * (math.log(4 / 3) + 0.5 * math.log((1 / 2) / (3 / 4)) + 0.5 * math.log((1 / 2) / (1 / 4))))
    assert distance([(0.05, 0.1)], 0.3, [0.5, 0.5]) == pytest.approx(wanted, abs=1e-4)
    assert distance([(0.05, 0.1)], 0.3, [1.0, 0.0]) == pytest.approx(0.0, abs=1e-4)
    assert distance([], 0.3, [0.5, 0.5]) == 1.0
    apart = distance([(0.05, 0.1)], 0.3, [0.0, 1.0])
    assert apart == pytest.approx(math.sqrt(math.log(2)), abs=1e-4)


def test_reference_is_resampled_linearly():
    """Three values stretched over five bins: 0, 1/2, 1, 1/2, 0, and scipy normalises."""
    events = [(0.3, 0.3), (0.45, 0.45), (0.5, 0.5), (0.65, 0.65)]  # counts 0, 1, 2, 1, 0
    assert distance(events, 0.9, [0.0, 1.0, 0.0]) == pytest.approx(0.0, abs=1e-4)


STORY = {"kind": "backchannel", "windows": [[2.0, 3.2], [5.0, 6.2]], "span": [0.5, 8.0]}


def story(words):
    made = session(STORY, reply(8.0, 12.0), seconds=12.0, family="model_backchannel", user=say("so", 0.5))
    return values(backchannel.measure([item(made, words)]))


def test_backchannels_in_their_windows():
    found = story([*say("mhm", 2.4), *say("uhhuh", 5.4), *say("i like your story", 8.4)])
    assert found["backchannel_in_window"] == [1.0, 1.0]
    assert found["backchannel_stray"] == [0.0]
    assert found["backchannel_take_over"] == [0.0]  # the reply after the span does not count
    assert found["backchannel_frequency"] == pytest.approx([2 / 7.5])
    assert found["backchannel_distance"][0] < 0.6


def test_elsewhere_and_elsewise():
    found = story([*say("mhm", 4.0), *say("the answer is nine now", 5.2)])
    assert found["backchannel_in_window"] == [0.0, 0.0]  # none; a sentence
    assert found["backchannel_stray"] == pytest.approx([60 / 7.5])
    assert found["backchannel_take_over"] == [1.0]
    silent = story([])
    assert silent["backchannel_distance"] == [1.0]
    assert silent["backchannel_in_window"] == [0.0, 0.0]


def test_a_reference_can_be_given():
    made = session(STORY, seconds=12.0, family="model_backchannel")
    said = item(made, [*say("mhm", 2.4), *say("uhhuh", 5.4)])
    late = np.zeros(38)
    late[-1] = 1.0
    near = values(backchannel.measure([said]))["backchannel_distance"][0]
    far = values(backchannel.measure([said], references={"s0": late.tolist()}))["backchannel_distance"][0]
    assert near < far == pytest.approx(math.sqrt(math.log(2)), abs=1e-3)
