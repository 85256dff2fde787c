"""Voices: text in, speech with word times out.

espeak-ng comes as a shared library in the `espeakng-loader` wheel. It keeps global state from one utterance to the
next; our voice files (`tracts.py`) switch off what draws on it and the seed is set each time, so that speech is a
function of text and speaker alone. One process each: the library is not thread-safe.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import espeakng_loader
import numpy as np
import soxr

from data_pipelines import tracts
from tmljax.stream.microturn import MICROTURN_SAMPLES, SAMPLE_RATE
from tmljax.stream.record import Word

ACCENTS = {
    "us": "gmw/en-US",
    "gb": "gmw/en",
    "rp": "gmw/en-GB-x-rp",
    "lancaster": "gmw/en-GB-x-gbclan",
    "midlands": "gmw/en-GB-x-gbcwmd",
    "nyc": "gmw/en-US-nyc",
    "caribbean": "gmw/en-029",
}

# How words sound that the dictionary would read otherwise (espeak phoneme mnemonics).
SOUNDS = {"mhm": "[[m@h'm]]", "uhhuh": "[[Vh'V]]", "um": "[[V:m]]", "uh": "[[V:]]"}
LETTER_SOUNDS = {"a": "[['eI]]", "i": "[['aI]]"}  # the model says letters, never articles


class Speaker(NamedTuple):
    """One person: an accent, a vocal tract and habits."""

    accent: str
    tract: str
    rate: int  # words per minute
    pitch: int  # 0..99, 50 is the tract's own
    range: int  # of pitch, 0..99


MODEL = Speaker("us", tracts.MODEL, 205, 50, 25)


@dataclass(frozen=True)
class Utterance:
    """samples float32 [n] at 16 kHz, without silence at either end; words are timed from its start."""

    samples: np.ndarray
    words: tuple[Word, ...]

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


class Voice(Protocol):
    """Anything that speaks for everybody; a better synthesiser drops in here."""

    def say(self, text: str, speaker: Speaker) -> Utterance: ...


def utter(voices: Voice, text: str, speaker: Speaker) -> Utterance:
    """What is heard when they say it: people speak, the model says word after word."""
    if speaker != MODEL:
        return voices.say(text, speaker)
    return in_step([voices.say(word, MODEL) for word in text.split()])


def in_step(spoken: Sequence[Utterance]) -> Utterance:
    """Utterances of one word each (at least one), one after the other, each from the start of a micro-turn.

    A voice that speaks whole sentences lets each word hint at the next, in pace, melody and how sounds run together.
    The model chooses a word a micro-turn before it sounds, and hears itself: in training it would read from its own
    speech what to say, and be at a loss when it has to speak.
    """
    turns = [-(-len(word.samples) // MICROTURN_SAMPLES) for word in spoken]
    starts = MICROTURN_SAMPLES * np.cumsum([0, *turns[:-1]])
    samples = np.zeros(starts[-1] + len(spoken[-1].samples), np.float32)
    timed = []
    for word, start in zip(spoken, starts):
        end = start + len(word.samples)
        samples[start:end] = word.samples
        timed.append(Word(word.words[0].text, round(start / SAMPLE_RATE, 4), round(end / SAMPLE_RATE, 4)))
    return Utterance(samples, tuple(timed))


@cache
def split_of(text: str) -> str:
    """The split that a sentence belongs to: by its hash, so that it can be in one only."""
    share = hashlib.blake2b(text.encode(), digest_size=4).digest()[0] / 256
    return "test" if share < 0.12 else "validation" if share < 0.20 else "train"


@cache
def cast(split: str) -> tuple[tuple[str, str], ...]:
    """(accent, tract) of everybody who may speak to the model in this split; no vocal tract is in two splits."""
    return tuple((accent, tract) for accent in ACCENTS for tract in tracts.SPLITS[split])


def draw_speaker(rng: np.random.Generator, split: str) -> Speaker:
    people = cast(split)
    accent, tract = people[rng.integers(len(people))]
    return Speaker(accent, tract, int(rng.integers(165, 226)), int(rng.integers(30, 71)), int(rng.integers(30, 71)))


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
_EVENT_WORD, _EVENT_END = 1, 5
_SYNCHRONOUS, _BUFFER_MS = 2, 4000
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_QUIET = 50  # of 100: at full volume it clips now and then, and its gain remembers that
_UTF8, _PHONEMES = 1, 0x100


@cache
def _data_folder() -> str:
    """espeak's data with our voice files and links to the wheel for the rest, shared by all processes."""
    source = Path(espeakng_loader.get_data_path())
    files = tracts.voice_files(source / "voices" / "!v")
    fingerprint = hashlib.blake2b(repr((str(source), files)).encode(), digest_size=8).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"tmljax-voices-{os.getuid()}-{fingerprint}"
    if not (folder / "phondata").exists():
        making = Path(tempfile.mkdtemp(prefix="tmljax-voices-"))
        for name in ("phondata", "phonindex", "phontab", "intonations", "en_dict", "lang"):
            (making / name).symlink_to(source / name)
        (making / "voices" / "!v").mkdir(parents=True)
        for tract, text in files.items():
            (making / "voices" / "!v" / tract).write_text(text)
        try:
            making.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(making)
    return str(folder)


