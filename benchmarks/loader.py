"""Throughput of the training loader: `python -m benchmarks.loader [--config=configs/demo.py] [--workers=0]`.

Prints one JSON line. Without a config, sessions of noise of the usual length, one in eight with video, are written
to a temporary folder with the real features, so that reading, decoding, weaving and batching are all in it.
`cpu_share_at` is the share of one core that the loader takes while training consumes so many s/s.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipelines import loader, recordings
from data_pipelines.words import choose_tokenizer
from launch.verb import load_experiment
from tmljax.config import Data, Experiment
from tmljax.stream.microturn import FRAMES, MEL, MICROTURN_SECONDS
from tmljax.stream.record import Session, Word
from tmljax.stream.text import Tokenizer

WORDS = "one two three four five six seven eight nine ten".split()  # noqa: SIM905
TRAINING_RATE = 300  # s of conversation a second, about what two cores train


def make_sessions(count: int, experiment: Experiment) -> Iterator[Session]:
    stream, rng = experiment.stream, np.random.default_rng(0)
    for number in range(count):
        microturns = int(rng.integers(40, 80))
        frames = microturns * FRAMES
        moments = np.arange(0.2, microturns * MICROTURN_SECONDS - 1, 0.35)
        words = tuple(Word(WORDS[i % 10], float(moment), float(moment) + 0.3) for i, moment in enumerate(moments))
        pictures = (-(-microturns // stream.video_every), stream.video_height, stream.video_width, 3)
        yield Session(
            id=str(number),
            family="noise",
            frames=frames,
            user_dmel=rng.integers(0, 16, (frames, MEL), np.uint8),
            model_mel=rng.normal(size=(frames, MEL)).astype(np.float16),
            user_words=words[: len(words) // 2],
            model_words=words[len(words) // 2 :],
            video=rng.integers(0, 256, pictures, np.uint8) if number % 8 == 0 else None,
        )


def measure(batches: loader.Loader, count: int) -> dict[str, float]:
    """Rates over `count` batches after those that were ready, and what the main process spent on them."""
    began = time.perf_counter()
    next(batches)
    first = time.perf_counter() - began
    for _ in range(2 * loader.AHEAD):
        next(batches)
    began, spent = time.perf_counter(), time.process_time()
    examples = microturns = 0
    for _ in range(count):
        valid = next(batches)["valid"]
        examples += len(valid)
        microturns += int(valid.sum())
    wall, cpu = time.perf_counter() - began, time.process_time() - spent
    seconds = microturns * MICROTURN_SECONDS
    return {
        "first_batch_s": round(first, 3),
        "examples_per_s": round(examples / wall, 1),
        "conversation_s_per_s": round(seconds / wall, 1),
        "conversation_s_per_cpu_s": round(seconds / cpu, 1),
        f"cpu_share_at_{TRAINING_RATE}": round(TRAINING_RATE * cpu / seconds, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="read the prepared dataset of this config instead of noise")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--sessions", type=int, default=256, help="of noise")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.config:
            experiment = load_experiment(arguments.config, [])
            sources = loader.open_sources(experiment, "train")
            tokenizer = choose_tokenizer(experiment)
        else:
            experiment = Experiment(data=Data(root=folder))
            home = Path(folder) / "noise"
            recordings.store(home, experiment.stream, make_sessions(arguments.sessions, experiment))
            sources = [loader.Source("noise", 1.0, recordings.Records(home, experiment.stream, "train"))]
            tokenizer = Tokenizer.train(WORDS, experiment.stream.vocab_size)
        batches = loader.load_sources(sources, experiment, tokenizer, seed=0, workers=arguments.workers)
        line = {
            "benchmark": "loader",
            "source": arguments.config or "noise",
            "batch": experiment.data.batch,
            "window": experiment.data.window,
            "workers": arguments.workers,
            **measure(batches, arguments.batches),
        }
        batches.close()
    if arguments.workers:  # their time is theirs
        line = {name: value for name, value in line.items() if "cpu" not in name}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
