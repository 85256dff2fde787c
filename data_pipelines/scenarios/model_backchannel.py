"""Model backchannel: "mm-hm" after the clauses of a long story, without taking over before its end."""

from __future__ import annotations

from data_pipelines.scenarios.language import ANIMALS, COLOURS, THINGS, choose, draw_filled
from data_pipelines.scenarios.stage import GAP, Stage
from data_pipelines.score import Score, boundary

OPENINGS = (
    "let me tell you a story",
    "i want to tell you a story",
    "listen to my story",
    "here is a story for you",
    "can i tell you a story",
)
FIRST = ("there was a {c} {a}", "i saw a {c} {a}", "i had a {c} {a}", "once there was a {c} {a}")
MIDDLE = (
    "it went to the {t}",
    "it was looking for a {t}",
    "it found a {c2} {t}",
    "it came to see the {t}",
    "it liked the {t}",
    "then it met a {a2}",
    "it gave me a {t}",
)
ENDINGS = ("that is my story", "and that is the end", "that was my story", "that is the end of my story")
ACKNOWLEDGEMENTS = ("mhm", "uhhuh")


def compose(stage: Stage) -> Score:
    rng = stage.rng
    beginnings = [f"{opening} {first}" for opening in OPENINGS for first in FIRST]
    opening, cast = draw_filled(rng, stage.split, beginnings, c=COLOURS, a=ANIMALS)
    animal = cast["a"]
    clauses = [opening]
    others = [a for a in ANIMALS if a != animal]
    for i in rng.choice(len(MIDDLE), int(rng.integers(1, 3)), replace=False):
        clauses.append(MIDDLE[i].format(t=choose(rng, THINGS), c2=choose(rng, COLOURS), a2=choose(rng, others)))
    start, windows = stage.clock, []
    for clause in clauses:
        stage.user(clause + ",")
        end = stage.clock
        begin = boundary(end + GAP)
        stage.model(choose(rng, ACKNOWLEDGEMENTS), begin)
        stage.rest(0.6, 0.9)
        windows.append([round(end, 3), round(stage.clock + 0.4, 3)])
    last = stage.user(choose(rng, ENDINGS))
    stage.truth.append({"kind": "backchannel", "windows": windows, "span": [round(start, 3), round(last.end, 3)]})
    stage.reply(f"i like your story about the {animal}", (animal,))
    return stage.score("model_backchannel")
