"""Sessions and performances made by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tmljax.evals.baselines import hum
from tmljax.evals.item import Item, Performance
from tmljax.stream.record import Session, Word


def say(text: str, start: float, each: float = 0.4) -> list[Word]:
    """Words one after the other."""
    return [Word(w, round(start + i * each, 4), round(start + (i + 1) * each, 4)) for i, w in enumerate(text.split())]


def perform(words: Sequence[Word], seconds: float = 10.0, **more: Any) -> Performance:
    """Claims the words and hums exactly while it does."""
    return Performance(hum(words, round(seconds * 16_000)), tuple(words), **more)


def session(
    *truth: dict[str, Any],
    user: Sequence[Word] = (),
    model: Sequence[Word] = (),
    seconds: float = 10.0,
    family: str = "turn_taking",
    name: str = "s0",
) -> Session:
    samples = round(seconds * 16_000)
    channels = np.stack([hum(model, samples), hum(user, samples)], axis=1)
    return Session(
        id=name,
        family=family,
        frames=samples // 400,
        user_dmel=np.zeros((samples // 400, 80), np.uint8),
        model_mel=None,
        user_words=tuple(user),
        model_words=tuple(model),
        audio=np.rint(channels * 32767).astype(np.int16),
        truth=truth,
    )


def reply(after: float, end: float, content: str = "") -> dict[str, Any]:
    return {"kind": "reply", "after": after, "window": [after, end], "content": content.split()}


def item(made: Session, words: Sequence[Word], clean: Sequence[Word] | None = None) -> Item:
    seconds = made.frames * 0.025
    return Item(made, perform(words, seconds), None if clean is None else perform(clean, seconds))


def values(measurements: Sequence[Any]) -> dict[str, list[float | None]]:
    """name -> values, of what a metrics file returns."""
    return {m.name: [v.value for v in m.values] for m in measurements}
