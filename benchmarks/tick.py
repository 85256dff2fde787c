"""Latency of the streaming decoder, one JSON line a case. Close other programs first.

    python -m benchmarks.tick [--config=configs/demo.py | --workdir=DIR] [--sessions=1,8,32] [--minutes=60]

Case "batch": time of a tick, its results fetched to the host, with every session slot in use, and of the
vocoders on top. Case "flat": one session from its first minute to its last; medians and resident memory of both.
Without --workdir the weights are random, and such a model never pauses: the flow head and the vocoder work in
every micro-turn, which is the most a tick can cost ("speaking" reports the share).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from absl import flags
from tqdm import trange

from launch import verb
from tmljax.config import Experiment, UserError
from tmljax.decode.engine import Engine
from tmljax.decode.program import engine_from_params, engine_from_workdir
from tmljax.decode.session import Chunk, Live
from tmljax.model.interaction import Definition, Params
from tmljax.stream.microturn import IDLE, MICROTURN_SAMPLES, MICROTURN_SECONDS
from tmljax.stream.text import Tokenizer

MINUTE = round(60 / MICROTURN_SECONDS)  # ticks


def define_flags() -> None:
    flags.DEFINE_string("config", "configs/demo.py", "config file, for random weights")
    flags.DEFINE_multi_string("config_field", [], "GROUP.FIELD=VALUE override of the config")
    flags.DEFINE_string("workdir", None, "trained weights instead of random ones")
    flags.DEFINE_list("sessions", ["1", "8", "32"], "session slots, a case each")
    flags.DEFINE_integer("ticks", 300, "ticks measured in each case", lower_bound=2)
    flags.DEFINE_integer("warm", 30, "ticks before them", lower_bound=0)
    flags.DEFINE_float("minutes", 60, "of the one session of case flat; 0 leaves it out", lower_bound=0)


def main(argv: Sequence[str]) -> None:
    given = flags.FLAGS
    if given.workdir:
        make = partial(engine_from_workdir, given.workdir)
    else:
        experiment = verb.load_experiment(given.config, given.config_field)
        make = partial(random_engine, experiment, draw_params(experiment))
    for sessions in given.sessions:
        if not sessions.isdigit() or int(sessions) < 1:
            raise UserError(f"--sessions={sessions} must be whole numbers from 1, as in --sessions=1,8,32")
    for sessions in map(int, given.sessions):
        emit(batch(make(sessions), given.ticks, given.warm))
    if given.minutes:
        emit(flat(make(1), round(given.minutes * MINUTE)))


def draw_params(experiment: Experiment) -> Params:
    """Well-scaled random weights."""
    numbers = np.random.default_rng(0).standard_normal(2**20 + 1, np.float32)  # again and again: drawing takes minutes

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else 1
        return (np.resize(numbers, leaf.shape) / np.float32(np.sqrt(fan_in))).astype(leaf.dtype, copy=False)

    return jax.tree.map(draw, Definition(experiment.stream, experiment.model).abstract())


def random_engine(experiment: Experiment, params: Params, sessions: int) -> Engine:
    """With a tokenizer that knows nothing: as fast or slow as a trained one."""
    return engine_from_params(experiment, Tokenizer.train([], experiment.stream.vocab_size), params, sessions)


class Talk:
    """Every slot in use; noise with the loudness of speech comes in."""

    def __init__(self, engine: Engine):
        self.live, self.sessions = Live(engine), engine.sessions
        self.noise = (np.random.default_rng(1).standard_normal(64 * MICROTURN_SAMPLES) * 0.05).astype(np.float32)
        for seed in range(engine.sessions):
            self.live.open(seed)
        self.ticks = self.spoke = 0

    def tick(self) -> tuple[float, float, float]:
        """(tick, all vocoders, everything) in ms."""
        chunks = {}
        for n in range(self.sessions):
            at = (self.ticks + n) % 64 * MICROTURN_SAMPLES
            chunks[n] = Chunk(self.noise[at : at + MICROTURN_SAMPLES])
        begin = time.perf_counter()
        spoken = self.live.step(chunks).values()
        whole_ms = 1e3 * (time.perf_counter() - begin)
        self.ticks += 1
        self.spoke += sum(bool((one.text != IDLE).any()) for one in spoken)
        return max(one.tick_ms for one in spoken), max(one.vocoder_ms for one in spoken), whole_ms

    @property
    def speaking(self) -> float:
        return round(self.spoke / (self.ticks * self.sessions), 3)


def batch(engine: Engine, ticks: int, warm: int) -> dict:
    talk = Talk(engine)
    measured = np.array([talk.tick() for _ in range(warm + ticks)])[warm:]
    tick_ms, vocoder_ms, whole_ms = measured.T
    return {
        "case": "batch",
        "sessions": engine.sessions,
        "ticks": ticks,
        "tick_ms": percentiles(tick_ms),
        "vocoder_ms_per_session": percentiles(vocoder_ms / engine.sessions),
        "whole_ms": percentiles(whole_ms),  # features, tick and vocoders of all sessions
        "sessions_in_real_time": round(1e3 * MICROTURN_SECONDS / float(np.median(whole_ms)) * engine.sessions, 1),
        "speaking": talk.speaking,
        **about(),
    }


def flat(engine: Engine, ticks: int) -> dict:
    """Does a session slow down or grow as it gets older?"""
    talk, minute = Talk(engine), min(MINUTE, ticks // 2)
    measured = np.empty((ticks, 3))
    memory = []
    for t in trange(ticks, unit="tick", mininterval=2.0):
        measured[t] = talk.tick()
        if t in (minute - 1, ticks - 1):
            memory.append(resident_mib())
    first, last = measured[:minute], measured[-minute:]
    return {
        "case": "flat",
        "minutes": round(ticks / MINUTE, 2),
        "tick_ms_first_minute": percentiles(first[:, 0]),
        "tick_ms_last_minute": percentiles(last[:, 0]),
        "vocoder_ms_first_minute": percentiles(first[:, 1]),
        "vocoder_ms_last_minute": percentiles(last[:, 1]),
        "last_over_first": round(float(np.median(last[:, 2]) / np.median(first[:, 2])), 3),
        "resident_mib_first_minute": memory[0],
        "resident_mib_last_minute": memory[-1],
        "speaking": talk.speaking,
        **about(),
    }


def percentiles(ms: np.ndarray) -> dict[str, float]:
    return {"p50": round(float(np.median(ms)), 3), "p99": round(float(np.percentile(ms, 99)), 3)}


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return round(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def about() -> dict:
    """What the numbers were taken on, and what else the machine was doing."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "load1": round(os.getloadavg()[0], 2),
        "jax": jax.__version__,
    }


def emit(line: dict) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    define_flags()
    sys.exit(verb.run(main))
