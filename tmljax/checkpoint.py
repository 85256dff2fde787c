"""Checkpoints of a workdir: written in the background, checked when read, restored onto any mesh.

    workdir/tokenizer.json
    workdir/checkpoints/STEP/      params (nested dict), optimizer (flat dict), progress (json)

Orbax writes a step aside and renames it when it is whole. What happens to it afterwards is noticed by fingerprints
of the arrays (tmljax/fingerprint.py), which lie in the progress, and by the seal of that. Each process reads its own
part, and all go on with the newest step that every one of them could read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from tmljax import cluster, config, files
from tmljax.config import Experiment, UserError
from tmljax.fingerprint import fingerprints, flatten, host_fingerprints
from tmljax.quiet import hushed
from tmljax.storage import SEAL, Damaged, Unreachable, read, read_json, seal, share, unseal, verify
from tmljax.stream.text import Tokenizer

FOLDER = "checkpoints"
KNOWN = 50  # newest checkpoints that are looked at
TOKENIZER = "tokenizer.json"
PROGRESS = "progress"
BEST = "best"
FORMAT = 5  # raise it when the same parameters compute something else


class Restored(NamedTuple):
    step: int
    params: Any
    optimizer: Any
    iterator: Any  # json-able state of the data iterator


class Checkpoints:
    """Writes the checkpoints of one run, keeping the newest `keep` and the best."""

    def __init__(self, workdir: str | Path, keep: int):
        self._folder = Path(workdir).absolute() / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        newest, best = (
            policies.LatestN(keep),
            policies.BestN(get_metric_fn=goodness, n=1, keep_checkpoints_without_metrics=False),
        )
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([newest, best]),
                best_fn=goodness,  # without it orbax forgets the metrics
                async_options=ocp.options.AsyncOptions(barrier_sync_fn=self._meet),
            ),
        )
        self._writing = False
        self._broken = False
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(hushed())

    def save(
        self, step: int, params: Any, optimizer: Any, iterator: Any, experiment: Experiment, loss: float | None = None
    ) -> None:
        """Returns when the arrays are copied; the best checkpoint is the one of lowest held-out `loss`.

        Raises UserError where this or the save before fails for want of space.
        """
        self.wait()
        items = {"params": params, "optimizer": flatten(optimizer)}
        progress = {
            "format": FORMAT,
            "step": step,
            "loss": loss,
            "iterator": iterator,
            "config": dataclasses.asdict(experiment),
            "fingerprints": {name: fingerprints(tree) for name, tree in items.items()},
        }
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        metrics = None if loss is None else {"loss": loss}
        self._writing = True
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(**arrays, progress=ocp.args.JsonSave(seal(progress))),
                metrics=metrics,
                force=True,
            )
        except Exception as e:
            raise self._failure(e) from None

    def poll(self) -> None:
        """Raises UserError where the save in progress has failed; never waits."""
        if self._writing and (self._broken or not self._manager.is_saving_in_progress()):
            self.wait()

    def wait(self) -> None:
        """Until what was saved is on disk. Raises UserError where it could not be written."""
        if not self._writing:
            return
        self._writing = False
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._failure(e) from None

    def close(self) -> None:
        """Raises UserError where the save in progress fails."""
        try:
            self.wait()
        finally:
            with self._quiet, contextlib.suppress(Exception):  # raised by wait already
                self._manager.close()
                gc.collect()

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier among the processes, but one whose write has failed says so at once, and waits for nobody."""
        failed = sys.exc_info()[1]
        if failed is not None:
            self._broken = True
            raise failed
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _failure(self, e: Exception) -> Exception:
        if not files.is_full(e):
            return e
        kept = ", ".join(map(str, steps(self._folder.parent))) or "none"
        return UserError(
            f"no space left on device while writing a checkpoint to {self._folder}; complete checkpoints: {kept}; "
            f"free some space and run the same command again"
        )


def goodness(metrics: dict[str, float]) -> float:
    """Orbax keeps the highest."""
    return -metrics["loss"] if np.isfinite(metrics["loss"]) else -np.inf


def steps(workdir: str | Path) -> list[int]:
    """Steps that were written to the end, oldest first."""
    folder = Path(workdir) / FOLDER
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit()) if folder.is_dir() else []


