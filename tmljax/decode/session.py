"""The host side of the streaming decoder: sessions in and out of the slots of one compiled tick.

Evaluation, the `stream` verb, an exported directory and a server all run through `Live`, so what is
measured is what is served. Features are computed 200 ms at a time with carried state, and every session
owns its tokenizer queue, its dMel state and its voice: what it says depends on its inputs and its seed
alone, whatever shares its batch (blueprint law 3).

Only arrays cross the border to the tick, by name, so that a tick made from the model's source and one
loaded from an export are the same to this file; it imports neither.

N slots of the decoder batch, T micro-turns of a session, P patches of a frame, F frames and M mel channels
of a micro-turn.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tmljax.decode.engine import Arrays, Engine
from tmljax.stream import dmel
from tmljax.stream.microturn import (
    ABSENT,
    FRAMES,
    MICROTURN_SAMPLES,
    MICROTURN_SECONDS,
    OUTPUT_LAG,
    PATCH_VALUES,
    SAMPLE_RATE,
    input_microturn,
)
from tmljax.stream.patches import patchify
from tmljax.stream.record import Word
from tmljax.stream.text import Tokenizer
from tmljax.stream.weave import text_of

SILENT_BINS = dmel.quantise(dmel.SILENCE_MEL)


class Chunk(NamedTuple):
    """What one session takes in during one micro-turn; None where the stream does not exist."""

    audio: np.ndarray | None = None  # float32 [3200]
    typed: Sequence[int] = ()  # token ids, queued when there are more than the micro-turn has slots
    frame: np.ndarray | None = None  # uint8 [H, W, 3]; shown at the next micro-turn that takes video


class Spoken(NamedTuple):
    """What came out of it, to be heard during the micro-turn that follows."""

    audio: np.ndarray  # float32 [3200]
    text: np.ndarray  # int32 [k]
    heard: int
    mel: np.ndarray  # float32 [F, M]
    tick_ms: float  # the tick, its results fetched to the host
    vocoder_ms: float  # the voices of all sessions, which are made together


@dataclass
class _Slot:
    """One session's state on the host."""

    seed: int
    vocoder: Any
    mel: Any = field(default_factory=dmel.MelState)
    typed: deque[int] = field(default_factory=deque)
    frame: np.ndarray | None = None
    microturn: int = 0


