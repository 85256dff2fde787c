"""What the starters of other machines share: what they refuse, what they would do, and `launch.finished`, with fakes in
place of what is called.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import training, verb
from tests.launch.fakes import (
    ANSWER,
    FLAGS,
    GCLOUD,
    PYTHON,
    ROOT,
    SRUN,
    SSH,
    STARTERS,
    TRAIN,
    Fakes,
    refuses,
)
from tmljax import checkpoint, sharding

PROGRAM = {"slurm": "sbatch", "gke": "kubectl", "tpu_vm": "gcloud", "ssh": "ssh"}


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path, python=PYTHON, ssh=SSH, gcloud=GCLOUD, srun=SRUN, scontrol=ANSWER, sbatch=ANSWER)


def test_the_shell_scripts_pass_shellcheck():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "shellcheck comes with the extra `test`: pip install -e '.[test]'"
    scripts = sorted(str(p.relative_to(ROOT)) for p in [*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"])
    assert len(scripts) >= 6
    done = subprocess.run([program, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("starter", STARTERS)
def test_what_it_is_and_what_is_wrong(starter, tmp_path):
    """--help; a dry run where nothing is installed; and, in one line, what is missing."""
    nothing = Fakes(tmp_path)
    nothing.environment["PATH"] = str(tmp_path / "bin")
    helped = nothing.start(starter, "--help")
    assert helped.returncode == 0
    assert "--dry-run" in helped.stdout
    assert f"python -m launch.{starter}" in helped.stdout
    dry = nothing.start(starter, *STARTERS[starter], "--dry-run", "--", *TRAIN)
    assert dry.returncode == 0, dry.stderr
    assert PROGRAM[starter] in dry.stdout
    refuses(nothing.start(starter, *STARTERS[starter], "--", *TRAIN), f"{PROGRAM[starter]} is not installed here")
    refuses(nothing.start(starter, "--", *TRAIN), "is missing")


@pytest.mark.parametrize(
    ("starter", "devices"),
    [("slurm", r"--nodes=(\d+) .*--gpus-per-node=(\d+)"), ("gke", r"--hosts=(\d+) --resource=google.com/tpu:(\d+)")],
)
def test_the_batch_of_the_example_divides_over_its_devices(starter, devices):
    example = importlib.import_module(f"launch.{starter}").__doc__
    hosts, each = map(int, re.search(devices, example).groups())
    experiment = verb.load_experiment(re.search(r"--config=(\S+)", example)[1])
    sharding.check_sizes(experiment, sharding.fill(experiment.mesh, hosts * each))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "end with -- python -m launch.train"),
        (["--", "make", "coffee"], "not make coffee"),
        (["--", *TRAIN, "--workdir", "gs://bucket/run"], "--workdir=gs://bucket/run is an address"),
        (["--", *TRAIN, "--config.data.root=gs://bucket"], "config.data.root=gs://bucket is an address; mount the "),
        (["--nods=3", "--", *TRAIN], "nods"),
        (["stray", "--", *TRAIN], "'stray' is not a flag"),
        (["--port=70000", "--", *TRAIN], "port"),
        (["--hosts=ada:22", "--", *TRAIN], "ada:22 is neither HOST nor USER@HOST; a port of ssh goes to ~/.ssh/config"),
        (["--hosts=ada,-oProxyCommand=x", "--", *TRAIN], "-oProxyCommand=x is neither"),
        (["--hosts=me@", "--", *TRAIN], "me@ is neither"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, words, complaint):
    refuses(Fakes(tmp_path).start("ssh", *STARTERS["ssh"], *words), complaint)


@pytest.mark.parametrize("starter", STARTERS)
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--workdir=/shared/run"], "behind --: --config is missing"),
        (["--config=configs/smoke.py"], "behind --: --workdir is missing"),
        (["--config=configs/smok.py", "--workdir=/shared/run"], "did you mean configs/smoke.py?"),
        ([*FLAGS, "--config.train.step=5"], "config.train.step does not exist; did you mean steps?"),
        ([*FLAGS, "--config.data.batch", "none"], "config.data.batch"),
        ([*FLAGS, "--config.train.steps"], "--config.train.steps needs a value"),
        ([*FLAGS, "--flagfile=/nowhere"], "--flagfile=/nowhere cannot be read: No such file or directory"),
        ([*FLAGS, "--profil=3"], "--profil does not exist; did you mean --profile?"),
        ([*FLAGS, "--profile=x"], "profile"),
        ([*FLAGS, "stray"], "'stray' is not a flag"),
    ],
)
def test_a_training_that_would_end_with_a_mistake_is_not_started(tmp_path, starter, flags, complaint):
    fakes = Fakes(tmp_path, **dict.fromkeys(PROGRAM.values(), ANSWER))
    refuses(fakes.start(starter, *STARTERS[starter], "--", "python", "-m", "launch.train", *flags), complaint)
    assert not fakes.calls()


def test_the_flags_of_a_training_are_read_as_it_reads_them(tmp_path):
    (tmp_path / "flags.txt").write_text("--config=configs/smoke.py\n--config.train.steps=7\n")
    file = f"--flagfile={tmp_path}/flags.txt"
    foreign = ["--a_flag_of_a_library=5", "--verbosity", "1", "--profile=3"]
    read = training.read(
        [file, *foreign, "--workdir", "/a", "--config.data.batch", "24", "-config_field=data.batch=16", "--workdir=/b"]
    )
    assert (read.workdir, read.experiment.train.steps, read.experiment.data.batch) == ("/b", 7, 16)
    assert read.places() == {"workdir": "/b", "config.data.root": "data"}


@pytest.mark.parametrize("starter", STARTERS)
def test_a_config_that_only_the_machines_have_is_left_to_them(tmp_path, starter):
    far = ["--config=/shared/mine.py", "--workdir=/shared/run", "--config.of.it=3"]
    done = Fakes(tmp_path).start(starter, *STARTERS[starter], "--dry-run", "--", "python", "-m", "launch.train", *far)
    assert done.returncode == 0
    assert "--config=/shared/mine.py is not on this machine, so that it is not checked here" in done.stderr
    assert far[0] in done.stdout


def test_a_dry_run_calls_nothing_and_prints_what_a_shell_would_take(fakes):
    for starter in ("slurm", "tpu_vm", "ssh"):
        done = fakes.start(starter, *STARTERS[starter], "--dry-run", "--", *TRAIN)
        lines = [shlex.split(line) for line in done.stdout.splitlines()]
        assert lines[0][0] == PROGRAM[starter]
        words = lines[0] if starter == "slurm" else shlex.split(lines[-1][-1])  # of the far side's shell
        assert words[-len(FLAGS) :] == FLAGS
    assert fakes.calls() == []


@pytest.mark.parametrize("form", ["one word", "two words", "in a file"])
@pytest.mark.parametrize(("wanted", "code"), [(5, 0), (6, 75)])
def test_finished_looks_for_the_last_step_that_can_be_read(tmp_path, wanted, code, form):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "6.damaged").mkdir()
    (tmp_path / "flags.txt").write_text(f"--config_field=train.steps={wanted}\n--profile=3\n")
    steps = {
        "one word": [f"--config.train.steps={wanted}"],
        "two words": ["--config.train.steps", str(wanted), "--config.mesh.fsdp", "-1"],
        "in a file": [f"--flagfile={tmp_path}/flags.txt"],
    }[form]
    flags = ["--config", "configs/smoke.py", *steps, f"--workdir={tmp_path}"]
    foreign = ["--a_flag_of_a_library=5", "--verbosity", "1", "--alsologtostderr"]
    done = Fakes(tmp_path).start("finished", *flags, *foreign, "--log_dir", "/nowhere")
    assert done.returncode == code, done.stderr
    assert f"step 5 of {wanted}" in done.stdout


def test_finished_agrees_with_the_checkpoints_of_a_training(tmp_path):
    """It reads the folder by itself, so that it need not load what reads checkpoints."""
    (tmp_path / checkpoint.FOLDER / "12").mkdir(parents=True)
    (tmp_path / checkpoint.FOLDER / "13.orbax-checkpoint-tmp-0").mkdir()
    fakes = Fakes(tmp_path)
    done = fakes.start("finished", "--config=configs/smoke.py", f"--workdir={tmp_path}")
    assert f"step {checkpoint.steps(tmp_path)[-1]} of" in done.stdout
    refuses(fakes.start("finished", "--config=configs/smok.py", "--workdir=x"), "smoke.py?")
    refuses(fakes.start("finished", "--config=configs/smoke.py", "--workdir=x", "y"), "'y' is not a flag")
    refuses(fakes.start("finished", "--config=configs/smoke.py", "--workdir=gs://bucket/x"), "is an address; mount")
    lone = ["--config=configs/smoke.py", "--workdir=x", "--config.train.steps"]
    refuses(fakes.start("finished", *lone), "--config.train.steps needs a value")


@pytest.mark.parametrize(("starter", "flag"), [("slurm", "--sbatch"), ("tpu_vm", "--create")])
def test_a_quotation_that_does_not_end_is_named(tmp_path, starter, flag):
    fakes = Fakes(tmp_path, gcloud="", sbatch="")
    refuses(
        fakes.start(starter, *STARTERS[starter], f"{flag}=--comment='x", "--", *TRAIN), f"{flag}=--comment='x is no"
    )
