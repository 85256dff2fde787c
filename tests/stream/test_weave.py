import dataclasses

import numpy as np
import pytest

from tmljax.config import Stream, UserError
from tmljax.stream import dmel
from tmljax.stream.microturn import ABSENT, HOLD, IDLE, Layout
from tmljax.stream.record import Session, Word
from tmljax.stream.text import Tokenizer
from tmljax.stream.weave import audible, cut, queue_tokens, text_of, weave

LAYOUT = Layout(Stream())


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["one two three four five six seven eight nine ten the answer is"] * 9, 400)


def session(**kwargs):
    return Session(**{"id": "s", "family": "f", "frames": 80, "user_dmel": None, "model_mel": None} | kwargs)


def word_ids(tokenizer, *words):
    ids = [tokenizer.encode_word(word) for word in words]
    assert all(len(i) == 1 for i in ids)
    return [i[0] for i in ids]


def test_a_session_with_nothing_in_it(tokenizer):
    streams = weave(session(frames=72), LAYOUT, tokenizer)
    T = 10  # nine micro-turns, rounded up to video_every = 2
    shapes = {name: (array.shape, array.dtype.name) for name, array in streams.items()}
    assert shapes == {
        "user_dmel": ((T, 8, 80), "uint8"),
        "user_present": ((T,), "bool"),
        "video": ((T // 2, 1, 4800), "uint8"),
        "video_present": ((T // 2,), "bool"),
        "user_text": ((T, 1), "int32"),
        "model_text": ((T, 1), "int32"),
        "model_mel": ((T, 8, 80), "float16"),
        "heard": ((T,), "int32"),
        "seen": ((T // 2, 2), "int32"),
        "valid": ((T,), "bool"),
    }
    assert streams["valid"].tolist() == [True] * 9 + [False]
    assert not streams["user_present"].any()
    assert not streams["video_present"].any()
    assert (streams["user_text"] == ABSENT).all()
    assert (streams["model_text"] == IDLE).all()
    assert (streams["heard"] == IDLE).all()
    assert (streams["seen"] == ABSENT).all()
    assert (streams["model_mel"] == dmel.SILENCE_MEL.astype(np.float16)).all()
    assert (streams["user_dmel"] == dmel.quantise(dmel.SILENCE_MEL)).all()


def test_user_audio_keeps_its_time_and_the_model_is_a_microturn_ahead(tokenizer):
    frames = np.arange(80)
    dmels = np.repeat(frames[:, None] % 16, 80, 1).astype(np.uint8)
    mels = np.repeat(frames[:, None] / 16, 80, 1).astype(np.float16)
    words = (Word("one", 0.2, 2.0),)
    streams = weave(session(user_dmel=dmels, model_mel=mels, model_words=words), LAYOUT, tokenizer)
    assert np.array_equal(streams["user_dmel"].reshape(80, 80), dmels)
    assert streams["user_present"].all()
    assert np.array_equal(streams["model_mel"].reshape(80, 80)[:-8], mels[8:])
    assert (streams["model_mel"].reshape(80, 80)[-8:] == dmel.SILENCE_MEL.astype(np.float16)).all()


def test_nothing_gives_a_word_away_before_it_is_said(tokenizer):
    """Up to the micro-turn of its first token, the streams are those of a model that stays silent for ever."""
    mels = np.random.default_rng(0).uniform(-7, 2, (80, 80)).astype(np.float16)  # sound everywhere
    speaks = weave(session(model_mel=mels, model_words=(Word("one", 1.0, 1.5),)), LAYOUT, tokenizer)
    silent = weave(session(model_mel=mels), LAYOUT, tokenizer)
    first = int(np.flatnonzero((speaks["model_text"] != IDLE).any(axis=1))[0])
    assert first == 4  # heard in [1.0, 1.2), the output of micro-turn 4
    for name in speaks:
        every = len(speaks["valid"]) // len(speaks[name])
        assert np.array_equal(speaks[name][: first // every], silent[name][: first // every]), name
    assert not np.array_equal(speaks["model_mel"], silent["model_mel"])


def test_video_frames_come_every_second_microturn(tokenizer):
    video = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)
    streams = weave(session(video=video), LAYOUT, tokenizer)
    assert np.array_equal(streams["video"][:3].reshape(video.shape), video)
    assert streams["video_present"].tolist() == [True] * 3 + [False] * 2
    assert not streams["video"][3:].any()
    longer = weave(session(video=np.repeat(video, 3, 0)), LAYOUT, tokenizer)
    assert longer["video_present"].all()
    with pytest.raises(UserError, match="video_height"):
        weave(session(video=np.zeros((3, 80, 40, 3), np.uint8)), LAYOUT, tokenizer)


def test_what_a_frame_shows_is_the_target_of_that_frame(tokenizer):
    """Frames come every 0.4 s: nothing in the first, two words in the second and third, one in the fourth."""
    one, two = word_ids(tokenizer, "one", "two")
    seen = (Word("one", 0.4, 1.2), Word("two", 0.4, 1.2), Word("two", 1.2, 1.6))
    streams = weave(session(seen=seen), LAYOUT, tokenizer)
    assert streams["seen"].tolist() == [[IDLE, ABSENT], [one, two], [one, two], [two, ABSENT], [IDLE, ABSENT]]
    zebra = tokenizer.encode_word("zebra")
    assert len(zebra) > 2  # a word of many tokens hides no other
    both = weave(session(seen=(Word("zebra", 0.0, 0.4), Word("two", 0.0, 0.4))), LAYOUT, tokenizer)
    assert both["seen"][0].tolist() == [zebra[0], two]
    assert weave(session(seen=()), LAYOUT, tokenizer)["seen"].tolist() == [[IDLE, ABSENT]] * 5


def test_words_land_where_they_are_heard(tokenizer):
    one, two = word_ids(tokenizer, "one", "two")
    words = (Word("one", 0.65, 0.95), Word("two", 1.05, 1.44))
    streams = weave(session(model_words=words), LAYOUT, tokenizer)
    # 0.65 s is in [0.6, 0.8), the output of micro-turn 2. The pause of 0.1 s is no silence; of the window
    # [1.4, 1.6) 40 ms are spoken, which is under a quarter.
    assert streams["model_text"][:, 0].tolist() == [IDLE, IDLE, one, HOLD, two, HOLD, IDLE, IDLE, IDLE, IDLE]


def test_words_before_the_first_output_go_to_it(tokenizer):
    (one,) = word_ids(tokenizer, "one")
    streams = weave(session(model_words=(Word("one", 0.0, 0.3),)), LAYOUT, tokenizer)
    assert streams["model_text"][:3, 0].tolist() == [one, IDLE, IDLE]


def test_a_breath_parts_two_stretches():
    words = [Word("a", 0.2, 0.4), Word("b", 0.69, 0.8), Word("c", 1.2, 1.25)]
    # windows [0.2, 0.4) [0.4, 0.6) [0.6, 0.8) [0.8, 1.0) [1.0, 1.2) [1.2, 1.4)
    assert audible(words, 6).tolist() == [True, True, True, False, False, True]
    assert audible([Word("a", 0.2, 0.4), Word("b", 0.7, 0.8)], 3).tolist() == [True, False, True]
    assert audible([Word("a", 0.2, 0.249)], 1).tolist() == [False]
    assert audible([Word("long", 0.2, 1.0), Word("inside", 0.3, 0.4)], 4).all()


def test_tokens_wait_for_room():
    slots = queue_tokens([(0.5, [10, 11, 12]), (0.1, [20]), (0.7, [13])], np.zeros((6, 1), np.int32))
    assert slots[:, 0].tolist() == [20, 0, 10, 11, 12, 13]
    slots = queue_tokens([(0.1, [20]), (0.5, [10, 11, 12]), (0.7, [13])], np.zeros((5, 2), np.int32))
    assert slots.tolist() == [[20, 0], [0, 0], [10, 11], [12, 13], [0, 0]]
    slots = queue_tokens([(0.35, [10, 11, 12])], np.zeros((2, 1), np.int32))
    assert slots[:, 0].tolist() == [0, 10]


def test_queue_against_one_token_at_a_time():
    rng = np.random.default_rng(0)
    for _ in range(50):
        k, T = int(rng.integers(1, 4)), 12
        timed = [
            (float(rng.uniform(0, 3)), [int(i) for i in rng.integers(3, 99, rng.integers(0, 4))]) for _ in range(6)
        ]
        flat, free = [0] * (T * k), 0
        for seconds, ids in sorted(timed, key=lambda entry: entry[0]):
            for token in ids:
                free = max(free, int(seconds / 0.2 + 1e-6) * k)
                if free < T * k:
                    flat[free] = token
                free += 1
        assert queue_tokens(timed, np.zeros((T, k), np.int32)).reshape(-1).tolist() == flat


def test_several_slots_fill_up_with_hold(tokenizer):
    one, two, three = word_ids(tokenizer, "one", "two", "three")
    layout = Layout(Stream(model_text_slots=2, user_text_slots=2))
    words = (Word("one", 0.4, 0.5), Word("two", 0.5, 0.6), Word("three", 0.6, 0.95))
    streams = weave(session(model_words=words, typed=(Word("one", 0.4, 0.4),)), layout, tokenizer)
    assert streams["model_text"][:5].tolist() == [[IDLE] * 2, [one, two], [three, HOLD], [HOLD] * 2, [IDLE] * 2]
    assert streams["user_text"][:4].tolist() == [[ABSENT] * 2, [ABSENT] * 2, [one, ABSENT], [ABSENT] * 2]


def test_heard_follows_the_end_of_a_word(tokenizer):
    one, two = word_ids(tokenizer, "one", "two")
    words = (Word("One,", 0.2, 0.7), Word("two", 0.7, 0.79))
    assert weave(session(user_words=words), LAYOUT, tokenizer)["heard"][:6].tolist() == [IDLE] * 3 + [one, two, IDLE]


def test_typed_text_is_taken_as_typed(tokenizer):
    streams = weave(session(typed=(Word("One?", 0.4, 0.4),)), LAYOUT, tokenizer)
    ids = streams["user_text"][:, 0]
    assert ids[:2].tolist() == [ABSENT, ABSENT]
    assert tokenizer.decode(ids) == " One?"


def full_session(frames=80, seed=0):
    rng = np.random.default_rng(seed)
    words = tuple(Word(w, 0.3 * i, 0.3 * i + 0.2) for i, w in enumerate(["one", "two", "zebra", "four"]))
    return session(
        frames=frames,
        user_dmel=rng.integers(0, 16, (frames, 80)).astype(np.uint8),
        model_mel=rng.normal(size=(frames, 80)).astype(np.float16),
        user_words=words,
        model_words=words,
        typed=words,
        video=rng.integers(0, 256, (4, 40, 40, 3), np.uint8),
        seen=words,
    )


@pytest.mark.parametrize("frames", [80, 72, 8])
def test_cutting_and_weaving_a_window_agree(frames, tokenizer):
    whole = weave(full_session(frames), LAYOUT, tokenizer)
    for start, length in ((0, 4), (2, 6), (4, 40), (10, 4), (30, 2), (0, len(whole["valid"]))):
        example = cut(whole, start, length)
        woven = weave(full_session(frames), LAYOUT, tokenizer, start, length)
        assert example.keys() == woven.keys() == whole.keys() | {"start"}
        for name in example:
            assert np.array_equal(example[name], woven[name]), (name, start, length)
            assert example[name].dtype == woven[name].dtype
        assert example["start"] == start
        real = max(min(len(whole["valid"]) - start, length), 0)
        assert np.array_equal(example["user_dmel"][:real], whole["user_dmel"][start : start + real])
        assert not example["valid"][real:].any()
        assert (example["model_text"][real:] == IDLE).all()
        assert (example["user_text"][real:] == ABSENT).all()
        assert not example["user_present"][real:].any()
        assert not example["video_present"][real // 2 :].any()
        assert len(example["video"]) * 2 == length


def test_a_window_off_the_video_grid_is_refused(tokenizer):
    whole = weave(full_session(), LAYOUT, tokenizer)
    for start, length in ((1, 4), (0, 5), (-2, 4)):
        with pytest.raises(ValueError, match="multiples of video_every=2"):
            cut(whole, start, length)
        with pytest.raises(ValueError, match="multiples of video_every=2"):
            weave(full_session(), LAYOUT, tokenizer, start, length)


@pytest.mark.parametrize("k", [1, 3])
def test_text_of_undoes_the_weave(k, tokenizer):
    layout = Layout(Stream(model_text_slots=k))
    words = tuple(Word(w, 0.2 + i * 0.8, 0.6 + i * 0.8) for i, w in enumerate(["the", "answer", "is", "seven"]))
    claimed = text_of(weave(session(frames=160, model_words=words), layout, tokenizer)["model_text"], tokenizer)
    assert [w.text for w in claimed] == [w.text for w in words]
    for ours, theirs in zip(claimed, words):
        assert ours.start == pytest.approx(theirs.start, abs=1e-9)
        assert ours.end == pytest.approx(theirs.end, abs=1e-9)


def test_a_word_ends_where_the_next_begins(tokenizer):
    one, two = word_ids(tokenizer, "one", "two")
    ids = np.array([[IDLE], [one], [HOLD], [two], [IDLE]])
    words = text_of(ids, tokenizer)
    assert [w.text for w in words] == ["one", "two"]
    np.testing.assert_allclose([w[1:] for w in words], [(0.4, 0.8), (0.8, 1.0)])


def test_two_words_of_one_microturn(tokenizer):
    one, two = word_ids(tokenizer, "one", "two")
    words = text_of(np.array([[one, two], [HOLD, HOLD], [IDLE, IDLE]]), tokenizer)
    np.testing.assert_allclose([w[1:] for w in words], [(0.2, 0.2), (0.2, 0.6)])


def test_tokens_of_one_word_stay_together(tokenizer):
    zebra = tokenizer.encode_word("zebra")
    assert len(zebra) > 2
    ids = np.array([[i] for i in [*zebra, HOLD, IDLE, HOLD, *zebra[1:], IDLE]])
    words = text_of(ids, tokenizer)
    assert words[0].text == "zebra"
    assert words[0].end == pytest.approx(0.2 * (len(zebra) + 2))
    assert words[1].text == tokenizer.decode(zebra[1:])
    assert len(words) == 2


def test_text_of_survives_anything(tokenizer):
    rng = np.random.default_rng(0)
    ids = rng.integers(-3, tokenizer.vocab_size + 30, (4000, 2))
    ids[rng.random((4000, 2)) < 0.5] = HOLD
    words = text_of(ids, tokenizer)
    assert all(w.text and w.end >= w.start for w in words)
    starts = [w.start for w in words]
    assert starts == sorted(starts)
    assert text_of(np.full((5, 1), HOLD), tokenizer) == []
    assert text_of(np.zeros((0, 1), np.int32), tokenizer) == []


def test_longer_than_the_window_loses_nothing(tokenizer):
    """Windows of a session, laid end to end, are the session."""
    source = dataclasses.replace(full_session(), frames=160)
    whole = weave(source, LAYOUT, tokenizer)
    pieces = [cut(whole, start, 4) for start in range(0, 20, 4)]
    for name in whole:
        assert np.array_equal(np.concatenate([piece[name] for piece in pieces]), whole[name])
