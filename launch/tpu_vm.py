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

It runs again where what comes after it failed, and where the files here are others than those there. The training
outlives this command, which follows it: Ctrl-C leaves it running, and the same command follows it again; while it runs
nothing is copied. The slice stays when it is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from launch import starter, training, verb
from launch.ssh import process
from launch.training import ROOT
from tmljax.config import UserError

GONE = {"PREEMPTED", "TERMINATED"}  # of the states of a slice, those that none comes back from
PASSING = {"CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING", "STOPPING", "DELETING", "HIDING", "UNHIDING"}

GCLOUD = ("gcloud", "compute", "tpus", "tpu-vm")

FOLDER = "tmljax"  # in the home of each worker
ARCHIVE = f"{FOLDER}.tar.gz"
INSTALLED = ".venv/.installed"  # the digest of the files, when all of this has come to its end
INSTALL = ".venv/bin/pip install --quiet --constraint constraints.txt --editable '.[tpu]'"
NEEDED = (3, 11)  # of Python, as in pyproject.toml
OLDER = 78  # exit code of a worker whose Python is older
BUSY = 79  # of tpu_vm.sh on a worker that trains


def define_flags() -> None:
    flags.DEFINE_string("name", None, "of the TPU VM", required=True)
    flags.DEFINE_string("zone", None, "of Google Cloud", required=True)
    flags.DEFINE_string("type", None, "accelerator type, v5p-32 say", required=True)
    flags.DEFINE_string("version", None, "runtime version, v2-alpha-tpuv5 say", required=True)
    flags.DEFINE_string("project", None, "of Google Cloud; gcloud's own by default")
    flags.DEFINE_string("create", "", "more options for its creation: --spot, --network=...")
    flags.DEFINE_string("setup", "", "shell command for each worker of a new slice, before the installation")
    flags.DEFINE_string("python", "python3", "of the workers, 3.11 or newer, as their shell finds it")
    flags.DEFINE_integer("grace", 120, "seconds to save in when asked to stop", lower_bound=1)
    flags.DEFINE_integer("restarts", 10, "how often a training that fails is started again", lower_bound=0)
    flags.DEFINE_float("pause", 30.0, "seconds before it is started again", lower_bound=0)
    flags.DEFINE_bool("dry-run", False, starter.DRY_RUN)


def main(argv: Sequence[str]) -> int:
    command, given = starter.command(), flags.FLAGS
    verb.words_of("create")
    tpu = TpuVm(starter.Shell.of_flags(), given.name, given.zone, given.project)
    check_places(command.training)
    tpu.shell.check(*GCLOUD, "list", *tpu.where, "--format=none")
    began = False

    def attempt() -> int:
        nonlocal began
        files = Files.tracked(tpu.shell)  # as they are by now: what is packed is what the digest says
        check_config(command.training, files)
        code = prepare(tpu, files)
        if code == 0:
            began, code = True, train(tpu, command, given.grace)
        if began and code not in (0, starter.AGAIN, starter.MISTAKE) and tpu.look()[0] != "READY":
            return starter.AGAIN  # a slice that was taken away is no failure, nor is one that cannot be had just now
        return code

    code = starter.persevere(attempt, given.restarts, given.pause)
    if not tpu.shell.dry:
        delete = shlex.join(tpu.words("delete"))
        starter.say(f"{given.name} still exists, and costs; when you have what you need: {delete}")
    return code


