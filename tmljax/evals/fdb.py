"""Our output in the folders of Full-Duplex-Bench, so that others' evaluators run on it unchanged.

v1.0: one folder per item with input.wav, output.wav (same length, same clock), output.json (the words, as their
ASR would write them) and the truth file of the task. Their pause and turn evaluators look at all of the output,
so an item is cut to the turn in question; the interruption task's output.json begins where the interruption
ends, as theirs does. v1.5: the run with the overlap and the clean run side by side.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tmljax.config import UserError
from tmljax.evals import backchannel, intervals
from tmljax.evals.item import Item, samples_of, turns, user_audio
from tmljax.evals.take_over import after_interruption, silences, user_turn
from tmljax.evals.timing import events_of, without_events
from tmljax.stream.audio import write_wav
from tmljax.stream.record import Word

README = """Written by launch.evaluate, in the folder layouts of Full-Duplex-Bench v1.0 and v1.5
(https://github.com/DanielLin94144/Full-Duplex-Bench). The conversations are synthetic ones of this project's
test split, not those of the benchmark: numbers from here do not compare with its leaderboard.

output.json holds the words that the model claims, at the times it claims them, in place of an ASR transcript;
delete the files and run get_transcript/asr.py to have yours. v1_0/icc_gt_distribution.json stands in for the
benchmark's human reference and holds the truth windows of these conversations; eval_backchannel.py reads a
file of that name from the folder it is started in. A v1.5 item with several overlaps names the first of them
in metadata.json; its clean run has none.
"""

NOTE = "README.txt"


class Writer:
    """Writes items beside `place` as they come; `finish` adds what concerns all of them, and puts them there.

    Until then what an earlier evaluation left stays where it is.
    """

    def __init__(self, place: Path):
        """Raises UserError for a folder that is somebody else's."""
        note = place / NOTE
        ours = note.exists() and note.read_text(encoding="utf-8").startswith(README.splitlines()[0])
        if place.exists() and any(place.iterdir()) and not ours:
            raise UserError(f"{place} holds files that launch.evaluate did not write; move them away")
        self.place, self.root, self.replaced = (
            place.with_name(place.name + x) for x in ("", ".unfinished", ".replaced")
        )
        for folder in (self.root, self.replaced):
            shutil.rmtree(folder, ignore_errors=True)
        self.root.mkdir(parents=True)
        (self.root / NOTE).write_text(README, encoding="utf-8")
        self.references: dict[str, list[float]] = {}

    def write(self, item: Item) -> None:
        write = {
            "turn_taking": self.turn_taking,
            "pause": self.pause,
            "interruption": self.interruption,
            "model_backchannel": self.backchannel,
        }.get(item.session.family)
        if write is not None:
            write(item)
        if item.clean is not None:
            self.overlap(item)

    def turn_taking(self, item: Item) -> None:
        for k, turn in enumerate(turns(item.session)):
            folder = self.cut("v1_0/synthetic_turn_taking", f"{item.session.id}_{k}", item, turn.begin, turn.end)
            mark = [turn.after - turn.begin, turn.truth["window"][1] - turn.begin]
            write_json(folder / "turn_taking.json", [{"text": "[TURN-TAKING]", "timestamp": rounded(mark)}])

    def pause(self, item: Item) -> None:
        """Cut to the user's turn: whatever is said there is said in the pause."""
        paused = [t for t in turns(item.session) if silences(item, t)]
        for k, turn in enumerate(paused):
            begin, end = (turn.begin if k == 0 else user_turn(item, turn)[0]), turn.after
            folder = self.cut("v1_0/synthetic_pause_handling", f"{item.session.id}_{k}", item, begin, end)
            marks = [[s - begin for s in t["window"]] for t in silences(item, turn)]
            write_json(folder / "pause.json", [{"text": "[PAUSE]", "timestamp": rounded(m)} for m in marks])

    def interruption(self, item: Item) -> None:
        audio = user_audio(item.session)
        for k, truth in enumerate(item.truths("yield")):
            begin, end = truth["at"], truth["end"]
            folder = self.cut("v1_0/synthetic_user_interruption", f"{item.session.id}_{k}", item, 0.0, item.seconds)
            said = item.session.user_words
            context, interrupt = (
                intervals.overlapping(said, *span) for span in ((0.0, begin - intervals.ROUNDING), (begin, end))
            )
            note = {"context": text(context), "interrupt": text(interrupt), "timestamp": rounded([begin, end])}
            write_json(folder / "interrupt.json", [note])
            write_wav(folder / "context.wav", audio[: samples_of(max((w.end for w in context), default=begin))])
            write_wav(folder / "interrupt.wav", audio[samples_of(begin) : samples_of(end)])
            write_json(folder / "output.json", transcript(after_interruption(item.performance.words, end)))

    def backchannel(self, item: Item) -> None:
        for truth in item.truths("backchannel"):
            name = str(len(self.references))  # theirs are called 0, 1, 2, …
            self.references[name] = backchannel.reference_of(item, truth).tolist()
            folder = self.cut("v1_0/synthetic_backchannel", name, item, *truth["span"])
            write_json(folder / "session.json", {"id": item.session.id, "span": rounded(truth["span"])})

    def overlap(self, item: Item) -> None:
        subset = {"interruption": "user_interruption", "user_backchannel": "user_backchannel"}.get(item.session.family)
        event = events_of(item.session)[0]
        if subset is None:
            speaks = intervals.overlapping(item.session.user_words, event[0], event[1] - intervals.ROUNDING)
            subset = "talking_to_other" if speaks else "background_speech"
        folder = self.root / "v1_5" / subset / item.session.id
        clean = without_events(item.session)
        for prefix, session, performance in (("", item.session, item.performance), ("clean_", clean, item.clean)):
            put(folder / f"{prefix}input", user_audio(session), session.user_words)
            put(folder / f"{prefix}output", performance.audio, performance.words)
        metadata = {
            "context_text": text(intervals.overlapping(item.session.user_words, 0.0, event[0])),
            "current_turn_text": text(intervals.overlapping(item.session.user_words, *event)),
            "timestamps": rounded(event),
        }
        write_json(folder / "metadata.json", metadata)

    def cut(self, subset: str, name: str, item: Item, begin: float, end: float) -> Path:
        """input and output of [begin, end], times counted from there."""
        folder = self.root / subset / name
        piece = slice(samples_of(begin), samples_of(end))
        put(folder / "input", user_audio(item.session)[piece], None)
        put(folder / "output", item.performance.audio[piece], shifted(item.performance.words, begin, end))
        spoken = [
            {"text": c["text"], "timestamp": c["timestamp"]}
            for c in transcript(shifted(item.session.user_words, begin, end))["chunks"]
        ]
        write_json(folder / "transcription.json", [{"speaker": "user", "item": spoken}])
        return folder

    def finish(self) -> None:
        if self.references:
            write_json(self.root / "v1_0" / "icc_gt_distribution.json", self.references)
        if self.place.exists():
            self.place.rename(self.replaced)
        self.root.rename(self.place)
        shutil.rmtree(self.replaced, ignore_errors=True)


def put(stem: Path, samples: np.ndarray, words: Iterable[Word] | None) -> None:
    """stem.wav, and stem.json where there are words."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_wav(stem.with_suffix(".wav"), samples)
    if words is not None:
        write_json(stem.with_suffix(".json"), transcript(words))


def shifted(words: Iterable[Word], begin: float, end: float) -> list[Word]:
    return [Word(w.text, w.start - begin, w.end - begin) for w in intervals.crop(words, begin, end)]


def transcript(words: Iterable[Word]) -> dict[str, Any]:
    """What their ASR step writes."""
    words = list(words)
    return {
        "text": text(words),
        "chunks": [{"text": w.text, "timestamp": rounded([w.start, w.end])} for w in words],
    }


def text(words: Iterable[Word]) -> str:
    return " ".join(w.text for w in words)


def rounded(times: Iterable[float]) -> list[float]:
    return [round(float(t), 3) for t in times]


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
