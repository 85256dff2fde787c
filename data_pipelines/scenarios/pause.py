"""Pause handling: stay silent while the user thinks in the middle of a sentence."""

from __future__ import annotations

from data_pipelines.scenarios.language import FILLERS, Request, any_kind, choose, draw, recital, statement
from data_pipelines.scenarios.stage import Stage
from data_pipelines.score import Score

SHORT = 6.5  # seconds, as `stage.SHORT`: an exchange with a pause takes longer


def compose(stage: Stage) -> Score:
    stage_pause(stage)
    while stage.clock < SHORT:
        stage.rest(0.4, 1.2)
        if stage.rng.random() < 0.6:
            stage_pause(stage)
        else:
            stage.exchange(draw(stage.rng, stage.split))
    return stage.score("pause")


def stage_pause(stage: Stage) -> None:
    said = draw(stage.rng, stage.split, _say)
    speak_with_pause(stage, said.words)
    stage.answer(said)


def _say(rng) -> Request:
    kind = rng.random()
    return statement(rng) if kind < 0.15 else recital(rng) if kind < 0.2 else any_kind(rng)


def speak_with_pause(stage: Stage, words: tuple[str, ...]) -> None:
    """Says the words with a pause of 0.5 to 2 s after the second word or later."""
    rng = stage.rng
    cut = int(rng.integers(min(2, len(words) - 1), len(words)))
    first = " ".join(words[:cut])
    if rng.random() < 0.25:
        first = f"{first} {choose(rng, FILLERS)}"
    begun = stage.turn(first + ("," if rng.random() < 0.6 else ""))
    stage.rest(0.5, 2.0)
    resumed = stage.user(" ".join(words[cut:]))
    stage.expect_silence(begun.end, min(resumed.start + 0.4, resumed.end))