class Files(NamedTuple):
    """Those of this repository that git tracks or would track."""

    names: tuple[str, ...]  # from the root
    digest: str  # of names and contents

    @classmethod
    def tracked(cls, shell: starter.Shell) -> Files:
        """Raises UserError where there is no repository."""
        listed = shell.read("git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        names = tuple(sorted(name for name in listed.split("\0") if (ROOT / name).is_file()))
        if not names and not shell.dry:
            raise UserError(f"git lists no files of {ROOT}; start from a clone of the repository")
        digest = hashlib.sha256()
        for name in names:
            digest.update(hashlib.sha256((ROOT / name).read_bytes()).digest() + name.encode())
        return cls(names, digest.hexdigest()[:16])

    def pack(self, path: str) -> None:
        with tarfile.open(path, "w:gz") as archive:
            for name in self.names:
                archive.add(ROOT / name, name)


def check_places(read: training.Training) -> None:
    """Raises UserError where what must outlive a slice would lie in the home of its workers."""
    for name, path in read.places().items():
        if not path.startswith("/"):
            raise UserError(
                f"--{name}={path} behind -- would be another folder on each worker, and go with it; name one of a disk "
                f"that all workers see: --{name}=/..."
            )


def check_config(read: training.Training, files: Files) -> None:
    """Raises UserError for a config of this repository that is not copied."""
    path = os.path.relpath(ROOT / read.config, ROOT)
    if files.names and read.experiment is not None and path not in files.names:
        raise UserError(
            f"--config={read.config} is not copied to the workers, since git ignores it or it is not in the "
            "repository; move it there"
        )


def train(tpu: TpuVm, command: starter.Command, grace: int) -> int:
    """Follows the training of a slice, which is started where there is none; returns its exit code."""
    _, addresses = tpu.look()
    if not addresses:
        return starter.LOST
    count = "NUMBER-OF-WORKERS" if tpu.shell.dry else len(addresses)
    told = process(f"{addresses[0]}:{starter.PORT}", count)
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
    project: str | None

    @property
    def where(self) -> list[str]:
        return [f"--zone={self.zone}"] + ([f"--project={self.project}"] if self.project else [])

    def words(self, verb: str, *options: str) -> list[str]:
        return [*GCLOUD, verb, self.name, *self.where, *options]

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


def prepare(tpu: TpuVm, files: Files) -> int:
    """Makes and fills the slice where there is none, or only what is left of one; returns the exit code of what
    failed, or 0. Raises UserError for a slice that neither works nor is gone."""
    given = flags.FLAGS
    state = settled(tpu, given.pause)
    if state == "READY" and not tpu.shell.dry:
        return renew(tpu, files)
    if state in GONE:
        starter.say(f"{tpu.name} is {state}; it is made anew")
        tpu.shell.run(*tpu.words("delete", "--quiet"))
    elif state not in ("", "READY"):
        start, delete = (shlex.join(tpu.words(word)) for word in ("start", "delete"))
        raise UserError(f"{tpu.name} is {state}; start it with {start}, or delete it, to have it made anew: {delete}")
    kind = (f"--accelerator-type={given.type}", f"--version={given.version}")
    code = tpu.shell.run(*tpu.words("create", *kind, *verb.words_of("create")))
    return code or install(tpu, files)


def renew(tpu: TpuVm, files: Files) -> int:
    """Installs on a slice that is there, unless all workers have these files or one of them trains."""
    code = tpu.run_line("all", f'test "$(cat {FOLDER}/{INSTALLED} 2>/dev/null)" = {files.digest}')
    if code in (0, starter.LOST):
        return code
    code = tpu.run_line("all", f"test ! -e {FOLDER}/launch || {{ cd {FOLDER} && bash launch/tpu_vm.sh idle; }}")
    if code == BUSY:
        starter.say(f"{tpu.name} trains with other files than those here; it goes on with them")
        return 0
    return code or install(tpu, files)


def settled(tpu: TpuVm, pause: float) -> str:
    """The state of the slice, which is looked at again while it is on the way to another."""
    while (state := tpu.look()[0]) in PASSING:
        starter.say(f"{tpu.name} is {state}; looking again in {pause:g} seconds")
        time.sleep(pause)
    return state


def install(tpu: TpuVm, files: Files) -> int:
    """Copies the files and installs them on every worker; returns 0, LOST, 1 where something failed, which may pass, or
    2 where it will not."""
    given = flags.FLAGS
    with tempfile.TemporaryDirectory() as folder:
        archive = ARCHIVE if tpu.shell.dry else f"{folder}/{ARCHIVE}"
        if not tpu.shell.dry:
            files.pack(archive)
        code = tpu.shell.run(*GCLOUD, "scp", archive, f"{tpu.name}:", *tpu.where, "--worker=all")
    code = code or tpu.run_line("all", " && ".join(steps(given.setup, given.python, files.digest)))
    if code == OLDER:  # no slice waits, and costs, for what trying again would not mend
        needed = ".".join(map(str, NEEDED))
        return verb.complain(
            f"tmljax needs Python {needed} or newer, and {given.python} of {tpu.name} is older or not there; "
            "set --python=/path/to/a/newer/python, which --setup may install"
        )
    return code if code in (0, starter.LOST) else 1  # tar and pip leave with 2, too, for what passes


def steps(setup: str, python: str, digest: str) -> list[str]:
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
        f"echo {digest} >{INSTALLED}",
    ]


if __name__ == "__main__":
    define_flags()
    sys.exit(starter.run(main))
