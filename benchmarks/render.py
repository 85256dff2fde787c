"""Speed of data generation on one core: `python -m benchmarks.render [--sessions 300] [--config=configs/demo.py]`.

Prints one JSON line, in seconds of conversation per second of one core's time: `rate` from nothing to the
records on disk (voices, mixing, features, frames, serialisation), `score_rate` for voices and scores alone, and
the share of each part. What was spoken before is forgotten first, so that nothing comes from memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipelines import plan, staging
from data_pipelines.scenarios import FAMILIES
from data_pipelines.scenarios.stage import Stage
from data_pipelines.voices import Voices
from launch.verb import load_experiment
from tmljax.config import Experiment


def compose(experiment: Experiment, sessions: int) -> tuple[float, float]:
    """Core seconds and seconds of conversation of composing scores, utterances included."""
    voices, rng = Voices(), np.random.default_rng(0)
    shares = plan.mixture(experiment)
    families = rng.choice(list(shares), sessions, p=list(shares.values()))
    start, seconds = time.process_time(), 0.0
    for family in families:
        seconds += FAMILIES[family][0](Stage(rng, "train", experiment.stream, voices)).seconds
    return time.process_time() - start, seconds


def write(experiment: Experiment, sessions: int, folder: Path) -> tuple[float, float]:
    """The same for whole shards of records."""
    staging.voices.cache_clear()
    start, seconds = time.process_time(), 0.0
    for first in range(0, sessions, plan.SHARD):
        shard = plan.Shard("train", first // plan.SHARD, first, min(plan.SHARD, sessions - first))
        seconds += staging.render_to_file(experiment, shard, folder)
    return time.process_time() - start, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=300)
    parser.add_argument("--config", default="")
    options = parser.parse_args()
    experiment = load_experiment(options.config) if options.config else Experiment()
    with tempfile.TemporaryDirectory() as folder:
        write(experiment, 8, Path(folder))  # rooms, noises and filters are made once
        composing, composed = compose(experiment, options.sessions)
        writing, written = write(experiment, options.sessions, Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).glob("train-*.array_record"))
    result = {
        "benchmark": "render",
        "sessions": options.sessions,
        "seconds": round(written, 1),
        "rate": round(written / writing),
        "score_rate": round(composed / composing),
        "score_share": round(composing / composed * written / writing, 3),
        "bytes_per_second": round(size / written),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
