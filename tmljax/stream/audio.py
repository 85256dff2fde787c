"""Waveforms in and out: any sound file becomes 16 kHz float32, and what is written is whole or absent.

Legend: n samples.
"""

from __future__ import annotations

import os
import struct
import wave

import numpy as np
import soundfile
import soxr

from tmljax import files
from tmljax.config import UserError
from tmljax.stream.microturn import FRAME_SAMPLES, SAMPLE_RATE

# Voice activity of clean speech, RMS of 25 ms in dB below full scale. A stretch must reach ONSET_DB; it
# extends while it stays above KEEP_DB. Digital silence is -inf, 16-bit dither -98, a whisper about -45.
ONSET_DB = -40.0
KEEP_DB = -50.0


def read_audio(path: str | os.PathLike[str]) -> np.ndarray:
    """float32 [n], or [n, channels] when there are several, at 16 kHz, nominally in [-1, 1].

    Takes what libsndfile reads, at any rate and width. Raises UserError for a missing, empty, truncated or
    zero-length file, for one that is not audio, and for samples that are not finite.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise UserError(f"{name}: no such file" if not os.path.exists(name) else f"{name}: not a file")
    if os.path.getsize(name) == 0:
        raise UserError(f"{name}: the file is empty")
    refuse_truncated(name)
    try:
        with soundfile.SoundFile(name) as file:
            promised, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError) as e:  # TypeError: of a headerless .raw
        raise UserError(f"{name}: not a readable sound file ({e}); WAV, FLAC, Ogg and MP3 are") from None
    if len(samples) < promised:
        raise UserError(f"{name}: truncated, {len(samples)} of {promised} samples are there; copy or record it again")
    if not len(samples):
        raise UserError(f"{name}: holds no samples")
    if not np.isfinite(samples).all():
        raise UserError(f"{name}: has samples that are not finite numbers")
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE)
        if not len(samples):
            raise UserError(f"{name}: too short for one sample at {SAMPLE_RATE} Hz")
    return samples[:, 0] if samples.shape[1] == 1 else samples


def refuse_truncated(name: str) -> None:
    """libsndfile reads a cut WAV as if it were meant to be short, so its data chunk is compared with the file."""
    size = os.path.getsize(name)
    with open(name, "rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
            return
        while len(chunk := file.read(8)) == 8:
            kind, length = chunk[:4], struct.unpack("<I", chunk[4:])[0]
            here = file.tell()
            if kind == b"data":
                # 0xFFFFFFFF and its kin are written by programs that stream and do not know the length
                if length < 0x7FFFF000 and here + length > size:
                    there = f"{size - here} of {length} bytes of sound are there"
                    raise UserError(f"{name}: truncated, {there}; copy or record it again")
                return
            file.seek(here + length + length % 2)
    raise UserError(f"{name}: truncated, the WAV has no data chunk; copy or record it again")


def write_wav(path: str | os.PathLike[str], samples: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """16-bit WAV of float32 [n] or [n, channels] in [-1, 1] (clipped) or int16, whole or not at all.

    Raises UserError when the folder is missing, the disk is full or writing is refused.
    """
    name = os.fspath(path)
    pcm = samples if samples.dtype == np.int16 else to_int16(samples)
    try:
        with files.whole(name) as aside, open(aside, "wb") as raw, wave.open(raw, "wb") as file:
            file.setnchannels(1 if pcm.ndim == 1 else pcm.shape[1])
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(np.ascontiguousarray(pcm, "<i2").tobytes())
    except OSError as e:
        full = "the disk is full" if files.is_full(e) else e.strerror or str(e)
        raise UserError(f"cannot write {name}: {full}") from None


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Rounded and clipped; NaN is silence. int16 -> float32 / 32768 -> int16 is exact."""
    return np.rint(np.clip(np.nan_to_num(samples) * 32768.0, -32768, 32767)).astype(np.int16)


def energy_vad(samples: np.ndarray) -> np.ndarray:
    """bool [ceil(n / 400)]: which frames of 25 ms hold sound, for float32 [n] without background noise.

    Two absolute thresholds with hysteresis, ONSET_DB and KEEP_DB; a plain one flickers inside words.
    """
    frames = np.pad(samples, (0, -len(samples) % FRAME_SAMPLES)).reshape(-1, FRAME_SAMPLES).astype(np.float32)
    power = np.einsum("fs,fs->f", frames, frames) / FRAME_SAMPLES
    loud, kept = power > 10 ** (ONSET_DB / 10), power > 10 ** (KEEP_DB / 10)
    starts, ends = _runs(kept)
    reached = np.add.reduceat(loud, starts) > 0 if len(starts) else np.zeros(0, bool)
    voiced = np.zeros(len(kept), bool)
    for start, end in zip(starts[reached], ends[reached], strict=True):
        voiced[start:end] = True
    return voiced


def _runs(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends (exclusive) of the runs of True."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False].astype(np.int8)))
    return edges[::2], edges[1::2]


def voiced_segments(samples: np.ndarray, merge_gap: float = 0.3, min_length: float = 0.05) -> list[tuple[float, float]]:
    """Stretches of sound as (start, end) seconds: gaps of at most `merge_gap` closed, then short ones dropped."""
    seconds = FRAME_SAMPLES / SAMPLE_RATE
    merged: list[tuple[float, float]] = []
    for start, end in zip(*(edges * seconds for edges in _runs(energy_vad(samples))), strict=True):
        if merged and start - merged[-1][1] <= merge_gap + 1e-9:
            merged[-1] = (merged[-1][0], float(end))
        else:
            merged.append((float(start), float(end)))
    return [(start, end) for start, end in merged if end - start >= min_length - 1e-9]
