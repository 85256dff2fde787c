"""Trains on the nodes of a SLURM cluster, one process each: submits launch/slurm.sh.

    python -m launch.slurm --nodes=4 --sbatch="--partition=gpu --gpus-per-node=4 --time=24:00:00" \\
        -- python -m launch.train --config=configs/demo.py --workdir=/shared/runs/demo

Run it where the repository lies on a disk that all nodes see; the workdir and config.data.root must lie on one too.
Before the time limit the job is asked to stop: it saves and goes back to the queue, as it does when SLURM preempts it
or a node fails, and goes on from its last checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import starter, training, verb

SCRIPT = Path(__file__).with_name("slurm.sh")


def define_flags() -> None:
    flags.DEFINE_integer("nodes", None, "how many", required=True, lower_bound=1)
    flags.DEFINE_string("name", "tmljax", "of the job; its output goes to NAME-JOBID.log")
    flags.DEFINE_string("sbatch", "", "more options of sbatch: partition, account, GPUs, time limit")
    flags.DEFINE_integer("grace", 300, "seconds before the time limit at which to stop and save", lower_bound=1)
    flags.DEFINE_integer("restarts", 10, "how often a training that fails is started again", lower_bound=0)
    flags.DEFINE_bool("dry-run", False, starter.DRY_RUN)


def main(argv: Sequence[str]) -> int:
    command, given = starter.command(), flags.FLAGS
    return starter.Shell.of_flags().run(
        "sbatch",
        f"--job-name={given.name}",
        f"--output={given.name}-%j.log",
        "--open-mode=append",
        f"--nodes={given.nodes}",
        "--ntasks-per-node=1",
        "--requeue",
        f"--signal=TERM@{given.grace}",
        f"--chdir={training.ROOT}",
        *verb.words_of("sbatch"),
        str(SCRIPT),
        str(given.restarts),
        *command.words(),
    )


if __name__ == "__main__":
    define_flags()
    sys.exit(starter.run(main))
