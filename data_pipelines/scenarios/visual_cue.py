"""Visual cue: "tell me when you see the red circle"; say so each time it appears, and nothing before."""

from __future__ import annotations

from dataclasses import replace

from data_pipelines.scenarios.language import choose, draw_filled
from data_pipelines.scenarios.stage import Stage
from data_pipelines.scenes import COLOURS, SHAPES, Scene, Thing, draw_thing
from data_pipelines.score import Score, boundary
from tmljax.stream.microturn import MICROTURN_SECONDS

ORDERS = (
    "tell me when you see the {c} {s}",
    "tell me when the {c} {s} comes",
    "say when you see the {c} {s}",
    "let me know when you see the {c} {s}",
    "look for the {c} {s}",
    "i want to know when the {c} {s} comes",
)
SEE = 0.6  # seconds in which the model notices
LATE = 2.0  # seconds after it appears in which its answer may begin
AGAIN = 8.6  # seconds; when the first answer ends later it does not come again, so that most sessions fit 12 s


def compose(stage: Stage) -> Score:
    rng = stage.rng
    order, values = draw_filled(rng, stage.split, ORDERS, c=tuple(COLOURS), s=SHAPES)
    colour, shape = values["c"], values["s"]
    stage.turn(order)
    stage.reply(f"looking for the {colour} {shape}", ())  # side by side: that is what the sight of both recalls
    period = MICROTURN_SECONDS * stage.stream.video_every
    quiet = stage.clock + 0.3  # since when nothing has been due
    stage.close(quiet)
    things: list[Thing | None] = []
    while not things or (stage.clock < AGAIN and rng.random() < 0.8):
        longest = 1.2 if things else 2.8
        first = int((stage.clock + rng.uniform(0.4, longest)) / period) + 1  # the frame in which the target appears
        appears = first * period
        stage.expect_silence(quiet, appears)
        content = [colour, shape, "came"]  # the last word tells it from what was said to the order
        spoken = stage.model("the " + " ".join(content), boundary(appears + SEE))
        window = [round(appears, 3), round(appears + LATE, 3)]
        stage.truth.append({"kind": "cue", "modality": "visual", "window": window, "content": content})
        things += _distractors(stage, colour, shape, first - len(things))
        things += [draw_thing(rng, colour, shape)] * int(rng.integers(2, 5))
        stage.clock, quiet = max(spoken.end, len(things) * period), max(appears + LATE, spoken.end) + 0.1
    score = stage.score("visual_cue", (0.3, 0.7))
    frames = round(score.seconds / period)
    things += _distractors(stage, colour, shape, frames - len(things))
    return replace(score, scene=Scene(stage.stream.video_height, stage.stream.video_width, tuple(things)))


def _distractors(stage: Stage, colour: str, shape: str, frames: int) -> list[Thing | None]:
    """Other shapes, and now and then none, each for one to four frames."""
    rng = stage.rng
    others = [(c, s) for c in COLOURS for s in SHAPES if (c, s) != (colour, shape)]
    near = [(c, s) for c, s in others if c == colour or s == shape]
    things: list[Thing | None] = []
    while len(things) < frames:
        kind = rng.random()
        thing = None if kind < 0.2 else draw_thing(rng, *choose(rng, near if kind < 0.7 else others))
        things += [thing] * int(rng.integers(1, 5))
    return things[:frames]
