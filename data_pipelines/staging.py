"""Shards as files: rendered by worker processes, each renamed into place when whole.

NAME.json beside NAME.array_record is the sign that the shard is whole, and says what is in it.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from data_pipelines import records
from data_pipelines.plan import Shard, render_shard
from data_pipelines.voices import Voices
from tmljax import files
from tmljax.config import Experiment
from tmljax.stream.record import Session


def is_whole(shard: Shard, staging: Path) -> bool:
    return (staging / f"{shard.name}.json").exists()


def read_summary(shard: Shard, staging: Path) -> dict[str, dict[str, Any]]:
    """sessions and seconds by family, and how often each word is said."""
    return json.loads((staging / f"{shard.name}.json").read_text())


def render_all(
    experiment: Experiment, missing: Sequence[Shard], staging: Path, workers: int
) -> Iterator[tuple[Shard, float]]:
    """Each shard as it is done, with its seconds of conversation."""
    if workers <= 1:
        for shard in missing:
            yield shard, render_to_file(experiment, shard, staging)
        return
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_worker
    ) as pool:
        waiting = {pool.submit(render_to_file, experiment, shard, staging): shard for shard in missing}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BaseException:
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            raise


def _prepare_worker() -> None:
    """Ctrl-C is the parent's to handle; a worker ends when the parent does, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@functools.cache
def voices() -> Voices:
    return Voices()


def render_to_file(experiment: Experiment, shard: Shard, staging: Path) -> float:
    """Renders one shard to staging/NAME.array_record and, as the sign that it is whole, NAME.json."""
    seconds: Counter[str] = Counter()
    sessions: Counter[str] = Counter()
    words: Counter[str] = Counter()

    def rendered() -> Iterator[Session]:
        for session in render_shard(experiment, shard, voices()):
            seconds[session.family] += session.frames / 40
            sessions[session.family] += 1
            words.update(w.text for w in (*session.user_words, *session.model_words, *session.typed))
            yield session

    records.write(staging / f"{shard.name}.array_record", rendered(), experiment.stream)
    summary = {"sessions": dict(sessions), "seconds": dict(seconds), "words": dict(sorted(words.items()))}
    files.write_text(staging / f"{shard.name}.json", json.dumps(summary))
    return sum(seconds.values())
