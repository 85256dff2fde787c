"""Starts N processes on this machine as if they were N hosts, and sees them through.

    python -m launch.local --hosts=2 --devices-per-host=4 [--max-restarts=N] -- COMMAND...

COMMAND is what would run on one machine, `python -m launch.train --config=... --workdir=...` say. Each host has CPU
devices of its own and finds the others over a free port. What they print is prefixed by the host. When one fails, or
hangs, all are ended, and started again as often as --max-restarts allows, which is never by default: training goes on
from its last checkpoint. Ctrl-C and SIGTERM are handed on to every host, which save and leave; Ctrl-C again ends them
at once. Hosts that saved and left, because one of them got SIGTERM say, succeeded: the run ends with 0, and the same
command goes on from there. However this program ends, no host outlives it.

Exit code: 0 when all hosts succeeded, 2 for a mistake that starting again would not mend, 124 when a host hung, 130
after Ctrl-C, else that of the host which failed first, 128 + n for one that signal n ended.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

from absl import flags

from launch import starter
from tmljax import pulse
from tmljax.config import UserError
from tmljax.terminal import Terminal

HUNG = 124  # exit code, as of timeout(1)
LOOK = 0.2  # seconds between looks at what does not announce itself
QUIET = 5.0  # seconds between two states of a progress bar that are passed on
GLOO = re.compile(r"\[Gloo\] Rank|number of connected peer ranks is : \d+\s*$")  # what it says when all is well
HOLD = 0.2  # seconds that output waits, to be dropped if it only is the echo of another host's failure
DRAIN = 10.0  # seconds that the last output of ended hosts may take
GUARD = ("sh", "-c", "read _; kill -KILL 0")  # ends its process group when the pipe that it reads is closed


def define_flags() -> None:
    flags.DEFINE_integer("hosts", None, "processes to start", required=True, lower_bound=1)
    flags.DEFINE_integer("devices-per-host", 1, "simulated CPU devices of each", lower_bound=1)
    flags.DEFINE_integer(
        "max-restarts", 0, "how often all are started again after a failure; with 0 one ends the run", lower_bound=0
    )
    flags.DEFINE_float(
        "hang-seconds",
        300.0,
        "a host that gives no sign of life, or stays at one step, for so long has failed",
        lower_bound=1.0,
    )
    flags.DEFINE_float(
        "stall-seconds",
        3600.0,
        "as long may saving, restoring, evaluating, compiling or building data take without getting on",
        lower_bound=1.0,
    )


class Options(NamedTuple):
    command: tuple[str, ...]
    hosts: int
    devices: int = 1
    restarts: int = 0
    hang_seconds: float = 300.0
    stall_seconds: float = 3600.0


class Failure(NamedTuple):
    code: int
    cause: str


def main(argv: Sequence[str]) -> int:
    command = tuple(sys.argv[sys.argv.index("--") + 1 :]) if "--" in sys.argv else ()
    if not command:
        raise UserError("there is nothing to run: end with -- python -m launch.train --config=... --workdir=...")
    given = flags.FLAGS
    return supervise(
        Options(
            command,
            given.hosts,
            given["devices-per-host"].value,
            given["max-restarts"].value,
            given["hang-seconds"].value,
            given["stall-seconds"].value,
        )
    )


def supervise(options: Options) -> int:
    """The verb; returns the exit code."""
    with Asked() as asked:
        for restart in range(options.restarts + 1):
            with Job(options) as job:
                failure = job.watch(asked)
            if asked.signal is signal.SIGINT:
                return 130
            if failure is None:
                return 0
            if failure.code == starter.MISTAKE:  # the host has said what is wrong
                return failure.code
            if asked.signal is not None or restart == options.restarts:
                Terminal(sys.stderr).say(f"error: {failure.cause}; all hosts were ended")
                return failure.code
            starter.say(f"{failure.cause}; all hosts start again ({restart + 1} of {options.restarts})")
    raise AssertionError("unreachable")


class Asked:
    """What the user or the scheduler asked for: the first signal, and how often."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.times = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Asked:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.signal = signal.Signals(number)
        self.times += 1


class Host:
    """One process, what it prints, and its signs of life."""

    def __init__(self, index: int, process: subprocess.Popen[bytes], signs: int):
        self.index, self.process = index, process
        self.began = self.heard = time.time()
        self.sign: pulse.Sign | None = None
        self.muted = False
        self._signs = os.fdopen(signs, "rb")
        streams = ((process.stdout, Terminal(sys.stdout)), (process.stderr, Terminal(sys.stderr)))
        self._threads = [
            threading.Thread(target=self._pass_on, args=(source, out), daemon=True) for source, out in streams
        ]
        for thread in (*self._threads, threading.Thread(target=self._listen, daemon=True)):
            thread.start()

    def _listen(self) -> None:
        with self._signs:
            for line in self._signs:
                with contextlib.suppress(ValueError, TypeError):  # cut short by its end
                    self.sign, self.heard = pulse.Sign.from_line(line), time.time()

    def _pass_on(self, source: IO[bytes], out: Terminal) -> None:
        """Line by line, so that lines of two hosts do not mix; of a progress bar a state now and then."""
        last = 0.0
        for line in pieces(source):
            if self.muted or GLOO.search(line) or not line.strip():
                continue
            if line.endswith("\r"):
                if time.monotonic() - last < QUIET:
                    continue
                last = time.monotonic()
            text = line.strip("\r\n")
            out.say(f"host {self.index} | {text}")

    def finish_output(self) -> None:
        for thread in self._threads:
            thread.join(DRAIN)


