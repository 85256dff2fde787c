"""The table that a reader looks at first: which measurement of which family, and which statistic of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from tmljax.evals.statistics import Estimate, Summary
from tmljax.evals.suite import ALL


class Row(NamedTuple):
    label: str
    name: str
    family: str
    statistic: Literal["mean", "median"]


ROWS = (
    Row("Smooth turn-taking: takes the turn", "take_over", "turn_taking", "mean"),
    Row("Smooth turn-taking: median latency", "latency", "turn_taking", "median"),
    Row("Smooth turn-taking: starts before the user ends", "starts_early", "turn_taking", "mean"),
    Row("Pause in mid-sentence: takes over", "pause_take_over", "pause", "mean"),
    Row("Interruption: stops and takes the new turn", "takes_new_turn", "interruption", "mean"),
    Row("Interruption: median stop latency", "stop_latency", "interruption", "median"),
    Row("User backchannel: keeps the floor", "keeps_floor", "user_backchannel", "mean"),
    Row("No answer wanted: takes over", "false_take_over", "no_answer", "mean"),
    Row("Reply due: content right", "content", ALL, "mean"),
    Row("Verbal cue: right and in time", "verbal_cue", "verbal_cue", "mean"),
    Row("Verbal cue: speaks where there was none", "false_utterance", "verbal_cue", "mean"),
    Row("Visual cue: right and in time", "visual_cue", "visual_cue", "mean"),
    Row("Visual cue: speaks where there was none", "false_utterance", "visual_cue", "mean"),
    Row("Story: backchannel where one belongs", "backchannel_in_window", "model_backchannel", "mean"),
    Row("Audible speech agrees with claimed words", "audible_agreement", ALL, "mean"),
    Row("The same, within speech", "audible_agreement_in_speech", ALL, "mean"),
)


class Cell(NamedTuple):
    estimate: Estimate | None
    n: int
    not_applicable: int


def find(summaries: Iterable[Summary], row: Row) -> tuple[Summary | None, Cell]:
    """The summary behind a row, and its cell; an empty cell where the system was not measured."""
    for s in summaries:
        if (s.name, s.family) == (row.name, row.family):
            return s, Cell(s.mean if row.statistic == "mean" else s.median, s.n, s.not_applicable)
    return None, Cell(None, 0, 0)
