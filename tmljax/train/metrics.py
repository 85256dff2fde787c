"""What a run says of itself: metrics.jsonl, TensorBoard, and a line or a bar on the terminal.

A row of metrics.jsonl belongs to one step. Everything in it is a value of that step and the same in every run of
the same config, interrupted or not, but for the names that begin with time/: those are measured since the last row.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tqdm import tqdm

from tmljax import files
from tmljax.terminal import Terminal

FILE = "metrics.jsonl"
TIME = "time/"

Row = dict[str, float]  # metric -> value; `step` is among them


class Journal:
    """Writes rows to metrics.jsonl and TensorBoard, going on after `step`: later rows of an earlier run are dropped."""

    def __init__(self, workdir: str | Path, step: int):
        path = Path(workdir) / FILE
        keep_rows(path, step)
        self._lines = open(path, "a", encoding="utf-8")  # noqa: SIM115  held for the length of the run
        self._events = EventsWriter(str(Path(workdir) / "events"), filename_suffix=f".{step}.{os.getpid()}")
        if step:
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=restart))

    def write(self, row: Row) -> None:
        self._lines.write(json.dumps({name: jsonable(value) for name, value in row.items()}) + "\n")
        self._lines.flush()
        for name, value in row.items():
            if name != "step":
                scalar = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=name, simple_value=value)])
                self._events.write_event(event_pb2.Event(wall_time=time.time(), step=int(row["step"]), summary=scalar))
        self._events.flush()

    def sync(self) -> None:
        """On disk, so that no checkpoint is ahead of its rows."""
        os.fsync(self._lines.fileno())

    def close(self) -> None:
        self._lines.close()
        self._events.close()


def jsonable(value: float) -> float | None:
    """JSON has no infinities."""
    return value if math.isfinite(value) else None


def read_rows(path: Path) -> list[Row]:
    """Rows written to the end; one cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def keep_rows(path: Path, step: int) -> None:
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= step]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


class Progress:
    """A bar on a terminal, else one line a row. The run goes on when nobody reads them any more."""

    def __init__(self, first: int, last: int, out: TextIO | None = None):
        self._out = Terminal(sys.stderr if out is None else out)
        self._last, self._done, self._began = last, 0, 0.0
        self._bar = (
            tqdm(total=last, initial=first, desc="training", unit="step", file=self._out, dynamic_ncols=True)
            if self._out.isatty()
            else None
        )

    def advance(self) -> None:
        if not self._done:
            self._began = time.perf_counter()
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def show(self, row: Row) -> None:
        terms = {name.removeprefix("loss/"): value for name, value in row.items() if name.startswith("loss/")}
        losses = {"": terms.pop("total", float("nan")), **terms}
        if "val/loss/total" in row:
            losses["held-out"] = row["val/loss/total"]
        loss = " ".join(f"{name} {value:.3f}".strip() for name, value in losses.items())
        text = f"loss {loss}, {row[TIME + 'conversation_seconds_per_second']:.0f} s/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        step, took = int(row["step"]), time.perf_counter() - self._began
        left = f"{clock(took / (self._done - 1) * (self._last - step))} left" if self._done > 1 else "compiled"
        self._out.say(f"step {step}/{self._last}: {text}, {left}")

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.clear()
        self._out.say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
