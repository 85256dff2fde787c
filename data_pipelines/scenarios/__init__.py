"""Scenario families: what each is for is said in its file. Every family is a function Stage -> Score."""

from __future__ import annotations

from collections.abc import Callable

from data_pipelines.scenarios import (
    interruption,
    model_backchannel,
    no_answer,
    pause,
    self_correction,
    turn_taking,
    typed_text,
    user_backchannel,
    verbal_cue,
    visual_cue,
    visual_question,
)
from data_pipelines.scenarios.stage import Stage
from data_pipelines.score import Score

# family -> (how to compose one, its weight in the default mixture)
FAMILIES: dict[str, tuple[Callable[[Stage], Score], float]] = {
    "turn_taking": (turn_taking.compose, 0.24),
    "pause": (pause.compose, 0.16),
    "self_correction": (self_correction.compose, 0.05),
    "interruption": (interruption.compose, 0.04),
    "user_backchannel": (user_backchannel.compose, 0.03),
    "model_backchannel": (model_backchannel.compose, 0.02),
    "verbal_cue": (verbal_cue.compose, 0.10),
    "no_answer": (no_answer.compose, 0.14),
    "visual_cue": (visual_cue.compose, 0.19),
    "visual_question": (visual_question.compose, 0.015),
    "typed_text": (typed_text.compose, 0.015),
}

# What a session lasts on average (seconds, by a dataset's summary.json); turns hours of training data into a number of
# sessions.
SECONDS: dict[str, float] = {
    "turn_taking": 11.4,
    "pause": 11.4,
    "self_correction": 11.8,
    "interruption": 10.5,
    "user_backchannel": 10.8,
    "model_backchannel": 11.1,
    "verbal_cue": 11.5,
    "no_answer": 10.3,
    "visual_cue": 10.8,
    "visual_question": 10.2,
    "typed_text": 10.7,
}
