"""Waveforms: level, noise, rooms, overlap; features equal to those of the whole file."""

import math
from dataclasses import replace

import numpy as np
import pytest

from data_pipelines.render import render, sparse_log_mel
from data_pipelines.scenarios import FAMILIES
from data_pipelines.scenarios.stage import Stage
from data_pipelines.score import Acoustics, Score, Speech
from data_pipelines.voices import MODEL, Speaker, Voices, utter
from tmljax.config import Stream
from tmljax.stream.audio import voiced_segments
from tmljax.stream.dmel import log_mel, quantise
from tmljax.stream.microturn import SAMPLE_RATE
from tmljax.stream.record import Word

DRY = Acoustics(level_db=-20, noise="white", snr_db=None, room=None)
USER, NEIGHBOUR = Speaker("us", "f3", 190, 50, 50), Speaker("rp", "m1", 190, 50, 50)


def level_db(samples: np.ndarray) -> float:
    """Root mean square in dB of full scale."""
    return 20 * math.log10(max(float(np.sqrt(np.mean(np.square(samples)))), 1e-6))


@pytest.fixture(scope="module")
def voices():
    return Voices()


def speech(voices, track, text, speaker, start, **changes) -> Speech:
    said = utter(voices, text, speaker)
    words = tuple(Word(w.text, w.start + start, w.end + start) for w in said.words)
    return Speech(track, text, speaker, start, start + said.seconds, words, **changes)


def scene(voices, acoustics=DRY, **changes) -> Score:
    speeches = (
        speech(voices, "user", "what is three plus five", USER, 0.5),
        speech(voices, "model", "the answer is eight", MODEL, 2.2),
    )
    return replace(Score("turn_taking", 4.0, speeches, acoustics, ()), **changes)


def sound(score, voices, seed=0):
    session = render(score, "x", voices, np.random.default_rng(seed), keep_audio=True)
    return session, session.audio[:, 0] / 32768, session.audio[:, 1] / 32768


def stretch(samples, a, b):
    return samples[round(a * SAMPLE_RATE) : round(b * SAMPLE_RATE)]


def test_each_speaks_on_its_own_channel_at_its_time(voices):
    score = scene(voices)
    session, model, user = sound(score, voices)
    assert session.frames == 160
    assert len(model) == 4 * SAMPLE_RATE
    for channel, part in ((user, score.speeches[0]), (model, score.speeches[1])):
        assert not stretch(channel, 0, part.start).any()
        assert not stretch(channel, part.end + 0.01, 4).any()
        (heard,) = voiced_segments(channel.astype(np.float32), 0.3, 0.1)
        assert heard == pytest.approx((part.start, part.end), abs=0.06)
    assert [w.text for w in session.user_words] == ["what", "is", "three", "plus", "five"]
    assert [w.text for w in session.model_words] == ["the", "answer", "is", "eight"]


def test_level_is_what_the_score_says(voices):
    for level in (-30, -12):
        part = scene(voices).speeches[0]
        _, _, user = sound(scene(voices, replace(DRY, level_db=level)), voices)
        assert level_db(stretch(user, part.start, part.end)) == pytest.approx(level, abs=1.5)


@pytest.mark.parametrize("noise", ["white", "pink", "hum", "babble"])
def test_noise_has_its_level_everywhere(voices, noise):
    _, model, user = sound(scene(voices, replace(DRY, noise=noise, snr_db=15)), voices)
    assert level_db(stretch(user, 0, 0.45)) == pytest.approx(-35, abs=4)
    assert level_db(stretch(user, 2.2, 4.0)) == pytest.approx(-35, abs=4)
    assert not stretch(model, 0, 2.1).any()  # the model's channel is clean


def test_a_room_leaves_a_tail_and_keeps_the_time(voices):
    part = scene(voices).speeches[0]
    tails = []
    for room in range(4):
        _, _, user = sound(scene(voices, replace(DRY, room=room)), voices)
        tails.append(level_db(stretch(user, part.end + 0.01, part.end + 0.06)))
        assert not stretch(user, 0, part.start).any()
        assert -70 < tails[-1] < -22
    assert np.ptp(tails) > 0.5


