"""User backchannel: the user says "mm-hm" while the model speaks; it keeps the floor."""

from __future__ import annotations

from data_pipelines.scenarios.language import BACKCHANNELS, choose, draw, recital
from data_pipelines.scenarios.stage import Stage
from data_pipelines.score import Score


def compose(stage: Stage) -> Score:
    rng, split = stage.rng, stage.split
    asked = draw(rng, split, recital)
    stage.ask(asked)
    answer = stage.answer(asked)
    moment = answer.start + rng.uniform(0.7, 1.6)
    while moment < answer.end - 1.3:
        murmur = stage.user(choose(rng, BACKCHANNELS), start=moment, gain_db=-rng.uniform(3, 10))
        until = min(murmur.end + 1.0, answer.end - 0.2)
        stage.truth.append(
            {
                "kind": "keep_floor",
                "window": [round(murmur.start, 3), round(murmur.end, 3)],
                "until": round(until, 3),
            }
        )
        moment = murmur.end + rng.uniform(1.2, 3.0)
    stage.clock = answer.end
    if stage.clock < 7:
        stage.rest(0.4, 1.0)
        stage.exchange(draw(rng, split))
    return stage.score("user_backchannel")
