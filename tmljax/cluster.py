"""The processes of a run: how they find one another, who speaks for them, and when they are asked to stop."""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

CACHE_VARIABLE = "TMLJAX_CACHE"


def initialize() -> None:
    """Joins the other processes where the environment names them; call before anything touches a device.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them outright; inside a SLURM step and on the
    workers of a TPU slice JAX reads what the scheduler left.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
        jax.distributed.initialize(
            num_processes=None if count is None else int(count), process_id=None if index is None else int(index)
        )
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def process_index() -> int:
    """Touches no device where there is one process, so that data may be built by worker processes before training."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def process_count() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_lead() -> bool:
    """Whether this process writes what exists once: logs, metrics, config."""
    return process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come to this place."""
    if process_count() > 1:
        multihost_utils.sync_global_devices(name)


def cache_folder() -> str:
    return os.environ.get(CACHE_VARIABLE) or os.path.join(os.path.expanduser("~"), ".cache", "tmljax")


def enable_compile_cache() -> None:
    """Compiled programs outlive the process, in ~/.cache/tmljax/xla or below $TMLJAX_CACHE."""
    jax.config.update("jax_compilation_cache_dir", os.path.join(cache_folder(), "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# Of glibc's mallopt: no memory of its own for a large block, none given back, one pool for all threads.
_M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -4, -1, -8


def keep_memory() -> None:
    """Keeps what a step on the CPU needs until the next one; call before anything starts threads.

    XLA:CPU asks malloc for a step's temporaries and frees them at its end. By default they go back to the system,
    which hands them out again page by page, zeroed: a tenth of the demo model's training step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)):
            libc.mallopt(option, value)


def compiler_options(mesh: Mesh, cpu_level: int) -> dict[str, int] | None:
    """For `jax.jit`. At its highest level, 3, XLA:CPU compiles for long what then runs no faster.

    Measured on the demo model's training step: 27, 19 and 16 s of CPU at levels 3, 2 and 1, and steps of 3.7, 3.6 and
    3.8 s of CPU.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return {"xla_backend_optimization_level": cpu_level} if on_cpu else None


class StopNotice:
    """Turns SIGTERM (preemption) and the first Ctrl-C into a wish that the loop reads between steps.

    A second Ctrl-C interrupts at once, as it would have without this.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    @property
    def wanted(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            os.write(2, b"\nfinishing the step and saving; Ctrl-C again leaves at once\n")
