"""Full-Duplex-Bench v1.5 (arXiv 2507.23159): stop and response latency, and what the model did at an overlap.

Timing follows its get_timing.py: speech segments of both sides (pauses up to 0.6 s inside the user's, 0.5 s
inside the model's), the stretches where both speak, and the gaps from the user's end to the model's next
start. It ships no aggregation; ours pools all intervals. User segments come from word times where a session
has them, model segments from energy; theirs both come from Silero VAD.

Its judge of behaviour is a language model. Ours is a proxy by exact content, and named so: after the event
the model *responds* if it says the content of the reply then due, *resumes* if it says what it goes on to say
in the clean run, and is *silent* if it says nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from tmljax.evals import intervals
from tmljax.evals.content import contains
from tmljax.evals.intervals import Interval
from tmljax.evals.item import USER_GAP, Item, Measurement, gather, user_audio
from tmljax.stream import dmel
from tmljax.stream.audio import to_int16
from tmljax.stream.microturn import FRAME_SAMPLES, SAMPLE_RATE
from tmljax.stream.record import Session, Word

Behaviour = Literal["respond", "resume", "silent", "other"]

FADE = 0.02  # seconds at both ends of what is blanked
REST = 0.45  # seconds between what is said to others and a request, at least


def stop_intervals(user: Sequence[Interval], model: Sequence[Interval]) -> list[Interval]:
    """Where both speak; of those that end in the same millisecond the shortest. In the order of their ends."""
    best: dict[int, Interval] = {}
    for user_start, user_end in user:
        for model_start, model_end in model:
            start, end = max(user_start, model_start), min(user_end, model_end)
            key = round(end * 1000)
            if end > start and (key not in best or end - start < best[key][1] - best[key][0]):
                best[key] = (start, end)
    return sorted(best.values(), key=lambda i: i[1])


def response_intervals(user: Sequence[Interval], model: Sequence[Interval]) -> list[Interval]:
    """From a user segment's end to the next start of the model; of those sharing a start the latest end."""
    best: dict[int, Interval] = {}
    for _, user_end in user:
        start = next((s for s, _ in model if s > user_end), None)
        if start is None:
            continue
        key = round(start * 1000)
        if key not in best or user_end > best[key][0]:
            best[key] = (user_end, start)
    return sorted(best.values(), key=lambda i: i[1])


def events_of(session: Session) -> list[Interval]:
    """The overlap events, by which a session is paired with its clean self: an interruption, backchannels of the
    user, or speech that is none of the model's business."""
    found = [(t["at"], t["end"]) for t in session.truth if t["kind"] == "yield"]
    found += [tuple(t["window"]) for t in session.truth if t["kind"] == "keep_floor"]
    if session.family == "no_answer":
        found += [bystander(session, t["window"]) for t in session.truth if t["kind"] == "silence"]
    return sorted(found)


def bystander(session: Session, window: Sequence[float]) -> Interval:
    """From the first to the last word inside the window, or the whole window where no words are known; of a window that
    ends with a request what comes before that."""
    begin, end = window
    words = sorted(intervals.overlapping(session.user_words, begin, end), key=lambda w: w.start)
    if any(t["kind"] == "reply" and abs(t["after"] - end) < REST for t in session.truth):
        request = max((k for k in range(1, len(words)) if words[k].start - words[k - 1].end >= REST), default=0)
        end = words[request].start if words else end
        words = words[:request]
    return (words[0].start, max(w.end for w in words)) if words else (begin, end)


