"""The processes of a run: how they find one another, agree, and leave; who speaks for them."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tmljax import pulse
from tmljax.config import UserError

CACHE_VARIABLE = "TMLJAX_CACHE"
TEXT = 1024  # bytes that a process can tell the others at a time


def initialize() -> None:
    """Joins the other processes where the environment names them; call before anything touches a device.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them outright; inside a SLURM step and on the
    workers of a TPU slice JAX reads what the scheduler left.
    """
    pulse.begin()
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is StopNotice's
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
        jax.distributed.initialize(
            num_processes=None if count is None else int(count), process_id=None if index is None else int(index)
        )
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()
    wait_for_all("here")  # before one of them does something else for long, see `compile_together`


def refuse_many(verb: str) -> None:
    """Raises UserError for what one process does, started as several. They would write the same files."""
    count = os.environ.get("JAX_NUM_PROCESSES") or os.environ.get("SLURM_STEP_NUM_TASKS") or "1"
    if count != "1":
        raise UserError(f"{verb} is the work of one process, and this is one of {count}; only training has more")


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


def tell_all(text: str) -> list[str]:
    """What each process has to say, the same list in all of them; every process must come here."""
    if process_count() == 1:
        return [text]
    padded = np.frombuffer(text.encode()[:TEXT].ljust(TEXT, b"\0"), np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(padded)]


def part() -> None:
    """Leaves the others when all have come to this place."""
    pulse.at("leaving")
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Around a whole program: one that fails ends at once.

    JAX would have it wait at exit for the others, which wait for it in the middle of a step.
    """
    try:
        yield
        code: Any = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if jax.distributed.is_initialized():  # it did not come to `part`
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of others Python lets go while it ends, and the process would die
    sys.exit(code)


def compile_together(function: Any, *arguments: Any) -> None:
    """Compiles a jitted function, in all processes before one of them runs it; its first call finds it compiled.

    At a collective of devices that have not met before, gloo waits half a minute for the others and no longer.
    """
    function.lower(*arguments).compile()
    wait_for_all("compiled")


def cache_folder() -> str:
    return os.environ.get(CACHE_VARIABLE) or os.path.join(os.path.expanduser("~"), ".cache", "tmljax")


def enable_compile_cache() -> None:
    """Compiled programs outlive the process, in ~/.cache/tmljax/xla or below $TMLJAX_CACHE."""
    jax.config.update("jax_compilation_cache_dir", os.path.join(cache_folder(), "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# Without these libtpu lets every collective along a mesh axis stand still for itself. Gathers go beneath products; sums
# that are scattered, along axes of more than one dimension of the torus, to the SparseCore, where the chip has one.
BESIDE_PRODUCTS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
}


def compiler_options(mesh: Mesh, cpu_level: int) -> dict[str, int | bool] | None:
    """For `jax.jit` of training. On TPUs collectives run beside products (LOG.md says what that did to the 276B step).

    At its highest level, 3, XLA:CPU compiles for long what then runs no faster. Measured on the demo model's training
    step: 27, 19 and 16 s of CPU at levels 3, 2 and 1, and steps of 3.7, 3.6 and 3.8 s of CPU.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "tpu":
        return dict(BESIDE_PRODUCTS) if mesh.size > 1 else None
    return {"xla_backend_optimization_level": cpu_level} if platform == "cpu" else None


_asked = threading.Lock()  # once taken, never given back: the process is leaving


def leave_when_asked() -> None:
    """SIGTERM ends this process at once, with exit code 0, wherever `StopNotice` has nothing to save: before the first
    step and after the last, too, a stop is no failure.

    A thread sees to it, for Python's own handlers wait until what the main thread called comes back: a barrier that
    never will, say, when the others were asked too and have left. It asks nothing of JAX, which may be what waits.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.signal(signal.SIGTERM, _leave)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def listen() -> None:
        while numbers := os.read(heard, 64):
            if signal.SIGTERM in numbers:
                _leave()

    threading.Thread(target=listen, name="leave when asked", daemon=True).start()


def _leave(*_: object) -> None:
    if _asked.acquire(blocking=False):
        try:
            os.write(2, b"asked to leave, with nothing to save; the same command goes on\n")
        finally:
            os._exit(0)


class StopNotice:
    """Turns SIGTERM (preemption) and the first Ctrl-C into a wish that the loop reads between steps.

    All processes stop at the same step, whichever of them was asked: after each step they `tell` one another, which
    no step waits for, and what was told with a step is read two steps later. A second Ctrl-C interrupts at once, as
    it would have without this.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # what all have agreed on
        self._own: signal.Signals | None = None
        self._told: deque[jax.Array] = deque()
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup = -1

    def tell(self) -> None:
        """After a step was dispatched; every process tells as often."""
        if process_count() > 1:
            self._told.append(_highest()(0 if self._own is None else int(self._own)))

    @property
    def wanted(self) -> bool:
        """The same in every process, and true for ever once it is."""
        if process_count() == 1:
            self.signal = self._own
        while len(self._told) > 1:  # the last belongs to a step that is still running
            agreed = int(jax.device_get(self._told.popleft()))
            self.signal = self.signal or (signal.Signals(agreed) if agreed else None)
        return self.signal is not None

    def __enter__(self) -> Self:
        self._wakeup = signal.set_wakeup_fd(-1)  # the thread that leaves when asked hears of no signal that comes here
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._own is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._own = signal.Signals(number)
        if number == signal.SIGINT and is_lead():
            os.write(2, b"\nfinishing the step and saving; Ctrl-C again leaves at once\n")


@functools.cache
def _highest() -> Callable[[int], jax.Array]:
    """A function to the highest of the numbers that the processes call it with, an array that is there later."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    one_each, same = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    highest = jax.jit(jnp.max, out_shardings=same)

    def post(number: int) -> jax.Array:
        mine = np.full(jax.local_device_count(), number, np.int32)
        with jax.transfer_guard("allow"):
            return highest(jax.make_array_from_process_local_data(one_each, mine))

    return post