def test_background_speech_is_low_and_dull(voices):
    text = "what is three plus five"
    spectra = {}
    for track, gain in (("user", 0.0), ("other", -18.0)):
        score = scene(voices, speeches=(speech(voices, track, text, NEIGHBOUR, 0.5, gain_db=gain),))
        session, _, user = sound(score, voices)
        power = np.abs(np.fft.rfft(user)) ** 2
        edge = round(3000 * len(user) / SAMPLE_RATE)
        spectra[track] = (level_db(user), power[edge:].sum() / power.sum())
    assert spectra["other"][0] < spectra["user"][0] - 10
    assert spectra["other"][1] < 0.2 * spectra["user"][1]
    assert session.user_words == ()  # nobody near said it


def test_cut_speech_fades_and_then_is_silent(voices):
    whole = speech(voices, "model", "monday, tuesday, wednesday", MODEL, 1.0)
    cut = replace(whole, stop=1.8, words=whole.words[:2], end=1.8)
    _, model, _ = sound(scene(voices, speeches=(cut,)), voices)
    _, uncut, _ = sound(scene(voices, speeches=(whole,)), voices)
    np.testing.assert_array_equal(stretch(model, 0, 1.78), stretch(uncut, 0, 1.78))
    assert not stretch(model, 1.8, 4.0).any()
    assert np.abs(stretch(model, 1.799, 1.8)).max() < 0.1 * np.abs(uncut).max()


def test_features_are_those_of_the_kept_audio(voices):
    """int16 rounding aside, the stored features are what anybody computes from the stored audio."""
    session, _, user = sound(scene(voices, replace(DRY, snr_db=25)), voices)
    again = quantise(log_mel(user.astype(np.float32))[0])
    assert (again != session.user_dmel).mean() < 0.02
    assert np.abs(again.astype(int) - session.user_dmel.astype(int)).max() <= 2


def test_skipping_silence_changes_nothing():
    rng = np.random.default_rng(0)
    samples = np.zeros(400 * 100, np.float32)
    for a, b in ((0, 700), (4000, 4001), (12_345, 20_000), (39_000, 40_000)):
        samples[a:b] = rng.standard_normal(b - a) * 0.1
    np.testing.assert_array_equal(sparse_log_mel(samples), log_mel(samples)[0])
    np.testing.assert_array_equal(sparse_log_mel(0 * samples), log_mel(0 * samples)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_renders_and_can_be_heard(voices, family):
    """Nobody can listen in a test; but speech is loud where words are, and the model's channel is silent elsewhere."""
    for seed in range(3):
        score = FAMILIES[family][0](Stage(np.random.default_rng(seed), "test", Stream(), voices))
        session, model, user = sound(score, voices)
        assert session.frames * 400 == len(model)
        assert session.model_mel.shape == (session.frames, 80)
        assert session.model_mel.dtype == np.float16
        spoken = np.zeros(len(model), bool)
        for speech_ in score.speeches:
            if speech_.track == "model":
                spoken[round(speech_.start * SAMPLE_RATE) - 1 : round(speech_.end * SAMPLE_RATE) + 80] = True
        assert not model[~spoken].any()
        if spoken.any():
            assert -35 < level_db(model[spoken]) < -12
            assert np.abs(model).max() < 1
        if score.listens:
            assert session.user_dmel.shape == (session.frames, 80)
            assert np.abs(user).max() < 1
            if session.user_words:
                assert level_db(user) > -60
        else:
            assert session.user_dmel is None
        if session.video is not None:
            assert session.video.shape == (session.frames // (8 * Stream().video_every), 40, 40, 3)


def test_same_seed_same_session(voices):
    for family in ("interruption", "visual_cue"):
        one, two = (
            sound(FAMILIES[family][0](Stage(np.random.default_rng(5), "train", Stream(), voices)), voices, 5)[0]
            for voices in (voices, Voices())
        )
        np.testing.assert_array_equal(one.audio, two.audio)
        np.testing.assert_array_equal(one.user_dmel, two.user_dmel)
        assert one.truth == two.truth
        if one.video is not None:
            np.testing.assert_array_equal(one.video, two.video)
