"""A session woven into the streams of its micro-turns, cut into training examples, and read back.

What the model puts out in micro-turn t is heard one micro-turn later (microturn.OUTPUT_LAG), so its words
and its mel move one micro-turn towards the past here, and back again in `text_of`. Where its text is idle its mel
is silence, as the decoder has it: a breath before the first word would give the word away, in training only.

Legend: T micro-turns, k text slots, P patches of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tmljax.config import UserError
from tmljax.stream.dmel import SILENCE_MEL, quantise
from tmljax.stream.microturn import (
    ABSENT,
    CONTROL_TOKENS,
    FRAMES,
    HOLD,
    IDLE,
    MEL,
    MICROTURN_SECONDS,
    OUTPUT_LAG,
    SEEN_WORDS,
    Layout,
    input_microturn,
    output_seconds,
)
from tmljax.stream.patches import patchify
from tmljax.stream.record import Session, Word
from tmljax.stream.text import Tokenizer

BREATH = 0.3  # seconds; words closer than this are one stretch of speech
AUDIBLE = 0.25  # share of an output window that speech must fill for HOLD
_SILENT_MEL = SILENCE_MEL.astype(np.float16)
_SILENT_BINS = quantise(SILENCE_MEL)

Streams = dict[str, np.ndarray]


def weave(session: Session, layout: Layout, tokenizer: Tokenizer, start: int = 0, length: int | None = None) -> Streams:
    """All streams of a session; T is its micro-turns rounded up to a multiple of `video_every`.

    user_dmel uint8 [T, 8, 80], user_present bool [T], video uint8 [T / video_every, P, 4800], video_present
    bool [T / video_every], user_text int32 [T, k], model_text int32 [T, k], model_mel float16 [T, 8, 80],
    heard int32 [T], seen int32 [T / video_every, 2], valid bool [T]. With `length`, the same as
    `cut(weave(session, ...), start, length)`, but of sound and video only that window is touched.
    """
    every = layout.stream.video_every
    real = session.frames // FRAMES
    T = -(-real // every) * every
    first, count = (0, T) if length is None else (start, length)
    _check_window(first, count, every)
    present = first + np.arange(count) < real
    frames = min(count, max(T - first, 0)) // every
    video, video_present = _weave_video(session.video, layout, first // every, frames)
    seen = _weave_seen(session.seen, tokenizer, first // every, frames, every * MICROTURN_SECONDS)
    streams = {
        "user_dmel": _fold(session.user_dmel, first * FRAMES, count, _SILENT_BINS),
        "user_present": present & (session.user_dmel is not None),
        "video": _pad(video, count // every, 0),
        "video_present": _pad(video_present, count // every, False),
        "seen": _pad(seen, count // every, ABSENT),
        "model_mel": _fold(session.model_mel, (first + OUTPUT_LAG) * FRAMES, count, _SILENT_MEL),
        "valid": present,
    }
    for name, array in _weave_text(session, layout, tokenizer, T).items():
        streams[name] = _pad(array[first : first + count], count, _FILLERS[name])
    silent = (streams["model_text"] == IDLE).all(axis=1)
    streams["model_mel"] = np.where(silent[:, None, None], _SILENT_MEL, streams["model_mel"])
    return streams if length is None else streams | {"start": np.int32(start)}


def cut(streams: Streams, start: int, length: int) -> Streams:
    """One training example: `length` micro-turns from `start` on (a multiple of video_every), and its `start`.

    Beyond the session's end it is absent, idle and silent, with valid False.
    """
    every = max(len(streams["valid"]) // max(len(streams["video"]), 1), 1)
    _check_window(start, length, every)
    example = {}
    for name, array in streams.items():
        step = every if name in PER_FRAME else 1
        example[name] = _pad(array[start // step : (start + length) // step], length // step, _FILLERS[name])
    example["start"] = np.int32(start)
    return example


_FILLERS = {
    "user_dmel": _SILENT_BINS,
    "user_present": False,
    "video": 0,
    "video_present": False,
    "seen": ABSENT,
    "user_text": ABSENT,
    "model_text": IDLE,
    "model_mel": _SILENT_MEL,
    "heard": IDLE,
    "valid": False,
}


PER_FRAME = ("video", "video_present", "seen")


def _check_window(start: int, length: int, every: int) -> None:
    if start < 0 or start % every or length % every:
        raise ValueError(f"start={start} and length={length} must be multiples of video_every={every}")


def _pad(array: np.ndarray, length: int, filler: np.ndarray | int) -> np.ndarray:
    if len(array) == length:
        return array
    padded = np.empty((length, *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    padded[len(array) :] = filler
    return padded


def _fold(frames: np.ndarray | None, first: int, count: int, silence: np.ndarray) -> np.ndarray:
    """[F, 80] from frame `first` on -> [count, 8, 80] micro-turns, silence behind the end."""
    kept = silence[None, :][:0] if frames is None else frames[first : first + count * FRAMES]
    return _pad(kept.astype(silence.dtype, copy=False), count * FRAMES, silence).reshape(count, FRAMES, MEL)


def _weave_video(video: np.ndarray | None, layout: Layout, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    seen = np.zeros((0, layout.stream.video_height, layout.stream.video_width, 3), np.uint8)
    if video is not None:
        if video.shape[1:] != seen.shape[1:]:
            raise UserError(
                f"the session's video frames are {video.shape[1:]}, config.stream says {seen.shape[1:]}; "
                "set config.stream.video_height and video_width to the data's, or build the dataset anew"
            )
        seen = video[first : first + count]
    return _pad(patchify(seen), count, 0), np.arange(count) < len(seen)


def _weave_seen(seen: Sequence[Word] | None, tokenizer: Tokenizer, first: int, count: int, period: float) -> np.ndarray:
    """Of each frame the first token of each word for what it shows: idle for nothing, absent where nobody said."""
    tokens = np.full((count, SEEN_WORDS), ABSENT, np.int32)
    if seen is None:
        return tokens
    for row, frame in zip(tokens, range(first, first + count), strict=True):
        moment = (frame + 0.5) * period
        shown = [tokenizer.encode_word(w.text) for w in seen if w.start <= moment < w.end]
        ids = [word[0] for word in shown if word][:SEEN_WORDS]
        row[: max(len(ids), 1)] = ids or IDLE
    return tokens


def _weave_text(session: Session, layout: Layout, tokenizer: Tokenizer, T: int) -> Streams:
    typed = [(w.start, tokenizer.encode(" " + w.text.strip())) for w in session.typed]
    heard = [(w.end, tokenizer.encode_word(w.text)) for w in session.user_words]
    spoken = [(w.start, tokenizer.encode_word(w.text)) for w in session.model_words]
    model_text = np.full((T, layout.model_text), IDLE, np.int32)
    queue_tokens(spoken, model_text, OUTPUT_LAG)
    speaking = (model_text != IDLE).any(axis=1) | audible(session.model_words, T)
    model_text[speaking[:, None] & (model_text == IDLE)] = HOLD
    return {
        "user_text": queue_tokens(typed, np.full((T, layout.user_text), ABSENT, np.int32)),
        "model_text": model_text,
        "heard": queue_tokens(heard, np.full((T, 1), IDLE, np.int32))[:, 0],
    }


def queue_tokens(timed: Sequence[tuple[float, list[int]]], slots: np.ndarray, lag: int = 0) -> np.ndarray:
    """Write tokens, given as (seconds, ids), into `slots` int32 [T, k] in place, and return it.

    Tokens enter from slot 0 of the micro-turn of their time, `lag` micro-turns earlier; what finds no room
    waits for the next micro-turn, and is lost at the end.
    """
    tokens, positions = place_tokens(timed, slots.shape[1], lag)
    room = positions < slots.size
    slots.reshape(-1)[positions[room]] = tokens[room]
    return slots


def place_tokens(timed: Sequence[tuple[float, list[int]]], slots: int, lag: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(ids, positions) of all tokens in time, position p being slot p % slots of micro-turn p // slots."""
    timed = sorted(timed, key=lambda entry: entry[0])
    tokens = np.array([i for _, ids in timed for i in ids], np.int32)
    arrivals = np.array([max(input_microturn(s) - lag, 0) for s, ids in timed for _ in ids], np.int64)
    order = np.arange(len(tokens))
    # position = max(own arrival, position of the one before + 1), for all tokens at once
    return tokens, np.maximum.accumulate(arrivals * slots - order) + order


