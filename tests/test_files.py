"""A file is whole or as it was, whatever happens while it is written."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tmljax import files

ROOT = Path(__file__).parents[1]


def test_what_is_written_takes_the_place_of_what_was(tmp_path):
    files.write_text(tmp_path / "a.txt", "first")
    files.write_text(tmp_path / "a.txt", "zweite Fassung, länger")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "zweite Fassung, länger"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    files.write_text(tmp_path / "a.txt", "old")

    def write_half() -> None:
        with files.whole(tmp_path / "a.txt") as aside:
            aside.write_text("half of the ne")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_it_is_on_disk_before_it_is_in_place(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    files.write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"


FOR_EVER = """
import sys
from tmljax import files
while True:
    for letter in "ab":
        files.write_text(sys.argv[1], letter * 300_000)
"""


def test_nobody_reads_half_a_file_of_a_process_that_is_killed(tmp_path):
    """Two contents of one length, written in turn without end by a process that is killed in the middle."""
    loop = (
        "import sys; from tmljax import files\nwhile True: [files.write_text(sys.argv[1], c * 300_000) for c in 'ab']"
    )
    child = subprocess.Popen([sys.executable, "-c", loop, str(tmp_path / "a.txt")], cwd=ROOT)
    seen = set()
    while len(seen) < 2:
        assert child.poll() is None
        if (tmp_path / "a.txt").exists():
            seen.add((tmp_path / "a.txt").read_text())
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    seen.add((tmp_path / "a.txt").read_text())
    assert seen == {"a" * 300_000, "b" * 300_000}


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError("UNKNOWN: write failed: No space left on device; writing a.array_record"), True),
        (ValueError("I/O error: Disk quota exceeded (os error 122)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("RESOURCE_EXHAUSTED: out of memory"), False),
    ],
)
def test_a_full_disk_is_told_from_other_failures(error, full):
    assert files.is_full(error) is full
