"""Tells whether a training is at its end: exit 0, or 75 where the same command would go on with it.

    python -m launch.finished --config=configs/demo.py --workdir=runs/demo

The flags are those of launch.train, which leaves with 0 at its end and also when it was asked to stop and has saved.
What starts it on other machines tells the two apart by this, in an instant: no array library is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import verb
from launch.starter import AGAIN

KNOWN = {"config", "config_field", "workdir", "profile", "flagfile", "help", "helpshort", "helpfull"}


def define_flags() -> None:
    verb.define_config()
    flags.DEFINE_string("workdir", None, "where the checkpoints are", required=True)
    flags.DEFINE_integer("profile", 0, "of launch.train, and nothing here")


def main(argv: Sequence[str]) -> int:
    workdir, wanted = flags.FLAGS.workdir, verb.experiment().train.steps
    saved = Path(workdir, "checkpoints").glob("*")  # as orbax names what is whole
    step = max((int(folder.name) for folder in saved if folder.name.isdigit()), default=0)
    print(f"{workdir}: step {step} of {wanted} is saved")
    return 0 if step >= wanted else AGAIN


def keep_known(arguments: Sequence[str]) -> list[str]:
    """Without flags of the libraries, in one word or in two, which say nothing of what is trained and for how long."""
    kept, foreign = list[str](), False
    for argument in arguments:
        if argument.startswith("-"):
            name, equals, _ = argument.lstrip("-").partition("=")
            foreign = name not in KNOWN
            if not foreign:
                kept.append(argument)
            foreign &= not equals  # the next word may be its value
        else:
            if not foreign:
                kept.append(argument)
            foreign = False
    return kept


if __name__ == "__main__":
    define_flags()
    sys.exit(verb.run(main, keep=keep_known))
