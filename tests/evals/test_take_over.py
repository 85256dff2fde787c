"""Full-Duplex-Bench v1: the take-over rule at its borders, latency, pauses, interruptions."""

import pytest

from tests.evals.hand import item, reply, say, session, values
from tmljax.evals import take_over
from tmljax.evals.item import turns
from tmljax.evals.take_over import after_interruption, latency, takes_over
from tmljax.stream.record import Word


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        ([], False),
        (say("mm", 1.0, 0.4), False),
        (say("yes i see", 1.0, 0.3), False),  # 3 words in 0.9 s: a backchannel
        (say("yes i do see", 1.0, 0.2), True),  # 4 words in 0.8 s
        (say("seven", 1.0, 1.0), True),  # one word, but of 1 s
        (say("mm hm yes", 1.0, 0.333), False),  # 0.999 s
        ([Word("mm", 1.0, 1.2), Word("hm", 4.0, 4.2)], True),  # spans 3.2 s, pause included
        ([Word("a", 1.4, 1.6), Word("b", 2.2, 2.4)], True),  # 1 s on the grid, 0.9999999999999998 in floating point
    ],
)
def test_take_over_rule(words, taken):
    assert takes_over(words) is taken


def test_latency_is_clipped_and_needs_a_take_over():
    talk = say("the answer is nine", 2.0, 0.5)
    assert latency(talk, 1.6) == pytest.approx(0.4)
    assert latency(talk, 2.5) == 0.0
    assert latency(say("mm", 2.0), 1.6) is None
    assert latency([], 1.6) is None


def test_nobody_takes_a_turn():
    """Where their evaluator divides by zero: the rate is 0 and latency does not apply."""
    found = values(take_over.measure([item(session(reply(2.0, 10.0, "nine")), [])]))
    assert found["take_over"] == [0.0]
    assert found["latency"] == [None]


def test_early_answer_has_latency_zero_and_is_early():
    made = session(reply(3.0, 10.0), user=say("one two three", 0.5, 0.8))
    found = lambda words: values(take_over.measure([item(made, words)]))  # noqa: E731
    assert found(say("the answer is nine", 1.0))["latency"] == [0.0]
    assert found(say("the answer is nine", 1.0))["starts_early"] == [1.0]
    assert found(say("the answer is nine", 3.2))["starts_early"] == [0.0]
    assert found([])["starts_early"] == [None]


def test_turns_divide_a_conversation():
    made = session(reply(2.0, 5.0), reply(6.5, 10.0))
    first, second = turns(made)
    assert (first.begin, first.end, second.begin, second.end) == (0.0, 5.0, 5.0, 10.0)
    words = [*say("the answer is nine", 2.4), *say("the number is two", 7.5)]
    assert values(take_over.measure([item(made, words)]))["latency"] == pytest.approx([0.4, 1.0])


def test_pause_looks_at_the_users_turn_alone():
    pause = {"kind": "silence", "window": [1.5, 3.0]}
    user = [*say("what is", 0.5, 0.5), *say("two plus two", 3.0, 0.3)]
    made = session(pause, reply(3.9, 8.0), user=user)
    rate = lambda words: values(take_over.measure([item(made, words)]))["pause_take_over"]  # noqa: E731
    assert rate(say("the answer is four", 4.2)) == [0.0]  # after the turn
    assert rate(say("the answer is four", 1.7)) == [1.0]  # inside the pause
    assert rate(say("mm hm", 1.7)) == [0.0]  # a backchannel is no take-over
    assert rate(say("okay the answer is four", 3.7)) == [0.0]  # one word overlaps the turn's end
    no_pause = session(reply(3.9, 8.0), user=user)
    assert "pause_take_over" not in values(take_over.measure([item(no_pause, [])]))


def test_silence_before_the_turn_is_no_pause():
    chatter = {"kind": "silence", "window": [0.4, 2.0]}
    made = session(chatter, reply(5.0, 9.0), user=[*say("anna come here", 0.5), *say("what is two", 3.5, 0.5)])
    assert "pause_take_over" not in values(take_over.measure([item(made, [])]))


def test_interruption_crops_first():
    words = say("one two three four five six", 4.0, 0.5)  # until 7.0
    assert after_interruption(words, 5.75) == [
        Word("four", 5.75, 6.0), Word("five", 6.0, 6.5), Word("six", 6.5, 7.0),
    ]  # fmt: skip
    made = session(reply(2.0, 4.5), {"kind": "yield", "at": 4.5, "end": 5.75}, reply(5.75, 10.0), family="interruption")
    talked_through = values(take_over.measure([item(made, words)]))
    assert talked_through["interruption_take_over"] == [1.0]  # 1.25 s are left after the crop
    assert talked_through["interruption_latency"] == [0.0]
    stopped = values(take_over.measure([item(made, say("one two", 4.0, 0.4))]))
    assert stopped["interruption_take_over"] == [0.0]
    assert stopped["interruption_latency"] == [None]
