"""Manifests of real stereo recordings, in the layout of kyutai-labs/moshi-finetune, read and checked.

A manifest is JSON lines, one recording each, paths relative to the manifest's folder:

    {"path": "calls/0001.wav", "duration": 24.5, "video": "calls/0001.npy"}

The sound file has two channels at any rate: left is the model's side, right the user's. Beside it lies a
file of the same stem with the word times (annotate.py of moshi-finetune writes it):

    {"alignments": [["hello", [0.32, 0.61], "SPEAKER_MAIN"], ...], "typed": [["seven", 12.4], ...]}

Words of SPEAKER_MAIN are the model's, of any other speaker the user's. "video" and "typed" are ours and optional:
uint8 frames [N, H, W, 3] of the config's video size, one for every `video_every` micro-turns (.npy, or .npz with
one array), and what the user typed when. Only headers are read here, so a mistake in the last of ten thousand
files is told at once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from tmljax.config import Stream, UserError
from tmljax.stream import audio
from tmljax.stream.microturn import MICROTURN_SECONDS
from tmljax.stream.record import Word

SYNTHETIC = "synthetic"  # the generated dataset's name in config.data.recordings
MODEL_SPEAKER = "SPEAKER_MAIN"
ALIGNMENT_TOLERANCE = 0.25  # seconds by which an aligner may overshoot the end
DURATION_TOLERANCE = 1.0  # seconds between the manifest's duration and the file's


@dataclass(frozen=True)
class Recording:
    """One line of a manifest, checked; `user_words` is None where nobody transcribed the user."""

    where: str  # "manifest.jsonl:3"
    id: str  # the manifest's path without the suffix
    path: Path
    seconds: float
    model_words: tuple[Word, ...]
    user_words: tuple[Word, ...] | None
    typed: tuple[Word, ...]
    video: Path | None

    @property
    def microturns(self) -> int:
        return math.ceil(self.seconds / MICROTURN_SECONDS - 1e-6)


def parse_manifests(text: str) -> dict[str, float]:
    """{manifest: weight} of config.data.recordings, "a.jsonl:0.5,b.jsonl" (a weight left out is 1)."""
    weights: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        path, colon, weight = item.rpartition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            path, colon, value = item, ":", 1.0
        path = path if colon else item
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"config.data.recordings: the weight of {path} must be a number from 0 up, got {weight}")
        if path in weights:
            raise UserError(f"config.data.recordings names {path} twice")
        if value == 0 and path != SYNTHETIC and not Path(path).exists():
            near = f"; did you mean {SYNTHETIC}:0?" if difflib.get_close_matches(path, [SYNTHETIC]) else ""
            raise UserError(f"config.data.recordings leaves out {path}, which does not exist{near}")
        weights[path] = value
    return weights


def recorded(text: str) -> list[str]:
    """The manifests themselves, in order, without those of weight 0."""
    return [path for path, weight in parse_manifests(text).items() if path != SYNTHETIC and weight]


class Line(NamedTuple):
    where: str  # "manifest.jsonl:3"
    name: str  # as the manifest has it
    sound: Path
    words: Path
    video: Path | None
    duration: float | None


def read_manifest(path: str | os.PathLike[str], stream: Stream) -> list[Recording]:
    """Raises UserError naming the line, and the word where there is one, for anything that cannot be used."""
    recordings = [_read_recording(line, stream) for line in _read_lines(Path(path))]
    if not recordings:
        raise UserError(f"the recordings manifest {path} names no recording")
    return recordings


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Changes with the manifest and with the size or date of any file that it names; reads none of them."""
    digest = hashlib.sha256()
    for line in _read_lines(Path(path)):
        files = (file for file in (line.sound, line.words, line.video) if file is not None)
        stats = [(file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else None for file in files]
        digest.update(repr((line.name, line.duration, line.video and line.video.name, stats)).encode())
    return digest.hexdigest()


def _read_lines(path: Path) -> Iterator[Line]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the recordings manifest {path}: {_reason(e)}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _parse_line(line, f"{path}:{number}", path.parent)


def _parse_line(text: str, where: str, folder: Path) -> Line:
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not JSON ({e.msg} at column {e.colno})") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("path"), str):
        raise UserError(
            f'{where}: must be an object like {{"path": "x.wav", "duration": 24.5}}, got {text.strip()[:80]}'
        )
    duration, video, sound = tree.get("duration"), tree.get("video"), folder / tree["path"]
    if duration is not None and not _is_number(duration):
        raise UserError(f"{where}: the duration must be seconds, got {duration!r}")
    if not isinstance(video, str | None):
        raise UserError(f"{where}: the video must be the name of a file, got {video!r}")
    return Line(
        where, tree["path"], sound, sound.with_suffix(".json"), None if video is None else folder / video, duration
    )


def _read_recording(line: Line, stream: Stream) -> Recording:
    seconds = _measure(line.sound, line.where)
    if line.duration is not None and abs(line.duration - seconds) > DURATION_TOLERANCE:
        raise UserError(
            f"{line.where}: the duration is given as {line.duration:g} s but {line.sound} lasts {seconds:.2f} s"
        )
    tree = _read_sidecar(line.words, line.where)
    words = [_word(entry, seconds, f"{line.words}: alignments[{i}]") for i, entry in enumerate(tree["alignments"])]
    model, user = (
        _in_order(w for w, speaker in words if (speaker == MODEL_SPEAKER) is mine and w.text) for mine in (True, False)
    )
    recording = Recording(
        where=line.where,
        id=os.path.splitext(line.name)[0],
        path=line.sound,
        seconds=seconds,
        model_words=model,
        user_words=user or None,
        typed=_in_order(
            _typed(entry, seconds, f"{line.words}: typed[{i}]") for i, entry in enumerate(tree.get("typed", []))
        ),
        video=line.video,
    )
    if recording.video is not None:
        open_video(recording, stream)
    return recording


def _measure(sound: Path, where: str) -> float:
    """Seconds of a stereo file, from its header."""
    if not sound.is_file():
        raise UserError(f"{where}: the sound file {sound} is missing")
    try:
        audio.refuse_truncated(str(sound))
        header = soundfile.info(str(sound))
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    except (soundfile.LibsndfileError, TypeError) as e:  # TypeError: of a headerless .raw
        raise UserError(f"{where}: {sound} cannot be read as sound: {e}") from None
    if header.channels != 2:
        raise UserError(
            f"{where}: {sound} has {header.channels} channel{'s' * (header.channels > 1)}; "
            "a recording needs two, left the model's and right the user's"
        )
    if header.frames == 0:
        raise UserError(f"{where}: {sound} holds no sound")
    return header.frames / header.samplerate


def _read_sidecar(sidecar: Path, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{where}: the word times {sidecar} are missing (moshi-finetune's annotate.py makes them)"
        ) from None
    except (OSError, ValueError) as e:
        raise UserError(f"{where}: cannot read the word times {sidecar}: {_reason(e)}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("alignments"), list):
        raise UserError(f'{where}: {sidecar} has no list "alignments"')
    if not isinstance(tree.get("typed", []), list):
        raise UserError(f'{where}: {sidecar}: "typed" must be a list')
    return tree


def _word(entry: Any, seconds: float, where: str) -> tuple[Word, str]:
    match entry:
        case [str(text), [start, end], str(speaker)] if _is_number(start) and _is_number(end):
            pass
        case _:
            raise UserError(f'{where} must be ["word", [start, end], "SPEAKER"], got {json.dumps(entry)[:80]}')
    if not 0 <= start <= end:
        raise UserError(f"{where} {text!r}: {start:g} to {end:g} s is no stretch of time")
    if end > seconds + ALIGNMENT_TOLERANCE:
        raise UserError(f"{where} {text!r}: ends at {end:g} s, beyond the recording's end at {seconds:.2f} s")
    return Word(text.strip(), min(float(start), seconds), min(float(end), seconds)), speaker


def _typed(entry: Any, seconds: float, where: str) -> Word:
    match entry:
        case [str(text), moment] if _is_number(moment) and 0 <= moment <= seconds:
            return Word(text, float(moment), float(moment))
    raise UserError(f'{where} must be ["text", time], the time within {seconds:.2f} s, got {json.dumps(entry)[:80]}')


def _in_order(words: Iterable[Word]) -> tuple[Word, ...]:
    return tuple(sorted(words, key=lambda word: word.start))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def open_video(recording: Recording, stream: Stream) -> np.ndarray:
    """uint8 [N, H, W, 3], of which only what is touched is read (.npy)."""
    path = recording.video
    try:
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(frames, np.lib.npyio.NpzFile):
            if len(frames.files) != 1:
                raise UserError(f"{recording.where}: {path} must hold one array, it has {len(frames.files)}")
            frames = frames[frames.files[0]]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as e:
        reason = (
            "it is no .npy or .npz file of numbers" if isinstance(e, ValueError) and "pickle" in str(e) else _reason(e)
        )
        raise UserError(f"{recording.where}: cannot read the video {path}: {reason}") from None
    wanted = (stream.video_height, stream.video_width, 3)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != wanted:
        raise UserError(
            f"{recording.where}: {path} is {frames.dtype} {list(frames.shape)}; it must be uint8 [N, "
            f"{', '.join(map(str, wanted))}], the size in config.stream"
        )
    most = -(-recording.microturns // stream.video_every)
    if len(frames) > most:
        raise UserError(
            f"{recording.where}: {path} has {len(frames)} frames; {recording.seconds:.2f} s take at most {most}, "
            f"one every {stream.video_every * MICROTURN_SECONDS:g} s"
        )
    return frames
