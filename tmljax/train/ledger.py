"""Where the wall time of a run went, over all its starts: goodput.

workdir/time.jsonl is only ever added to. A line says what one start of the run spent since its line before, by cause,
and the step it had then come to; everything reported is a sum over the lines, so kills and restarts lose nothing:

    wall = useful + start + restore + data + checkpoint + evaluation + redone + down

`start` is from the beginning of the process to the first step's dispatch, compilation and building of the dataset
included; `data` is what the devices stood still for a batch; `redone` is training past the step from which a later
start went on; `down` is what lies between the last line of a start and the beginning of the next.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tmljax import files
from tmljax.train.metrics import TIME, Row, clock, read_rows

FILE = "time.jsonl"
TRAINING = "training"
SECONDS = 30.0  # between lines at most, but for a step that takes longer
CAUSES = ("start", "restore", "data", "checkpoint", "evaluation", "redone", "down")

Line = dict[str, Any]  # began, at: Unix times; first: step it went on from; step; spent: cause -> seconds


class Ledger:
    """Keeps the account of one start of a run; the process began at the Unix time `began`, or now."""

    def __init__(self, workdir: str | Path, began: float | None = None):
        self._path = Path(workdir) / FILE
        self._began = time.time() if began is None else began
        self._offset = time.time() - time.perf_counter()  # somebody may set the clock while we run
        self._since, self._claimed = self._began, 0.0
        self._written = self._began
        self._spent: Counter[str] = Counter()
        self._otherwise = "start"  # where time goes that nobody claims
        self._first = 0
        self.sums: Counter[str] = Counter()

    def go_on_from(self, step: int) -> None:
        """Reads what earlier starts spent, seen from this one, which goes on from `step`."""
        lines = read_rows(self._path)
        whole = "".join(json.dumps(line) + "\n" for line in lines)
        if self._path.exists() and self._path.read_text(encoding="utf-8") != whole:  # a line was cut short
            files.write_text(self._path, whole)
        self._first, self.sums = step, account(lines, self._began, step)

    @contextlib.contextmanager
    def spending(self, cause: str) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self.claim(cause, time.perf_counter() - before)

    def claim(self, cause: str, seconds: float) -> None:
        self._spent[cause] += seconds
        self._claimed += seconds

    def trains(self) -> None:
        """From here on, time that nobody claims is training."""
        self._settle()
        self._otherwise = TRAINING

    def write(self, step: int) -> Row:
        """Adds a line; returns the sums so far as a part of a row."""
        self._settle()
        line = {"began": self._began, "at": self._since, "first": self._first, "step": step, "spent": self._spent}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.sums.update(self._spent)
        self._spent, self._written = Counter(), self._since
        return as_row(self.sums)

    def keep_up(self, step: int) -> None:
        """Adds a line where the last is old: what a kill leaves unwritten counts as time that the run was down."""
        if self._offset + time.perf_counter() - self._written > SECONDS:
            self.write(step)

    def _settle(self) -> None:
        now = self._offset + time.perf_counter()
        self._spent[self._otherwise] += now - self._since - self._claimed
        self._since, self._claimed = now, 0.0


def account(lines: Sequence[Line], began: float, first: int) -> Counter[str]:
    """Seconds by cause over all starts before the one that `began` then and went on from step `first`."""
    sums: Counter[str] = Counter()
    lowest = float("inf")  # of the steps from which later starts went on
    for line in reversed(lines):
        if line["began"] != began:  # the last line of an earlier start
            sums["down"] += max(0.0, began - line["at"])  # a clock may have been set back
            lowest = min(lowest, first)
            began, first = line["began"], line["first"]
        for cause, seconds in line["spent"].items():
            sums["redone" if cause == TRAINING and line["step"] > lowest else cause] += seconds
    return sums


def as_row(sums: Counter[str]) -> Row:
    useful, wall = sums[TRAINING], sums.total()
    lost = {f"{TIME}lost/{cause}": sums[cause] for cause in CAUSES}
    return {TIME + "goodput": useful / max(wall, 1e-9), TIME + "wall": wall, TIME + "useful": useful, **lost}


def as_text(sums: Counter[str]) -> str:
    useful, wall = sums[TRAINING], sums.total()
    lost = ", ".join(f"{cause} {sums[cause]:.1f}" for cause in CAUSES)
    return f"goodput {useful / max(wall, 1e-9):.1%} of {clock(wall)}: {useful:.1f} s of training; lost seconds: {lost}"
