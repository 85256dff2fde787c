"""User interruption: stop in the middle of a long answer, then answer the new request."""

from __future__ import annotations

from data_pipelines.scenarios.language import choose, draw, recital
from data_pipelines.scenarios.stage import Stage
from data_pipelines.score import Score

CALLS = ("wait", "stop", "hold on", "no no", "stop please", "wait wait")


def compose(stage: Stage) -> Score:
    rng, split = stage.rng, stage.split
    asked = draw(rng, split, recital)
    stage.ask(asked)
    long_answer = stage.answer(asked)
    onset = rng.uniform(long_answer.start + 1.6, long_answer.end - 1.0)
    first = stage.truth[-1]
    stage.close(onset)
    long_answer = stage.interrupt(long_answer, onset)
    first["content"] = [w.text for w in long_answer.words if w.end <= onset][:2]
    stage.clock = onset
    call, wanted = choose(rng, CALLS), draw(rng, split)
    if rng.random() < 0.6:
        spoken = stage.user(f"{call}, {wanted.text}")
    else:
        stage.user(call)
        stage.rest(0.1, 0.5)
        spoken = stage.user(wanted.text)
    stage.truth.append({"kind": "yield", "at": round(onset, 3), "end": round(spoken.end, 3)})
    stage.clock = max(spoken.end, long_answer.end)
    stage.reply(wanted.reply, wanted.content, after=spoken.end)
    return stage.score("interruption")
