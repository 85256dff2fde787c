"""dMel: speech as 80 log-mel intensities in 16 bins, 40 frames a second (arXiv 2407.15835, code apple/dmel).

The recipe is Apple's to the constant (n_fft 1024, Hann of 50 ms, Slaney mel 80-7600 Hz, magnitude, log10,
16 bins over [-7, 2]) but causal: frame i ends with sample 400 (i + 1), so nothing waits for the future.
Chunked equals whole bit for bit, hence no BLAS here: its sums depend on how many rows a call has. The
filterbank is a sparse matrix whose every output is summed in one order, and the FFT always gets full
SIMD blocks. Oracle: the plain per-frame transform in tests/stream/test_dmel.py.

Legend: F mel frames, M mel channels (80), K FFT bins.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scipy.fft
import scipy.sparse

from tmljax.stream.microturn import BINS, FRAME_SAMPLES, MEL, SAMPLE_RATE

N_FFT = 1024
WINDOW_SAMPLES = 800
LOOK_BACK = N_FFT - FRAME_SAMPLES  # samples of state
LOW_HZ, HIGH_HZ = 80.0, 7600.0
POWER_FLOOR = 1e-10
MEL_FLOOR = 1e-10
LOG_LOW, LOG_HIGH = -7.0, 2.0
BIN_WIDTH = (LOG_HIGH - LOG_LOW) / (BINS - 1)  # 0.6
VOICE_DELAY = 2  # frames by which a voice made from mel is late: a frame tells of the sound before its end
SIMD_FRAMES = 16  # pocketfft transforms up to 16 float32 frames at once; the rest would go another way
BLOCK_FRAMES = 128  # frames in flight: what fits the second-level cache


@dataclass(frozen=True)
class MelState:
    """What the next frames need of the past: the last 624 samples, zeros at the start of a stream."""

    tail: np.ndarray = field(default_factory=lambda: np.zeros(LOOK_BACK, np.float32))


def hz_to_mel(hz: np.ndarray | float) -> np.ndarray:
    """Slaney's scale: linear below 1 kHz (200/3 Hz a mel), 27 mels per factor 6.4 above."""
    hz = np.asarray(hz, np.float64)
    return np.where(hz < 1000.0, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000.0) / 1000) / np.log(6.4))


def mel_to_hz(mel: np.ndarray | float) -> np.ndarray:
    mel = np.asarray(mel, np.float64)
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((np.maximum(mel, 15) - 15) / 27))


def filterbank() -> np.ndarray:
    """float64 [M, K]: triangles on Slaney's scale, each of unit area in Hz (librosa.filters.mel's default)."""
    edges = mel_to_hz(np.linspace(hz_to_mel(LOW_HZ), hz_to_mel(HIGH_HZ), MEL + 2))
    bins = np.arange(N_FFT // 2 + 1) * SAMPLE_RATE / N_FFT
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))
    return np.maximum(triangles, 0) * 2 / (high - low)


def hann() -> np.ndarray:
    """Periodic Hann of 800 samples, float32; torch and librosa centre it in the 1024 of the transform."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW_SAMPLES) / WINDOW_SAMPLES)).astype(np.float32)


_HANN = hann()
FILTERS = scipy.sparse.csr_matrix(filterbank().astype(np.float32))  # [M, K]
_MARGIN = (N_FFT - WINDOW_SAMPLES) // 2


def log_mel(samples: np.ndarray, state: MelState | None = None) -> tuple[np.ndarray, MelState]:
    """log10 mel, float32 [F, 80], of `samples` [400 F] in [-1, 1] (int16 is scaled), and the state to go on with.

    Without `state` the stream starts, after silence. Feeding a stream in any pieces gives the same bits.
    """
    if samples.ndim != 1 or len(samples) % FRAME_SAMPLES:
        raise ValueError(f"log_mel takes [400 F] samples, got {samples.shape}; see pad_to_frames")
    if samples.dtype == np.int16:
        samples = samples * np.float32(1 / 32768)
    tail = MelState().tail if state is None else state.tail
    stream = np.concatenate([tail, samples.astype(np.float32, copy=False)])
    frames = len(samples) // FRAME_SAMPLES
    mel_FM = np.empty((frames, MEL), np.float32)
    # Only the window's 800 of the 1024 samples matter, and a shift does not change magnitudes.
    padded = np.concatenate([stream[_MARGIN:], np.zeros(SIMD_FRAMES * FRAME_SAMPLES, np.float32)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW_SAMPLES)[::FRAME_SAMPLES]
    for start in range(0, frames, BLOCK_FRAMES):
        stop = min(start + BLOCK_FRAMES, frames)
        whole = start - (start - stop) // SIMD_FRAMES * SIMD_FRAMES
        mel_FM[start:stop] = _log_mel_block(windows[start:whole])[: stop - start]
    return mel_FM, MelState(stream[len(stream) - LOOK_BACK :].copy())


def _log_mel_block(frames: np.ndarray) -> np.ndarray:
    """[n, 800] -> [n, M] for n a multiple of SIMD_FRAMES."""
    spectrum = scipy.fft.rfft(frames * _HANN, N_FFT, axis=-1)
    power = spectrum.real**2
    power += spectrum.imag**2
    magnitude = np.sqrt(np.maximum(power, np.float32(POWER_FLOOR)))
    mel = FILTERS @ np.ascontiguousarray(magnitude.T)
    return np.log10(np.maximum(mel, np.float32(MEL_FLOOR))).T


def pad_to_frames(samples: np.ndarray, frames: int = 1) -> np.ndarray:
    """Zeros appended to the next multiple of `frames` mel frames."""
    short = -len(samples) % (frames * FRAME_SAMPLES)
    return np.pad(samples, (0, short)) if short else samples


def quantise(mel: np.ndarray) -> np.ndarray:
    """uint8 bins 0..15 of log10 mel of any shape: the nearest of -7, -6.4, ..., 2."""
    bins = np.rint((np.asarray(mel, np.float32) - np.float32(LOG_LOW)) / np.float32(BIN_WIDTH))
    return np.clip(bins, 0, BINS - 1).astype(np.uint8)


def dequantise(bins: np.ndarray) -> np.ndarray:
    """float32 log10 mel at the centre of each bin; off by at most 0.3 inside [-7, 2]."""
    return np.float32(LOG_LOW) + np.float32(BIN_WIDTH) * bins.astype(np.float32)


SILENCE_MEL: np.ndarray = log_mel(np.zeros(FRAME_SAMPLES, np.float32))[0][0]  # float32 [80], digital silence
SILENCE_MEL.flags.writeable = False
