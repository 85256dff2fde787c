"""Systems that need no model. A metric that cannot tell them apart measures nothing.

Always silent and always talking are the two ends; the VAD timer is the turn detector that an interaction
model does without; the oracle says the truth's words in the truth's voice, as finely as the 200 ms grid allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tmljax.evals import intervals
from tmljax.evals.intervals import Interval
from tmljax.evals.item import Performance, above_noise, model_audio, segments, user_audio
from tmljax.stream.microturn import FRAME_SAMPLES, SAMPLE_RATE, Layout
from tmljax.stream.record import Session, Word
from tmljax.stream.text import Tokenizer
from tmljax.stream.weave import text_of, weave

REPLY = ("let", "me", "think", "about", "that", "for", "a", "moment")
WORD_SECONDS = 0.3
TIMER = 0.6  # seconds of silence after which the timer speaks
NOTICE = 0.1  # seconds of user speech before it stops
PERIOD = 128  # samples: 125 Hz

Perform = Callable[[Session], Performance]


def baselines(layout: Layout, tokenizer: Tokenizer) -> tuple[tuple[str, Perform], ...]:
    return (
        ("always silent", always_silent),
        ("always talking", always_talking),
        ("VAD timer", vad_timer),
        ("oracle", partial(oracle, layout=layout, tokenizer=tokenizer)),
    )


def always_silent(session: Session) -> Performance:
    return Performance(np.zeros(session.frames * FRAME_SAMPLES, np.float32), ())


def always_talking(session: Session) -> Performance:
    return speak(session, [(0.0, session.frames * intervals.FRAME_SECONDS)])


def vad_timer(session: Session) -> Performance:
    """Speaks TIMER seconds after the user fell silent, and stops when the user speaks."""
    user = segments(above_noise(user_audio(session)), 0.0)
    length, over = len(REPLY) * WORD_SECONDS, session.frames * intervals.FRAME_SECONDS
    stretches = []
    for i, (_, end) in enumerate(user):
        resumed = user[i + 1][0] if i + 1 < len(user) else over
        if resumed > end + TIMER:
            stretches.append((end + TIMER, min(end + TIMER + length, resumed + NOTICE, over)))
    return speak(session, stretches)


def oracle(session: Session, layout: Layout, tokenizer: Tokenizer) -> Performance:
    """The words as the weave gives them to the model, read back; the sound as it was recorded."""
    end = session.frames * intervals.FRAME_SECONDS
    words = text_of(weave(session, layout, tokenizer)["model_text"], tokenizer)
    kept = tuple(w._replace(end=min(w.end, end)) for w in words if w.start < end)
    return Performance(model_audio(session), kept, heard=session.user_words)


def speak(session: Session, stretches: Sequence[Interval]) -> Performance:
    """The canned reply over and over in each stretch, cut where it ends, in a humming voice."""
    words = [word for stretch in stretches for word in recite(*stretch)]
    return Performance(hum(words, session.frames * FRAME_SAMPLES), tuple(words))


def recite(begin: float, end: float) -> list[Word]:
    count = int(np.ceil((end - begin) / WORD_SECONDS - intervals.EPSILON))
    starts = [begin + i * WORD_SECONDS for i in range(max(count, 0))]
    return [Word(REPLY[i % len(REPLY)], s, min(s + WORD_SECONDS, end)) for i, s in enumerate(starts)]


def hum(words: Sequence[Word], samples: int) -> np.ndarray:
    """float32 [samples]: ten harmonics under each word, swelling and fading."""
    phase = 2 * np.pi * np.arange(PERIOD) / PERIOD
    tone = np.resize(sum(np.sin(k * phase) / k for k in range(1, 11)), samples)
    loudness = np.zeros(samples)
    for word in words:
        a, b = round(word.start * SAMPLE_RATE), min(round(word.end * SAMPLE_RATE), samples)
        loudness[a:b] = 0.3 + 0.7 * np.sin(np.pi * np.arange(b - a) / max(b - a, 1))
    return (0.12 * tone * loudness).astype(np.float32)
