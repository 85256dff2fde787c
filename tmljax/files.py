"""Files that are whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write to; what is there at the end is on disk and takes the place of `path`.

    When anything goes wrong the name vanishes and `path` stays as it was. Host and process are part of the name, so
    that many can write the same file on a disk that they share: one of them is last. Raises OSError.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """As UTF-8. Raises OSError."""
    with whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def is_full(error: BaseException) -> bool:
    """Was it for want of space, in the system's number or only in the words of a library?"""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    words = [text for number in numbers for text in (os.strerror(number), f"(os error {number})")]
    return getattr(error, "errno", None) in numbers or any(text in str(error) for text in words)


def sync(path: Path) -> None:
    """Returns when the file is on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
