"""The micro-turn: 200 ms of all streams, and the only description of it.

A micro-turn owns a fixed number of slots (transformer positions), in this order:

    [user_audio | user_video | user_text | model_text | model_audio]

Input slots of micro-turn t carry the wall clock [t, t+1) x 200 ms. Its output is made once that input is
complete, so it is heard during [t+1, t+2) x 200 ms: `OUTPUT_LAG` micro-turns later, plus what its vocoder needs
(`dmel.VOICE_DELAY`, 50 ms), which `decode.session` adds to sound and claims alike. Everything that
turns times into micro-turns (weave, decoder, metrics) uses the two functions at the end of this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tmljax.config import Stream

SAMPLE_RATE = 16_000
FRAME_SAMPLES = 400  # a dMel frame is 25 ms
FRAMES = 8  # dMel frames in a micro-turn
MICROTURN_SAMPLES = FRAMES * FRAME_SAMPLES
MICROTURN_SECONDS = MICROTURN_SAMPLES / SAMPLE_RATE
MEL = 80  # mel channels
BINS = 16  # dMel bins
PATCH = 40  # pixels along a patch
PATCH_VALUES = PATCH * PATCH * 3
OUTPUT_LAG = 1
SEEN_WORDS = 2  # for what a frame shows, in any order, noted at its last slot
NOTES = 1 + SEEN_WORDS  # of a micro-turn, in this order: a word heard, then those for what is seen

# Control tokens; every tokenizer of the project puts them first.
ABSENT = 0  # no typed text in this slot
IDLE = 1  # the model says nothing
HOLD = 2  # the model is still saying the word before
CONTROL_TOKENS = ("<absent>", "<idle>", "<hold>")


def is_word(token: Any) -> Any:
    """Of a token, or of each in an array: whether it is, or is part of, a word."""
    return token >= len(CONTROL_TOKENS)


@dataclass(frozen=True)
class Layout:
    """Slots of a micro-turn, derived from the config."""

    stream: Stream

    @property
    def user_audio(self) -> int:
        return FRAMES // self.stream.frames_per_slot

    @property
    def patches(self) -> int:
        return (self.stream.video_height // PATCH) * (self.stream.video_width // PATCH)

    @property
    def user_video(self) -> int:
        return -(-self.patches // self.stream.patches_per_slot)

    @property
    def user_text(self) -> int:
        return self.stream.user_text_slots

    @property
    def model_text(self) -> int:
        return self.stream.model_text_slots

    @property
    def model_audio(self) -> int:
        return FRAMES // self.stream.frames_per_slot

    @property
    def inputs(self) -> int:
        return self.user_audio + self.user_video + self.user_text

    @property
    def outputs(self) -> int:
        return self.model_text + self.model_audio

    @property
    def slots(self) -> int:
        return self.inputs + self.outputs

    def positions(self, turns: int) -> np.ndarray:
        """The positions of a training example of so many micro-turns: int32 [P, 2] of (micro-turn, slot).

        Video slots between two frames are left out: nothing sees them, and nothing is predicted from them.
        """
        turn, slot = np.divmod(np.arange(turns * self.slots, dtype=np.int32), self.slots)
        video = (slot >= self.user_audio) & (slot < self.user_audio + self.user_video)
        return np.stack([turn, slot], axis=1)[~video | (turn % self.stream.video_every == 0)]


def input_microturn(seconds: float) -> int:
    """The micro-turn whose input holds this moment of the wall clock."""
    return int(seconds / MICROTURN_SECONDS + 1e-6)


def output_seconds(microturn: int) -> float:
    """When the output of this micro-turn begins to be heard."""
    return (microturn + OUTPUT_LAG) * MICROTURN_SECONDS
