"""Verbal cue: "when i say tiger you say green"; speak at the cue, while the user goes on."""

from __future__ import annotations

from itertools import combinations, pairwise

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
APART = 5  # items at least from one cue to the next: an answer a second and a half late meets no other cue


def compose(stage: Stage) -> Score:
    rng = stage.rng
    said, values = draw_filled(rng, stage.split, ORDERS, x=ANIMALS, y=COLOURS)
    cue, wanted = values["x"], values["y"]
    stage.turn(said)
    stage.reply(f"okay at {cue} {wanted}", ())  # the answer next to the cue: that is what the cue then recalls
    stage.rest(0.4, 0.9)
    others = [str(w) for w in rng.permutation(ANIMALS + THINGS) if w != cue]
    cues = int(rng.choice(3, p=(0.10, 0.30, 0.60)))
    items = others[: int(rng.integers(*((8, 11) if cues < 2 else (10, 13))))]
    for place in _places(rng, len(items), cues):
        items[place] = cue
    listed = stage.turn(f"{choose(rng, LEADS)} " + " and ".join(items))
    quiet = listed.start  # since when nothing has been due
    for end in (w.end for w in listed.words if w.text == cue):
        if end - quiet >= 1:  # a word more or less in a shorter silence says little
            stage.expect_silence(quiet, end)
        expected = {"kind": "cue", "modality": "verbal", "window": [round(end, 3), round(end + LATE, 3)]}
        stage.truth.append({**expected, "content": [wanted]})
        answer = stage.model(wanted, boundary(end + HEAR))
        quiet = max(end + LATE, answer.end) + 0.1
    if quiet < listed.end or quiet == listed.start:
        stage.expect_silence(quiet, listed.end + (0.5 if quiet == listed.start else 0))
    return stage.score("verbal_cue", (0.6, 0.9))


def _places(rng: Rng, items: int, cues: int) -> tuple[int, ...]:
    """Where in a list the cues are, as likely anywhere: but neither first nor last, and APART."""
    possible = [p for p in combinations(range(1, items - 1), cues) if all(b - a >= APART for a, b in pairwise(p))]
    return choose(rng, possible)
