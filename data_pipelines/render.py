"""Rendering: a score becomes a session, with waveforms, features, frames and words.

The model's channel is clean; the user's has a level, a room, noise, and other people in it. Everything is a
function of the score and one random generator.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import scipy.fft

from data_pipelines.scenarios.stage import ROOMS
from data_pipelines.scenes import describe, draw
from data_pipelines.score import Score, Speech
from data_pipelines.voices import Voice, utter
from tmljax.stream.dmel import LOOK_BACK, SILENCE_MEL, log_mel, quantise
from tmljax.stream.microturn import FRAME_SAMPLES, MEL, MICROTURN_SAMPLES, SAMPLE_RATE
from tmljax.stream.record import Session, Word

FADE = 320  # 20 ms: how speech is cut off
NOISE_SECONDS = 16
MUFFLED_HZ = 1500  # what is left of background speech


def render(score: Score, name: str, voices: Voice, rng: np.random.Generator, keep_audio: bool) -> Session:
    """`keep_audio` keeps both channels as int16 [samples, 2], model first."""
    samples = round(score.seconds * SAMPLE_RATE)
    samples += -samples % MICROTURN_SAMPLES
    model = np.zeros(samples, np.float32)
    for speech in score.speeches:
        if speech.track == "model":
            _add(model, _cut(utter(voices, speech.text, speech.speaker).samples, speech), speech.start)
    user = _int16(_user_channel(score, samples, voices, rng)) if score.listens else None
    audio = None
    if keep_audio:
        audio = np.stack([_int16(model), np.zeros(samples, np.int16) if user is None else user], axis=1)
    return Session(
        id=name,
        family=score.family,
        frames=samples // FRAME_SAMPLES,
        user_dmel=None if user is None else quantise(log_mel(user.astype(np.float32) / 32768)[0]),
        model_mel=sparse_log_mel(model).astype(np.float16),
        user_words=_words(score, "user"),
        model_words=_words(score, "model"),
        typed=score.typed,
        seen=None if score.scene is None else describe(score.scene, score.seconds / len(score.scene.things)),
        video=None if score.scene is None else draw(score.scene, rng),
        audio=audio,
        truth=score.truth,
    )


def _words(score: Score, track: str) -> tuple[Word, ...]:
    return tuple(sorted((w for s in score.speeches if s.track == track for w in s.words), key=lambda w: w.start))


def _int16(samples: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(samples * 32767), -32768, 32767).astype(np.int16)


def _add(channel: np.ndarray, samples: np.ndarray, seconds: float) -> None:
    start = round(seconds * SAMPLE_RATE)
    room = max(len(channel) - start, 0)
    channel[start : start + len(samples)] += samples[:room]


def _cut(samples: np.ndarray, speech: Speech) -> np.ndarray:
    """Speech up to its `stop`, faded out."""
    if speech.stop is None:
        return samples
    kept = samples[: max(round((speech.stop - speech.start) * SAMPLE_RATE), 0)].copy()
    fade = min(FADE, len(kept))
    kept[len(kept) - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
    return kept


def _user_channel(score: Score, samples: int, voices: Voice, rng: np.random.Generator) -> np.ndarray:
    channel = np.zeros(samples, np.float32)
    acoustics = score.acoustics
    level = 10 ** (acoustics.level_db / 20)
    for speech in score.speeches:
        if speech.track == "model":
            continue
        said = utter(voices, speech.text, speech.speaker).samples
        gain = level * 10 ** (speech.gain_db / 20) / max(float(np.sqrt(np.mean(said * said))), 1e-4)
        if speech.track == "other":
            said = _filtered(said, _responses(True)[0 if acoustics.room is None else acoustics.room])
        elif acoustics.room is not None:
            said = _filtered(said, _responses(False)[acoustics.room])
        _add(channel, said * np.float32(gain), speech.start)
    if acoustics.snr_db is not None:
        noise = _noises()[acoustics.noise]
        shift = int(rng.integers(len(noise)))
        repeated = np.resize(np.roll(noise, shift), samples)
        channel += repeated * np.float32(level * 10 ** (-acoustics.snr_db / 20))
    return np.clip(channel, -1, 1, out=channel)


def _filtered(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    size = scipy.fft.next_fast_len(len(samples) + len(response), real=True)
    spectrum = scipy.fft.rfft(samples, size) * scipy.fft.rfft(response, size)
    return scipy.fft.irfft(spectrum, size)[: len(samples) + len(response) - 1].astype(np.float32, copy=False)


@cache
def _responses(muffled: bool) -> tuple[np.ndarray, ...]:
    """Rooms: a direct sound and exponentially decaying noise; muffled ones are heard through a wall."""
    rng = np.random.default_rng(17)
    responses = []
    for _ in range(ROOMS):
        decay = rng.uniform(0.1, 0.35)  # seconds until -60 dB
        time = np.arange(int(decay * SAMPLE_RATE)) / SAMPLE_RATE
        tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / decay)
        tail *= rng.uniform(0.3, 0.8) / np.sqrt(np.sum(tail * tail))
        tail[0] = 0.0 if muffled else 1.0
        if muffled:
            spectrum = scipy.fft.rfft(tail, 2 * len(tail))
            hz = scipy.fft.rfftfreq(2 * len(tail), 1 / SAMPLE_RATE)
            tail = scipy.fft.irfft(spectrum / (1 + (hz / MUFFLED_HZ) ** 4))[: len(tail)]
            tail /= np.sqrt(np.sum(tail * tail))
        responses.append(tail.astype(np.float32))
    return tuple(responses)


@cache
def _noises() -> dict[str, np.ndarray]:
    """Kinds of noise, float32, of unit root mean square, that loop without a click."""
    rng = np.random.default_rng(23)
    count = NOISE_SECONDS * SAMPLE_RATE
    white = rng.standard_normal(count)
    hz = scipy.fft.rfftfreq(count, 1 / SAMPLE_RATE)
    spectrum = scipy.fft.rfft(white)
    pink = scipy.fft.irfft(spectrum / np.sqrt(np.maximum(hz, 40.0)), count)
    time = np.arange(count) / SAMPLE_RATE
    hum = sum(np.sin(2 * np.pi * 50 * k * time + k) / k for k in (1, 2, 3, 5, 7)) + 0.3 * pink / pink.std()
    syllables = scipy.fft.irfft(scipy.fft.rfft(rng.standard_normal(count)) * (hz < 4), count)
    speechlike = scipy.fft.irfft(spectrum / (1 + (hz / 500) ** 2), count)
    babble = speechlike / speechlike.std() * np.exp(0.5 * syllables / syllables.std())
    kinds = {"white": white, "pink": pink, "hum": hum, "babble": babble}
    return {kind: (noise / noise.std()).astype(np.float32) for kind, noise in kinds.items()}


def sparse_log_mel(samples: np.ndarray) -> np.ndarray:
    """log_mel of a channel that is mostly digital silence: only frames that hear something are computed.

    Equal bit for bit, since a frame depends on its own window alone.
    """
    frames = len(samples) // FRAME_SAMPLES
    loud = samples.reshape(frames, FRAME_SAMPLES).any(axis=1)
    reach = -(-LOOK_BACK // FRAME_SAMPLES)
    heard = loud.copy()
    for back in range(1, reach + 1):
        heard[back:] |= loud[:-back]
    mel = np.empty((frames, MEL), np.float32)
    mel[:] = SILENCE_MEL
    edges = np.flatnonzero(np.diff(np.concatenate([[False], heard, [False]]).astype(np.int8)))
    for start, stop in edges.reshape(-1, 2):
        mel[start:stop] = log_mel(samples[start * FRAME_SAMPLES : stop * FRAME_SAMPLES])[0]
    return mel
