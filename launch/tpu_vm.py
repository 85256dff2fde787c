"""Trains on a TPU VM slice: makes it, copies this repository, trains on all workers, and again after a preemption.

    python -m launch.tpu_vm --name=demo --zone=us-east5-a --type=v5p-32 --version=v2-alpha-tpuv5 --create=--spot \\
        --setup="bash workers.sh" --python=python3.12 \\
        -- .venv/bin/python -m launch.train --config=configs/demo.py --workdir=/mnt/shared/demo \\
        --config.data.root=/mnt/shared/data

What git would track here is copied to ~/tmljax of every worker; --setup runs there; then --python, 3.11 or newer, makes
the environment .venv and installs the repository with the extra `tpu`. The workdir and config.data.root lie on a disk
that all workers see. A workers.sh for images whose python3 is 3.10, with a disk of NFS:

    set -e
    sudo add-apt-repository -y ppa:deadsnakes/ppa
    sudo apt-get install -y python3.12-venv nfs-common
    sudo mkdir -p /mnt/shared
    mountpoint -q /mnt/shared || sudo mount -t nfs SERVER:/shared /mnt/shared

It runs again where what comes after it failed. The training outlives this command, which follows it: Ctrl-C leaves it
running, and the same command follows it again. The slice stays when it is done.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from launch import starter, verb
from launch.ssh import process
from tmljax.config import UserError

GONE = {"PREEMPTED", "TERMINATED"}  # of the states of a slice, those that none comes back from
PASSING = {"CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING", "STOPPING", "DELETING", "HIDING", "UNHIDING"}

FOLDER = "tmljax"  # in the home of each worker
ARCHIVE = f"{FOLDER}.tar.gz"
INSTALLED = ".venv/.installed"  # the sign that all of this came to its end
INSTALL = ".venv/bin/pip install --quiet --constraint constraints.txt --editable '.[tpu]'"
NEEDED = (3, 11)  # of Python, as in pyproject.toml
OLDER = 78  # exit code of a worker whose Python is older


def define_flags() -> None:
    flags.DEFINE_string("name", None, "of the TPU VM", required=True)
    flags.DEFINE_string("zone", None, "of Google Cloud", required=True)
    flags.DEFINE_string("type", None, "accelerator type, v5p-32 say", required=True)
    flags.DEFINE_string("version", None, "runtime version, v2-alpha-tpuv5 say", required=True)
    flags.DEFINE_string("create", "", "more options for its creation: --spot, --network=..., --project=...")
    flags.DEFINE_string("setup", "", "shell command for each worker of a new slice, before the installation")
    flags.DEFINE_string("python", "python3", "of the workers, 3.11 or newer, as their shell finds it")
    flags.DEFINE_integer("grace", 120, "seconds to save in when asked to stop", lower_bound=1)
    flags.DEFINE_integer("restarts", 10, "how often a training that fails is started again", lower_bound=0)
    flags.DEFINE_float("pause", 30.0, "seconds before it is started again", lower_bound=0)
    flags.DEFINE_bool("renew", False, "copy and install this repository again where the slice has it already")
    flags.DEFINE_bool("dry-run", False, starter.DRY_RUN)


def main(argv: Sequence[str]) -> int:
    command, given = starter.command(), flags.FLAGS
    verb.words_of("create")
    check_folders(command)
    tpu = TpuVm(starter.Shell.of_flags(), given.name, given.zone)
    began = False
    tpu.shell.check("gcloud", "compute", "tpus", "tpu-vm", "list", f"--zone={given.zone}", "--format=none")

    def attempt() -> int:
        nonlocal began
        code = prepare(tpu)
        if code == 0:
            began, code = True, train(tpu, command, given.grace)
        if began and code not in (0, starter.AGAIN, starter.MISTAKE) and tpu.look()[0] != "READY":
            return starter.AGAIN  # a slice that was taken away is no failure, nor is one that cannot be had just now
        return code

    code = starter.persevere(attempt, given.restarts, given.pause)
    delete = shlex.join(tpu.words("delete"))
    starter.say(f"{given.name} still exists, and costs; when you have what you need: {delete}")
    return code


def check_folders(command: starter.Command) -> None:
    """Raises UserError where what must outlive a slice would lie in the home of its workers."""
    for name, path in (("workdir", command.workdir), ("config.data.root", command.experiment.data.root)):
        if not path.startswith("/"):
            raise UserError(
                f"--{name}={path} behind -- would be another folder on each worker, and go with it; name one of a disk "
                f"that all workers see: --{name}=/..."
            )


def train(tpu: TpuVm, command: starter.Command, grace: int) -> int:
    """Follows the training of a slice, which is started where there is none; returns its exit code."""
    _, addresses = tpu.look()
    if not addresses:
        return starter.LOST
    told = process(f"{addresses[0]}:{starter.PORT}", len(addresses))
    code = tpu.on_workers("all", ["bash", "launch/tpu_vm.sh", "start", *told, *command.words()])
    code = code or tpu.on_workers("0", ["bash", "launch/tpu_vm.sh", "follow"])
    if code == 0:
        return tpu.on_workers("0", command.finished())
    if code != starter.LOST:  # the others may be waiting for the one that failed
        tpu.on_workers("all", ["bash", "-c", f"tail -n 5 train.log; bash launch/tpu_vm.sh stop {grace}"])
    return code


class TpuVm(NamedTuple):
    """A slice, by way of gcloud."""

    shell: starter.Shell
    name: str
    zone: str

    def words(self, verb: str, *options: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "tpu-vm", verb, self.name, f"--zone={self.zone}", *options]

    def look(self) -> tuple[str, list[str]]:
        """READY, PREEMPTED, ... or "" where there is none, and the addresses of its workers."""
        dry = '{"state": "READY", "networkEndpoints": [{"ipAddress": "FIRST-WORKER"}]}'
        found = json.loads(self.shell.read(*self.words("describe", "--format=json"), dry=dry) or "{}")
        return found.get("state", ""), [endpoint["ipAddress"] for endpoint in found.get("networkEndpoints", [])]

    def on_workers(self, which: str, words: Sequence[str]) -> int:
        """Runs a command in the repository on one worker or `all`; returns its exit code."""
        return self.run_line(which, f"cd {FOLDER} && exec {shlex.join(words)}")

    def run_line(self, which: str, line: str) -> int:
        return self.shell.run(*self.words("ssh", f"--worker={which}", f"--command={line}"))


def prepare(tpu: TpuVm) -> int:
    """Makes and fills the slice where there is none, or only what is left of one; returns the exit code of what
    failed, or 0. Raises UserError for a slice that neither works nor is gone."""
    given = flags.FLAGS
    state = settled(tpu, given.pause)
    if state == "READY" and not tpu.shell.dry:
        if not given.renew and tpu.run_line("all", f"test -e {FOLDER}/{INSTALLED}") == 0:
            return 0
        return install(tpu, given.setup, given.python)
    if state in GONE:
        starter.say(f"{tpu.name} is {state}; it is made anew")
        tpu.shell.run(*tpu.words("delete", "--quiet"))
    elif state not in ("", "READY"):
        start, delete = (shlex.join(tpu.words(word)) for word in ("start", "delete"))
        raise UserError(f"{tpu.name} is {state}; start it with {start}, or delete it, to have it made anew: {delete}")
    kind = (f"--accelerator-type={given.type}", f"--version={given.version}")
    code = tpu.shell.run(*tpu.words("create", *kind, *verb.words_of("create")))
    return code or install(tpu, given.setup, given.python)


def settled(tpu: TpuVm, pause: float) -> str:
    """The state of the slice, which is looked at again while it is on the way to another."""
    while (state := tpu.look()[0]) in PASSING:
        starter.say(f"{tpu.name} is {state}; looking again in {pause:g} seconds")
        time.sleep(pause)
    return state


def install(tpu: TpuVm, setup: str, python: str) -> int:
    """Copies the files that git would track, and installs them on every worker; returns the exit code."""
    root = shlex.quote(str(starter.ROOT))
    with tempfile.TemporaryDirectory() as folder:
        archive = ARCHIVE if tpu.shell.dry else f"{folder}/{ARCHIVE}"
        tracked = f"git -C {root} ls-files -z --cached --others --exclude-standard"
        tpu.shell.check("bash", "-c", f"{tracked} | tar -czf {archive} -C {root} --null -T -")
        copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", archive, f"{tpu.name}:", f"--zone={tpu.zone}"]
        code = tpu.shell.run(*copy, "--worker=all")
    code = code or tpu.run_line("all", " && ".join(steps(setup, python)))
    if code == OLDER:  # no slice waits, and costs, for what trying again would not mend
        needed = ".".join(map(str, NEEDED))
        return verb.complain(
            f"tmljax needs Python {needed} or newer, and {python} of {tpu.name} is older or not there; "
            "set --python=/path/to/a/newer/python, which --setup may install"
        )
    return code


def steps(setup: str, python: str) -> list[str]:
    """What a worker does with the archive."""
    suits = shlex.quote(f"import sys; sys.exit(sys.version_info < {NEEDED})")
    return [
        f"mkdir -p {FOLDER}",
        f"tar -xzf {ARCHIVE} -C {FOLDER}",
        f"cd {FOLDER}",
        f"bash -c {shlex.quote(setup)}",
        f"{{ {python} -c {suits} || exit {OLDER}; }}",
        f"{python} -m venv .venv",
        INSTALL,
        f"touch {INSTALLED}",
    ]


if __name__ == "__main__":
    define_flags()
    sys.exit(starter.run(main))
