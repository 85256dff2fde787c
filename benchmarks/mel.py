"""Throughput of the dMel front end on one thread: `python -m benchmarks.mel [--seconds 30] [--repeats 9]`.

Prints one JSON line. `whole` takes the recording in one call, `chunked` as 200 ms micro-turns with carried
state, which is what the decoder does; `quantise` is included in neither. Neither uses a second thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from tmljax.stream import dmel
from tmljax.stream.microturn import MICROTURN_SAMPLES, SAMPLE_RATE


def whole(samples: np.ndarray) -> None:
    dmel.log_mel(samples)


def chunked(samples: np.ndarray) -> None:
    state = dmel.MelState()
    for chunk in samples.reshape(-1, MICROTURN_SAMPLES):
        _, state = dmel.log_mel(chunk, state)


def measure(transform, samples: np.ndarray, repeats: int) -> list[float]:
    """Seconds of each repeat, after a warm-up."""
    transform(samples)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        transform(samples)
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the recording")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    microturns = max(round(arguments.seconds * SAMPLE_RATE / MICROTURN_SAMPLES), 1)
    samples = np.random.default_rng(0).normal(size=microturns * MICROTURN_SAMPLES).astype(np.float32) * 0.1
    seconds = len(samples) / SAMPLE_RATE
    line = {"benchmark": "mel", "seconds": seconds, "repeats": arguments.repeats, "threads": 1}
    for transform in (whole, chunked):
        times = measure(transform, samples, arguments.repeats)
        line[f"{transform.__name__}_audio_s_per_s"] = round(seconds / statistics.median(times), 1)
        line[f"{transform.__name__}_audio_s_per_s_min"] = round(seconds / max(times), 1)
        line[f"{transform.__name__}_audio_s_per_s_max"] = round(seconds / min(times), 1)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
