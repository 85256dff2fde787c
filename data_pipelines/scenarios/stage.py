"""The stage on which a family composes its score: who speaks, what time it is, what is expected.

The clock is the end of what was said last. Voices are asked while composing, because when the user has
finished decides when the model begins.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data_pipelines.scenarios.language import Request, choose, hesitant
from data_pipelines.score import Acoustics, Score, Speech, Track, Truth, boundary, clip_words
from data_pipelines.voices import MODEL, Speaker, Voice, draw_speaker, utter
from tmljax.config import Stream
from tmljax.stream.microturn import MICROTURN_SECONDS
from tmljax.stream.record import Word

GAP = 0.2  # seconds of silence that the model waits for at least, or of speech before it notices
STOP = 0.4  # seconds of speech after which it gives way
SHORT = 8.2  # seconds; after another exchange a session that has come no further mostly still fits 12 s
ROOMS = 16


class Stage:
    def __init__(self, rng: np.random.Generator, split: str, stream: Stream, voices: Voice) -> None:
        self.rng, self.split, self.stream = rng, split, stream
        self._voices = voices
        self.speaker = draw_speaker(rng, split)
        self.speeches: list[Speech] = []
        self.truth: list[Truth] = []
        self.typed: list[Word] = []
        self.listens = True
        self.clock = 0.0
        self._open: list[Truth] = []  # replies whose window ends with the user's next turn
        self.rest(0.2, 1.0)

    def rest(self, low: float, high: float) -> None:
        self.clock += self.rng.uniform(low, high)

    def speak(self, track: Track, text: str, speaker: Speaker, start: float, gain_db: float = 0.0) -> Speech:
        utterance = utter(self._voices, text, speaker)
        start = round(start * 16_000) / 16_000
        words = tuple(Word(w.text, round(w.start + start, 4), round(w.end + start, 4)) for w in utterance.words)
        speech = Speech(track, text, speaker, start, start + utterance.seconds, words, gain_db)
        self.speeches.append(speech)
        return speech

    def user(self, text: str, start: float | None = None, gain_db: float = 0.0) -> Speech:
        """The user says something; moves the clock to its end."""
        speech = self.speak("user", text, self.speaker, self.clock if start is None else start, gain_db)
        self.clock = max(self.clock, speech.end)
        return speech

    def turn(self, text: str) -> Speech:
        """A turn of the user: replies due before it are overdue now."""
        self.close(self.clock)
        return self.user(text)

    def ask(self, said: Request) -> Speech:
        return self.turn(hesitant(self.rng, said.words))

    def reply(self, text: str, content: tuple[str, ...], after: float | None = None) -> Speech:
        """The model answers what ended at `after` (now); moves the clock to its end."""
        after = self.clock if after is None else after
        speech = self.model(text, boundary(after + GAP))
        self.expect_reply(after, content)
        self.clock = speech.end
        return speech

    def model(self, text: str, start: float) -> Speech:
        return self.speak("model", text, MODEL, start)

    def answer(self, said: Request) -> Speech:
        return self.reply(said.reply, said.content)

    def exchange(self, said: Request) -> Speech:
        """A request and its answer; returns the request."""
        asked = self.ask(said)
        self.answer(said)
        self.rest(0.4, 1.1)
        return asked

    def interrupt(self, speech: Speech, onset: float) -> Speech:
        """Cuts the model's `speech` as it hears somebody speak since `onset`."""
        words, stop = clip_words(speech.words, boundary(onset + STOP), boundary(onset + GAP))
        cut = replace(speech, words=words, stop=stop, end=stop)
        self.speeches[self.speeches.index(speech)] = cut
        return cut

    def expect_reply(self, after: float, content: tuple[str, ...]) -> None:
        expected = {"kind": "reply", "after": round(after, 3), "window": [after, after], "content": list(content)}
        self.truth.append(expected)
        self._open.append(expected)

    def expect_silence(self, start: float, end: float) -> None:
        self.truth.append({"kind": "silence", "window": [round(start, 3), round(end, 3)]})

    def close(self, moment: float) -> None:
        """Windows of replies end here."""
        for expected in self._open:
            expected["window"] = [round(expected["window"][0], 3), round(moment, 3)]
        self._open.clear()

    def score(self, family: str, tail: tuple[float, float] = (0.5, 1.0)) -> Score:
        """Ends the session a little after the last event."""
        rng = self.rng
        seconds = self.clock + rng.uniform(*tail)
        period = MICROTURN_SECONDS * self.stream.video_every
        seconds = round(float(np.ceil(seconds / period - 1e-6)) * period, 4)
        self.close(seconds)
        acoustics = Acoustics(
            level_db=-rng.uniform(12, 30),
            noise=choose(rng, ("white", "pink", "hum", "babble")),
            snr_db=None if rng.random() < 0.2 else rng.uniform(10, 40),
            room=int(rng.integers(ROOMS)) if rng.random() < 0.4 else None,
        )
        truth = tuple(sorted(self.truth, key=_when))
        speeches = tuple(sorted(self.speeches, key=lambda s: s.start))
        return Score(family, seconds, speeches, acoustics, truth, tuple(self.typed), listens=self.listens)


def _when(expected: Truth) -> float:
    """The moment from which an expectation holds."""
    if expected["kind"] == "yield":
        return expected["at"]
    return (expected["span"] if expected["kind"] == "backchannel" else expected["window"])[0]
