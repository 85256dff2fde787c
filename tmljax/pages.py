"""Huge pages for what a program asks malloc for.

XLA:CPU asks for the temporaries of a step and frees them at its end. They go back to the system, which hands them out
again page by page, zeroed; and products whose operands lie on many small pages wait for their addresses.
"""

import contextlib
import os
import sys
from collections.abc import Mapping

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"  # 1: as many as the system gives who asks
BEFORE = "TMLJAX_TUNABLES_BEFORE"  # what VARIABLE was for a program that has begun anew


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a program that is to have them, unless it says otherwise already."""
    said = environment.get(VARIABLE, "")
    if TUNABLE in said:
        return dict(environment)
    return {**environment, VARIABLE: f"{said}:{TUNABLE}=1".lstrip(":")}


def ask_for_huge_pages() -> None:
    """Begins this program anew with them, for glibc reads its tunables as a process starts; what it starts gets none.

    Call before any import that takes long, and before descriptors are closed to what is executed. Without glibc 2.35 or
    newer it changes nothing.
    """
    before = os.environ.pop(BEFORE, None)
    if before is not None:
        if before:
            os.environ[VARIABLE] = before
        else:
            os.environ.pop(VARIABLE, None)
        return
    wanted = with_huge_pages(os.environ)
    if sys.platform == "linux" and sys.executable and wanted != dict(os.environ):
        wanted[BEFORE] = os.environ.get(VARIABLE, "")
        with contextlib.suppress(OSError):  # slower then, and nothing else
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)
