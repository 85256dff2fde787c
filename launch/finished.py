"""Tells whether a training is at its end: exit 0, or 75 where the same command would go on with it.

    python -m launch.finished --config=configs/demo.py --workdir=runs/demo

The flags are those of launch.train, which leaves with 0 at its end and also when it was asked to stop and has saved.
What starts it on other machines tells the two apart by this.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from launch import verb
from launch.starter import AGAIN
from tmljax import checkpoint
from tmljax.config import UserError


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is not a flag; see --help")
    workdir, wanted = flags.FLAGS.workdir, verb.experiment().train.steps
    step = max(checkpoint.steps(workdir), default=0)
    print(f"{workdir}: step {step} of {wanted} is saved")
    return 0 if step >= wanted else AGAIN


if __name__ == "__main__":
    from launch.train import define_flags

    define_flags()
    sys.exit(verb.run(main))