def without_events(session: Session) -> Session:
    """The same session with its events blanked from the user's audio: room tone instead, as loud as the quietest
    tenth of the channel. Words and truth about them go too. Raises ValueError where there is nothing to blank."""
    events = events_of(session)
    if not events or session.audio is None:
        raise ValueError(f"session {session.id} has no event in its audio to blank")
    user = user_audio(session)
    for event in events:
        user = blank(user, event)
    mel, _ = dmel.log_mel(user, dmel.MelState())
    gone = ("yield", "keep_floor", "silence")
    answers = [t for t in session.truth if t["kind"] == "yield"]
    return dataclasses.replace(
        session,
        user_dmel=dmel.quantise(mel) if session.user_dmel is not None else None,
        audio=np.stack([session.audio[:, 0], to_int16(user)], axis=1),
        user_words=words_outside(session.user_words, events),
        truth=tuple(
            t
            for t in session.truth
            if t["kind"] not in gone and not (t["kind"] == "reply" and any(t["after"] == y["end"] for y in answers))
        ),
    )


def words_outside(words: Sequence[Word], events: Sequence[Interval]) -> tuple[Word, ...]:
    """Those that begin in none of the events."""
    return tuple(w for w in words if not any(a - intervals.ROUNDING <= w.start < b for a, b in events))


def blank(samples: np.ndarray, event: Interval) -> np.ndarray:
    """float32 [n], the event cross-faded into room tone."""
    frames = samples[: len(samples) // FRAME_SAMPLES * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES)
    level = np.sqrt(np.quantile(np.mean(frames**2, axis=1), 0.1))
    tone = np.random.default_rng(0).standard_normal(len(samples)).astype(np.float32) * level
    clock = np.arange(len(samples)) / SAMPLE_RATE
    keep = np.clip(np.maximum(event[0] - clock, clock - event[1]) / FADE, 0, 1).astype(np.float32)
    return samples * keep + tone * (1 - keep)


def behaviour(item: Item) -> Behaviour | None:
    """What the model did from the onset of the first event on; None where the event called for nothing and the
    clean run says nothing after it either, so that no two behaviours could be told apart."""
    if item.clean is None or not events_of(item.session):
        return None
    onset, end = events_of(item.session)[0]
    said = [w.text for w in intervals.starting(item.performance.words, onset, float("inf"))]
    continued = _goes_on(item.clean.words, onset)
    due = [t for t in item.truths("reply") if item.truths("yield") and t["after"] >= end - intervals.EPSILON]
    if not due and not continued:
        return None
    if not said:
        return "silent"
    if any(contains(said, t["content"]) for t in due):
        return "respond"
    return "resume" if continued and contains(said, continued) else "other"


def _goes_on(words: Sequence[Word], onset: float) -> list[str]:
    """What the clean run says after the onset without a pause, the word at the onset left out."""
    spurt = intervals.at(intervals.spans(words, 0.5), onset)
    return [w.text for w in intervals.starting(words, onset, spurt[1])] if spurt else []


def reaction(item: Item, onset: float) -> float | None:
    """How long the audible speech that the event met went on after its onset; None if there was none."""
    spurt = intervals.at(item.model_segments, onset)
    return None if spurt is None else spurt[1] - onset


def clean_user_segments(item: Item) -> list[Interval]:
    events = events_of(item.session)
    return intervals.spans(words_outside(item.session.user_words, events), USER_GAP)


def measure(items: Sequence[Item]) -> list[Measurement]:
    paired = [i for i in items if i.clean is not None and events_of(i.session)]
    acts = [(i, behaviour(i)) for i in paired]
    stops = [(i, e - s) for i in paired for s, e in stop_intervals(i.user_segments, i.model_segments)]
    gaps = [(i, e - s) for i in paired for s, e in response_intervals(i.user_segments, i.model_segments)]
    clean = [(i, e - s) for i in paired for s, e in response_intervals(clean_user_segments(i), i.clean_segments or [])]
    return [
        *gather("overlap_stop_latency", "s", "lower", stops),
        *gather("overlap_response_latency", "s", "lower", gaps),
        *gather("clean_response_latency", "s", "lower", clean),
        *(
            m
            for kind in ("respond", "resume", "silent", "other")
            for m in gather(f"behaviour_proxy_{kind}", "rate", "neither", ((i, a and a == kind) for i, a in acts))
        ),
    ]
