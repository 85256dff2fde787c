"""Trains on machines reached by ssh, one process each; what they say comes back with the host's name before it.

    python -m launch.ssh --hosts=ada,grace,me@alan --folder=/shared/tmljax \\
        -- .venv/bin/python -m launch.train --config=configs/demo.py --workdir=/shared/runs/demo

The repository lies in --folder on each of them, installed, and they let this machine in without a password. The
workdir and config.data.root lie on a disk that all of them see. When one fails, or this machine is lost, all are asked
to stop and save; then all are started again. Ctrl-C stops them and ends it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from launch import starter
from tmljax.config import UserError
from tmljax.terminal import Terminal

HOST = re.compile(r"([\w.][\w.-]*@)?\w[\w.-]*")
OPTIONS = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")


def define_flags() -> None:
    flags.DEFINE_list("hosts", None, "separated by commas, each HOST or USER@HOST; the others must reach the first")
    flags.mark_flag_as_required("hosts")
    flags.DEFINE_string("folder", None, "the repository on each host", required=True)
    told = "of the first host, where the processes find one another"
    flags.DEFINE_integer("port", starter.PORT, told, lower_bound=1, upper_bound=65535)
    flags.DEFINE_integer("grace", 120, "seconds to save in when asked to stop", lower_bound=0)
    flags.DEFINE_integer("restarts", 10, "how often a training that fails is started again", lower_bound=0)
    flags.DEFINE_float("pause", 10.0, "seconds before it is started again", lower_bound=0)
    flags.DEFINE_bool("dry-run", False, starter.DRY_RUN)


class Remote(NamedTuple):
    """One host, and what is started on it."""

    host: str
    words: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    command, given = starter.command(), flags.FLAGS
    hosts = [host.strip() for host in given.hosts if host.strip()]
    if not hosts or len(set(hosts)) < len(hosts):
        raise UserError(f"--hosts={','.join(given.hosts)} must name each host once")
    for host in hosts:
        if not HOST.fullmatch(host):
            raise UserError(f"--hosts: {host} is neither HOST nor USER@HOST; a port of ssh goes to ~/.ssh/config")
    shell = starter.Shell.of_flags()
    address = f"{hosts[0].rpartition('@')[2]}:{given.port}"
    remotes = []
    for index, host in enumerate(hosts):
        before = [*process(address, len(hosts), index), "bash", "launch/ssh.sh", str(given.grace)]
        remotes.append(remote(host, given.folder, before, command))
    finished = remote(hosts[0], given.folder, [], command, "launch.finished")

    def attempt() -> int:
        code = supervise(remotes, given.grace) if not shell.dry else max(shell.run(*r.words) for r in remotes)
        return code or shell.run(*finished.words)

    return starter.persevere(attempt, given.restarts, given.pause)


def process(address: str, count: int | str, index: int | None = None) -> list[str]:
    """What tells a process of the others (tmljax/cluster.py); without `index` JAX asks the machine for it."""
    named = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": index}
    return ["env", *(f"{name}={value}" for name, value in named.items() if value is not None)]


def remote(
    host: str, folder: str, before: Sequence[str], command: starter.Command, module: str = "launch.train"
) -> Remote:
    text = f"cd {shlex.quote(folder)} && exec {shlex.join([*before, *command.words(module)])}"
    return Remote(host, ("ssh", *OPTIONS, host, text))


def supervise(remotes: Sequence[Remote], grace: float) -> int:
    """Runs them all to their end; 0, or the exit code of the first that failed, upon which the others are stopped."""
    running: list[Running] = []
    try:
        for one in remotes:
            running.append(start(one))
        while True:
            codes = [one.process.poll() for one in running]
            failed = next((index for index, code in enumerate(codes) if code), None)
            if failed is not None:
                starter.say(f"{remotes[failed].host} {what(codes[failed])}; all are stopped")
                return codes[failed]
            if None not in codes:
                return 0
            time.sleep(0.05)
    finally:
        stop(running, grace)


def what(code: int) -> str:
    """What befell the host that ssh left with this exit code."""
    return "cannot be reached, or its connection was lost" if code == starter.LOST else f"ended with exit code {code}"


class Running(NamedTuple):
    process: subprocess.Popen[bytes]
    relay: threading.Thread  # prints what it says


def start(one: Remote) -> Running:
    try:  # in a session of its own: Ctrl-C is ours to handle
        process = subprocess.Popen(
            one.words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise starter.missing(one.words[0]) from None

    def relay() -> None:
        out = Terminal(sys.stdout)
        for line in process.stdout:
            out.say(f"[{one.host}] {line.decode(errors='replace').rstrip()}")

    running = Running(process, threading.Thread(target=relay, daemon=True))
    running.relay.start()
    return running


def stop(running: Sequence[Running], grace: float) -> None:
    """The end of standard input asks the far side to stop (launch/ssh.sh); who does not in time is cut off."""
    for process, _ in running:
        process.stdin.close()
    deadline = time.monotonic() + grace + 10
    for process, relay in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
        relay.join(timeout=5)


if __name__ == "__main__":
    define_flags()
    sys.exit(starter.run(main))
