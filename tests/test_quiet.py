import asyncio
import gc
import sys

import pytest

from tmljax.quiet import hushed


@pytest.fixture
def printed(monkeypatch):
    """What reaches the hooks that were there before."""
    found = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, e, traceback: found.append(str(e)))
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: found.append(str(unraisable.exc_value)))
    return found


def test_closed_loops_are_dropped_and_all_else_is_printed(printed):
    with hushed():
        for text in ("Event loop is closed", "something of ours"):
            sys.excepthook(RuntimeError, RuntimeError(text), None)
    assert printed == ["something of ours"]


def test_abandoned_coroutines_are_dropped_and_broken_objects_are_printed(printed):
    async def abandoned():
        try:
            await asyncio.sleep(0)
        finally:
            raise ValueError("of an abandoned coroutine")

    class Broken:
        def __del__(self):
            raise ValueError("of an object")

    with hushed():
        coroutine, broken = abandoned(), Broken()
        coroutine.send(None)
        del coroutine, broken
        gc.collect()
    assert printed == ["of an object"]


def test_hooks_are_put_back():
    before = sys.excepthook, sys.unraisablehook
    with pytest.raises(KeyError), hushed():
        raise KeyError
    assert (sys.excepthook, sys.unraisablehook) == before
