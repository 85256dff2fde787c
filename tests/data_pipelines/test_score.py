"""The grid on which the model starts and stops."""

import pytest

from data_pipelines.score import boundary, clip_words
from tmljax.stream.record import Word

SPEECH = (Word("one", 1.0, 1.3), Word("two", 1.4, 1.8), Word("three", 1.9, 2.5), Word("four", 2.6, 2.9))


@pytest.mark.parametrize(("moment", "start"), [(0.0, 0.0), (0.2, 0.2), (0.6000000001, 0.6), (0.61, 0.8), (1.399, 1.4)])
def test_boundary_is_the_next_micro_turn(moment, start):
    assert boundary(moment) == pytest.approx(start)


def test_words_before_the_cut_stay_and_those_behind_it_go():
    words, stop = clip_words(SPEECH, stop=1.85, noticed=1.6)
    assert [w.text for w in words] == ["one", "two"]
    assert stop == 1.85


def test_a_word_half_said_is_said():
    words, stop = clip_words(SPEECH, stop=2.2, noticed=1.8)
    assert words[-1] == Word("three", 1.9, 2.2)
    assert stop == 2.2


def test_a_word_hardly_begun_is_not_begun():
    words, stop = clip_words(SPEECH, stop=2.0, noticed=1.8)
    assert [w.text for w in words] == ["one", "two"]
    assert stop == 1.9


def test_what_began_before_it_was_noticed_cannot_be_taken_back():
    words, stop = clip_words(SPEECH, stop=2.0, noticed=2.0)
    assert words[-1] == Word("three", 1.9, 2.0)
    assert stop == 2.0
