"""From log-mel back to sound, one micro-turn at a time.

`Vocoder` is what the decoder knows; a learned one drops in. `GriffinLim` needs no training: linear
magnitudes that explain the mel (multiplicative updates, Lee and Seung 2000), phases carried on from the last
micro-turn along spectral peaks, then fast Griffin-Lim (Perraudin et al. 2013) on the new frames alone. What
the past frames add to the overlap is fixed, so micro-turns join without a seam (RTISI, Beauregard et al.
2005). Whole utterances are synthesised by the same pushes, hence chunked equals whole. Sessions are pushed together,
in groups over the cores, since numpy on one session's few numbers is mostly overhead; each comes out as if alone.

Legend: N sessions, F mel frames, M mel channels (80), J synthesis frames (two a mel frame), K FFT bins.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

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
GROUP = 8  # sessions that a thread takes at a time; of 4, 8 and 16 the fastest on two cores (LOG.md)
GATE = -4.0  # a frame whose channels all lie below is silence: about half a step of 16 bits
CEILING = 1.5  # of log10 mel; a full-scale square wave stays below

_BINS = dmel.N_FFT // 2 + 1
_HANN = dmel.hann()
_FILTERS_KM = dmel.FILTERS.T.tocsr()
_COVERED_K = np.asarray(dmel.FILTERS.sum(axis=0)).reshape(-1)
_SHARE_K1 = np.where(_COVERED_K > 0, 1 / np.maximum(_COVERED_K, 1e-9), 0).astype(np.float32)[:, None]


class Vocoder(Protocol):
    """What makes voices. What it returns is `latency_samples` later than `dmel.log_mel` heard it."""

    latency_samples: int

    def stream(self) -> Any:
        """What a session's next micro-turn needs of those before; `push` changes it in place."""

    def push(self, streams: Sequence[Any], mel_NFM: np.ndarray) -> np.ndarray:
        """One micro-turn of N sessions, float32 [N, 8, 80] log10 mel -> float32 [N, 3200] samples, each as if alone."""


@dataclass(frozen=True)
class GriffinLim:
    """Any mel, even one that no sound has (a model's), gives finite samples in [-1, 1]; silence gives zeros."""

    iterations: int = 12
    momentum: float = 0.5
    mel_iterations: int = 10
    seed: int = 0

    latency_samples = LATENCY

    def stream(self) -> Voice:
        phase_K = np.random.default_rng(self.seed).uniform(-np.pi, np.pi, _BINS).astype(np.float32)
        return Voice(np.zeros(_BINS, np.float32), phase_K, np.zeros(TAIL, np.float32), np.zeros(DELAY, np.float32))

    def push(self, streams: Sequence[Voice], mel_NFM: np.ndarray) -> np.ndarray:
        """See `Vocoder.push`."""
        if not streams:
            return np.zeros((0, MICROTURN_SAMPLES), np.float32)
        if len(streams) <= GROUP:
            return self._push_group(streams, mel_NFM)
        groups = [slice(n, n + GROUP) for n in range(0, len(streams), GROUP)]
        pushed = _threads().map(lambda group: self._push_group(streams[group], mel_NFM[group]), groups)
        return np.concatenate(list(pushed))

    def synthesise(self, mel_FM: np.ndarray) -> np.ndarray:
        """float32 [400 F], aligned with the sound that `dmel.log_mel` made `mel_FM` of."""
        F = len(mel_FM)
        silent = np.broadcast_to(dmel.SILENCE_MEL, (-F % FRAMES + FRAMES, MEL))
        stream = self.stream()
        pushed = np.concatenate([mel_FM, silent]).reshape(-1, FRAMES, MEL)
        samples = np.concatenate([self.push([stream], mel[None])[0] for mel in pushed])
        return samples[LATENCY : LATENCY + F * FRAME_SAMPLES]

    def _push_group(self, streams: Sequence[Voice], mel_NFM: np.ndarray) -> np.ndarray:
        magnitude_NJK = self._magnitudes(streams, mel_NFM)
        settled = np.zeros((len(streams), MICROTURN_SAMPLES), np.float32)
        sounding = [n for n, s in enumerate(streams) if magnitude_NJK[n].any() or s.overlap.any()]
        if sounding:
            settled[sounding] = self._reconstruct([streams[n] for n in sounding], magnitude_NJK[sounding])
        samples = np.concatenate([np.stack([s.delayed for s in streams]), settled], axis=1)
        for stream, delayed in zip(streams, samples[:, MICROTURN_SAMPLES:], strict=True):
            stream.delayed = delayed
        return np.clip(samples[:, :MICROTURN_SAMPLES], -1, 1)

    def _magnitudes(self, streams: Sequence[Voice], mel_NFM: np.ndarray) -> np.ndarray:
        """[N, J, K]: the mel frames' linear magnitudes and, between them, interpolated ones."""
        mel_NFM = np.nan_to_num(np.asarray(mel_NFM, np.float32), nan=dmel.LOG_LOW, posinf=CEILING, neginf=dmel.LOG_LOW)
        new_NFK = np.zeros((*mel_NFM.shape[:2], _BINS), np.float32)
        loud_NF = mel_NFM.max(axis=2) >= GATE
        if loud_NF.any():
            new_NFK[loud_NF] = linear_magnitudes(mel_NFM[loud_NF], self.mel_iterations)
        last_N1K = np.stack([s.magnitude_K for s in streams])[:, None]
        roots = np.concatenate([last_N1K, new_NFK], axis=1) ** np.float32(0.25)
        between = (0.5 * (roots[:, :-1] + roots[:, 1:])) ** 4
        for stream, new_FK in zip(streams, new_NFK, strict=True):
            stream.magnitude_K = new_FK[-1]
        return np.stack([between, new_NFK], axis=2).reshape(len(streams), -1, _BINS).astype(np.float32)

    def _reconstruct(self, streams: Sequence[Voice], magnitude_NJK: np.ndarray) -> np.ndarray:
        """The samples that the new frames settle, [N, 3200]; keeps what the next ones need."""
        overlap = np.stack([s.overlap for s in streams])
        spectrum_NJK = magnitude_NJK * propagate(np.stack([s.phase_K for s in streams]), magnitude_NJK)
        before = None
        for _ in range(self.iterations):
            consistent = _analyse(_overlap_add(spectrum_NJK, overlap) / _NORM)
            step = 0 if before is None else self.momentum * (consistent - before)
            before = consistent
            spectrum_NJK = magnitude_NJK * _unit(consistent + step)
        samples = _overlap_add(spectrum_NJK, overlap)
        for n, stream in enumerate(streams):
            stream.overlap = samples[n, MICROTURN_SAMPLES:]
            stream.phase_K = np.angle(spectrum_NJK[n, -1])
        return samples[:, :MICROTURN_SAMPLES] / _NORM[:MICROTURN_SAMPLES]


