"""Real stereo recordings as sessions: a moshi-finetune manifest in, the dataset's own records out.

A recording of any length is read once, in blocks, and becomes records of about a minute, cut where nobody
speaks: so a window can be read without its hour, and an hour counts for more than a minute. The layout of
the files is described in data_pipelines/manifest.py.

Legend: F mel frames, M mel channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import soundfile
import soxr

from data_pipelines.manifest import Recording, open_video, read_manifest
from tmljax.config import Experiment, UserError
from tmljax.stream import dmel
from tmljax.stream.microturn import FRAME_SAMPLES, FRAMES, MICROTURN_SAMPLES, MICROTURN_SECONDS, SAMPLE_RATE
from tmljax.stream.record import Session, Word

FAMILY = "recording"
UNHEARD = "recording-unheard"  # nobody transcribed the user: what was heard is unknown
RECORD_MICROTURNS = 300  # of a record, at most, unless the training window is longer
BLOCK_SECONDS = 20  # of sound in memory


def import_manifest(path: str | os.PathLike[str], experiment: Experiment) -> Iterator[Session]:
    """The sessions of a manifest, in order. All of it is checked (UserError) before the first one is made."""
    for recording in read_manifest(path, experiment.stream):
        yield from convert(recording, experiment)


def convert(recording: Recording, experiment: Experiment) -> Iterator[Session]:
    """The recording as sessions of about RECORD_MICROTURNS, each with its own clock."""
    every = experiment.stream.video_every
    video = None if recording.video is None else open_video(recording, experiment.stream)
    borders = place_borders(recording, every, max(RECORD_MICROTURNS, experiment.data.window))
    frames = _stream_frames(recording, borders)
    for number, (first, last) in enumerate(pairwise(borders)):
        model_mel, user_mel = next(frames)
        start, end = first * MICROTURN_SECONDS, last * MICROTURN_SECONDS
        pictures = None if video is None else np.array(video[first // every : -(-last // every)])
        yield Session(
            id=f"{recording.id}-{number:04d}",
            family=FAMILY if recording.user_words is not None else UNHEARD,
            frames=(last - first) * FRAMES,
            user_dmel=dmel.quantise(user_mel),
            model_mel=model_mel.astype(np.float16),
            user_words=_words_within(recording.user_words or (), start, end),
            model_words=_words_within(recording.model_words, start, end),
            typed=_words_within(recording.typed, start, end),
            video=None if pictures is None or not len(pictures) else pictures,
        )


def place_borders(recording: Recording, every: int, most: int) -> list[int]:
    """Micro-turns where records begin and end: multiples of `every`, far from words, at most `most` apart."""
    words = (*recording.model_words, *(recording.user_words or ()))
    starts, ends = np.array([word[1:] for word in words]).reshape(-1, 2).T
    total, most = recording.microturns, most // every * every
    borders = [0]
    while (left := total - borders[-1]) > most:
        even = left / -(-left // most)  # of what is left, in records of one length
        candidates = np.arange(every, most + 1, every)
        candidates = borders[-1] + candidates[np.argsort(np.abs(candidates - even))][: most // every // 3 + 1]
        moments = candidates[:, None] * MICROTURN_SECONDS
        distance = np.maximum(starts - moments, moments - ends).min(axis=1, initial=np.inf)
        # Half a second from any word is far enough; argmax takes the first, the nearest to even.
        borders.append(int(candidates[np.argmax(np.minimum(distance, 0.5))]))
    return [*borders, total]


def _words_within(words: tuple[Word, ...], start: float, end: float) -> tuple[Word, ...]:
    """Words that start in [start, end), on the clock that starts at `start`."""
    return tuple(
        Word(word.text, word.start - start, min(word.end, end) - start)
        for word in words
        if start - 1e-6 <= word.start < end - 1e-6
    )


def _stream_frames(recording: Recording, borders: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Log mel of (model, user), float32 [F, 80] each, between each pair of borders."""
    states = [dmel.MelState(), dmel.MelState()]
    held = [np.zeros((0, dmel.MEL), np.float32)] * 2
    blocks = _stream_sound(recording, borders[-1] * MICROTURN_SAMPLES)
    for first, last in pairwise(borders):
        wanted = (last - first) * FRAMES
        pieces = [[rest] for rest in held]
        while sum(map(len, pieces[0])) < wanted:
            block = next(blocks)
            for channel in range(2):
                mel, states[channel] = dmel.log_mel(np.ascontiguousarray(block[:, channel]), states[channel])
                pieces[channel].append(mel)
        joined = [np.concatenate(piece) for piece in pieces]
        held = [mel[wanted:] for mel in joined]
        yield joined[0][:wanted], joined[1][:wanted]


def _stream_sound(recording: Recording, samples: int) -> Iterator[np.ndarray]:
    """float32 [400 n, 2] at 16 kHz, `samples` in all: what is missing to the last micro-turn is silence."""
    rest = np.zeros((0, 2), np.float32)
    for block in _stream_resampled(recording):
        block = np.concatenate([rest, block])[:samples]
        whole = len(block) // FRAME_SAMPLES * FRAME_SAMPLES
        rest = block[whole:]
        samples -= whole
        if whole:
            yield block[:whole]
    if samples:
        yield np.concatenate([rest, np.zeros((samples - len(rest), 2), np.float32)])


def _stream_resampled(recording: Recording) -> Iterator[np.ndarray]:
    try:
        with soundfile.SoundFile(str(recording.path)) as file:
            resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 2, dtype="float32")
            same = file.samplerate == SAMPLE_RATE
            read = 0
            for block in file.blocks(file.samplerate * BLOCK_SECONDS, dtype="float32", always_2d=True):
                read += len(block)
                if not np.isfinite(block).all():
                    raise UserError(f"{recording.where}: {recording.path} has samples that are not finite numbers")
                yield block if same else resampler.resample_chunk(block)
            if read < file.frames:
                raise UserError(f"{recording.where}: {recording.path} is truncated: {read} of {file.frames} samples")
            if not same:
                yield resampler.resample_chunk(np.zeros((0, 2), np.float32), last=True)
    except soundfile.LibsndfileError as e:
        raise UserError(f"{recording.where}: {recording.path} cannot be read as sound: {e}") from None
