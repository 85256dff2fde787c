"""A session as it is stored: what both sides did over one stretch of wall clock, and what ought to happen.

Synthetic renderings and real stereo recordings both become this record, so that everything after it is
one path. All times are seconds on the session's clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Word(NamedTuple):
    """A spoken or typed word; `typed` words have end == start."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Session:
    """F = 8 x micro-turns frames of 25 ms; arrays are None where the stream does not exist.

    `truth` is a list of expectations (see data_pipelines/score.py), plain JSON.
    """

    id: str
    family: str
    frames: int  # F, a multiple of 8
    user_dmel: np.ndarray | None  # uint8 [F, 80]
    model_mel: np.ndarray | None  # float16 [F, 80], log10 mel as in tmljax/stream/dmel.py
    user_words: tuple[Word, ...] = ()  # what was addressed to the model or said near it
    model_words: tuple[Word, ...] = ()
    typed: tuple[Word, ...] = ()
    seen: tuple[Word, ...] | None = None  # what the video shows, while it does; None: nobody wrote it down
    video: np.ndarray | None = None  # uint8 [N, H, W, 3]; frame i is seen during micro-turn i * video_every
    audio: np.ndarray | None = None  # int16 [samples, 2], channel 0 the model's, 1 the user's; kept for test splits
    truth: tuple[dict[str, Any], ...] = field(default=())
