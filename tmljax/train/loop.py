"""The training loop: dispatch a step, then read what the step before it gave.

What a run writes does not depend on where it was interrupted. A checkpoint of step n holds the parameters, the
optimizer and the place in the data after n steps, and is begun only when all rows up to n are in metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tmljax import checkpoint, cluster, lineage, pulse
from tmljax.config import Experiment
from tmljax.sharding import batch_sharding
from tmljax.train.feed import Fed, Feed, Source, to_devices
from tmljax.train.ledger import Ledger, as_text
from tmljax.train.metrics import Journal, Progress
from tmljax.train.profile import Profile
from tmljax.train.speed import Stopwatch, as_row
from tmljax.train.state import Definition, State, create_state
from tmljax.train.step import Metrics, Objective, Program, make_program

SELECTION = "val/loss/total"  # the best checkpoint is the one where this is lowest


class Task(NamedTuple):
    """What is trained."""

    experiment: Experiment
    definition: Definition
    objective: Objective
    flops: float | None = None  # of a step, where they are counted


class Data(NamedTuple):
    """What it is trained and judged on: this process's rows of each batch."""

    batches: Source
    validation: Sequence[dict[str, np.ndarray]]  # held out


class Outcome(NamedTuple):
    step: int  # steps taken over all runs
    signal: signal.Signals | None  # what asked the loop to stop, None where it came to its end


@dataclass
class Run:
    """What the loop holds while it runs."""

    experiment: Experiment
    program: Program
    validation: Sequence[dict[str, np.ndarray]]
    sharding: NamedSharding  # of a batch
    checkpoints: checkpoint.Checkpoints
    journal: Journal | None  # of the lead process
    progress: Progress | None
    watch: Stopwatch
    ledger: Ledger
    profile: Profile
    evaluated: bool = False  # in this process

    @contextlib.contextmanager
    def aside(self, cause: str) -> Iterator[None]:
        """Time that is not training."""
        pulse.at(cause)
        with self.watch.apart(), self.ledger.spending(cause):
            yield


def train(
    task: Task,
    workdir: str | Path,
    data: Data,
    mesh: Mesh,
    *,
    began: float | None = None,
    profile: int = 0,
    out: TextIO | None = None,
) -> Outcome:
    """Trains until config.train.steps, SIGTERM or Ctrl-C, going on from the newest checkpoint of the workdir.

    The process `began` at this Unix time; the lead process traces `profile` steps.
    Raises UserError for a workdir trained with another config, a mesh that does not divide, and a full disk.
    """
    experiment = task.experiment
    lineage.keep_config(workdir, experiment)
    program = make_program(experiment, task.definition, task.objective, mesh)
    sharding = batch_sharding(mesh)
    ledger = Ledger(workdir, began)
    pulse.at("restoring")
    with ledger.spending("restore"):
        restored = resume(workdir, program.abstract, data.batches)
    feed = Feed(data.batches, sharding)  # reads while the programs below compile
    try:
        state = (
            create_state(task.definition, program.optimizer, mesh, experiment.train.seed)
            if restored is None
            else restored
        )
        step = int(jax.device_get(state.step))
        lead = cluster.is_lead()
        if lead:
            ledger.go_on_from(step)
        with contextlib.ExitStack() as open_things:
            run = Run(
                experiment,
                program,
                data.validation,
                sharding,
                open_things.enter_context(contextlib.closing(checkpoint.Checkpoints(workdir, experiment.train.keep))),
                open_things.enter_context(contextlib.closing(Journal(workdir, step))) if lead else None,
                open_things.enter_context(contextlib.closing(Progress(step, experiment.train.steps, out)))
                if lead
                else None,
                Stopwatch(experiment, task.flops, list(mesh.devices.flat), step),
                ledger,
                open_things.enter_context(contextlib.closing(Profile(workdir, step, profile if lead else 0))),
            )
            with cluster.StopNotice() as stop, jax.transfer_guard("disallow"):
                step = run_steps(run, state, step, feed, stop)
                return Outcome(step, stop.signal)
    finally:
        feed.close()


def resume(workdir: str | Path, abstract: State, batches: Source) -> State | None:
    """The state of the newest checkpoint, with the data at its place; None where there is none."""
    restored = checkpoint.resume(workdir, abstract.params, (abstract.optimizer, abstract.step, abstract.skipped))
    if restored is None:
        return None
    batches.set_state(restored.iterator)
    optimizer, step, skipped = restored.optimizer
    return State(step, restored.params, optimizer, skipped)


