"""Speed of training, one JSON line. Close other programs first.

    python -m benchmarks.train --config=configs/demo.py [--steps=30] [--start=cold|warm]

Trains the config for a few steps as the verb does, data and all, and reports the median step. "share_of_peak" is model
FLOPs (tmljax/train/speed.py: no recomputation) against the fastest large matrix product that this process
measured, in the dtype of the activations. "start_seconds" runs from the start of the process to the end of the first
step; a cold start finds no compiled program. Data is built before the clock starts where it is not there.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BEGAN = time.perf_counter()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

from data_pipelines import builder  # noqa: E402
from launch import train, verb  # noqa: E402
from tmljax import cluster  # noqa: E402
from tmljax.config import Experiment  # noqa: E402
from tmljax.model.interaction import Definition, count  # noqa: E402
from tmljax.train.metrics import FILE, TIME, read_rows  # noqa: E402
from tmljax.train.speed import step_flops  # noqa: E402

SETTLE = 5  # steps before the measured ones


def define_flags() -> None:
    verb.define_config()
    flags.DEFINE_integer("steps", 30, "steps measured", lower_bound=3)
    flags.DEFINE_enum("start", "cold", ["cold", "warm"], "whether to begin with an empty compile cache")


class Stamp(io.StringIO):
    """Notes when the first row is shown."""

    at: float | None = None

    def write(self, text: str) -> int:
        if self.at is None:
            self.at = time.perf_counter()
        return super().write(text)


def main(argv: Sequence[str]) -> None:
    given = flags.FLAGS
    experiment = shorten(verb.experiment(), SETTLE + given.steps)
    began = time.perf_counter()
    builder.build(experiment)
    building = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        if given.start == "cold":
            os.environ[cluster.CACHE_VARIABLE] = os.path.join(folder, "cache")
        stamp = Stamp()
        train.train_workdir(experiment, os.path.join(folder, "workdir"), stamp)
        rows = read_rows(Path(folder) / "workdir" / FILE)[SETTLE:]
    start = stamp.at - BEGAN - building + interpreter_seconds()
    report = describe(given.config, experiment, rows) | {"start": given.start, "start_seconds": round(start, 1)}
    print(json.dumps(report))


def shorten(experiment: Experiment, steps: int) -> Experiment:
    """Every step a row, and nothing between them."""
    apart = dataclasses.replace(
        experiment.train, steps=steps, log_every=1, save_every=steps, eval_every=steps, eval_batches=1
    )
    return dataclasses.replace(experiment, train=apart)


def describe(name: str, experiment: Experiment, rows: list[dict]) -> dict:
    step = float(np.median([row[TIME + "step_seconds"] for row in rows]))
    model = Definition(experiment.stream, experiment.model)
    flops, peak = step_flops(experiment, model), matmul_peak(experiment.model.dtype)
    per_second = rows[0][TIME + "step_seconds"] / step
    return {
        "benchmark": "train",
        "config": name,
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "parameters": count(model.abstract()),
        "dtype": experiment.model.dtype,
        "step_seconds": round(step, 4),
        "positions_per_second": round(rows[0][TIME + "positions_per_second"] * per_second),
        "conversation_seconds_per_second": round(rows[0][TIME + "conversation_seconds_per_second"] * per_second, 1),
        "model_gflops_per_step": round(flops / 1e9, 1),
        "matmul_peak_gflops_per_second": round(peak / 1e9, 1),
        "share_of_peak": round(flops / step / peak, 3),
        "data_wait": round(float(np.mean([row[TIME + "data_wait"] for row in rows])), 4),
    }


def matmul_peak(dtype: str, size: int = 2048, times: int = 10) -> float:
    """FLOP/s of the fastest of some square products."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.dot)
    seconds = []
    for _ in range(times):
        before = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - before)
    return 2 * size**3 / min(seconds)


def interpreter_seconds() -> float:
    """From the start of the process to this module's first line, where the system tells."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        alive = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0
    return alive - (time.perf_counter() - BEGAN)


if __name__ == "__main__":
    define_flags()
    sys.exit(verb.run(main))
