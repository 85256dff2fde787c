"""Typed text: read it word by word, answer in speech and text."""

from __future__ import annotations

from data_pipelines.scenarios.language import Request, draw, question, statement
from data_pipelines.scenarios.stage import Stage
from data_pipelines.score import Score
from tmljax.stream.record import Word


def compose(stage: Stage) -> Score:
    rng, split = stage.rng, stage.split
    stage.listens = rng.random() < 0.6
    if rng.random() < 0.25:
        told = draw(rng, split, statement)
        _exchange(stage, told)
        stage.rest(0.4, 1.0)
        _exchange(stage, draw(rng, split, lambda r: question(r, *told.fact)))
    else:
        _exchange(stage, draw(rng, split))
        stage.rest(0.4, 1.0)
        said = draw(rng, split)
        if stage.listens and rng.random() < 0.5:
            stage.exchange(said)
        else:
            _exchange(stage, said)
    return stage.score("typed_text")


def _exchange(stage: Stage, said: Request) -> None:
    stage.close(stage.clock)
    for word in said.words:
        moment = round(stage.clock, 3)
        stage.typed.append(Word(word, moment, moment))
        stage.rest(0.2, 0.4)
    stage.clock = stage.typed[-1].start
    stage.answer(said)
