"""The flags of launch.train, for it and for what reads them without loading what it needs: the starters and
launch.finished."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from launch import verb
from tmljax.config import Experiment, UserError

ROOT = Path(__file__).parents[1]
KNOWN = ("config", "config_field", "workdir", "profile")
ABSL = ("help", "helpshort", "helpfull")


class Training(NamedTuple):
    """What the flags say."""

    workdir: str
    config: str  # the file
    experiment: Experiment | None  # None where only the machines that train have the config

    def places(self) -> dict[str, str]:
        """flag -> folder, of what must outlive a machine, as far as it is known here."""
        root = {} if self.experiment is None else {"config.data.root": self.experiment.data.root}
        return {"workdir": self.workdir, **root}


def define_flags(values: flags.FlagValues | None = None) -> None:
    """Among `values`, by default those of the process."""
    values = flags.FLAGS if values is None else values
    verb.define_config(values)
    told = "where checkpoints and metrics go; made if absent"
    flags.DEFINE_string("workdir", None, told, required=True, flag_values=values)
    told = "steps to trace into WORKDIR/profile, for XProf and TensorBoard"
    flags.DEFINE_integer("profile", 0, told, lower_bound=0, flag_values=values)


def read(words: Sequence[str]) -> Training:
    """What launch.train would do with these flags in the root of the repository. Flags of libraries are left to it, and
    so is an absolute --config that is not on this machine.

    Raises UserError as it would, naming what is wrong.
    """
    given = flags.FlagValues()
    define_flags(given)
    with contextlib.chdir(ROOT):
        verb.parse_flags(keep_known(verb.expand(["launch.train", *words])), given)
        path, _, argument = given.config.partition(".py:")
        path += ".py" if argument else ""
        if os.path.isabs(path) and not os.path.exists(path):
            return Training(given.workdir, path, None)
        return Training(given.workdir, path, verb.load_experiment(given.config, given.config_field))


def keep_known(arguments: Sequence[str]) -> list[str]:
    """Without flags of the libraries, in one word or in two, which say nothing of what is trained and for how long.

    Raises UserError for what is hardly a library's: a known one, misspelt.
    """
    kept, foreign = list[str](), False
    for argument in arguments:
        if argument.startswith("-"):
            name, equals, _ = argument.lstrip("-").partition("=")
            foreign = name not in (*KNOWN, *ABSL)
            if not foreign:
                kept.append(argument)
            elif near := difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.8):
                raise UserError(f"--{name} does not exist; did you mean --{near[0]}?")
            foreign &= not equals  # the next word may be its value
        else:
            if not foreign:
                kept.append(argument)
            foreign = False
    return kept
