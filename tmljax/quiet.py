"""Silence for what a failed read or write leaves behind.

Orbax raises the error that matters. The tasks that it abandons then print pages of tracebacks on stderr, from threads
of tensorstore and from the garbage collector: those are dropped here, and nothing else is.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator
from types import TracebackType


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Installs filters on the hooks that print what nobody catches, and takes them off again."""
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook
    logger = logging.getLogger("asyncio")
    level = logger.level

    def without_closed_loops(kind: type[BaseException], e: BaseException, traceback: TracebackType | None) -> None:
        if not is_closed_loop(e):
            excepthook(kind, e, traceback)

    def without_coroutines(unraisable: sys.UnraisableHookArgs) -> None:
        if not inspect.iscoroutine(unraisable.object) and not is_closed_loop(unraisable.exc_value):
            unraisablehook(unraisable)

    try:
        sys.excepthook, sys.unraisablehook = without_closed_loops, without_coroutines
        logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
    finally:
        sys.excepthook, sys.unraisablehook = excepthook, unraisablehook
        logger.setLevel(level)


def is_closed_loop(e: BaseException | None) -> bool:
    return isinstance(e, RuntimeError) and "Event loop is closed" in str(e)
