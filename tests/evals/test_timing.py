"""Full-Duplex-Bench v1.5: intervals, paired runs, behaviour proxies."""

import numpy as np
import pytest

from tests.evals.hand import item, reply, say, session, values
from tmljax.evals import timing
from tmljax.evals.intervals import merge
from tmljax.evals.item import MODEL_GAP, USER_GAP, user_audio
from tmljax.evals.timing import behaviour, events_of, response_intervals, stop_intervals, without_events


def test_merge_gaps():
    pieces = [(0.0, 1.0), (1.6, 2.0), (2.61, 3.0)]
    assert merge(pieces, 0.6) == [(0.0, 2.0), (2.61, 3.0)]
    assert merge(pieces, 0.5) == pieces
    assert merge([(1.0, 2.0), (0.0, 3.0)]) == [(0.0, 3.0)]


def test_the_pauses_inside_a_segment_are_those_of_the_benchmark():
    """get_timing.py: 0.6 s for the user, 0.5 s for the model."""
    assert (USER_GAP, MODEL_GAP) == (0.6, 0.5)


def test_stop_intervals():
    model = [(1.0, 4.0), (6.0, 9.0)]
    user = [(0.0, 1.5), (3.0, 7.0), (9.0, 9.5)]
    assert stop_intervals(user, model) == [(1.0, 1.5), (3.0, 4.0), (6.0, 7.0)]  # touching at 9.0 is no overlap
    assert stop_intervals([], model) == []


def test_of_one_end_the_shortest_stays():
    assert stop_intervals([(1.0, 5.0), (3.0, 5.0002)], [(0.0, 6.0)]) == [(3.0, 5.0002)]
    assert stop_intervals([(1.0, 5.0), (3.0, 5.002)], [(0.0, 6.0)]) == [(1.0, 5.0), (3.0, 5.002)]


def test_response_intervals():
    model = [(2.0, 3.0), (6.0, 7.0)]
    assert response_intervals([(0.0, 1.0), (4.0, 5.5)], model) == [(1.0, 2.0), (5.5, 6.0)]
    assert response_intervals([(0.0, 1.0), (1.2, 1.8)], model) == [(1.8, 2.0)]  # the later end wins
    assert response_intervals([(0.0, 2.0)], model) == [(2.0, 6.0)]  # a start at the end itself is not after it
    assert response_intervals([(8.0, 9.0)], model) == []


INTERRUPTED = (reply(2.0, 4.0, "monday"), {"kind": "yield", "at": 4.0, "end": 5.5}, reply(5.5, 10.0, "nine"))
USER = [*say("list the days", 0.6), *say("wait what is nine", 4.0, 0.375)]


def test_without_events_blanks_only_the_event():
    made = session(*INTERRUPTED, user=USER, family="interruption")
    clean = without_events(made)
    before, after = user_audio(made), user_audio(clean)
    inside = slice(round(4.02 * 16000), round(5.48 * 16000))
    assert np.abs(before[inside]).max() > 0.05
    assert np.abs(after[inside]).max() < 1e-3
    outside = slice(0, round(3.9 * 16000))
    assert np.array_equal(before[outside], after[outside])
    assert [w.text for w in clean.user_words] == ["list", "the", "days"]
    assert [t["kind"] for t in clean.truth] == ["reply"]
    assert clean.user_dmel.shape == made.user_dmel.shape
    assert clean.id == made.id
    assert np.array_equal(clean.audio[:, 0], made.audio[:, 0])


def test_blank_leaves_room_tone():
    rng = np.random.default_rng(0)
    noisy = (rng.standard_normal(160_000) * 0.01).astype(np.float32)
    noisy[80_000:90_000] += 0.5
    blanked = timing.blank(noisy, (5.0, 5.625))
    assert np.abs(blanked[80_400:89_600]).max() < 0.06
    assert 0.007 < blanked[80_400:89_600].std() < 0.011


def test_nothing_to_blank():
    with pytest.raises(ValueError, match="no event"):
        without_events(session(reply(2.0, 5.0)))


def test_bystander_is_an_event_of_its_family_only():
    silence = {"kind": "silence", "window": [0.0, 4.0]}
    user = say("anna come here", 1.0)
    assert events_of(session(silence, user=user, family="no_answer")) == [(1.0, pytest.approx(2.2))]
    assert events_of(session(silence, family="no_answer")) == [(0.0, 4.0)]
    assert events_of(session(silence, user=user, family="pause")) == []


def test_a_request_after_it_is_no_part_of_the_event():
    """Of what others say, and of what is heard in the background only; nor is it taken from the clean run."""
    request = say("spell moon", 3.0)
    end = request[-1].end
    truth = {"kind": "silence", "window": [0.0, end]}, reply(end, 8.0, "m")
    made = session(*truth, user=[*say("anna come here", 1.0), *request], family="no_answer")
    assert events_of(made) == [(1.0, pytest.approx(2.2))]
    assert [w.text for w in without_events(made).user_words] == ["spell", "moon"]
    assert events_of(session(*truth, user=request, family="no_answer")) == [(0.0, 3.0)]


@pytest.mark.parametrize(
    ("said", "act"),
    [
        ([*say("monday tuesday", 2.4, 0.9), *say("the answer is nine", 5.9)], "respond"),
        (say("monday tuesday wednesday thursday friday", 2.4, 0.9), "resume"),
        (say("monday", 2.4, 1.0), "silent"),
        ([*say("monday", 2.4), *say("the answer is ten", 5.9)], "other"),
    ],
)
def test_behaviour_proxy(said, act):
    clean = say("monday tuesday wednesday thursday friday", 2.4, 0.9)
    made = session(*INTERRUPTED, user=USER, family="interruption")
    assert behaviour(item(made, said, clean)) == act
    found = values(timing.measure([item(made, said, clean)]))
    acts = ("respond", "resume", "silent", "other")
    assert [found[f"behaviour_proxy_{kind}"] for kind in acts] == [[float(kind == act)] for kind in acts]


def test_behaviour_does_not_apply_where_nothing_was_due():
    made = session({"kind": "silence", "window": [0.0, 4.0]}, user=say("anna come", 1.0), family="no_answer")
    assert behaviour(item(made, [], [])) is None
    assert behaviour(item(made, [])) is None  # no clean run
    assert values(timing.measure([item(made, [], [])]))["behaviour_proxy_silent"] == [None]


def test_pooled_latencies():
    made = session(*INTERRUPTED, user=USER, family="interruption")
    talk = [*say("monday tuesday", 2.4, 1.0), *say("the answer is nine", 6.0)]
    found = values(timing.measure([item(made, talk, say("monday tuesday", 2.4, 1.0))]))
    assert found["overlap_stop_latency"] == pytest.approx([0.4], abs=0.03)  # 4.0 until 4.4
    assert found["overlap_response_latency"] == pytest.approx([0.6, 0.5], abs=0.03)  # 1.8 to 2.4, 5.5 to 6.0
    assert found["clean_response_latency"] == pytest.approx([0.6], abs=0.03)