@dataclass
class Voice:
    """What one session's next micro-turn needs of those before."""

    magnitude_K: np.ndarray  # of the last synthesis frame
    phase_K: np.ndarray
    overlap: np.ndarray  # what past frames add to samples not yet settled
    delayed: np.ndarray


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="voice")


def linear_magnitudes(mel_FM: np.ndarray, iterations: int) -> np.ndarray:
    """float32 [F, K] >= 0 whose mel is 10 ** mel_FM, as near as `iterations` multiplicative updates come."""
    target_MF = 10 ** np.minimum(mel_FM.T, np.float32(CEILING)).astype(np.float32)
    estimate_KF = (_FILTERS_KM @ np.ascontiguousarray(target_MF)) * _SHARE_K1 + np.float32(1e-8)
    for _ in range(iterations):
        ratio_MF = target_MF / np.maximum(dmel.FILTERS @ estimate_KF, np.float32(1e-10))
        estimate_KF *= (_FILTERS_KM @ ratio_MF) * _SHARE_K1
    return np.ascontiguousarray(estimate_KF.T)


def propagate(phase_NK: np.ndarray, magnitude_NJK: np.ndarray) -> np.ndarray:
    """complex64 unit phases [N, J, K]: each peak turns on at its frequency, and its bins follow it.

    Neighbouring bins of a Hann window centred at 400 samples differ by pi 800 / 1024 (Laroche and Dolson 1999).
    """
    k = np.arange(_BINS, dtype=np.int32)
    peak_NJK = np.zeros(magnitude_NJK.shape, bool)
    left, here, right = magnitude_NJK[..., :-2], magnitude_NJK[..., 1:-1], magnitude_NJK[..., 2:]
    peak_NJK[..., 1:-1] = (here > left) & (here >= right)
    below = np.maximum.accumulate(np.where(peak_NJK, k, -_BINS), axis=-1)  # the nearest peak from each bin down, and up
    above = np.minimum.accumulate(np.where(peak_NJK, k, 2 * _BINS)[..., ::-1], axis=-1)[..., ::-1]
    nearest_NJK = np.where(k - below <= above - k, below, above).clip(0, _BINS - 1)
    some_NJ = peak_NJK.any(axis=-1)

    log = np.log(magnitude_NJK + np.float32(1e-9))
    offset_NJK = np.zeros(magnitude_NJK.shape, np.float32)
    a, b, c = log[..., :-2], log[..., 1:-1], log[..., 2:]
    offset_NJK[..., 1:-1] = np.clip(0.5 * (a - c) / np.minimum(a - 2 * b + c, -1e-6), -0.5, 0.5)
    # What a peak turns from frame to frame, and what a bin beside it differs.
    own_NJK = np.float32(2 * np.pi * HOP / dmel.N_FFT) * (k.astype(np.float32) + offset_NJK)
    aside_NJK = np.float32(np.pi * dmel.WINDOW_SAMPLES / dmel.N_FFT) * (k - nearest_NJK).astype(np.float32)
    turn_NJK = np.take_along_axis(own_NJK, nearest_NJK, axis=-1) - aside_NJK
    phases = np.empty(magnitude_NJK.shape, np.float32)
    for j in range(magnitude_NJK.shape[1]):
        turned_NK = np.take_along_axis(phase_NK, nearest_NJK[:, j], axis=-1) + turn_NJK[:, j]
        phase_NK = np.where(some_NJ[:, j, None], np.remainder(turned_NK, np.float32(2 * np.pi)), phase_NK)
        phases[:, j] = phase_NK
    return np.exp(1j * phases).astype(np.complex64)


def _overlap_add(spectrum_NJK: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """float32 [N, 3200 + TAIL]: the windowed frames added up, the past's share `overlap` [N, TAIL] with them."""
    frames = scipy.fft.irfft(spectrum_NJK, dmel.N_FFT, axis=-1)[..., : dmel.WINDOW_SAMPLES] * _HANN
    (N, J), hops = frames.shape[:2], frames.reshape(*frames.shape[:2], OVERLAP, HOP)
    total = np.zeros((N, J + OVERLAP - 1, HOP), np.float32)
    total[:, : OVERLAP - 1] = overlap.reshape(N, -1, HOP)
    for i in range(OVERLAP):
        total[:, i : i + J] += hops[:, :, i]
    return total.reshape(N, -1)


def _analyse(samples: np.ndarray) -> np.ndarray:
    """complex64 [N, J, K]."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, dmel.WINDOW_SAMPLES, axis=-1)[:, ::HOP]
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
