import numpy as np
import pytest

from tmljax.stream import dmel
from tmljax.stream.vocoder import GATE, GROUP, HOP, GriffinLim, linear_magnitudes, propagate

SILENT = np.tile(dmel.SILENCE_MEL, (8, 1))


def speech_like(seconds, seed=0):
    """Gliding harmonics in syllables, with breathy noise between them: what a vocoder has to follow."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16000)) / 16000
    pitch = 120 + 40 * np.sin(2 * np.pi * 0.9 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / 16000
    voice = sum(np.sin(n * phase) / n for n in range(1, 25))
    syllable = np.maximum(np.sin(2 * np.pi * 2.5 * time), 0)
    sound = 0.1 * voice * syllable + 0.01 * rng.standard_normal(len(time)) * (syllable == 0)
    sound *= time < seconds - 0.4
    return sound.astype(np.float32)


def push(stream, mel):
    return GriffinLim().push([stream], mel[None])[0]


def push_all(stream, mel):
    return np.concatenate([push(stream, frames) for frames in mel.reshape(-1, 8, 80)])


def test_the_sound_has_the_mel_it_was_made_of():
    mel, _ = dmel.log_mel(speech_like(4.0))
    samples = GriffinLim().synthesise(mel)
    assert samples.dtype == np.float32
    assert len(samples) == 400 * len(mel)
    again, _ = dmel.log_mel(samples)
    loud = mel.max(axis=1) > -2
    assert loud.mean() > 0.5
    assert np.abs(again - mel)[loud].mean() < 0.12


def test_a_stream_is_late_by_its_declared_latency():
    mel, _ = dmel.log_mel(speech_like(2.0))
    vocoder = GriffinLim()
    streamed = push_all(vocoder.stream(), np.concatenate([mel, SILENT]))
    assert len(streamed) == 400 * (len(mel) + 8)
    late = vocoder.latency_samples
    assert late == 400 * dmel.VOICE_DELAY
    assert np.array_equal(streamed[late : late + 400 * len(mel)], vocoder.synthesise(mel))


def test_the_declared_latency_is_the_sound_s():
    """A burst that starts at 1.0 s comes out that much later."""
    burst = np.zeros(32000, np.float32)
    burst[16000:24000] = 0.1 * np.sin(2 * np.pi * 500 * np.arange(8000) / 16000)
    vocoder = GriffinLim()
    samples = push_all(vocoder.stream(), dmel.log_mel(burst)[0])[vocoder.latency_samples :]
    energy = np.convolve(samples**2, np.ones(160) / 160, "same")
    loud = np.flatnonzero(energy > 0.25 * energy.max())
    assert abs(loud[0] - 16000) < 480
    assert abs(loud[-1] - 24000) < 480


def test_silence_is_exact_and_comes_back():
    stream = GriffinLim().stream()
    assert not push_all(stream, np.concatenate([SILENT] * 3)).any()
    mel, _ = dmel.log_mel(speech_like(2.0))
    assert push_all(stream, mel).any()
    push_all(stream, SILENT)
    assert not push_all(stream, SILENT).any()
    noisy = SILENT + np.random.default_rng(0).normal(size=SILENT.shape).astype(np.float32) * 0.3
    assert noisy.max() < GATE
    assert not push(stream, noisy).any()


def test_sessions_pushed_together_sound_as_if_alone():
    """Bit for bit, in more groups than one, silent ones among them; twice the same."""
    mel, _ = dmel.log_mel(speech_like(1.2))
    turns_TFM = mel.reshape(-1, 8, 80)
    vocoder, sessions = GriffinLim(), 2 * GROUP + 3
    mel_NTFM = np.stack([np.roll(turns_TFM, n, axis=0) * (1 + 0.01 * n) for n in range(sessions)])
    mel_NTFM[3] = SILENT
    streams = [vocoder.stream() for _ in range(sessions)]
    together_NTS = np.stack([vocoder.push(streams, mel_NFM) for mel_NFM in mel_NTFM.swapaxes(0, 1)], axis=1)
    for mel_TFM, samples_TS in zip(mel_NTFM, together_NTS, strict=True):
        assert np.array_equal(push_all(vocoder.stream(), mel_TFM), samples_TS.reshape(-1))
    assert not together_NTS[3].any()
    assert len(np.unique(together_NTS.reshape(sessions, -1), axis=0)) == sessions
    assert vocoder.push([], np.zeros((0, 8, 80), np.float32)).shape == (0, 3200)


def propagate_frame_by_frame(phase_K, magnitude_JK):
    """The plain version: from each frame's list of peaks."""
    k, phases = np.arange(magnitude_JK.shape[1]), []
    for magnitude in magnitude_JK:
        left, here, right = magnitude[:-2], magnitude[1:-1], magnitude[2:]
        peaks = np.flatnonzero((here > left) & (here >= right)) + 1
        if len(peaks):
            a, b, c = np.log(magnitude[[peaks - 1, peaks, peaks + 1]] + 1e-9)
            frequency = peaks + np.clip(0.5 * (a - c) / np.minimum(a - 2 * b + c, -1e-6), -0.5, 0.5)
            turned = phase_K[peaks] + 2 * np.pi * HOP / dmel.N_FFT * frequency
            nearest = np.searchsorted((peaks[1:] + peaks[:-1]) / 2, k)
            phase_K = turned[nearest] - np.pi * dmel.WINDOW_SAMPLES / dmel.N_FFT * (k - peaks[nearest])
        phases.append(phase_K)
    return np.exp(1j * np.array(phases))


