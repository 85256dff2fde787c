"""Self-correction: answer what was meant ("seven, no, nine")."""

from __future__ import annotations

from data_pipelines.scenarios.language import Request, any_kind, corrected, draw, statement
from data_pipelines.scenarios.stage import Stage
from data_pipelines.score import Score


def compose(stage: Stage) -> Score:
    _exchange(stage)
    if stage.clock < 7:
        stage.rest(0.4, 1.2)
        if stage.rng.random() < 0.6:
            _exchange(stage)
        else:
            stage.exchange(draw(stage.rng, stage.split))
    return stage.score("self_correction")


def _exchange(stage: Stage) -> None:
    while True:
        said = draw(stage.rng, stage.split, _say)
        words = corrected(stage.rng, said)
        if words is not None:
            break
    stage.turn(" ".join(words))
    stage.answer(said)


def _say(rng) -> Request:
    return statement(rng) if rng.random() < 0.15 else any_kind(rng)
