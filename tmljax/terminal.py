"""A place to say things, for what must go on when nobody reads it any more."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TextIO


class Terminal:
    """Standard output or error, but that a reader who left and a full disk are no errors: then nothing is said. What
    its encoding lacks is a question mark."""

    def __init__(self, out: TextIO):
        self._out = out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)

    def write(self, text: str) -> int:
        encoding = self._out.encoding or "utf-8"
        with self._heedless():
            self._out.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._heedless():
            self._out.flush()

    def say(self, line: str) -> None:
        """At once, in one piece, so that lines of two threads do not mix."""
        self.write(f"{line}\n")
        self.flush()

    @contextlib.contextmanager
    def _heedless(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())  # for what is flushed at the end
        except OSError:
            pass
