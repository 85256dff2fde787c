"""Where a training step's time goes, one JSON line.

    python -m benchmarks.breakdown --config=configs/demo.py [--steps=3] [--trace=DIR]

Runs the compiled step on one batch under the profiler and adds up its operations by the part of the program they come
from: what `jax.named_scope` says in the compiled program's metadata. Milliseconds are of cores or devices at work, so
on two cores they add up to twice the wall clock at most; "waiting" is the rest. A fused operation counts where its
result belongs. --trace keeps the trace, which TensorBoard's profile plugin and XProf open.
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

import jax
from absl import flags

from data_pipelines import builder, loader
from data_pipelines.words import choose_tokenizer
from launch import verb
from tmljax import cluster
from tmljax.model.interaction import Definition
from tmljax.sharding import batch_sharding, make_mesh
from tmljax.train.feed import to_devices
from tmljax.train.objective import objective
from tmljax.train.state import create_state
from tmljax.train.step import make_program

PARTS = ("attention", "experts", "embed", "flow", "text_head", "optimizer")
OPERATION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)


def define_flags() -> None:
    verb.define_config()
    flags.DEFINE_integer("steps", 3, "steps traced", lower_bound=1)
    flags.DEFINE_string("trace", None, "folder to keep the trace in")


def main(argv: Sequence[str]) -> None:
    cluster.keep_memory()
    experiment, steps = verb.experiment(), flags.FLAGS.steps
    builder.build(experiment)
    tokenizer = choose_tokenizer(experiment)
    mesh, model = make_mesh(experiment.mesh), Definition(experiment.stream, experiment.model)
    with contextlib.closing(loader.train_loader(experiment, tokenizer)) as batches:
        batch = to_devices(next(batches), batch_sharding(mesh))
    program = make_program(experiment, model, objective, mesh)
    state = create_state(model, program.optimizer, mesh, seed=0)
    step = program.step.lower(state, batch).compile()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    with contextlib.nullcontext(flags.FLAGS.trace) if flags.FLAGS.trace else tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, metrics = step(state, batch)
                jax.block_until_ready(metrics)
        wall_ms = 1e3 * (time.perf_counter() - began) / steps
        spent = add_up(durations(Path(folder)), dict(OPERATION.findall(step.as_text())))
    workers = len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else len(jax.devices())
    ms = {part: value / 1e3 / steps for part, value in spent.items()}
    ms["waiting"] = max(wall_ms * workers - sum(ms.values()), 0.0)
    total = sum(ms.values())
    print(
        json.dumps(
            {
                "benchmark": "breakdown",
                "config": flags.FLAGS.config,
                "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
                "step_ms": round(wall_ms, 1),
                "workers": workers,
                "ms": {part: round(value, 1) for part, value in sorted(ms.items(), key=lambda item: -item[1])},
                "share": {part: round(value / total, 3) for part, value in sorted(ms.items(), key=lambda i: -i[1])},
            }
        )
    )


def durations(folder: Path) -> Iterator[tuple[str, float]]:
    """(operation of the compiled program, microseconds) of everything in the trace."""
    (path,) = folder.glob("**/*.trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    for event in events:
        if event.get("ph") == "X":
            yield event.get("args", {}).get("hlo_op", event["name"]), event.get("dur", 0.0)


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
