"""A score: a conversation before rendering, with the ground truth of what ought to happen.

Times are seconds on the session's clock. `truth` is a list of plain dicts, one per expectation:

    {"kind": "reply", "after": t, "window": [a, b], "content": [word, ...]}
        The user has finished at `after`, and a reply is due: it takes the turn inside `window`, and its words
        inside the window hold `content` in this order (no word in particular where it is empty). The window
        ends where the user's next turn begins.
    {"kind": "silence", "window": [a, b]}
        Nothing may be said: a pause inside a sentence, talk to others, background speech, silence.
    {"kind": "yield", "at": a, "end": b}
        The user interrupts during [a, b]; the model stops. Its answer is a "reply" of its own.
    {"kind": "keep_floor", "window": [a, b], "until": t}
        The user says "mm-hm" during [a, b]; the model goes on speaking until `t`.
    {"kind": "backchannel", "windows": [[a, b], ...], "span": [a, b]}
        A short acknowledgement starts inside each window; nobody takes the turn inside `span`.
    {"kind": "cue", "modality": "verbal" | "visual", "window": [a, b], "content": [word, ...]}
        `content` is said inside the window, over the user if need be (a verbal cue: all of it; a visual one:
        it starts inside).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from data_pipelines.scenes import Scene
from data_pipelines.voices import Speaker
from tmljax.stream.microturn import MICROTURN_SECONDS
from tmljax.stream.record import Word

Truth = dict[str, Any]
Track = Literal["user", "model", "other"]  # other: somebody in the background


@dataclass(frozen=True)
class Speech:
    """One utterance on a track. `words` carry session times; `stop` is where it is cut off, if it is."""

    track: Track
    text: str
    speaker: Speaker
    start: float
    end: float
    words: tuple[Word, ...]
    gain_db: float = 0.0  # against the track's level
    stop: float | None = None


@dataclass(frozen=True)
class Acoustics:
    """The room of the user: levels in dB, kinds by name; `snr_db` None for no noise."""

    level_db: float  # of the user's speech, below full scale
    noise: Literal["white", "pink", "hum", "babble"]
    snr_db: float | None
    room: int | None  # index of a room response


@dataclass(frozen=True)
class Score:
    family: str
    seconds: float
    speeches: tuple[Speech, ...]
    acoustics: Acoustics
    truth: tuple[Truth, ...]
    typed: tuple[Word, ...] = ()
    scene: Scene | None = None
    listens: bool = True  # False: there is no user audio stream


def boundary(seconds: float) -> float:
    """The first start of a micro-turn at or after this moment: the model can begin or stop there."""
    return round(math.ceil(seconds / MICROTURN_SECONDS - 1e-6) * MICROTURN_SECONDS, 4)


def clip_words(words: tuple[Word, ...], stop: float, noticed: float) -> tuple[tuple[Word, ...], float]:
    """What is left of speech that stops at `stop`, by somebody who knew since `noticed` that it would, and the cut.

    A word cut short counts as said when half of it was, or when it had begun before. Otherwise it is not begun.
    """
    kept = []
    for word in words:
        if word.end <= stop:
            kept.append(word)
        elif word.start < stop:
            if word.start >= noticed and stop - word.start < 0.5 * (word.end - word.start):
                return tuple(kept), word.start
            kept.append(word._replace(end=stop))
    return tuple(kept), stop
