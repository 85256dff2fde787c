"""What a metric looks at, and what it returns.

A metrics file has one entry, `measure(items) -> list[Measurement]`, over the items of one system. It takes
from each session the expectations it knows (`truth` kinds, see data_pipelines/score.py) and skips the rest,
so every family can be given to every file. Where an expectation cannot be tried at all (an interruption of
a model that was not talking) the value is None: not applicable, counted apart, never a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from tmljax.evals import intervals
from tmljax.evals.intervals import Interval
from tmljax.stream import audio
from tmljax.stream.microturn import FRAME_SAMPLES, SAMPLE_RATE
from tmljax.stream.record import Session, Word

USER_GAP = 0.6  # seconds of pause inside a segment, Full-Duplex-Bench v1.5 get_timing
MODEL_GAP = 0.5
SHORTEST_SEGMENT = 0.1  # seconds; a click is no speech
NOISE_MARGIN = 10 ** (9 / 10)  # power above the quietest tenth that counts as speech

Truth = Mapping[str, Any]


@dataclass(frozen=True)
class Performance:
    """What a system did in a session, on the session's clock.

    Transcripts of the decoder, the baselines, and output.wav + output.json of any other system are all this.
    """

    audio: np.ndarray  # float32 [samples] at 16 kHz, as long as the session
    words: tuple[Word, ...]  # claimed
    heard: tuple[Word, ...] | None = None  # the user's words as the system noted them; None: it notes none
    tick_ms: tuple[float, ...] = ()
    vocoder_ms: tuple[float, ...] = ()
    late: float = 0.0  # seconds by which sound and claims stand after the micro-turns that made them


@dataclass(frozen=True)
class Item:
    session: Session
    performance: Performance
    clean: Performance | None = None  # the same system and seed, the event blanked from the user's audio

    def truths(self, kind: str) -> list[Truth]:
        return [t for t in self.session.truth if t["kind"] == kind]

    @property
    def seconds(self) -> float:
        return self.session.frames * intervals.FRAME_SECONDS

    @cached_property
    def user_segments(self) -> list[Interval]:
        """User speech: by the truth's word times where there are any, by energy otherwise."""
        return user_segments(self.session)

    @cached_property
    def model_segments(self) -> list[Interval]:
        """Audible speech of the system, by energy."""
        return segments(self.performance.audio, MODEL_GAP)

    @cached_property
    def clean_segments(self) -> list[Interval] | None:
        return None if self.clean is None else segments(self.clean.audio, MODEL_GAP)


class Value(NamedTuple):
    session: str
    value: float | None  # None: not applicable


@dataclass(frozen=True)
class Measurement:
    name: str
    values: tuple[Value, ...]
    unit: Literal["rate", "share", "s", "1/s", "1/min", "distance", "ms"]  # a rate is of 0s and 1s
    better: Literal["higher", "lower", "neither"]


class Turn(NamedTuple):
    """A stretch of the session in which one reply is due."""

    begin: float  # what is said before belongs to the turn before
    after: float  # the user has finished: latency counts from here
    end: float  # what starts later belongs to the turn after
    truth: Truth


def turns(session: Session) -> list[Turn]:
    """One for each reply that is due; each begins where the window of the one before ends.

    With one reply the turn is the whole session, which is what Full-Duplex-Bench looks at. A reply after an
    interruption or a story begins where that ends, since what was said before answers something else.
    """
    replies = sorted((t for t in session.truth if t["kind"] == "reply"), key=lambda t: t["after"])
    ends = [t["end"] for t in session.truth if t["kind"] == "yield"]
    ends += [t["span"][1] for t in session.truth if t["kind"] == "backchannel"]
    divided: list[Turn] = []
    for truth in replies:
        before = [e for e in ends if e <= truth["after"] + intervals.EPSILON]
        begin = max([divided[-1].end if divided else 0.0, *before])
        divided.append(Turn(begin, truth["after"], truth["window"][1], truth))
    return divided


def segments(samples: np.ndarray, gap: float) -> list[Interval]:
    """Voiced stretches by energy. Full-Duplex-Bench uses Silero VAD here; we need no network weights."""
    return audio.voiced_segments(samples, merge_gap=gap, min_length=SHORTEST_SEGMENT)


def above_noise(samples: np.ndarray) -> np.ndarray:
    """float32 [n]: frames hardly louder than the quietest tenth are silenced, so that room noise is no speech."""
    whole = np.pad(samples, (0, -len(samples) % FRAME_SAMPLES)).reshape(-1, FRAME_SAMPLES)
    power = np.mean(whole**2, axis=1)
    return (whole * (power > NOISE_MARGIN * np.quantile(power, 0.1))[:, None]).reshape(-1)[: len(samples)]


def user_segments(session: Session) -> list[Interval]:
    if session.user_words:
        return intervals.spans(session.user_words, USER_GAP)
    return segments(above_noise(user_audio(session)), USER_GAP) if session.audio is not None else []


def user_audio(session: Session) -> np.ndarray:
    """float32 [samples] in [-1, 1]; silence where the session keeps no audio."""
    if session.audio is None:
        return np.zeros(session.frames * FRAME_SAMPLES, np.float32)
    return session.audio[:, 1].astype(np.float32) / 32768


def model_audio(session: Session) -> np.ndarray:
    """float32 [samples]: the voice that the model is trained to have."""
    if session.audio is None:
        return np.zeros(session.frames * FRAME_SAMPLES, np.float32)
    return session.audio[:, 0].astype(np.float32) / 32768


def samples_of(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE)


def gather(name: str, unit: Any, better: Any, pairs: Iterable[tuple[Item, float | bool | None]]) -> list[Measurement]:
    """A list with one Measurement, or an empty one where no item had the expectation."""
    values = tuple(Value(i.session.id, None if v is None else float(v)) for i, v in pairs)
    return [Measurement(name, values, unit, better)] if values else []
