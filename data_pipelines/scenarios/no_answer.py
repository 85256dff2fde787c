"""No answer wanted: talk to somebody else, speech in the background, noise, silence; sometimes a request follows."""

from __future__ import annotations

from dataclasses import replace

from data_pipelines.scenarios.language import NAMES, THINGS, Rng, any_kind, choose, draw, of_split, recital, statement
from data_pipelines.scenarios.stage import Stage
from data_pipelines.score import Score
from data_pipelines.voices import draw_speaker

ERRANDS = (
    "can you open the {t}",
    "where is the {t}",
    "did you see my {t}",
    "please bring me the {t}",
    "i can not find the {t}",
    "this is your {t}",
)


def compose(stage: Stage) -> Score:
    rng = stage.rng
    start = 0.0  # since when nobody has wanted an answer
    if rng.random() < 0.6:
        stage.exchange(draw(rng, stage.split))
        stage.close(stage.clock)
        start = stage.clock
    kind = rng.random()
    if kind < 0.10:
        stage.clock += rng.uniform(3, 5)
    elif kind < 0.55:
        _talk_to_others(stage)
    else:
        _background(stage)
    if kind >= 0.10 and rng.random() < 0.5:
        stage.rest(0.5, 1.2)
        request = stage.exchange(draw(rng, stage.split))
        stage.expect_silence(start, request.end)  # whoever answers the others does so before that
        return stage.score("no_answer", (0.1, 0.5))
    score = stage.score("no_answer", (1.6, 2.4))  # room to answer what wants no answer
    silence = {"kind": "silence", "window": [round(start, 3), score.seconds]}
    return replace(score, truth=(*score.truth, silence))


def _talk_to_others(stage: Stage) -> None:
    """The user speaks to somebody whose name comes first."""
    rng = stage.rng

    def attempt() -> tuple[str, str]:
        text = _sentence(rng)
        return text, text

    for turn in range(int(rng.integers(1, 3))):
        if turn:
            stage.rest(0.5, 1.5)
        stage.user(f"{choose(rng, NAMES)} {of_split(stage.split, attempt)}")


def _sentence(rng: Rng) -> str:
    kind = rng.random()
    if kind < 0.5:
        return choose(rng, ERRANDS).format(t=choose(rng, THINGS))
    make = any_kind if kind < 0.8 else statement if kind < 0.9 else recital
    return make(rng).text


def _background(stage: Stage) -> None:
    """Somebody else in the room, low and muffled, says what would deserve an answer."""
    rng = stage.rng
    other = draw_speaker(rng, stage.split)
    for turn in range(int(rng.integers(1, 3))):
        if turn:
            stage.rest(0.3, 1.0)
        said = draw(rng, stage.split, any_kind if rng.random() < 0.7 else statement)
        speech = stage.speak("other", said.text, other, stage.clock, -rng.uniform(14, 22))
        stage.clock = speech.end
