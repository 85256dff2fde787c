"""Verbal cue: "when i say tiger you say green"; speak at the cue, while the user goes on."""

from __future__ import annotations

from data_pipelines.scenarios.language import WORDS, choose, draw_filled
from data_pipelines.scenarios.stage import GAP, Stage
from data_pipelines.score import Score, boundary

ORDERS = (
    "when i say {x} you say {y}",
    "when you hear {x} say {y}",
    "say {y} when you hear {x}",
    "if i say {x} you say {y}",
    "each time i say {x} you say {y}",
    "when i say {x} please say {y}",
)
LEADS = ("i have the", "i see the", "there is the", "i can see the", "i want the", "here is the")
LATE = 1.2  # seconds after the cue in which the answer counts


def compose(stage: Stage) -> Score:
    rng = stage.rng
    said, values = draw_filled(rng, stage.split, ORDERS, x=WORDS, y=WORDS)
    cue, wanted = values["x"], values["y"]
    stage.turn(said)
    stage.reply("okay i will do that", ())
    stage.rest(0.4, 0.9)
    items = [w for w in rng.permutation(WORDS) if w not in (cue, wanted)][: int(rng.integers(6, 9))]
    if rng.random() < 0.8:
        items.insert(int(rng.integers(1, len(items) - 2)), cue)
    listed = stage.turn(f"{choose(rng, LEADS)} " + " and ".join(items))
    spoken = [w for w in listed.words if w.text == cue]
    if spoken:
        end = spoken[0].end
        stage.truth.append(
            {
                "kind": "cue",
                "modality": "verbal",
                "window": [round(end, 3), round(end + LATE, 3)],
                "content": [wanted],
            }
        )
        stage.expect_silence(listed.start, end)
        answer = stage.model(wanted, boundary(end + GAP))
        stage.expect_silence(max(end + LATE, answer.end) + 0.1, listed.end)
    else:
        stage.expect_silence(listed.start, listed.end + 0.5)
    return stage.score("verbal_cue", (0.6, 0.9))