class Job:
    """One start of all hosts, in a process group that a guard ends when this process does."""

    def __init__(self, options: Options):
        self._options = options
        self._hosts: list[Host] = []
        self._ended: queue.Queue[Host] = queue.Queue()  # in the order of their ends

    def __enter__(self) -> Job:
        self._guard = subprocess.Popen(GUARD, stdin=subprocess.PIPE, process_group=0)
        try:
            port = free_port()
            self._hosts = [self._start(index, port) for index in range(self._options.hosts)]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.wait()
        self._guard.stdin.close()
        for host in self._hosts:
            host.process.wait()
            host.finish_output()

    def _start(self, index: int, port: int) -> Host:
        signs, theirs = os.pipe()
        try:
            process = subprocess.Popen(
                self._options.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=self._guard.pid,
                pass_fds=(theirs,),
                env=os.environ | environment(self._options, index, port) | {pulse.VARIABLE: str(theirs)},
            )
        except OSError as e:
            os.close(signs)
            raise UserError(f"cannot start {shlex.join(self._options.command)}: {e.strerror}") from None
        finally:
            os.close(theirs)
        host = Host(index, process, signs)
        threading.Thread(target=self._await, args=(host,), daemon=True).start()
        return host

    def _await(self, host: Host) -> None:
        host.process.wait()
        self._ended.put(host)

    def watch(self, asked: Asked) -> Failure | None:
        """Until all hosts have succeeded, or one has failed or hangs."""
        left, told = len(self._hosts), 0
        while left:
            if asked.times > told:
                told = asked.times
                if told > 1 and asked.signal is signal.SIGINT:
                    return Failure(130, "interrupted")
                self._hand_on(asked.signal)
            with contextlib.suppress(queue.Empty):
                host = self._ended.get(timeout=LOOK)
                left -= 1
                code = host.process.returncode
                if code and not (code == 130 and asked.signal is signal.SIGINT):
                    return self._failure(host)
            if hung := self._hung():
                return hung
        return None

    def _hand_on(self, number: signal.Signals | None) -> None:
        for host in self._hosts:
            if number is not None and host.process.poll() is None:
                host.process.send_signal(number)

    def _blame(self, host: Host) -> None:
        """What the others say from now on is only the echo."""
        for other in self._hosts:
            other.muted = other is not host

    def _failure(self, host: Host) -> Failure:
        self._blame(host)
        code = host.process.returncode
        if code > 0:
            how, code = f"ended with exit code {code}", code
        else:
            how, code = f"was ended by {signal.Signals(-code).name}", 128 - code
        where = f", last heard of at {host.sign.place}" if host.sign is not None else ""
        silent = [other for other in self._running() if other is not host and time.time() - other.heard > 10]
        also = f"; host {silent[0].index} had been silent since {at(silent[0].heard)}" if silent else ""
        return Failure(code, f"host {host.index} {how}{where}{also}")

    def _running(self) -> list[Host]:
        """Those still there, where this command gives signs of life at all."""
        signing = any(host.sign is not None for host in self._hosts)
        return [host for host in self._hosts if signing and host.process.poll() is None]

    def _hung(self) -> Failure | None:
        """The host that is silent; where none is but all stay for too long, the one that keeps the others waiting."""
        now, most, running = time.time(), self._options.hang_seconds, self._running()
        for host in running:
            if now - host.heard > most:
                self._blame(host)
                place = f", then at {host.sign.place}" if host.sign is not None else ""
                silent = f"it has given no sign of life since {at(host.heard)}{place}"
                return Failure(HUNG, f"host {host.index} hangs: {silent}")
        signs = [(host.sign, host) for host in running if host.sign is not None]
        if not signs or len(signs) < len(running) or not all(self._stays(sign, now) for sign, _ in signs):
            return None
        sign, host = min(signs, key=lambda pair: pair[0].order)
        self._blame(host)
        who = f"host {host.index} hangs: it has"
        if not sign.hurried and len({sign.place for sign, _ in signs}) == 1:
            who = f"one of {len(signs)} hosts hangs: all have"
        return Failure(HUNG, f"{who} been at {sign.place} since {at(sign.since)}")

    def _stays(self, sign: pulse.Sign, now: float) -> bool:
        return now - sign.since > (self._options.hang_seconds if sign.hurried else self._options.stall_seconds)


def environment(options: Options, index: int, port: int) -> dict[str, str]:
    """What makes a process one of several hosts (tmljax/cluster.py), with devices of its own."""
    others = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(options.hosts),
        "JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"{others} --xla_force_host_platform_device_count={options.devices}".strip(),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pieces(source: IO[bytes]) -> Iterator[str]:
    """What ends in a line feed or a carriage return; the rest at the end."""
    rest = b""
    while read := os.read(source.fileno(), 1 << 16):
        time.sleep(HOLD)
        *whole, rest = re.split(rb"(?<=[\r\n])", rest + read)
        yield from (part.decode(errors="replace") for part in whole)
    if rest:
        yield rest.decode(errors="replace")


def at(when: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(when))


if __name__ == "__main__":
    define_flags()
    code = starter.run(main)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all hosts have ended
    sys.exit(code)
