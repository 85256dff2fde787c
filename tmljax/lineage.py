"""The config of a workdir, in its config.json, and which others may go on with its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from tmljax import checkpoint, cluster, config, files
from tmljax.config import Experiment, UserError
from tmljax.model.block import tile_rows

CONFIG = "config.json"
# What a resumed run may change: how long (which moves the end of the schedule), how often and where, how the same
# numbers are computed (but see `is_free`), and what is for serving alone.
FREE = (
    *("train.steps", "train.log_every", "train.save_every", "train.keep", "train.eval_every", "train.eval_batches"),
    *("data.root", "data.workers", "model.remat", "model.attention", "model.flow.steps", "model.flow.temperature"),
    *("model.moe.exchange", "model.moe.matmul", "model.moe.block_rows", "model.moe.tick_matmul"),
)
FREE_GROUPS = ("mesh.", "sampling.")


def keep_config(workdir: str | Path, experiment: Experiment) -> None:
    """Writes config.json. Raises UserError naming the fields where the workdir's checkpoints were trained otherwise,
    and where the newest is another version's."""
    path, trained = Path(workdir) / CONFIG, checkpoint.steps(workdir)
    folder = Path(workdir) / checkpoint.FOLDER
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):  # orbax would find out at the first save
        raise UserError(f"{folder} may not be written by this user; change its owner or mode, or use another --workdir")
    if trained:
        checkpoint.check_format(workdir, trained[-1])
    if path.exists() and trained:
        before = read_config(path)
        changed = [
            f"config.{name} was {old!r}, now {new!r}"
            for name, old, new in differences(before, dataclasses.asdict(experiment))
            if not is_free(name, old, experiment.model.moe)
        ]
        if changed:
            raise UserError(
                f"{workdir} was trained with another config: {'; '.join(changed)}. Set it back or use another --workdir"
            )
    if cluster.is_lead():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, config.to_json(experiment))
        except OSError as e:
            raise UserError(f"--workdir={workdir} cannot be written: {e.strerror}; name another folder") from None


def read_config(path: Path) -> dict[str, Any]:
    """As it was written, by whatever version. Raises UserError where it is no config."""
    try:
        tree = json.loads(path.read_text())
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no config; bring it back from a copy, or use another --workdir")
    return tree


def is_free(name: str, old: Any, moe: config.Moe) -> bool:
    """Whether it may be other than `old`, as it is among the experts' settings `moe` say.

    With a capacity another exchange drops other assignments, and where positions are gathered another tile too. So may
    another mesh, but a run must be able to go on with what hardware there is.
    """
    if moe.capacity_factor is not None and name == "model.moe.exchange":
        return False
    if moe.capacity_factor is not None and name == "model.moe.matmul" and moe.exchange == "gathered":
        return tile_rows(dataclasses.replace(moe, matmul=old)) == tile_rows(moe)
    return name in FREE or name.startswith(FREE_GROUPS)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) of each leaf that is not the same."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append((prefix + name, a, b))
    return found
