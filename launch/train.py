"""Trains a model; goes on by itself where the workdir holds a checkpoint.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.train.steps=500]

The dataset of the config is built first where it does not exist. Ctrl-C and SIGTERM finish the step, save and leave;
the same command goes on from there. The workdir gets config.json, tokenizer.json, checkpoints/, metrics.jsonl and
TensorBoard events.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from absl import flags

from data_pipelines import builder, loader, manifest, recordings
from data_pipelines.plan import count_sessions
from data_pipelines.words import choose_tokenizer, own_tokenizer
from launch import BEGAN, training, verb
from tmljax import checkpoint, cluster, lineage, pulse
from tmljax.config import Experiment, UserError
from tmljax.model.interaction import Definition
from tmljax.serve import bundle
from tmljax.sharding import check, make_mesh, param_shardings, process_rows
from tmljax.stream.text import Tokenizer
from tmljax.train.loop import Data, Outcome, Task, train
from tmljax.train.objective import objective
from tmljax.train.speed import step_flops


def main(argv: Sequence[str]) -> int:
    workdir = flags.FLAGS.workdir
    outcome = train_workdir(verb.experiment(), workdir, began=BEGAN, profile=flags.FLAGS.profile)
    if outcome.signal is None:
        said = f"trained to step {outcome.step}; evaluate it with: python -m launch.evaluate --workdir={workdir}"
    else:
        said = f"stopped by {outcome.signal.name} after step {outcome.step}, which is saved; the same command goes on"
    if cluster.is_lead():
        print(said)
    cluster.part()
    return 130 if outcome.signal is signal.SIGINT else 0


def train_workdir(
    experiment: Experiment, workdir: str, out: TextIO | None = None, began: float | None = None, profile: int = 0
) -> Outcome:
    """The verb, for an experiment at hand; progress goes to `out`, standard error by default.

    The time of the run is counted from the Unix time `began`, by default now.
    """
    began = time.time() if began is None else began
    cluster.initialize()
    cluster.enable_compile_cache()
    mesh = make_mesh(experiment.mesh)
    check(experiment, mesh)
    model = Definition(experiment.stream, experiment.model)
    param_shardings(mesh, model.axes(), model.abstract())  # refuses what the mesh does not divide
    rows = process_rows(mesh, experiment.data.batch)
    if bundle.is_export(workdir):
        raise UserError(f"--workdir={workdir} is an export, which training would destroy; name another folder")
    own_tokenizer(experiment)
    count_sessions(experiment)  # refuses what the data cannot be of
    builder.refuse_another(experiment)
    for recorded in manifest.recorded(experiment.data.recordings) if cluster.is_lead() else ():
        recordings.check(recorded, experiment)
    lineage.keep_config(workdir, experiment)  # what cannot be done has been refused, and leaves no trace
    tokenizer = prepare_data(experiment, workdir)
    with contextlib.closing(loader.train_loader(experiment, tokenizer, rows=rows)) as batches:
        held_out = loader.validation_batches(experiment, tokenizer, experiment.train.eval_batches, rows=rows)
        task, data = Task(experiment, model, objective, step_flops(experiment, model)), Data(batches, held_out)
        return train(task, workdir, data, mesh, began=began, profile=profile, out=out)


def prepare_data(experiment: Experiment, workdir: str) -> Tokenizer:
    """Builds and imports the data where it is absent. The tokenizer, which a checkpoint is nothing without, is chosen
    by the first run in a workdir; all processes and later runs take it from there."""
    pulse.at("building the dataset")
    path = Path(workdir) / checkpoint.TOKENIZER
    if cluster.is_lead():
        builder.build(experiment)
        for recorded in manifest.recorded(experiment.data.recordings):
            recordings.prepare(recorded, experiment)
        if not (path.exists() and checkpoint.steps(workdir)):
            choose_tokenizer(experiment).save(path)
    cluster.wait_for_all("dataset")
    return Tokenizer.load(path)


if __name__ == "__main__":
    training.define_flags()
    cluster.leave_when_asked()
    with cluster.leaving():
        sys.exit(verb.run(main))