def restore(workdir: str | Path, step: int, params: Any, optimizer: Any) -> Restored:
    """`params` and `optimizer` are trees of ShapeDtypeStruct with the shardings wanted.

    Raises Damaged or Unreachable in every process where one of them met it, UserError for another version's.
    """
    targets = {"params": params, "optimizer": flatten(optimizer)}
    arrays = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    found, progress, failure = None, {}, None
    check_format(workdir, step)
    try:
        found = read(_step_folder(workdir, step), lambda: arrays)
        progress = unseal(found.progress, PROGRESS)
        held_out_loss(workdir, step)
    except (Damaged, Unreachable) as e:
        failure = e
    share(failure)
    for name in targets:
        verify(fingerprints(found[name]), progress["fingerprints"][name])
    leaves = [found.optimizer[name] for name in targets["optimizer"]]
    moments = jax.tree.unflatten(jax.tree.structure(optimizer), leaves)
    return Restored(progress["step"], found.params, moments, progress["iterator"])


def resume(workdir: str | Path, params: Any, optimizer: Any) -> Restored | None:
    """The newest complete checkpoint, None where there is none at all; says so when newer ones are damaged.

    Damaged ones are renamed to STEP.damaged, so that their steps can be written again. Raises UserError where every
    one is damaged, and where one cannot be reached.
    """
    lead = cluster.is_lead()
    if lead:
        clear_unfinished(workdir)
    damaged: dict[int, Damaged] = {}
    for step in reversed(json.loads(cluster.tell_all(json.dumps(steps(workdir)[-KNOWN:]))[0])):
        try:
            restored = restore(workdir, step, params, optimizer)
        except Damaged as e:
            damaged[step] = e
            continue
        except Unreachable as e:
            raise _unreachable(workdir, step, e) from None
        if lead:
            damaged |= unjudged(workdir, step)
        for bad in damaged if lead else ():
            report_damage(bad, damaged[bad], step)
            os.replace(_step_folder(workdir, bad), _free_name(_step_folder(workdir, bad)))
        cluster.wait_for_all("damaged checkpoints are set aside")
        return restored
    if damaged:
        raise _all_damaged(workdir, damaged)
    return None


def read_newest(workdir: str | Path) -> tuple[int, Any, dict[str, Any]]:
    """(step, params, progress) of the newest checkpoint that can be read. Raises UserError where there is none."""
    damaged: dict[int, Damaged] = {}
    for step in reversed(steps(workdir)):
        try:
            params, progress = read_params(workdir, step)
        except Damaged as e:
            damaged[step] = e
            continue
        except Unreachable as e:
            raise _unreachable(workdir, step, e) from None
        for bad in damaged:
            report_damage(bad, damaged[bad], step)
        return step, params, progress
    if damaged:
        raise _all_damaged(workdir, damaged)
    if not Path(workdir).is_dir():
        raise UserError(f"--workdir={workdir}: there is no such folder")
    if (Path(workdir) / "manifest.json").exists():
        raise UserError(f"{workdir} is an export, or what is left of one; name the training workdir, or export again")
    train = f"python -m launch.train --config=configs/NAME.py --workdir={workdir}"
    raise UserError(f"{workdir} holds no checkpoint; train one with {train}")


def best_step(workdir: str | Path) -> int | None:
    """The step kept for its held-out loss, None where none was evaluated."""
    losses = {}
    for step in steps(workdir):
        with contextlib.suppress(Damaged, Unreachable):
            losses[step] = held_out_loss(workdir, step)
    losses = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(losses, key=losses.__getitem__) if losses else None


def held_out_loss(workdir: str | Path, step: int) -> float | None:
    """That the step was saved with. Raises Damaged where orbax, which has a file of its own for it, would read another;
    and Unreachable."""
    folder = _step_folder(workdir, step)
    loss = unseal(read_json(folder / PROGRESS / "metadata"), PROGRESS).get("loss")
    path = folder / "metrics" / "metrics"
    beside = read_json(path) if path.exists() else {"loss": None}
    if json.dumps(beside) != json.dumps({"loss": loss}):  # texts, for NaN is not itself
        raise Damaged("the held-out loss is not what was saved")
    return loss


def unjudged(workdir: str | Path, before: int) -> dict[int, Damaged]:
    """Of the steps before this one those whose loss orbax could not read, and would end the run for."""
    found = {}
    for step in steps(workdir):
        try:
            if step < before:
                held_out_loss(workdir, step)
        except Damaged as e:
            found[step] = e
        except Unreachable as e:
            raise _unreachable(workdir, step, e) from None
    return found


class Served(NamedTuple):
    step: int
    experiment: Experiment
    tokenizer: Tokenizer
    params: Any  # numpy arrays


