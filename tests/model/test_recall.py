"""What a word that is noted brings back: plainly, for a whole sequence, and micro-turn by micro-turn."""

import jax.numpy as jnp
import numpy as np
import pytest

from tmljax.model.recall import recall_last, recall_sequence
from tmljax.stream.microturn import ABSENT, HOLD, IDLE, NOTES

VOCAB = 9  # few words, so that they come again
LONG = 99  # micro-turns; longer than any here


NEITHER = [ABSENT, ABSENT]


def recall_plainly(note_TK: np.ndarray, text_TS: np.ndarray, window: int) -> list[list[int]]:
    recalled = []
    for t, (heard, *seen) in enumerate(note_TK.tolist()):
        pairs, word = [], None
        for token in text_TS[max(t + 1 - window, 0) : t + 1].ravel().tolist():
            if token > HOLD and word is not None:
                pairs.append((word, token))
            word = word if token == HOLD else token if token > HOLD else None
        shown = [(first, second) for first, second in pairs if second in seen]
        recalled.append([dict(pairs).get(heard, ABSENT), *(dict(shown).get(word, ABSENT) for word in seen)])
    return recalled


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("window", [6, LONG])
def test_three_ways_recall_the_same(slots, window):
    rng = np.random.default_rng(0)
    note_BTK, text_BTS = rng.integers(0, VOCAB, (3, 40, NOTES)), rng.integers(1, VOCAB, (3, 40, slots))
    expected = np.array([recall_plainly(*one, window) for one in zip(note_BTK, text_BTS)])
    assert 0.1 < np.mean(expected[..., 0] != ABSENT) < 0.8
    assert 0.02 < np.mean(expected[..., 1:] != ABSENT) < 0.5
    np.testing.assert_array_equal(recall_sequence(jnp.array(note_BTK), jnp.array(text_BTS), window), expected)
    said_NX = jnp.full((3, window * slots), IDLE)
    for t in range(40):
        said_NX = jnp.concatenate([said_NX[:, slots:], text_BTS[:, t]], axis=1)
        np.testing.assert_array_equal(recall_last(jnp.array(note_BTK[:, t]), said_NX), expected[:, t])


def recall_one(heard: list[int], said: list[int], window: int = LONG) -> list[int]:
    notes = jnp.array([[[word, ABSENT, ABSENT] for word in heard]])
    return recall_sequence(notes, jnp.array(said)[None, :, None], window)[0, :, 0].tolist()


def test_only_what_follows_in_one_stretch_of_speech_is_recalled():
    at, tiger, green, so = 3, 4, 5, 6
    said = [at, tiger, HOLD, green, IDLE, IDLE, so, IDLE, IDLE]
    heard = [tiger, tiger, tiger, tiger, green, at, IDLE, green, tiger]
    assert recall_one(heard, said) == [ABSENT, ABSENT, ABSENT, green, ABSENT, tiger, ABSENT, ABSENT, green]


def test_what_attention_sees_no_more_is_not_recalled():
    tiger, green = 4, 5
    said = [tiger, green, IDLE, IDLE, IDLE]
    assert recall_one([tiger] * 5, said, window=4) == [ABSENT, green, green, green, ABSENT]


def test_a_word_of_several_tokens_brings_back_its_own_rest():
    """A known limit: the first token of a word is followed by its second, which is no note of a frame."""
    ti, ger, green = 4, 5, 6
    assert recall_one([ABSENT, ABSENT, ti, ger], [ti, ger, green, IDLE]) == [ABSENT, ABSENT, ger, green]
    assert recall_seen([NEITHER] * 3 + [[ti, green]], jnp.array([[ti, ger, green, IDLE]])[..., None])[3] == NEITHER


def test_of_what_is_seen_only_words_said_together_come_back():
    red, circle, square, blue, came = 4, 5, 6, 7, 8
    said = jnp.array([[red, circle, IDLE, blue, square, came]])[..., None]
    frames = [[ABSENT, ABSENT], [red, circle], [circle, red], [red, square], [square, blue], [blue, circle]]
    assert recall_seen(frames, said) == [
        NEITHER,
        [circle, ABSENT],
        [ABSENT, circle],
        NEITHER,
        [ABSENT, square],
        NEITHER,
    ]


def test_a_later_word_for_something_else_hides_no_order():
    red, circle, square = 4, 5, 6
    said = jnp.array([[red, circle, IDLE, red, square]])[..., None]
    frames = [NEITHER, [red, circle], [red, square], [red, circle], [red, square]]
    assert recall_seen(frames, said) == [NEITHER, [circle, ABSENT], NEITHER, [circle, ABSENT], [square, ABSENT]]


def recall_seen(frames: list[list[int]], said: jnp.ndarray) -> list[list[int]]:
    notes = jnp.array([[[ABSENT, *frame] for frame in frames]])
    return recall_sequence(notes, said, LONG)[0, :, 1:].tolist()


def test_nothing_said_later_is_recalled():
    rng = np.random.default_rng(0)
    note_BTK, text_BTS = rng.integers(0, VOCAB, (3, 40, NOTES)), rng.integers(1, VOCAB, (3, 40, 2))
    other_BTS = np.concatenate([text_BTS[:, :20], rng.integers(1, VOCAB, (3, 20, 2))], axis=1)
    one, other = (recall_sequence(jnp.array(note_BTK), jnp.array(text), LONG) for text in (text_BTS, other_BTS))
    np.testing.assert_array_equal(one[:, :20], other[:, :20])
    assert np.any(one[:, 20:] != other[:, 20:])