class Live:
    """Sessions in the N slots of an engine, one micro-turn at a time."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._state = engine.start()
        self._slots: list[_Slot | None] = [None] * engine.sessions

    @property
    def open_slots(self) -> list[int]:
        return [n for n, slot in enumerate(self._slots) if slot is not None]

    @property
    def has_room(self) -> bool:
        return any(slot is None for slot in self._slots)

    def open(self, seed: int = 0) -> int:
        """Starts a session in a free slot. Raises RuntimeError when all are taken."""
        if not self.has_room:
            raise RuntimeError(f"all {self.engine.sessions} slots of the decoder are taken")
        n = self._slots.index(None)
        self._slots[n] = _Slot(seed=seed % 2**32, vocoder=self.engine.vocoder.stream())
        return n

    def close(self, slot: int) -> None:
        self._slots[slot] = None

    def push(self, slot: int, chunk: Chunk) -> Spoken:
        """One micro-turn of the only open session; with several open, time passes for all: see `step`."""
        return self.step({slot: chunk})[slot]

    def step(self, chunks: Mapping[int, Chunk]) -> dict[int, Spoken]:
        """One micro-turn of every open session. Raises ValueError unless each has its chunk."""
        if sorted(chunks) != self.open_slots:
            raise ValueError(f"a micro-turn passes for every session: open {self.open_slots}, given {sorted(chunks)}")
        inputs, after = self._inputs(chunks)
        begin = time.perf_counter()
        self._state, outputs = self.engine.tick(self._state, inputs)
        for n in chunks:
            self._slots[n] = after[n]
        outputs = {name: np.asarray(value) for name, value in outputs.items()}
        tick_ms = 1e3 * (time.perf_counter() - begin)
        begin = time.perf_counter()
        voices, mel_NFM = [self._slots[n].vocoder for n in chunks], outputs["model_mel"][list(chunks)]
        audio = dict(zip(chunks, self.engine.vocoder.push(voices, mel_NFM), strict=True))
        vocoder_ms = 1e3 * (time.perf_counter() - begin)
        text, heard, mel = outputs["model_text"], outputs["heard"], outputs["model_mel"]
        return {
            n: Spoken(audio[n], text[n].copy(), int(heard[n]), mel[n].copy(), tick_ms, vocoder_ms) for n in chunks
        }  # copies, for a view would keep what all slots said

    def _inputs(self, chunks: Mapping[int, Chunk]) -> tuple[Arrays, dict[int, _Slot]]:
        """Of the tick, and the sessions once it has passed; those of now stay as they are, so that a chunk that is
        refused costs nothing. Empty slots are reset at every tick, so that nothing in them ages."""
        N, layout = self.engine.sessions, self.engine.layout
        inputs = {
            "user_dmel": np.tile(SILENT_BINS, (N, FRAMES, 1)),
            "user_present": np.zeros(N, bool),
            "video": np.zeros((N, layout.patches, PATCH_VALUES), np.uint8),
            "video_present": np.zeros(N, bool),
            "user_text": np.full((N, layout.user_text), ABSENT, np.int32),
            "reset": np.ones(N, bool),
            "seed": np.zeros(N, np.uint32),
        }
        after = {n: dataclasses.replace(self._slots[n], typed=self._slots[n].typed.copy()) for n in chunks}
        for n, chunk in chunks.items():
            slot = after[n]
            if chunk.audio is None:
                slot.mel = dmel.MelState()
            else:
                mel, slot.mel = dmel.log_mel(_whole_chunk(chunk.audio), slot.mel)
                inputs["user_dmel"][n], inputs["user_present"][n] = dmel.quantise(mel), True
            slot.typed.extend(chunk.typed)
            for k in range(min(layout.user_text, len(slot.typed))):
                inputs["user_text"][n, k] = slot.typed.popleft()
            slot.frame = slot.frame if chunk.frame is None else chunk.frame
            if slot.frame is not None and slot.microturn % layout.stream.video_every == 0:
                inputs["video"][n], inputs["video_present"][n] = patchify(slot.frame[None])[0], True
                slot.frame = None
            inputs["reset"][n], inputs["seed"][n] = slot.microturn == 0, slot.seed
            slot.microturn += 1
        return inputs, after


def _whole_chunk(audio: np.ndarray) -> np.ndarray:
    if audio.shape != (MICROTURN_SAMPLES,):
        raise ValueError(f"a micro-turn takes {MICROTURN_SAMPLES} samples, got shape {audio.shape}")
    return audio


@dataclass(frozen=True)
class SessionInput:
    """One side of a conversation, known in advance; any subset of the streams."""

    audio: np.ndarray | None = None  # float32 [samples] at 16 kHz; digital silence follows its end
    typed: Sequence[Word] = ()
    video: np.ndarray | None = None  # uint8 [n, H, W, 3]; frame i is seen during micro-turn i * video_every
    seconds: float | None = None  # of the session; None: as long as the audio

    @property
    def samples(self) -> int:
        if self.seconds is not None:
            return round(self.seconds * SAMPLE_RATE)
        return 0 if self.audio is None else len(self.audio)


@dataclass(frozen=True)
class Transcript:
    """What the model did in one session, on the wall clock of the session."""

    audio: np.ndarray  # float32 [samples], exactly as many as the input
    words: list[Word]  # claimed: what the text says is being spoken, and when
    heard: list[Word]  # the user's words, over the micro-turn in which the model noted them
    text: np.ndarray  # int32 [T, k]
    heard_ids: np.ndarray  # int32 [T]
    mel: np.ndarray  # float32 [T, F, M]; row t is heard during micro-turn t + 1
    tick_ms: list[float]  # T latencies of the tick, fetch included
    vocoder_ms: list[float]  # T latencies of the vocoder, on top


def converse(
    engine: Engine,
    inputs: Sequence[SessionInput],
    seeds: Sequence[int],
    progress: Callable[[int], object] | None = None,
) -> list[Transcript]:
    """Runs every session to its end, as many at a time as the engine has slots (continuous batching).

    `progress` is called with the number of micro-turns that just passed, summed over sessions; the total is
    `microturns(inputs)`. Longest first: the slots then run empty together.
    """
    if len(seeds) != len(inputs):
        raise ValueError(f"{len(inputs)} sessions need as many seeds, got {len(seeds)}")
    live = Live(engine)
    waiting = deque(sorted(range(len(inputs)), key=lambda i: -inputs[i].samples))
    running: dict[int, tuple[int, _Run]] = {}
    transcripts: dict[int, Transcript] = {}
    while waiting or running:
        while waiting and live.has_room:
            i = waiting.popleft()
            running[live.open(seeds[i])] = (i, _Run(engine, inputs[i]))
        spoken = live.step({slot: run.next_chunk() for slot, (_, run) in running.items()})
        for slot, out in spoken.items():
            i, run = running[slot]
            run.spoken.append(out)
            if len(run.spoken) == run.microturns:
                transcripts[i] = run.transcript()
                live.close(slot)
                del running[slot]
        if progress is not None:
            progress(len(spoken))
    return [transcripts[i] for i in range(len(inputs))]


def microturns(inputs: Sequence[SessionInput]) -> int:
    return sum(math.ceil(one.samples / MICROTURN_SAMPLES) for one in inputs)


class _Run:
    """One session on its way through a slot."""

    def __init__(self, engine: Engine, source: SessionInput):
        if source.samples < 1:
            raise ValueError("a session needs audio or a length of at least one sample")
        self.engine, self.source = engine, source
        self.microturns = microturns([source])
        self.spoken: list[Spoken] = []
        self.typed: dict[int, list[int]] = {}
        for word in sorted(source.typed, key=lambda w: w.start):
            ids = engine.tokenizer.encode(" " + word.text.strip())
            self.typed.setdefault(input_microturn(word.start), []).extend(ids)

    def next_chunk(self) -> Chunk:
        t, source = len(self.spoken), self.source
        audio = frame = None
        if source.audio is not None:
            end = min((t + 1) * MICROTURN_SAMPLES, source.samples)
            given = source.audio[t * MICROTURN_SAMPLES : end]
            audio = np.pad(np.asarray(given, np.float32), (0, MICROTURN_SAMPLES - len(given)))
        if source.video is not None and t % self.engine.layout.stream.video_every == 0:
            i = t // self.engine.layout.stream.video_every
            frame = source.video[i] if i < len(source.video) else None
        return Chunk(audio, self.typed.get(t, ()), frame)

    def transcript(self) -> Transcript:
        samples, end = self.source.samples, self.source.samples / SAMPLE_RATE
        lag = np.zeros(OUTPUT_LAG * MICROTURN_SAMPLES, np.float32)
        text_Tk = np.stack([s.text for s in self.spoken])
        heard_T = np.array([s.heard for s in self.spoken], np.int32)
        return Transcript(
            audio=np.concatenate([lag, *(s.audio for s in self.spoken)])[:samples],
            words=_until(end, self._when_heard(text_of(text_Tk, self.engine.tokenizer))),
            heard=_until(end, heard_words(heard_T, self.engine.tokenizer)),
            text=text_Tk,
            heard_ids=heard_T,
            mel=np.stack([s.mel for s in self.spoken]),
            tick_ms=[s.tick_ms for s in self.spoken],
            vocoder_ms=[s.vocoder_ms for s in self.spoken],
        )

    def _when_heard(self, words: Sequence[Word]) -> list[Word]:
        """Claims are for the ear: as late as the voice is."""
        late = self.engine.vocoder.latency_samples / SAMPLE_RATE
        return [word._replace(start=word.start + late, end=word.end + late) for word in words]


def _until(end: float, words: Sequence[Word]) -> list[Word]:
    return [word._replace(end=min(word.end, end)) for word in words if word.start < end]


def heard_words(heard_T: np.ndarray, tokenizer: Tokenizer) -> list[Word]:
    """The user's words as the model noted them; each spans the micro-turn of its first token, whose end is
    also when the model's answer to it can first be heard."""
    lag = OUTPUT_LAG * MICROTURN_SECONDS
    noted = text_of(heard_T[:, None], tokenizer)
    return [Word(w.text, w.start - lag, w.start - lag + MICROTURN_SECONDS) for w in noted]
