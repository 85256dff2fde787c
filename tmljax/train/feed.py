"""Batches, read ahead on the host, and moved to the devices while the step before them runs: no more than two are there
at a time, that of the step and the next."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

DEPTH = 2  # batches that wait on the host
LOOK = 0.01  # seconds between looks at whether the devices are still busy


class Source(Protocol):
    """An endless iterator over this process's rows of each batch; `data_pipelines.loader.Loader` is one."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Read(NamedTuple):
    batch: dict[str, np.ndarray]
    state: Any  # of the source once this batch is taken


class Fed(NamedTuple):
    batch: dict[str, jax.Array]
    state: Any  # of the source once this batch is taken
    waited: float  # seconds that the devices stood still for it


class Feed:
    """Reads ahead in a thread. The source belongs to it until `close`."""

    def __init__(self, source: Source, sharding: NamedSharding):
        self._source, self._sharding = source, sharding
        self._queue: queue.Queue[Read | BaseException] = queue.Queue(DEPTH)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, name="feed", daemon=True)
        self._thread.start()

    def next(self, busy: Callable[[], bool] = lambda: False) -> Fed:
        """Nobody stands still while the devices are `busy`. Raises what the source raised."""
        idle_since = time.perf_counter()
        while True:
            working = busy()
            try:
                read = self._queue.get(timeout=LOOK if working else None)
            except queue.Empty:
                idle_since = time.perf_counter()
                continue
            if isinstance(read, BaseException):
                raise read
            batch = to_devices(read.batch, self._sharding)
            return Fed(batch, read.state, 0.0 if working else time.perf_counter() - idle_since)

    def close(self) -> None:
        self._ended.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _read(self) -> None:
        try:
            while not self._ended.is_set():
                batch = next(self._source)
                self._queue.put(Read(batch, self._source.get_state()))
        except BaseException as e:
            self._queue.put(e)


def to_devices(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows as part of the global batch."""
    with jax.transfer_guard("allow"):  # of several processes JAX takes this for a transfer that nobody asked for
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