def load_for_serving(workdir: str | Path, wanted: str | None = None) -> Served:
    """The newest complete checkpoint for None, that of lowest held-out loss for BEST, else that of this step.

    Raises UserError where there is none such, or it cannot be read.
    """
    step, params, progress = read_newest(workdir) if wanted is None else read_step(workdir, wanted)
    try:
        experiment = config.from_tree(Experiment, progress["config"])
    except UserError as e:
        raise UserError(f"checkpoint {step} of {workdir} is of another version of tmljax: {e}; train it anew") from None
    return Served(step, experiment, Tokenizer.load(Path(workdir) / TOKENIZER), params)


def read_step(workdir: str | Path, wanted: str) -> tuple[int, Any, dict[str, Any]]:
    """(step, params, progress) of a step, or of BEST. Raises UserError."""
    step = best_step(workdir) if wanted == BEST else int(wanted) if wanted.isdigit() else None
    if step is None and wanted == BEST:
        raise UserError(f"--step={BEST}: no checkpoint of {workdir} has a held-out loss")
    if step is None:
        raise UserError(f"--step={wanted} is neither a number nor {BEST}")
    if step not in steps(workdir):
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has {steps(workdir) or 'none'}")
    try:
        return step, *read_params(workdir, step)
    except Damaged as e:
        raise _all_damaged(workdir, {step: e}) from None
    except Unreachable as e:
        raise _unreachable(workdir, step, e) from None


def read_params(workdir: str | Path, step: int) -> tuple[Any, dict[str, Any]]:
    """Nested dict of numpy arrays, and the progress beside it; no device is touched.

    Raises Damaged, Unreachable, and UserError for another version's.
    """
    folder = _step_folder(workdir, step)

    def arrays() -> dict[str, Any]:
        shapes = ocp.StandardCheckpointHandler().metadata(folder / "params").tree
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return {"params": ocp.args.PyTreeRestore(restore_args=on_host)}

    check_format(workdir, step)
    found = read(folder, arrays)
    progress = unseal(found.progress, PROGRESS)
    verify(host_fingerprints(found.params), progress["fingerprints"]["params"])
    return found.params, progress


def check_format(workdir: str | Path, step: int) -> None:
    """Raises UserError where this version would compute something else with the parameters. Of what cannot be read, or
    is not what was saved, it says nothing: whoever reads the arrays will."""
    try:
        found = read_json(_step_folder(workdir, step) / PROGRESS / "metadata")
        version = found.get("format", 1)
        if SEAL in found:  # there was a time without
            unseal(found, PROGRESS)
    except (Damaged, Unreachable, AttributeError):
        return
    if version != FORMAT:
        raise UserError(
            f"checkpoint {step} of {workdir} has format {version}, this version of tmljax reads {FORMAT}: "
            f"use the version that wrote it, or train anew in another --workdir"
        )


def clear_unfinished(workdir: str | Path) -> None:
    """Removes what an interrupted save left behind."""
    for left in (Path(workdir) / FOLDER).glob("*.orbax-checkpoint-tmp*"):
        print(
            f"checkpoint {left.name.split('.')[0]} was being written when the last run ended; removed", file=sys.stderr
        )
        shutil.rmtree(left, ignore_errors=True)


def report_damage(step: int, reason: Damaged, used: int) -> None:
    print(f"checkpoint {step} is damaged ({reason}); using checkpoint {used}", file=sys.stderr)


def _step_folder(workdir: str | Path, step: int) -> Path:
    return Path(workdir).absolute() / FOLDER / str(step)


def _free_name(folder: Path) -> Path:
    name = folder.with_name(f"{folder.name}.damaged")
    return name if not name.exists() else folder.with_name(f"{folder.name}.damaged.{os.getpid()}")


def _unreachable(workdir: str | Path, step: int, reason: Unreachable) -> UserError:
    return UserError(
        f"checkpoint {step} of {workdir} cannot be read at present ({reason}); nothing was changed: "
        f"run the same command again when the storage answers"
    )


def _all_damaged(workdir: str | Path, damaged: dict[int, Damaged]) -> UserError:
    newest = max(damaged)
    others = f", nor can {', '.join(map(str, sorted(damaged.keys() - {newest})))}" if len(damaged) > 1 else ""
    return UserError(
        f"checkpoint {newest} of {workdir} cannot be read ({damaged[newest]}){others}; "
        f"bring {Path(workdir) / FOLDER} back from a copy, or use another --workdir"
    )