class Espeak:
    """The library; one per process, since its state is global."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        self._chunks: list[bytes] = []
        self._events: list[tuple[int, int, int]] = []  # type, character, sample
        self._callback = _CALLBACK(self._receive)
        self.rate = self._library.espeak_Initialize(_SYNCHRONOUS, _BUFFER_MS, _data_folder().encode(), 0)
        assert self.rate > 0, "espeak-ng did not start"
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, wav, count: int, events) -> int:
        if count > 0:
            self._chunks.append(ctypes.string_at(wav, 2 * count))
        i = 0
        while events[i].type:
            event = events[i]
            self._events.append((event.type, event.text_position, event.sample))
            i += 1
        return 0

    def _become(self, speaker: Speaker) -> None:
        """Also where nothing changes: loading a voice forgets the formants of the utterance before."""
        status = self._library.espeak_SetVoiceByName(f"{ACCENTS[speaker.accent]}+{speaker.tract}".encode())
        assert status == 0, f"espeak-ng has no voice {speaker}"
        settings = {_RATE: speaker.rate, _PITCH: speaker.pitch, _RANGE: speaker.range, _VOLUME: _QUIET}
        for parameter, value in settings.items():
            self._library.espeak_SetParameter(parameter, value, 0)

    def say(self, text: str, speaker: Speaker, sounds: Mapping[str, str] = SOUNDS) -> Utterance:
        """Words of `text` are separated by spaces and may carry punctuation."""
        self._become(speaker)
        words = text.split()
        spoken = [sounds.get(word.strip(",.?!"), word) for word in words]
        starts = np.cumsum([0] + [len(s) + 1 for s in spoken[:-1]])
        encoded = " ".join(spoken).encode()
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._chunks, self._events = [], []
        status = self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8 | _PHONEMES, None, None)
        assert status == 0, f"espeak-ng could not say {text!r}"
        samples = np.frombuffer(b"".join(self._chunks), np.int16).astype(np.float32) * (100 / _QUIET / 32768)
        onsets = np.full(len(words), -1.0)
        closed = len(samples) / self.rate
        for kind, character, sample in self._events:
            if kind == _EVENT_WORD:
                word = int(np.searchsorted(starts, character - 1, side="right")) - 1
                if onsets[word] < 0:
                    onsets[word] = sample / self.rate
            elif kind == _EVENT_END:
                closed = sample / self.rate
        resampled = soxr.resample(samples, self.rate, SAMPLE_RATE, quality="MQ").astype(np.float32, copy=False)
        return _tighten(resampled, words, _fill(onsets, spoken, closed))


def _fill(onsets: np.ndarray, spoken: list[str], end: float) -> np.ndarray:
    """Times of word borders [words + 1]; words that espeak merged ("of the") share their time by length."""
    borders = np.append(onsets, end)
    borders[0] = max(borders[0], 0.0)
    known = np.flatnonzero(borders >= 0)
    for a, b in itertools.pairwise(known):
        lengths = np.cumsum([len(spoken[i]) for i in range(a, b)])
        borders[a + 1 : b] = borders[a] + (borders[b] - borders[a]) * lengths[:-1] / lengths[-1]
    return np.maximum.accumulate(borders)


_BLOCK = 80  # 5 ms
_PAUSE = 0.075  # seconds: longer than the closure of a plosive, shorter than the rest at a comma


def _tighten(samples: np.ndarray, words: list[str], borders: np.ndarray) -> Utterance:
    """Cuts silence off both ends and ends each word where its sound ends.

    After a comma espeak reports the next word late: its sound begins with the first after the pause.
    """
    blocks = len(samples) // _BLOCK
    level = np.sqrt(np.mean(samples[: blocks * _BLOCK].reshape(blocks, _BLOCK) ** 2, axis=1))
    loud = np.flatnonzero(level > max(0.02 * level.max(), 1e-4))
    first, last = int(loud[0]), int(loud[-1]) + 1
    step = _BLOCK / SAMPLE_RATE
    timed = []
    for i, (text, start, end) in enumerate(zip(words, borders, borders[1:])):
        inside = loud[np.searchsorted(loud, start / step - 0.5) : np.searchsorted(loud, end / step - 0.5)]
        if text.endswith(",") and i + 1 < len(words):
            pauses = np.flatnonzero(np.diff(inside) > _PAUSE / step)
            if len(pauses):
                borders[i + 1] = inside[pauses[-1] + 1] * step
                inside = inside[: pauses[-1] + 1]
        if len(inside):
            start, end = max(start, inside[0] * step), min(max((inside[-1] + 1) * step, start + step), end)
        start, end = (min(max(t - first * step, 0.0), (last - first) * step) for t in (start, end))
        timed.append(Word(text.strip(",.?!"), round(float(start), 4), round(float(max(end, start)), 4)))
    return Utterance(np.ascontiguousarray(samples[first * _BLOCK : last * _BLOCK]), tuple(timed))


@cache
def _espeak() -> Espeak:
    return Espeak()


class Voices:
    """Everybody who can speak in this process; what was said lately is remembered, for the model repeats its words."""

    def __init__(self, words: int = 512, utterances: int = 16) -> None:
        self._espeak = _espeak()
        self._word = lru_cache(words)(lambda word: self._espeak.say(word, MODEL, SOUNDS | LETTER_SOUNDS))
        self._utterance = lru_cache(utterances)(self._espeak.say)

    def say(self, text: str, speaker: Speaker) -> Utterance:
        return self._word(text) if speaker == MODEL else self._utterance(text, speaker)
