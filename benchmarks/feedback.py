"""Does a model know what to say, or does it hear itself say it? One JSON line a family.

    python -m benchmarks.feedback --workdir=runs/demo [--suite=turn_taking,user_backchannel] [--limit=16]

Test sessions are streamed with text as the model writes it, and with all that it reads back as it makes it ("made"),
or with the mel of the data ("true_mel") or silence ("silent") for its own, or with the data's words for what it heard
and saw ("true_notes"). The share of replies whose content is right should hardly depend on the mel: where "true_mel" is
far above "made", training has shown the model something in its own speech that it does not put there itself. How far
"true_notes" is above "made" says what mishearing costs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from absl import flags

from data_pipelines.builder import open_split
from launch import verb
from tmljax import checkpoint
from tmljax.config import UserError
from tmljax.decode.tick import FREE, Forced, TickInput, init_state, tick
from tmljax.evals.content import contains
from tmljax.evals.intervals import overlapping
from tmljax.model.interaction import Definition, notes_of
from tmljax.stream.dmel import SILENCE_MEL
from tmljax.stream.record import Session
from tmljax.stream.text import Tokenizer
from tmljax.stream.weave import Streams, cut, text_of, weave


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "training workdir", required=True)
    flags.DEFINE_list("suite", ["turn_taking", "user_backchannel", "visual_question"], "scenario families")
    flags.DEFINE_integer("limit", 16, "test sessions of each", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    given = flags.FLAGS
    _, experiment, tokenizer, params = checkpoint.load_for_serving(given.workdir)
    model, split = Definition(experiment.stream, experiment.model), open_split(experiment, "test")
    for family in given.suite:
        sessions = [s for s in (split[i] for i in range(len(split))) if s.family == family][: given.limit]
        if not sessions:
            raise UserError(f"--suite={family}: the test split has no such family")
        every = experiment.stream.video_every
        length = max(-(-s.frames // (8 * every)) * every for s in sessions)
        woven = [cut(weave(s, model.layout, tokenizer), 0, length) for s in sessions]
        batch = {name: np.stack([one[name] for one in woven]) for name in woven[0]}
        run = jax.jit(partial(tick, model, sampling=experiment.sampling))
        shares = {fed: right(sessions, speak(run, model, params, batch, fed), tokenizer) for fed in FED}
        print(json.dumps({"benchmark": "feedback", "family": family, "sessions": len(sessions), **shares}), flush=True)


FED = ("made", "true_mel", "silent", "true_notes")


def speak(run, model: Definition, params, batch: Streams, fed: str) -> np.ndarray:
    """What the model writes in these sessions, int32 [N, T, S]."""
    (N, T), every = batch["valid"].shape, model.stream.video_every
    state, written, note_NTK = init_state(model, N), [], notes_of(batch)
    for t in range(T):
        mel_NFM = batch["model_mel"][:, t].astype(np.float32)
        silence_NFM = np.broadcast_to(SILENCE_MEL, mel_NFM.shape)
        forced = {
            "made": FREE,
            "true_mel": Forced(model_mel=mel_NFM),
            "silent": Forced(model_mel=silence_NFM),
            "true_notes": Forced(notes=note_NTK[:, t]),
        }[fed]
        inputs = TickInput(
            batch["user_dmel"][:, t], batch["user_present"][:, t], batch["video"][:, t // every],
            batch["video_present"][:, t // every], batch["user_text"][:, t],
            np.full(N, t == 0), np.arange(N, dtype=np.uint32),
        )  # fmt: skip
        state, out = run(params, state, inputs, forced=forced)
        written.append(np.asarray(out.model_text))
    return np.stack(written, axis=1)


def right(sessions: Sequence[Session], text_NTS: np.ndarray, tokenizer: Tokenizer) -> float:
    """Share of the replies due whose content is among the words that sound in their window, by the text alone."""
    due = []
    for session, text_TS in zip(sessions, text_NTS):
        words = text_of(text_TS, tokenizer)
        for truth in session.truth:
            if truth["kind"] == "reply" and truth["content"]:
                begin, end = truth["window"]
                said = overlapping(words, min(begin, truth["after"]), end)
                due.append(contains((w.text for w in said), truth["content"]))
    return round(float(np.mean(due)), 3)


if __name__ == "__main__":
    define_flags()
    sys.exit(verb.run(main))
