"""Where a training step's time goes, one JSON line.

    python -m benchmarks.breakdown --config=configs/demo.py [--steps=3] [--trace=DIR]

Runs the compiled step on one batch: alone, for its median time and MFU (tmljax/train/speed.py), then profiled:
operations are added up by the part of the program they come from, what `jax.named_scope` says in the compiled
program's metadata. Milliseconds are of cores or devices at work, so on two cores they add up to twice the wall clock at
most; "waiting" is the rest. A fused operation counts where its result belongs. --trace keeps the trace, which
TensorBoard's profile plugin and XProf open.
"""

from __future__ import annotations

import collections
import contextlib
import gzip
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from data_pipelines import builder, loader
from data_pipelines.words import choose_tokenizer
from launch import verb
from tmljax.config import Experiment, UserError
from tmljax.model.interaction import Definition, count
from tmljax.sharding import batch_sharding, make_mesh
from tmljax.stream.microturn import ABSENT, IDLE
from tmljax.train.feed import to_devices
from tmljax.train.objective import objective
from tmljax.train.speed import peak_flops, step_flops
from tmljax.train.state import create_state
from tmljax.train.step import make_program

PARTS = ("attention", "experts", "embed", "flow", "text_head", "optimizer")
WARM = 2  # steps before any is timed
OPERATION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)


def define_flags() -> None:
    verb.define_config()
    flags.DEFINE_integer("steps", 3, "steps traced", lower_bound=1)
    flags.DEFINE_integer("alone", 5, "steps timed before, without the profiler", lower_bound=1)
    flags.DEFINE_enum("batch", "loaded", ["loaded", "full"], "as the data has it, or with every stream there")
    flags.DEFINE_string("trace", None, "folder to keep the trace in")


def main(argv: Sequence[str]) -> None:
    # Else XLA:GPU hides the operations of a step in a few graphs. What the user sets comes later and wins.
    os.environ["XLA_FLAGS"] = "--xla_gpu_enable_command_buffer= " + os.environ.get("XLA_FLAGS", "")
    experiment = verb.experiment()
    builder.build(experiment)
    training = Training(experiment)
    for _ in range(WARM):
        training.step()
    seconds = [training.step() for _ in range(flags.FLAGS.alone)]
    print(json.dumps(describe(experiment, training, float(np.median(seconds))) | profile(training, flags.FLAGS.steps)))


class Training:
    """The compiled step and what it works on: the same batch again and again."""

    def __init__(self, experiment: Experiment):
        mesh, model = make_mesh(experiment.mesh), Definition(experiment.stream, experiment.model)
        with contextlib.closing(loader.train_loader(experiment, choose_tokenizer(experiment))) as batches:
            loaded = next(batches)
        self.batch = to_devices(fill(loaded) if flags.FLAGS.batch == "full" else loaded, batch_sharding(mesh))
        program = make_program(experiment, model, objective, mesh)
        self.state = create_state(model, program.optimizer, mesh, seed=0)
        self.compiled = program.step.lower(self.state, self.batch).compile()
        self.metrics: dict[str, jax.Array] = {}

    def step(self) -> float:
        """Returns the seconds it took."""
        began = time.perf_counter()
        self.state, self.metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.metrics)
        return time.perf_counter() - began


def describe(experiment: Experiment, training: Training, seconds: float) -> dict[str, Any]:
    """Raises UserError where steps were not taken: they are as fast as others, and tell nothing."""
    if training.metrics["skipped"]:
        raise UserError(
            f"{int(training.metrics['skipped'])} steps gave numbers that are not finite; --config.model.dtype?"
        )
    model = Definition(experiment.stream, experiment.model)
    flops, peak = step_flops(experiment, model), peak_flops(jax.devices())
    return {
        "benchmark": "breakdown",
        "config": flags.FLAGS.config,
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "parameters": count(model.abstract()),
        "batch": flags.FLAGS.batch,
        "positions": experiment.data.batch * len(model.layout.positions(experiment.data.window)),
        "loss": round(float(training.metrics["loss/total"]), 3),
        "step_ms": round(1e3 * seconds, 1),
        "model_tflops_per_second": round(flops / seconds / 1e12, 3),
        "mfu": peak and round(flops / seconds / peak, 3),
        "memory_gb": most_memory(),
    }


def profile(training: Training, steps: int) -> dict[str, Any]:
    with contextlib.nullcontext(flags.FLAGS.trace) if flags.FLAGS.trace else tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            wall_ms = 1e3 * sum(training.step() for _ in range(steps)) / steps
        spent = add_up(durations(Path(folder)), dict(OPERATION.findall(training.compiled.as_text())))
    workers = len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else len(jax.devices())
    ms = {part: value / 1e3 / steps for part, value in spent.items()}
    ms["waiting"] = max(wall_ms * workers - sum(ms.values()), 0.0)
    total = sum(ms.values())
    largest = sorted(ms.items(), key=lambda item: -item[1])
    return {
        "traced_ms": round(wall_ms, 1),
        "workers": workers,
        "ms": {part: round(value, 1) for part, value in largest},
        "share": {part: round(value / total, 3) for part, value in largest},
    }


def fill(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every stream there in every micro-turn: so every position goes to its experts, as MFU counts it."""
    there = {name: np.ones_like(batch[name]) for name in ("valid", "user_present", "video_present")}
    return batch | there | {"user_text": np.where(batch["user_text"] == ABSENT, IDLE, batch["user_text"])}


def most_memory() -> float | None:
    """GB that the first device held at most, where it keeps count."""
    stats = jax.devices()[0].memory_stats()
    return stats and round(stats["peak_bytes_in_use"] / 1e9, 1)


def durations(folder: Path) -> Iterator[tuple[str, float]]:
    """(operation of the compiled program, microseconds) of everything in the trace."""
    (path,) = folder.glob("**/*.trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    for event in events:
        named = "hlo_op" in event.get("args", {})
        if event.get("ph") == "X" and (named or jax.default_backend() != "gpu"):  # there others tell the same once more
            yield event["args"]["hlo_op"] if named else event["name"], event.get("dur", 0.0)


def add_up(durations: Iterator[tuple[str, float]], scopes: dict[str, str]) -> dict[str, float]:
    """Microseconds by part; loops are left out, since what they contain is there by itself."""
    spent: dict[str, float] = collections.Counter()
    for name, microseconds in durations:
        if name in scopes and not name.startswith(("while", "call")):
            words = re.split(r"[/()]", scopes[name])
            spent[next((part for part in PARTS if part in words), "other")] += microseconds
    return dict(spent)


if __name__ == "__main__":
    define_flags()
    sys.exit(verb.run(main))
