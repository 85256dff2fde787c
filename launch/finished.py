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

from launch import training, verb
from launch.starter import AGAIN


def main(argv: Sequence[str]) -> int:
    workdir, wanted = flags.FLAGS.workdir, verb.experiment().train.steps
    saved = Path(workdir, "checkpoints").glob("*")  # as orbax names what is whole
    step = max((int(folder.name) for folder in saved if folder.name.isdigit()), default=0)
    print(f"{workdir}: step {step} of {wanted} is saved")
    return 0 if step >= wanted else AGAIN


if __name__ == "__main__":
    training.define_flags()
    sys.exit(verb.run(main, keep=training.keep_known))