def run_steps(run: Run, state: State, step: int, feed: Feed, stop: cluster.StopNotice) -> int:
    """Returns the step it ended at; everything up to it is saved."""
    config = run.experiment.train
    first, saved, unread = step, step, None  # `unread`: the step before and its metrics
    pulse.at("compiling")
    while step < config.steps and not stop.wanted:
        try:
            fed = next_batch(run, feed, step + 1, unread, compiled=step > first)
        except Exception:
            if stop.wanted:  # Ctrl-C reaches the data workers too
                break
            raise
        run.profile.before(step + 1, unread)
        if step == first:
            cluster.compile_together(run.program.step, state, fed.batch)
            run.ledger.trains()
            run.watch.begin(first)
        state, metrics = run.program.step(state, fed.batch)
        step += 1
        run.profile.after(step, metrics)
        stop.tell()
        if unread is not None:
            report(run, *unread, ahead=fed.waited)
        unread = (step, metrics)
        run.checkpoints.poll()

        evaluates = step % config.eval_every == 0 or step == config.steps
        saves = step % config.save_every == 0 or step == config.steps
        if evaluates or saves:
            jax.block_until_ready(metrics)
            with run.aside("evaluation"):
                held_out = evaluate(run, state) if evaluates else {}
            report(run, step, metrics, held_out)
            unread = None
            if saves:
                saved = save(run, state, step, fed.state, held_out.get(SELECTION))

    if unread is not None:
        report(run, *unread)
    if step > saved:  # asked to stop between two checkpoints
        save(run, state, step, fed.state, None)
    with run.aside("checkpoint"):
        run.checkpoints.wait()
    if step > first and run.progress is not None:
        run.ledger.write(step)
        run.progress.say(as_text(run.ledger.sums))
    return step


def next_batch(run: Run, feed: Feed, step: int, unread: tuple[int, Metrics] | None, compiled: bool) -> Fed:
    """The batch of this step; the devices may still be at work on the step before."""
    if compiled:
        pulse.at(f"the data of step {step}", 2 * step, hurried=True)
    fed = feed.next(lambda: unread is not None and not unread[1]["skipped"].is_ready())
    if compiled:
        pulse.at(f"step {step}", 2 * step + 1, hurried=True)
    run.watch.stand_still(fed.waited)
    run.ledger.claim("data", fed.waited)
    return fed


def report(run: Run, step: int, metrics: Metrics, held_out: dict[str, float] | None = None, ahead: float = 0.0) -> None:
    """Waits for the step; writes its row where one is due. For the next one the devices have waited `ahead` seconds."""
    jax.block_until_ready(metrics)
    config = run.experiment.train
    if run.progress is not None:
        run.progress.advance()
    if not (held_out or step == 1 or step % config.log_every == 0 or step == config.steps):
        if run.journal is not None:
            run.ledger.keep_up(step)
        return
    row = as_row(step, jax.device_get(metrics) | (held_out or {})) | run.watch.read(step, ahead)
    if run.journal is not None and run.progress is not None:
        row |= run.ledger.write(step)
        run.journal.write(row)
        run.progress.show(row)


def evaluate(run: Run, state: State) -> dict[str, float]:
    """Means over the held-out batches, one of which is on the devices at a time, named val/..."""
    if not run.evaluated and run.validation:
        cluster.compile_together(run.program.evaluate, state.params, to_devices(run.validation[0], run.sharding))
        run.evaluated = True
    rows = [
        jax.device_get(run.program.evaluate(state.params, to_devices(batch, run.sharding))) for batch in run.validation
    ]
    return {f"val/{name}": mean_of(name, [float(row[name]) for row in rows]) for name in (rows[0] if rows else ())}


def mean_of(name: str, values: Sequence[float]) -> float:
    """Over batches; of an accuracy over those in which there was something to judge."""
    kept = values if name.startswith("loss/") else [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan


def save(run: Run, state: State, step: int, iterator: Any, loss: float | None) -> int:
    """Begins a checkpoint of this step and returns the step."""
    with run.aside("checkpoint"), jax.transfer_guard("allow"):
        if run.journal is not None:
            run.ledger.write(step)  # so that what comes after can be told from what is kept
            run.journal.sync()
        optimizer = (state.optimizer, state.step, state.skipped)
        run.checkpoints.save(step, state.params, optimizer, iterator, run.experiment, loss)
    return step