def audible(words: Sequence[Word], T: int) -> np.ndarray:
    """bool [T]: in which output windows the model is heard, words less than a breath apart being one stretch."""
    if not words:
        return np.zeros(T, bool)
    starts, ends = np.array([w[1:] for w in sorted(words, key=lambda w: w.start)]).T
    ends = np.maximum.accumulate(ends)
    breaks = starts[1:] - ends[:-1] >= BREATH - 1e-9
    starts, ends = starts[np.r_[True, breaks]], ends[np.r_[breaks, True]]
    spoken = np.cumsum(ends - starts)
    knots = np.column_stack([starts, ends]).reshape(-1)
    spoken_at_knots = np.column_stack([spoken - (ends - starts), spoken]).reshape(-1)
    borders = output_seconds(0) + np.arange(T + 1) * MICROTURN_SECONDS
    return np.diff(np.interp(borders, knots, spoken_at_knots)) >= AUDIBLE * MICROTURN_SECONDS - 1e-9


def text_of(model_text: np.ndarray, tokenizer: Tokenizer) -> list[Word]:
    """The words that ids [T, k] claim, with wall-clock times on the 200 ms grid.

    A word starts when the output of its first token is heard; it ends where the next word starts, or where
    the model stops holding it. Any ids are accepted: HOLD without a word says nothing, and a continuation
    after silence opens a word of its own.
    """
    spans: list[tuple[list[int], int, int]] = []  # ids, first micro-turn, micro-turn after the last
    is_open = False
    for t, slots in enumerate(np.asarray(model_text).tolist()):
        tokens = [i for i in slots if len(CONTROL_TOKENS) <= i < tokenizer.vocab_size]
        is_open = is_open and (bool(tokens) or HOLD in slots)
        for token in tokens:
            if not is_open or tokenizer.starts_word[token]:
                if is_open:
                    spans[-1] = (*spans[-1][:2], t)
                spans.append(([], t, t + 1))
                is_open = True
            spans[-1][0].append(token)
        if is_open:
            spans[-1] = (*spans[-1][:2], t + 1)
    texts = [tokenizer.decode(ids).strip() for ids, _, _ in spans]
    return [
        Word(text, output_seconds(first), output_seconds(end))
        for text, (_, first, end) in zip(texts, spans, strict=True)
        if text
    ]
