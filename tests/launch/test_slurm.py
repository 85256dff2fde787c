"""launch.slurm and its batch script, with fakes of SLURM's programs."""

from __future__ import annotations

import pytest

from launch import slurm
from tests.launch.fakes import (
    ANSWER,
    FINISHED,
    PYTHON,
    ROOT,
    SRUN,
    TRAIN,
    Fakes,
    refuses,
)


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path, python=PYTHON, srun=SRUN, scontrol=ANSWER, sbatch=ANSWER)


def test_sbatch_gets_one_process_a_node_and_the_same_flags(fakes):
    options = "--partition=gpu --comment='two words'"
    done = fakes.start("slurm", "--nodes=4", f"--sbatch={options}", "--grace=90", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls("sbatch")
    before, script = call["argv"][: -len(TRAIN) - 2], call["argv"][-len(TRAIN) - 2 :]
    assert script == [str(ROOT / "launch" / "slurm.sh"), "10", *TRAIN]
    assert {"--nodes=4", "--ntasks-per-node=1", "--requeue", "--signal=TERM@90"} <= set(before)
    assert before[-2:] == ["--partition=gpu", "--comment=two words"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            "--partition=gpu --nodes=7",
            "--sbatch has --nodes=7; a node has one process, and --nodes says how many nodes",
        ),
        ("-N7", "--sbatch has -N7; a node has one process"),
        ("--ntasks-per-node=2", "a node has one process"),
        ("--signal=INT@5", "--grace says when to stop"),
        ("--time=00:10:00", "--sbatch has --time=00:10:00, of which --grace=300 seconds are for saving"),
    ],
)
def test_options_of_sbatch_that_end_every_run_or_say_it_twice_are_refused(tmp_path, options, complaint):
    fakes = Fakes(tmp_path, sbatch=ANSWER)
    refuses(fakes.start("slurm", "--nodes=2", f"--sbatch={options}", "--", *TRAIN), complaint)
    assert not fakes.calls()


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("5", 300), ("5:30", 330), ("1:0:1", 3601), ("1-2", 93600), ("1-2:3", 93780), ("1-0:0:9", 86409), ("x", None)],
)
def test_time_limits_as_slurm_writes_them(limit, expected):
    assert slurm.seconds(limit) == expected


def batch(fakes, restarts=1, **environment):
    fakes.environment |= {"SLURM_JOB_ID": "61", **environment}
    return fakes.run("bash", str(ROOT / "launch" / "slurm.sh"), str(restarts), *TRAIN)


def names(fakes):
    return [c["argv"][1] if c["name"] == "python" else c["name"] for c in fakes.calls()]


def test_a_slurm_job_trains_to_the_end(fakes):
    fakes.answers("launch.finished", (75, ""), (0, ""))
    assert batch(fakes, SLURM_GPUS_ON_NODE="4").returncode == 0
    assert names(fakes) == ["launch.finished", "srun", "launch.finished"]
    (srun,) = fakes.calls("srun")
    assert srun["argv"] == ["--kill-on-bad-exit=1", *TRAIN]
    assert srun["told"] == {"JAX_LOCAL_DEVICE_IDS": "0,1,2,3"}
    assert fakes.calls("python")[0]["argv"] == FINISHED


def test_a_preempted_slurm_job_goes_back_to_the_queue_and_ends_there(fakes):
    fakes.answers("launch.finished", (75, ""), (75, ""), (75, ""), (0, ""))
    assert batch(fakes).returncode == 0
    assert fakes.calls("scontrol")[0]["argv"] == ["requeue", "61"]
    assert batch(fakes).returncode == 0  # as SLURM starts it again
    one = ["launch.finished", "srun", "launch.finished"]
    assert names(fakes) == [*one, "scontrol", *one]


def test_a_failing_slurm_job_is_started_again_so_often_and_a_mistake_never(fakes):
    fakes.answers("launch.finished", (75, ""))
    fakes.answers("srun", (137, ""))
    assert batch(fakes, restarts=2).returncode == 137
    assert len(fakes.calls("srun")) == 3
    fakes.answers("srun", (2, ""))
    assert batch(fakes).returncode == 2
    fakes.answers("srun", (137, ""))
    assert batch(fakes, MISTAKEN="one task of many").returncode == 2
    assert not list(ROOT.glob("mistake-*"))
    fakes.answers("launch.finished", (2, ""))
    assert batch(fakes).returncode == 2
    assert len(fakes.calls("srun")) == 5
    assert not fakes.calls("scontrol")
