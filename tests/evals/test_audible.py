"""Sound against claim."""

import numpy as np
import pytest

from tests.evals.hand import perform, say
from tmljax.evals.audible import agreement, agreement_in_speech, cells
from tmljax.evals.baselines import hum
from tmljax.evals.item import Performance


def test_a_cell_is_on_from_a_quarter():
    flags = np.zeros(24, bool)
    flags[:1] = flags[8:10] = True
    assert cells(flags).tolist() == [False, True, False]
    assert cells(np.ones(9, bool)).tolist() == [True, False]  # 1 of 8 in the last, partial cell


def test_agreement_by_hand():
    """10 s are 50 cells; 2 s of sound, 1 s of it claimed."""
    claimed, sounding = say("a b c d e", 2.0, 0.2), say("a b c d e f g h i j", 2.0, 0.2)
    half = Performance(hum(sounding, 160_000), tuple(claimed))
    assert agreement(half) == pytest.approx(45 / 50)
    assert agreement_in_speech(half) == pytest.approx(5 / 10)


def test_a_voice_that_is_late_as_a_whole_loses_nothing():
    """Claims and sound both 50 ms after the grid: the last cell must not count for one and not for the other."""
    claimed = say("a b c d e", 2.05, 0.2)
    sounding = hum([*claimed[:-1], claimed[-1]._replace(end=2.99)], 160_000)
    assert agreement(Performance(sounding, tuple(claimed), late=0.05)) == 1.0
    assert agreement(Performance(sounding, tuple(claimed))) < 1.0


def test_silence_cannot_carry_it():
    mute = Performance(np.zeros(160_000, np.float32), tuple(say("a", 2.0, 0.2)))
    assert agreement(mute) == pytest.approx(49 / 50)
    assert agreement_in_speech(mute) == 0.0
    assert agreement_in_speech(perform([])) is None
    assert agreement(perform([])) == 1.0


def test_pauses_of_a_breath_are_closed():
    apart = [*say("a b", 2.0, 0.2), *say("c d", 2.6, 0.2)]  # a whole cell between
    through = Performance(hum(apart, 160_000), tuple(say("a b c d e", 2.0, 0.2)))
    assert agreement(through) == 1.0
    assert agreement_in_speech(through) == 1.0
