"""Reads what orbax wrote, and tells a damaged checkpoint from storage that does not answer.

Each process reads its own part, waiting for no other; then all of them hear whether it went well everywhere.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from tmljax import cluster
from tmljax.fingerprint import Fingerprints, compare
from tmljax.quiet import hushed

# Some of what orbax raises for damaged files.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)

# What the system says when it is not the file that is wrong: the same read may succeed a moment later.
PASSING = {
    *(errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
    *(errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENOTCONN, errno.EHOSTDOWN),
}
PASSING_CODES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "PERMISSION_DENIED")  # as tensorstore puts them
SEAL = "seal"  # of what is written as JSON: a checksum of the rest
PAUSES = (1.0, 4.0, 10.0)  # seconds before each further attempt


class Damaged(Exception):
    """A checkpoint that cannot be read, or is not what was written."""


class Unreachable(Exception):
    """A checkpoint that storage does not hand out, which says nothing about the checkpoint."""


def read(folder: Path, args: Callable[[], dict[str, Any]]) -> Any:
    """The items of a step, this process's part of them. Raises Damaged; Unreachable after a few attempts."""
    for pause in (*PAUSES, None):
        try:
            return read_once(folder, args)
        except Unreachable:
            if pause is None:
                raise
            time.sleep(pause)


def read_once(folder: Path, args: Callable[[], dict[str, Any]]) -> Any:
    me = cluster.process_index()
    alone = ocp.options.MultiprocessingOptions(me, {me}, f"process{me}")  # one that fails keeps no other waiting
    with hushed():
        try:
            composite = ocp.args.Composite(**args(), progress=ocp.args.JsonRestore())
            reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)
            return reader.restore(folder, args=composite)
        except Exception as e:
            if type(e) is not Exception and not isinstance(e, UNREADABLE):
                raise
            reason = judge(folder, e)
        gc.collect()
    raise reason


def judge(folder: Path, e: Exception) -> Damaged | Unreachable:
    """What an error of a read says of the checkpoint. What orbax may not look into it takes for missing."""
    closed = next((path for path in (folder, *folder.rglob("*")) if not may_read(path)), None)
    if closed is not None:
        return Unreachable(f"{closed} may not be read by this user")
    kind = Unreachable if is_passing(e) else Damaged
    return kind(re.sub(r"\s+", " ", str(e.__cause__ or e))[:160] or type(e).__name__)


def may_read(path: Path) -> bool:
    return not path.exists() or os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0))


def read_json(path: Path) -> Any:
    """Raises Damaged and Unreachable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        kind = Unreachable if is_passing(e) else Damaged
        raise kind(f"{path.parent.name}: {e}") from None


def seal(tree: dict[str, Any]) -> dict[str, Any]:
    """With a checksum of all it says, as JSON says it."""
    as_read = json.loads(json.dumps(tree))
    return tree | {SEAL: zlib.crc32(json.dumps(as_read, sort_keys=True).encode())}


def unseal(tree: Any, name: str) -> dict[str, Any]:
    """What was sealed. Raises Damaged where it is anything else."""
    rest = {key: value for key, value in tree.items() if key != SEAL} if isinstance(tree, dict) else {}
    if not rest or seal(rest)[SEAL] != tree.get(SEAL):
        raise Damaged(f"{name} is not what was saved")
    return rest


def is_passing(e: BaseException | None) -> bool:
    """Whether an error of a read is storage's, not the checkpoint's: an OSError, or a text that names its number."""
    if e is None:
        return False
    number = re.search(r"os_error_code='(\d+)'", str(e))
    code = getattr(e, "errno", None) if number is None else int(number[1])
    return code in PASSING or str(e).startswith(PASSING_CODES) or is_passing(e.__cause__)


def share(failure: Exception | None) -> None:
    """Raises, in every process, the first failure that one of them met."""
    told = cluster.tell_all("" if failure is None else f"{type(failure).__name__}:{failure}")
    for process, text in enumerate(told):
        kind, _, reason = text.partition(":")
        if kind:
            where = f"process {process}: " if len(told) > 1 else ""
            raise {"Damaged": Damaged, "Unreachable": Unreachable}[kind](where + reason)


def verify(found: Fingerprints, saved: Fingerprints) -> None:
    """Raises Damaged where an array is not what was saved."""
    try:
        compare(found, saved)
    except ValueError as e:
        raise Damaged(str(e)) from None
