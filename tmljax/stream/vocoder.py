"""From log-mel back to sound, one micro-turn at a time.

`Vocoder` is what the decoder knows; a learned one drops in. `GriffinLim` needs no training: linear
magnitudes that explain the mel (multiplicative updates, Lee and Seung 2000), phases carried on from the last
micro-turn along spectral peaks, then fast Griffin-Lim (Perraudin et al. 2013) on the new frames alone. What
the past frames add to the overlap is fixed, so micro-turns join without a seam (RTISI, Beauregard et al.
2005). Whole utterances are synthesised by the same pushes, hence chunked equals whole.

Legend: F mel frames, M mel channels (80), J synthesis frames (two a mel frame), K FFT bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.fft

from tmljax.stream import dmel
from tmljax.stream.microturn import FRAME_SAMPLES, FRAMES, MEL, MICROTURN_SAMPLES

# A mel frame is centred on the sample 512 before its end, and a sample is settled once every window over it
# is there: 712 samples, rounded up to whole frames.
LATENCY = dmel.VOICE_DELAY * FRAME_SAMPLES

HOP = FRAME_SAMPLES // 2  # at the mel's own hop, windows overlap too little to tell the phase
OVERLAP = dmel.WINDOW_SAMPLES // HOP
TAIL = dmel.WINDOW_SAMPLES - HOP
DELAY = LATENCY - (dmel.N_FFT // 2 + dmel.WINDOW_SAMPLES // 2 - HOP)
GATE = -4.0  # a frame whose channels all lie below is silence: about half a step of 16 bits
CEILING = 1.5  # of log10 mel; a full-scale square wave stays below

_BINS = dmel.N_FFT // 2 + 1
_HANN = dmel.hann()
_FILTERS_KM = dmel.FILTERS.T.tocsr()
_COVERED_K = np.asarray(dmel.FILTERS.sum(axis=0)).reshape(-1)
_SHARE_K1 = np.where(_COVERED_K > 0, 1 / np.maximum(_COVERED_K, 1e-9), 0).astype(np.float32)[:, None]


class VocoderStream(Protocol):
    """The voice of one session."""

    def push(self, mel: np.ndarray) -> np.ndarray:
        """One micro-turn of log10 mel, float32 [8, 80] -> float32 [3200] samples."""


class Vocoder(Protocol):
    """What makes voices. What a stream returns is `latency_samples` later than `dmel.log_mel` heard it."""

    latency_samples: int

    def stream(self) -> VocoderStream: ...


@dataclass(frozen=True)
class GriffinLim:
    """Any mel, even one that no sound has (a model's), gives finite samples in [-1, 1]; silence gives zeros."""

    iterations: int = 12
    momentum: float = 0.5
    mel_iterations: int = 10
    seed: int = 0

    latency_samples = LATENCY

    def stream(self) -> GriffinLimStream:
        return GriffinLimStream(self)

    def synthesise(self, mel_FM: np.ndarray) -> np.ndarray:
        """float32 [400 F], aligned with the sound that `dmel.log_mel` made `mel_FM` of."""
        F = len(mel_FM)
        silent = np.broadcast_to(dmel.SILENCE_MEL, (-F % FRAMES + FRAMES, MEL))
        stream = self.stream()
        pushed = np.concatenate([mel_FM, silent]).reshape(-1, FRAMES, MEL)
        return np.concatenate([stream.push(mel) for mel in pushed])[LATENCY : LATENCY + F * FRAME_SAMPLES]


class GriffinLimStream:
    def __init__(self, settings: GriffinLim):
        self._settings = settings
        self._magnitude_K = np.zeros(_BINS, np.float32)  # of the last synthesis frame
        phase = np.random.default_rng(settings.seed).uniform(-np.pi, np.pi, _BINS)
        self._phase_K = phase.astype(np.float32)
        self._overlap = np.zeros(TAIL, np.float32)  # what past frames add to samples not yet settled
        self._delayed = np.zeros(DELAY, np.float32)

    def push(self, mel: np.ndarray) -> np.ndarray:
        """float32 [8, 80] -> float32 [3200]."""
        magnitude_JK = self._magnitudes(mel)
        if magnitude_JK.any() or self._overlap.any():
            settled = self._reconstruct(magnitude_JK)
        else:
            settled = np.zeros(MICROTURN_SAMPLES, np.float32)
        samples = np.concatenate([self._delayed, settled])
        self._delayed = samples[MICROTURN_SAMPLES:]
        return np.clip(samples[:MICROTURN_SAMPLES], -1, 1)

    def _magnitudes(self, mel: np.ndarray) -> np.ndarray:
        """[J, K]: the mel frames' linear magnitudes and, between them, interpolated ones."""
        mel = np.nan_to_num(np.asarray(mel, np.float32), nan=dmel.LOG_LOW, posinf=CEILING, neginf=dmel.LOG_LOW)
        new_FK = np.zeros((len(mel), _BINS), np.float32)
        loud = mel.max(axis=1) >= GATE
        if loud.any():
            new_FK[loud] = linear_magnitudes(mel[loud], self._settings.mel_iterations)
        roots = np.concatenate([self._magnitude_K[None], new_FK]) ** np.float32(0.25)
        between = (0.5 * (roots[:-1] + roots[1:])) ** 4
        self._magnitude_K = new_FK[-1]
        return np.stack([between, new_FK], axis=1).reshape(-1, _BINS).astype(np.float32)

    def _reconstruct(self, magnitude_JK: np.ndarray) -> np.ndarray:
        """The samples that the new frames settle; keeps what the next ones need."""
        spectrum_JK = magnitude_JK * _propagate(self._phase_K, magnitude_JK)
        before = None
        for _ in range(self._settings.iterations):
            consistent = _analyse(self._overlap_add(spectrum_JK) / _NORM)
            step = 0 if before is None else self._settings.momentum * (consistent - before)
            before = consistent
            spectrum_JK = magnitude_JK * _unit(consistent + step)
        samples = self._overlap_add(spectrum_JK)
        self._overlap = samples[MICROTURN_SAMPLES:]
        self._phase_K = np.angle(spectrum_JK[-1])
        return samples[:MICROTURN_SAMPLES] / _NORM[:MICROTURN_SAMPLES]

    def _overlap_add(self, spectrum_JK: np.ndarray) -> np.ndarray:
        """float32 [3200 + TAIL]: the windowed frames added up, the past's share with them."""
        frames = scipy.fft.irfft(spectrum_JK, dmel.N_FFT, axis=-1)[:, : dmel.WINDOW_SAMPLES] * _HANN
        hops = frames.reshape(-1, OVERLAP, HOP)
        total = np.zeros((len(hops) + OVERLAP - 1, HOP), np.float32)
        total[: OVERLAP - 1] = self._overlap.reshape(-1, HOP)
        for i in range(OVERLAP):
            total[i : i + len(hops)] += hops[:, i]
        return total.reshape(-1)


def linear_magnitudes(mel_FM: np.ndarray, iterations: int) -> np.ndarray:
    """float32 [F, K] >= 0 whose mel is 10 ** mel_FM, as near as `iterations` multiplicative updates come."""
    target_MF = 10 ** np.minimum(mel_FM.T, np.float32(CEILING)).astype(np.float32)
    estimate_KF = (_FILTERS_KM @ np.ascontiguousarray(target_MF)) * _SHARE_K1 + np.float32(1e-8)
    for _ in range(iterations):
        ratio_MF = target_MF / np.maximum(dmel.FILTERS @ estimate_KF, np.float32(1e-10))
        estimate_KF *= (_FILTERS_KM @ ratio_MF) * _SHARE_K1
    return np.ascontiguousarray(estimate_KF.T)


def _propagate(phase_K: np.ndarray, magnitude_JK: np.ndarray) -> np.ndarray:
    """complex64 unit phases [J, K]: each peak turns on at its frequency, and its bins follow it.

    Neighbouring bins of a Hann window centred at 400 samples differ by pi 800 / 1024 (Laroche and Dolson 1999).
    """
    k = np.arange(_BINS)
    phases = np.empty(magnitude_JK.shape, np.float32)
    for j, magnitude in enumerate(magnitude_JK):
        left, here, right = magnitude[:-2], magnitude[1:-1], magnitude[2:]
        peaks = np.flatnonzero((here > left) & (here >= right)) + 1
        if len(peaks):
            a, b, c = np.log(magnitude[[peaks - 1, peaks, peaks + 1]] + 1e-9)
            frequency = peaks + np.clip(0.5 * (a - c) / np.minimum(a - 2 * b + c, -1e-6), -0.5, 0.5)
            turned = phase_K[peaks] + 2 * np.pi * HOP / dmel.N_FFT * frequency
            nearest = np.searchsorted((peaks[1:] + peaks[:-1]) / 2, k)
            phase_K = turned[nearest] - np.pi * dmel.WINDOW_SAMPLES / dmel.N_FFT * (k - peaks[nearest])
            phase_K = np.remainder(phase_K, 2 * np.pi)
        phases[j] = phase_K
    return np.exp(1j * phases).astype(np.complex64)


def _analyse(samples: np.ndarray) -> np.ndarray:
    """complex64 [J, K]."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, dmel.WINDOW_SAMPLES)[::HOP]
    return scipy.fft.rfft(frames * _HANN, dmel.N_FFT, axis=-1)


def _unit(spectrum: np.ndarray) -> np.ndarray:
    return spectrum / np.maximum(np.abs(spectrum), np.float32(1e-12))


def _norm() -> np.ndarray:
    """float32 [3200 + TAIL]: sum of squared windows over each sample, of past and new but not future frames."""
    squares = (_HANN**2).reshape(OVERLAP, HOP)
    rows = MICROTURN_SAMPLES // HOP + OVERLAP - 1
    total = np.zeros((rows, HOP))
    for frame in range(1 - OVERLAP, MICROTURN_SAMPLES // HOP):
        for i in range(OVERLAP):
            if frame + i >= 0:
                total[frame + i] += squares[i]
    return np.maximum(total, 0.05).reshape(-1).astype(np.float32)


_NORM = _norm()
