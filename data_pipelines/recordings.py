"""Real stereo recordings as sessions: a moshi-finetune manifest in, the dataset's own records out.

A recording of any length is read once, in blocks, and becomes records of about a minute, cut where nobody
speaks: so a window can be read without its hour, and an hour counts for more than a minute. The layout of
the files is described in data_pipelines/manifest.py. The records are prepared once, under config.data.root,
with the features of synthetic sessions (data_pipelines/records.py).

Legend: F mel frames, M mel channels.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from data_pipelines import records
from data_pipelines.manifest import Recording, fingerprint, open_video, read_manifest
from tmljax import files, pulse
from tmljax.config import Experiment, Stream, UserError
from tmljax.stream import dmel
from tmljax.stream.microturn import FRAME_SAMPLES, FRAMES, MICROTURN_SAMPLES, MICROTURN_SECONDS, SAMPLE_RATE
from tmljax.stream.record import Session, Word

FAMILY = "recording"
UNHEARD = "recording-unheard"  # nobody transcribed the user: what was heard is unknown
RECORD_MICROTURNS = 300  # of a record, at most, unless the training window is longer
BLOCK_SECONDS = 20  # of sound in memory
HELD_OUT = 20  # one record in so many is for validation
SPLIT = "records"  # TFDS's one split, of which train and validation are parts
RECORDS_A_FILE = 512
FORMAT = 1  # raise it when the same files give other records


class Recorded(records.Dataset):
    """Real conversations; see data_pipelines/recordings.py."""


def folder(manifest: str, experiment: Experiment) -> Path:
    """Where the records of a manifest are: another folder when any of its files or the layout of video changes."""
    stream = experiment.stream
    most = max(RECORD_MICROTURNS, experiment.data.window)
    content = (FORMAT, fingerprint(manifest), stream.video_height, stream.video_width, stream.video_every, most)
    key = hashlib.sha256(repr(content).encode()).hexdigest()[:12]
    return Path(experiment.data.root) / f"{Path(manifest).stem}-{key}"


def check(manifest: str, experiment: Experiment) -> None:
    """Reads headers and word times, unless they were imported already. Raises UserError for what is wrong in them."""
    if not Recorded(folder(manifest, experiment), experiment.stream).whole:
        read_manifest(manifest, experiment.stream)


def prepare(manifest: str, experiment: Experiment, progress: bool = True) -> Path:
    """Imports a manifest where that was not done yet; other processes that ask for it wait.

    Raises UserError for what is wrong in the manifest, and for a full disk.
    """
    home, stream = folder(manifest, experiment), experiment.stream
    if Recorded(home, stream).whole:
        return home
    recordings = read_manifest(manifest, stream)
    try:
        with _alone(home.with_name(f".{home.name}.lock")):
            if not Recorded(home, stream).whole:
                shutil.rmtree(home, ignore_errors=True)  # what an interrupted import left
                store(home, stream, _import_all(recordings, experiment, manifest, progress))
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as e:  # ArrayRecord has its own ways to say it
        if files.is_full(e):
            raise UserError(f"the disk is full; free space for {home} and run again") from None
        if isinstance(e, OSError):
            raise UserError(f"cannot write the records of {manifest}: {e}") from None
        raise
    return home


def store(home: Path, stream: Stream, sessions: Iterator[Session]) -> None:
    """Writes `sessions` as records under `home`, for `Records` to read."""
    staging, staged = home / ".staging", list[tuple[Path, int]]()
    staging.mkdir(parents=True)
    for first in sessions:
        path = staging / f"{len(staged):05d}.array_record"
        staged.append((path, records.write(path, chain([first], islice(sessions, RECORDS_A_FILE - 1)), stream)))
    Recorded(home, stream, {SPLIT: staged}).take_over(staging)
    shutil.rmtree(staging)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _import_all(
    recordings: Sequence[Recording], experiment: Experiment, name: str, progress: bool
) -> Iterator[Session]:
    seconds = round(sum(recording.seconds for recording in recordings))
    with tqdm(total=seconds, unit="s", unit_scale=True, desc=f"importing {name}", disable=not progress) as bar:
        for recording in recordings:
            for session in convert(recording, experiment):
                yield session
                bar.update(session.frames * FRAME_SAMPLES / SAMPLE_RATE)
                pulse.goes_on()


def open_manifest(manifest: str, experiment: Experiment, split: str) -> Records:
    """The "train" or "validation" records of a manifest, which is imported first where it was not yet.

    One record in 20 is held out; its words were not trained on, its speakers may have been.
    Raises UserError where files of the import are missing or have lost a part.
    """
    home = prepare(manifest, experiment)
    if Recorded(home, experiment.stream).damaged([SPLIT]):
        raise records.damage(home, "it has lost files, or parts of them")
    return Records(home, experiment.stream, split)


class Records(Sequence[Session]):
    """Decoded when asked for. It can be pickled into worker processes."""

    def __init__(self, home: Path, stream: Stream, split: str) -> None:
        self._home, self._stream = home, stream
        self._numbers = split_records(Recorded(home, stream).info.splits[SPLIT].num_examples, split)
        self._source: Any = None

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Session:
        if self._source is None:
            self._source = Recorded(self._home, self._stream).as_data_source(SPLIT)
        return records.read(self._source, self._numbers[index], self._home)

    def fingerprint(self) -> str:
        """Of the records; see data_pipelines/records.py."""
        return records.fingerprint(Recorded(self._home, self._stream).data_dir, SPLIT)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}


def split_records(count: int, split: str) -> list[int]:
    """Every 20th record is for validation; the last one where there are fewer, but more than one."""
    held = list(range(HELD_OUT - 1, count, HELD_OUT)) or ([count - 1] if count > 1 else [])
    return held if split == "validation" else sorted(set(range(count)).difference(held))


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
