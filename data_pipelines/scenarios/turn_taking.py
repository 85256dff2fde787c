"""Smooth turn-taking: answer when the user has finished; remember what was said earlier."""

from __future__ import annotations

from data_pipelines.scenarios.language import draw, question, statement
from data_pipelines.scenarios.stage import SHORT, Stage
from data_pipelines.score import Score


def compose(stage: Stage) -> Score:
    rng, split = stage.rng, stage.split
    if rng.random() < 0.4:
        told = draw(rng, split, statement)
        stage.exchange(told)
        if rng.random() < 0.3:
            stage.exchange(draw(rng, split))
        stage.exchange(draw(rng, split, lambda r: question(r, *told.fact)))
    else:
        stage.exchange(draw(rng, split))
        stage.exchange(draw(rng, split))
        if stage.clock < SHORT:
            stage.exchange(draw(rng, split))
    return stage.score("turn_taking", (0.1, 0.5))
