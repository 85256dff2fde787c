"""Verbal cue: "when i say tiger you say green"; speak at the cue, while the user goes on."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from data_pipelines.scenarios.language import ANIMALS, COLOURS, THINGS, Rng, choose, draw_filled
from data_pipelines.scenarios.stage import Stage
from data_pipelines.score import Score, boundary

ORDERS = (
    "when i say {x} you say {y}",
    "when you hear {x} say {y}",
    "say {y} when you hear {x}",
    "if i say {x} you say {y}",
    "each time i say {x} you say {y}",
    "when i say {x} please say {y}",
)
LEADS = ("i have the", "i see the", "there is the", "i can see the", "i want the", "here is the")
HEAR = 0.4  # seconds after the cue in which the model notices
LATE = 1.2  # seconds after the cue in which the answer counts
APART = 4  # items from one cue to the next


def compose(stage: Stage) -> Score:
    rng = stage.rng
    said, values = draw_filled(rng, stage.split, ORDERS, x=ANIMALS, y=COLOURS)
    cue, wanted = values["x"], values["y"]
    stage.turn(said)
    stage.reply(f"okay {cue} then {wanted}", ())
    stage.rest(0.4, 0.9)
    cues = int(rng.choice(4, p=(0.10, 0.20, 0.40, 0.30)))
    others = [str(w) for w in rng.permutation(ANIMALS + THINGS) if w != cue]
    items = others[: int(rng.integers(*((9, 12) if cues < 3 else (11, 13))))]
    for place in _places(rng, len(items), cues):
        items[place] = cue
    listed = stage.turn(f"{choose(rng, LEADS)} " + " and ".join(items))
    quiet = listed.start  # since when nothing has been due
    for end in (w.end for w in listed.words if w.text == cue):
        if quiet < end:
            stage.expect_silence(quiet, end)
        expected = {"kind": "cue", "modality": "verbal", "window": [round(end, 3), round(end + LATE, 3)]}
        stage.truth.append({**expected, "content": [wanted]})
        answer = stage.model(wanted, boundary(end + HEAR))
        quiet = max(end + LATE, answer.end) + 0.1
    if quiet < listed.end or quiet == listed.start:
        stage.expect_silence(quiet, listed.end + (0.5 if quiet == listed.start else 0))
    return stage.score("verbal_cue", (0.6, 0.9))


def _places(rng: Rng, items: int, cues: int) -> list[int]:
    """Where in a list the cues are: neither first nor last, and far enough apart to be answered one by one."""
    while True:
        places = sorted(int(i) for i in rng.choice(np.arange(1, items - 1), cues, replace=False))
        if all(later - earlier >= APART for earlier, later in pairwise(places)):
            return places
