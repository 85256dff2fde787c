"""What the starters of other machines share: the command after `--`, doing or only printing, and starting again.

    python -m launch.STARTER FLAGS -- python -m launch.train FLAGS

is the command that would train here, run on every host: `launch.slurm`, `launch.gke`, `launch.tpu_vm`, `launch.ssh`.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import flags

from launch import training, verb
from tmljax.config import UserError
from tmljax.terminal import Terminal

PORT = 8476  # of the first host, where the processes of a run find one another
MISTAKE = 2  # exit code: starting again would not help
AGAIN = 75  # of launch.finished: the training was stopped before its end and goes on when started again
LOST = 255  # what ssh says when the connection is at fault, not the command
DRY_RUN = "print what would run, and run nothing"

INSTALLED_WITH = {
    "sbatch": "SLURM; run this on a login node of the cluster",
    "kubectl": "the Kubernetes client",
    "gcloud": "the Google Cloud SDK",
    "ssh": "OpenSSH",
    "git": "the package of that name",
}


class Command(NamedTuple):
    """`python -m launch.train flags...`, and what they say."""

    python: str
    flags: tuple[str, ...]
    training: training.Training

    def words(self, module: str = "launch.train") -> list[str]:
        return [self.python, "-m", module, *self.flags]

    def finished(self) -> list[str]:
        """Leaves with 0 where training is at its end, with AGAIN where it is not."""
        return self.words("launch.finished")


def run(main: Callable[[Sequence[str]], int | None]) -> int:
    """As `verb.run`, with what stands behind `--` left to `command`."""
    return verb.run(main, sys.argv[: sys.argv.index("--")] if "--" in sys.argv else sys.argv)


def command() -> Command:
    """What stands behind `--` on the command line. Raises UserError for anything but a training, and for one that would
    end with a mistake in its flags or its config: before there are machines, which cost."""
    match sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []:
        case [python, "-m", "launch.train", *rest]:
            try:
                found = training.read(rest)
            except UserError as e:
                raise UserError(f"behind --: {e}") from None
            if found.experiment is None:
                say(f"--config={found.config} is not on this machine, so that it is not checked here")
            return Command(python, tuple(rest), found)
        case []:
            raise UserError("there is nothing to run: end with -- python -m launch.train --config=... --workdir=...")
        case other:
            raise UserError(f"behind -- comes python -m launch.train and its flags, not {shlex.join(other)}")


class Shell(NamedTuple):
    """Runs programs of this machine; dry, it prints them and finds that all is well."""

    dry: bool

    @classmethod
    def of_flags(cls) -> Shell:
        return cls(flags.FLAGS["dry-run"].value)

    def run(self, *words: str, input: str | None = None) -> int:
        """Returns the exit code. Raises UserError where the program is not installed."""
        return self._start(words, input, None).returncode

    def check(self, *words: str, input: str | None = None) -> None:
        """Raises UserError where it fails, after its own message."""
        code = self.run(*words, input=input)
        if code:
            raise UserError(f"{shlex.join(words[:5])} ... failed with exit code {code}; its message stands above")

    def read(self, *words: str, dry: str = "") -> str:
        """What it prints, empty where it fails; `dry` on a dry run."""
        done = self._start(words, None, subprocess.PIPE)
        return dry if self.dry else done.stdout.strip() if done.returncode == 0 else ""

    def _start(self, words: Sequence[str], input: str | None, stdout: int | None) -> subprocess.CompletedProcess[str]:
        if self.dry:
            print(shlex.join(words), flush=True)
            return subprocess.CompletedProcess(words, 0, "")
        try:
            return subprocess.run(words, input=input, stdout=stdout, text=True, check=False)
        except FileNotFoundError:
            raise missing(words[0]) from None


def missing(program: str) -> UserError:
    return UserError(f"{program} is not installed here; it comes with {INSTALLED_WITH[program]}")


def persevere(attempt: Callable[[], int], restarts: int, pause: float) -> int:
    """Attempts until training is at its end (0) or cannot be helped; returns the exit code.

    A training that was stopped and saved (AGAIN) goes on; one that fails is started again `restarts` times.
    """
    failures = 0
    while (code := attempt()) not in (0, MISTAKE):
        failures += code != AGAIN
        if failures > restarts:
            say(f"training failed with exit code {code}; given up after {restarts} restarts")
            break
        why = "was stopped before its end" if code == AGAIN else f"failed with exit code {code}"
        say(f"training {why}; it goes on from its last checkpoint")
        time.sleep(pause)
    return code


def say(message: str) -> None:
    Terminal(sys.stderr).say(f"== {message}")
