"""Visual question: "what do you see here"; say the colour and the shape of what is there at that moment."""

from __future__ import annotations

from dataclasses import replace

from data_pipelines.scenarios.language import draw_filled
from data_pipelines.scenarios.stage import SHORT, Stage
from data_pipelines.scenes import COLOURS, SHAPES, Scene, Thing, draw_thing
from data_pipelines.score import Score
from tmljax.stream.microturn import MICROTURN_SECONDS

QUESTIONS = (
    "what do you see {place}",
    "what can you see {place}",
    "tell me what you see {place}",
    "say what you see {place}",
    "what is it that you see {place}",
    "i want to know what you see {place}",
)
PLACES = ("now", "there", "here", "in the picture", "in front of you")


def compose(stage: Stage) -> Score:
    rng = stage.rng
    period = MICROTURN_SECONDS * stage.stream.video_every
    things: list[Thing | None] = []
    while not things or stage.clock < SHORT:
        colour, shape = (str(rng.choice(options)) for options in (tuple(COLOURS), SHAPES))
        question, _ = draw_filled(rng, stage.split, QUESTIONS, place=PLACES)
        changes = int(stage.clock / period) + 1  # the frame from which the thing is there: before the question ends
        stage.turn(question)
        stage.reply(f"i see the {colour} {shape}", (colour, shape))
        shown = int(stage.clock / period) + 1
        things += [things[-1] if things else None] * (min(changes, shown - 1) - len(things))
        things += [draw_thing(rng, colour, shape)] * (shown - len(things))
        stage.rest(0.3, 0.8)
    score = stage.score("visual_question", (0.1, 0.5))
    things += [things[-1]] * (round(score.seconds / period) - len(things))
    return replace(score, scene=Scene(stage.stream.video_height, stage.stream.video_width, tuple(things)))