def test_bins_follow_the_nearest_peak():
    """Of frames with many peaks, one at either edge, two that a bin lies halfway between, and none."""
    rng = np.random.default_rng(0)
    magnitude_JK = rng.random((6, 513)).astype(np.float32)
    magnitude_JK[1:4] = 0.1
    magnitude_JK[1, 1] = magnitude_JK[2, 511] = magnitude_JK[3, 100] = magnitude_JK[3, 200] = 1
    magnitude_JK[4] = np.linspace(1, 2, 513)
    phase_K = rng.uniform(-np.pi, np.pi, 513).astype(np.float32)
    ours_NJK = propagate(np.stack([phase_K, phase_K]), np.stack([magnitude_JK, magnitude_JK[::-1]]))
    for ours_JK, magnitude in zip(ours_NJK, (magnitude_JK, magnitude_JK[::-1]), strict=True):
        np.testing.assert_allclose(ours_JK, propagate_frame_by_frame(phase_K, magnitude), atol=2e-3)


def test_the_past_does_not_depend_on_the_future():
    mel, _ = dmel.log_mel(speech_like(2.0))
    changed = mel.copy()
    changed[40:] = mel[40:][::-1]
    a, b = (push_all(GriffinLim().stream(), m) for m in (mel, changed))
    assert np.array_equal(a[: 400 * 40], b[: 400 * 40])
    assert not np.array_equal(a[400 * 40 :], b[400 * 40 :])


def steady(hz):
    tone = (0.3 * np.sin(2 * np.pi * hz * np.arange(48000) / 16000)).astype(np.float32)
    return GriffinLim().synthesise(dmel.log_mel(tone)[0])[6400:41600]


def test_no_click_where_microturns_join():
    """A steady low tone has next to no curvature; a jump at a border would stand out by tens of dB."""
    roughness = np.diff(steady(250), 3) ** 2
    phase = (np.arange(len(roughness)) + 800 - 88) % 3200  # a micro-turn's last settled sample
    near = (phase < 100) | (phase > 3100)
    assert roughness[near].max() < 10 * roughness[~near].max()


@pytest.mark.parametrize("hz", [97.7, 253.0, 1003.3])
def test_a_steady_tone_stays_steady_across_microturns(hz):
    """Amplitude and phase go on from one micro-turn to the next, or overlapping frames would cancel."""
    level = np.sqrt((steady(hz).reshape(-1, 320) ** 2).mean(axis=1))
    assert 20 * np.log10(level.min() / (0.3 / np.sqrt(2))) > -3
    assert 20 * np.log10(level.max() / (0.3 / np.sqrt(2))) < 2


def test_anything_a_model_may_put_out_is_sound():
    rng = np.random.default_rng(0)
    stream = GriffinLim().stream()
    for mel in (
        rng.normal(size=(8, 80)) * 5,
        np.full((8, 80), np.nan),
        np.full((8, 80), np.inf),
        np.full((8, 80), -np.inf),
        np.full((8, 80), 1e30),
    ):
        samples = push(stream, mel.astype(np.float32))
        assert samples.shape == (3200,)
        assert np.isfinite(samples).all()
        assert np.abs(samples).max() <= 1
    assert push(stream, SILENT.astype(np.float16)).dtype == np.float32


@pytest.mark.parametrize("frames", [0, 3, 8, 13])
def test_any_number_of_frames(frames):
    mel, _ = dmel.log_mel(speech_like(1.0)[: 400 * frames])
    assert len(GriffinLim().synthesise(mel)) == 400 * frames


def test_linear_magnitudes_explain_the_mel():
    mel, _ = dmel.log_mel(speech_like(1.0))
    magnitudes = linear_magnitudes(mel, 30)
    assert magnitudes.min() >= 0
    explained = np.log10(np.maximum(magnitudes @ dmel.filterbank().T, 1e-10))
    loud = mel > -3
    assert np.abs(explained - mel)[loud].mean() < 0.02
