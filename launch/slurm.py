"""Trains on the nodes of a SLURM cluster, one process each: submits launch/slurm.sh.

    python -m launch.slurm --nodes=4 --sbatch="--partition=gpu --gpus-per-node=4 --time=24:00:00" \\
        -- python -m launch.train --config=configs/demo.py --workdir=/shared/runs/demo

Run it where the repository lies on a disk that all nodes see; the workdir and config.data.root must lie on one too.
Before the time limit the job is asked to stop: it saves and goes back to the queue, as it does when SLURM preempts it
or a node fails, and goes on from its last checkpoint.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import starter, training, verb
from tmljax.config import UserError

PROCESSES = "a node has one process, and --nodes says how many nodes"
OURS = dict.fromkeys(("--nodes", "-N", "--ntasks", "-n", "--ntasks-per-node"), PROCESSES) | {
    "--signal": "--grace says when to stop",
    "--output": "--name names it",
    "-o": "--name names it",
}
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
    options = verb.words_of("sbatch")
    check_options(options, given.grace)
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
        *options,
        str(SCRIPT),
        str(given.restarts),
        *command.words(),
    )


def check_options(options: Sequence[str], grace: int) -> None:
    """Raises UserError for options of sbatch that another flag gives, and for a job that would be asked to stop as soon
    as it starts, again and again."""
    for word in options:
        name, _, value = word.partition("=")
        flag = OURS.get(name) or OURS.get(word[:2])
        if flag:
            raise UserError(f"--sbatch has {word}; {flag}")
        if name == "--time" and (limit := seconds(value)) is not None and limit <= 2 * grace:
            raise UserError(
                f"--sbatch has {word}, of which --grace={grace} seconds are for saving; give the job more time or a "
                "smaller --grace"
            )


def seconds(limit: str) -> int | None:
    """Of a time limit as SLURM has them, M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None for another."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        return None
    days, *rest = (None if part is None else int(part) for part in match.groups())
    given = [part for part in rest if part is not None]
    units = (3600, 60, 1) if days is not None or len(given) == 3 else (60, 1)
    return (days or 0) * 86400 + sum(part * unit for part, unit in zip(given, units, strict=False))


if __name__ == "__main__":
    define_flags()
    sys.exit(starter.run(main))
