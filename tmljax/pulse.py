"""Signs of life of a process, for the one that supervises it (launch/local.py); nothing where nobody does.

A thread writes a line to a pipe every second: where the process is, and since when. A process that is frozen falls
silent; one that waits for ever keeps saying where.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import NamedTuple, Self

VARIABLE = "TMLJAX_PULSE"  # file descriptor of the pipe
SECONDS = 1.0  # between signs


class Sign(NamedTuple):
    place: str
    since: float  # Unix time
    order: int  # the step it belongs to; the process with the lowest keeps the others waiting. -1: before the first
    hurried: bool  # a step: whether staying here for minutes, not for an hour, means that something hangs

    def to_line(self) -> bytes:
        return (json.dumps(self._asdict()) + "\n").encode()

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        return cls(**json.loads(line))


_here = Sign("starting", time.time(), -1, False)


def begin() -> None:
    """Starts the thread where the environment names a pipe."""
    pipe = os.environ.pop(VARIABLE, None)  # not the children's
    if pipe is not None:
        os.set_inheritable(int(pipe), False)
        threading.Thread(target=_beat, args=(int(pipe),), name="pulse", daemon=True).start()


def at(place: str, order: int = -1, hurried: bool = False) -> None:
    global _here
    _here = Sign(place, time.time(), order, hurried)


def goes_on() -> None:
    """At the same place still, but not for want of progress."""
    global _here
    _here = _here._replace(since=time.time())


def _beat(pipe: int) -> None:
    while True:
        try:
            os.write(pipe, _here.to_line())
        except OSError:  # nobody listens any more
            return
        time.sleep(SECONDS)
