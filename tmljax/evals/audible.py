"""Does what is heard agree with what is claimed?

Both become one flag per 25 ms frame: the output audio by energy, the claimed words by their times; pauses
shorter than 0.3 s are closed, as the weave does; both lose the start by which the voice is late. Then each 200 ms
cell of the micro-turn grid is on where at least a quarter of its frames are, the weave's rule for a held word, since
the claim knows no finer time. Agreement is the share of cells in which both say the same. Silence alone can carry that,
so the agreement within speech stands beside it: cells in which both speak over cells in which either does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tmljax.evals import intervals
from tmljax.evals.item import Item, Measurement, Performance, gather, segments
from tmljax.stream.microturn import FRAME_SAMPLES, FRAMES
from tmljax.stream.weave import AUDIBLE, BREATH


def cells(flags: np.ndarray) -> np.ndarray:
    """bool [frames] -> bool [frames / 8, rounded up]."""
    whole = np.pad(flags, (0, -len(flags) % FRAMES))
    return whole.reshape(-1, FRAMES).mean(axis=1) >= AUDIBLE


def both(performance: Performance) -> tuple[np.ndarray, np.ndarray]:
    """(heard, claimed) bool [micro-turns]."""
    frames = -(-len(performance.audio) // FRAME_SAMPLES)
    heard = intervals.mask(segments(performance.audio, BREATH), frames)
    claimed = intervals.mask(intervals.spans(performance.words, BREATH), frames)
    late = round(performance.late / intervals.FRAME_SECONDS)
    return cells(heard[late:]), cells(claimed[late:])


def agreement(performance: Performance) -> float:
    heard, claimed = both(performance)
    return float(np.mean(heard == claimed))


def agreement_in_speech(performance: Performance) -> float | None:
    """None where nothing is heard and nothing claimed."""
    heard, claimed = both(performance)
    either = np.sum(heard | claimed)
    return float(np.sum(heard & claimed) / either) if either else None


def measure(items: Sequence[Item]) -> list[Measurement]:
    return [
        *gather("audible_agreement", "share", "higher", ((i, agreement(i.performance)) for i in items)),
        *gather(
            "audible_agreement_in_speech",
            "share",
            "higher",
            ((i, agreement_in_speech(i.performance)) for i in items),
        ),
    ]
