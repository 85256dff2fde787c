"""The starters of other machines: what they call, with fakes in place of what is called.

Far sides are run here by a fake ssh or gcloud, so that a flag with spaces and quotes has been through every shell.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path

import pytest

from launch import slurm, tpu_vm, training, verb
from launch.starter import Shell
from tests.launch.fakes import (
    ANSWER,
    FINISHED,
    FLAGS,
    GCLOUD,
    INSTALLER,
    PYTHON,
    ROOT,
    SRUN,
    SSH,
    STARTERS,
    TRAIN,
    Fakes,
    refuses,
    train_calls,
    wait_for,
)
from tmljax import checkpoint, sharding
from tmljax.config import Experiment, UserError

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


@pytest.mark.parametrize("place", ["--workdir=runs/a", "--config.data.root=data"])
def test_a_folder_of_each_worker_alone_is_refused(tmp_path, place):
    done = Fakes(tmp_path).start("tpu_vm", *STARTERS["tpu_vm"], "--dry-run", "--", *TRAIN, place)
    refuses(done, f"{place} behind -- would be another folder on each worker, and go with it; name one of a disk that")


def test_a_dry_run_calls_nothing_and_prints_what_a_shell_would_take(fakes):
    for starter in ("slurm", "tpu_vm", "ssh"):
        done = fakes.start(starter, *STARTERS[starter], "--dry-run", "--", *TRAIN)
        lines = [shlex.split(line) for line in done.stdout.splitlines()]
        assert lines[0][0] == PROGRAM[starter]
        words = lines[0] if starter == "slurm" else shlex.split(lines[-1][-1])  # of the far side's shell
        assert words[-len(FLAGS) :] == FLAGS
    assert fakes.calls() == []


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


def ssh(fakes, *more, hosts="ada,me@alan"):
    return ("ssh", f"--hosts={hosts}", f"--folder={ROOT}", "--pause=0", "--grace=5", *more, "--", *TRAIN)


def test_ssh_starts_each_host_with_its_number_and_the_same_flags(fakes):
    fakes.answers("launch.train", (0, "hello\n"))
    done = fakes.start(*ssh(fakes))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[ada] hello", "[me@alan] hello"]
    calls = sorted(train_calls(fakes), key=lambda c: c["told"]["JAX_PROCESS_ID"])
    for index, call in enumerate(calls):
        assert call["argv"] == TRAIN[1:]
        assert call["cwd"] == str(ROOT)
        assert call["told"] == {
            "JAX_COORDINATOR_ADDRESS": "ada:8476",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
    assert [c["argv"] for c in fakes.calls("python")][2:] == [FINISHED]


def test_ssh_goes_on_after_a_stop_which_is_no_failure(fakes):
    fakes.answers("launch.finished", (75, ""), (75, ""), (0, ""))
    done = fakes.start(*ssh(fakes, "--restarts=0"))
    assert done.returncode == 0, done.stderr
    assert len(train_calls(fakes)) == 6
    assert "stopped before its end" in done.stderr


def test_ssh_stops_all_when_one_fails_and_starts_them_again(fakes):
    (fakes.folder / "train.waits").touch()
    fakes.answers("me_alan", (255, "ssh: connect to host alan port 22: No route to host\n"))
    done = fakes.start(*ssh(fakes, "--restarts=1"))
    assert done.returncode == 255
    assert done.stdout.count("[me@alan] ssh: connect to host alan") == 2
    assert done.stderr.count("== me@alan cannot be reached, or its connection was lost; all are stopped") == 2
    assert "training failed with exit code 255; given up after 1 restarts" in done.stderr
    assert len(train_calls(fakes)) == (fakes.folder / "train.stopped").stat().st_size == 2  # ada's, by SIGTERM


def test_ssh_does_not_repeat_a_mistake(fakes):
    fakes.answers("launch.train", (2, "error: --config=x.py: there is no such file\n"))
    done = fakes.start(*ssh(fakes, hosts="ada"))
    assert done.returncode == 2
    assert len(train_calls(fakes)) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_far_side_stops_and_saves_when_the_near_side_ends(fakes, number):
    """Ctrl-C, or this machine is lost: the connection closes, and the training gets SIGTERM."""
    (fakes.folder / "train.waits").touch()
    child = subprocess.Popen(
        [sys.executable, "-m", "launch.ssh", *ssh(fakes)[1:]], cwd=ROOT, env=fakes.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    wait_for(lambda: (fakes.folder / "train.started").exists() and len(train_calls(fakes)) == 2)
    time.sleep(0.5)
    child.send_signal(number)
    _, err = child.communicate(timeout=30)
    assert child.returncode == (130 if number == signal.SIGINT else -9)
    assert "Traceback" not in err
    stopped = fakes.folder / "train.stopped"
    wait_for(lambda: stopped.exists() and stopped.stat().st_size == 2)


def verbs(fakes):
    """What gcloud was asked, in short."""
    short = []
    listed, *calls = fakes.calls("gcloud")
    assert listed["argv"][3] == "list"  # whether we may ask at all
    for call in calls:
        line = next((a.removeprefix("--command=") for a in call["argv"] if a.startswith("--command=")), "")
        words = re.findall(r"(?<![\w-])(?:setup-ran|start|follow|launch\.finished|stop)(?![\w-])", line)
        short.append(" ".join([call["argv"][3], *words[:1]]))
    return short


READY = json.dumps({"state": "READY", "networkEndpoints": [{"ipAddress": "10.0.0.1"}, {"ipAddress": "10.0.0.2"}]})


def tpu(*more):
    options = ["--pause=0", "--grace=2", "--create=--spot", "--setup=echo setup-ran", *more]
    command = [".venv/bin/python", *TRAIN[1:]]
    return ("tpu_vm", *STARTERS["tpu_vm"], *options, "--", *command)


@pytest.fixture
def cloud(tmp_path):
    return Fakes(tmp_path, python=PYTHON, python3=INSTALLER, pip="", gcloud=GCLOUD)


def test_a_tpu_vm_is_made_filled_and_made_anew_after_a_preemption(cloud):
    """The slice vanishes while it trains, then there is none to be had, then one that is gone before it is looked at;
    the last one gets the same flags, and finishes. None of this is a failure."""
    preempted = json.dumps({"state": "PREEMPTED"})
    none = (1, "")
    cloud.answers("describe", none, (0, READY), *[(0, preempted)] * 2, *[none] * 5, (0, READY))
    cloud.answers("create", (0, ""), (1, ""), (0, ""))
    cloud.answers("delete", (0, ""))
    cloud.answers("follow", (255, ""), (0, ""))
    done = cloud.start(*tpu("--restarts=0"))
    assert done.returncode == 0, done.stderr
    made = ["create", "scp", "ssh setup-ran", "describe"]
    gone = [*made, "ssh start", "ssh follow", "describe", "describe", "delete", "create", "describe"]
    too_late = ["describe", *made, "describe"]
    there = ["describe", *made, "ssh start", "ssh follow", "ssh launch.finished"]
    assert verbs(cloud) == ["describe", *gone, *too_late, *there]
    assert "demo is PREEMPTED; it is made anew" in done.stderr
    create = next(c["argv"] for c in cloud.calls("gcloud") if c["argv"][3] == "create")
    assert create[4:] == ["demo", "--zone=us-x1", "--accelerator-type=v5p-16", "--version=v2", "--spot"]
    wait_for(lambda: len(train_calls(cloud)) == 2)
    for call in train_calls(cloud):
        assert call["argv"] == TRAIN[1:]
        assert call["cwd"] == str(cloud.folder / "machine" / "tmljax")
        assert call["told"] == {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "2"}
    assert (cloud.folder / "machine" / "tmljax" / "launch" / "train.py").exists()
    assert not (cloud.folder / "machine" / "tmljax" / ".git").exists()


def test_a_tpu_vm_on_its_way_is_waited_for_and_never_deleted(cloud):
    """Before any training and after it has begun; none of this is a failure."""
    before = ["CREATING", "STARTING", "RESTARTING", "REIMAGING"]
    after = ["REPAIRING", "REPAIRING", "STOPPING", "UNHIDING"]
    on_its_way = [[(0, json.dumps({"state": state})) for state in states] for states in (before, after)]
    cloud.answers("describe", *on_its_way[0], *[(0, READY)] * 2, *on_its_way[1], (0, READY))
    cloud.answers("follow", (255, ""), (0, ""))
    (cloud.folder / "machine").mkdir()
    done = cloud.start(*tpu("--restarts=0"))
    assert done.returncode == 0, done.stderr
    asked = verbs(cloud)
    assert asked[:5] == ["describe"] * 5
    assert asked.count("ssh start") == 2
    assert not {"create", "delete"} & set(asked)
    for state in before + after[1:]:
        assert f"demo is {state}; looking again in 0 seconds" in done.stderr
    assert done.stderr.count("training was stopped before its end") == 1


@pytest.mark.parametrize("state", ["STOPPED", "HIDDEN", "UNKNOWN"])
def test_a_tpu_vm_that_rests_is_left_to_who_stopped_it(cloud, state):
    cloud.answers("describe", (0, json.dumps({"state": state})))
    refuses(cloud.start(*tpu()), f"demo is {state}; start it with gcloud compute tpus tpu-vm start demo --zone=us-x1")
    assert verbs(cloud) == ["describe"]


def test_a_tpu_vm_that_trains_already_is_followed_and_its_failure_stops_the_others(cloud):
    """Nothing of the far side is faked but the training: it says something, fails once, and then is at its end."""
    machine = cloud.folder / "machine" / "tmljax"
    shutil.copytree(ROOT / "launch", machine / "launch")
    (machine / ".venv" / "bin").mkdir(parents=True)
    (machine / ".venv" / ".installed").write_text(tpu_vm.Files.tracked(Shell(dry=False)).digest)
    (machine / ".venv" / "bin" / "python").symlink_to(cloud.folder / "bin" / "python")
    cloud.answers("describe", (0, READY))
    cloud.answers("launch.train", (9, "boom\n"), (0, "trained\n"))
    done = cloud.start(*tpu())
    assert done.returncode == 0, done.stderr
    look = ["describe", "ssh", "describe", "ssh start", "ssh follow"]
    assert verbs(cloud) == [*look, "ssh stop", "describe", *look, "ssh launch.finished"]
    assert "failed with exit code 9" in done.stderr
    assert (machine / "train.log").read_text() == "boom\ntrained\n"
    assert len(train_calls(cloud)) == 2


def test_a_tpu_vm_whose_installation_failed_is_installed_again(cloud):
    cloud.answers("describe", (0, READY))
    pip = cloud.folder / "bin" / "pip"
    pip.write_text(pip.read_text() + "\nimport sys\nsys.exit(0 if answer('pip', (0, ''))[0] == 0 else 1)\n")
    cloud.answers("pip", (1, ""), (2, ""), (0, ""))  # 2 of pip is no mistake of the user's
    done = cloud.start(*tpu())
    assert done.returncode == 0, done.stderr
    fill = ["describe", "ssh", "ssh", "scp", "ssh setup-ran"]
    assert verbs(cloud) == [*fill, *fill, *fill, "describe", "ssh start", "ssh follow", "ssh launch.finished"]


@pytest.fixture
def trained(cloud):
    """A slice on which a training runs, with other files than those here."""
    cloud.answers("describe", (0, READY))
    machine = cloud.folder / "machine" / "tmljax"
    shutil.copytree(ROOT / "launch", machine / "launch")
    (machine / ".venv" / "bin").mkdir(parents=True)
    (machine / ".venv" / "bin" / "python").symlink_to(cloud.folder / "bin" / "python")
    (cloud.folder / "train.waits").touch()
    subprocess.run(["bash", "launch/tpu_vm.sh", "start", *TRAIN], cwd=machine, env=cloud.environment, check=True)
    wait_for((cloud.folder / "train.started").exists)
    yield machine
    subprocess.run(["bash", "launch/tpu_vm.sh", "stop", "20"], cwd=machine, env=cloud.environment, check=True)


def test_nothing_is_copied_beneath_a_training_that_runs(cloud, trained):
    cloud.answers("follow", (255, ""), (0, ""))
    done = cloud.start(*tpu("--restarts=1"))
    assert done.returncode == 0, done.stderr
    assert "demo trains with other files than those here; it goes on with them" in done.stderr
    assert not {"scp", "ssh setup-ran"} & set(verbs(cloud))
    assert len(train_calls(cloud)) == 1
    assert not (trained / tpu_vm.INSTALLED).exists()


def test_a_connection_that_is_lost_is_no_missing_installation(cloud):
    cloud.answers("describe", (0, READY))
    cloud.answers("ssh", (255, ""))
    assert cloud.start(*tpu("--restarts=1")).returncode == 255
    assert set(verbs(cloud)) == {"describe", "ssh"}


def test_a_pid_of_before_the_last_boot_is_nobodys(cloud, trained):
    def idle():
        words = ["bash", "launch/tpu_vm.sh", "idle"]
        return subprocess.run(words, cwd=trained, env=cloud.environment, check=False).returncode == 0

    assert not idle()
    noted = (trained / "train.pid").read_text()
    (trained / "train.pid").write_text(f"{noted.split()[0]} another-boot\n")
    assert idle()
    (trained / "train.pid").write_text(noted)


def test_the_project_is_named_in_every_call(cloud):
    cloud.answers("describe", (0, json.dumps({"state": "TERMINATED"})), (0, READY))
    (cloud.folder / "machine").mkdir()
    done = cloud.start(*tpu("--project=mine", "--restarts=1"))
    assert done.returncode == 0, done.stderr
    assert {call["argv"][3] for call in cloud.calls("gcloud")} == {"list", "describe", "delete", "create", "scp", "ssh"}
    assert all("--project=mine" in call["argv"] for call in cloud.calls("gcloud"))
    assert re.search(r"delete demo .*--project=mine", done.stderr)


def test_what_git_would_track_is_packed_and_has_a_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_vm, "ROOT", tmp_path / "clone")
    shell, clone = Shell(dry=False), tmp_path / "clone"
    clone.mkdir()
    with pytest.raises(UserError, match=r"git lists no files of .*clone; start from a clone"):
        tpu_vm.Files.tracked(shell)
    subprocess.run(["git", "init", "--quiet", str(clone)], check=True)
    for name, text in {"a b.py": "1", "gone.py": "2", ".gitignore": "runs\n", "runs": "big"}.items():
        (clone / name).write_text(text)
    subprocess.run(["git", "-C", str(clone), "add", "gone.py"], check=True)
    (clone / "gone.py").unlink()
    files = tpu_vm.Files.tracked(shell)
    files.pack(tmp_path / "archive")
    with tarfile.open(tmp_path / "archive") as archive:
        assert archive.getnames() == list(files.names) == [".gitignore", "a b.py"]
    (clone / "a b.py").write_text("3")
    assert tpu_vm.Files.tracked(shell).digest != files.digest
    for config in ("runs", "/elsewhere/x.py"):
        with pytest.raises(UserError, match="is not copied to the workers"):
            tpu_vm.check_config(training.Training("/w", config, Experiment()), files)
    tpu_vm.check_config(training.Training("/w", "a b.py", Experiment()), files)


def test_the_setup_of_a_worker_comes_before_the_installation_and_may_bring_its_python(cloud):
    programs = cloud.folder / "bin"
    cloud.answers("describe", (0, READY))
    setup = f"test -e .venv || ln -s {programs}/python3 {programs}/python3.12; echo setup-ran"
    done = cloud.start(*tpu(f"--setup={setup}", "--python=python3.12"))
    assert done.returncode == 0, done.stderr
    assert [call["argv"][:2] for call in cloud.calls("python3.12")][1:] == [["-m", "venv"]]
    assert not cloud.calls("python3")


def test_the_setup_of_a_worker_that_fails_ends_the_installation(cloud):
    cloud.answers("describe", (0, READY))
    done = cloud.start(*tpu("--setup=false; false", "--restarts=0"))
    assert done.returncode == 1
    assert not cloud.calls("python3")


@pytest.mark.parametrize(("python", "version"), [("python3", (3, 10, 12)), ("python3.99", (3, 99))])
def test_a_worker_whose_python_is_older_is_no_reason_to_try_again(cloud, python, version):
    cloud.answers("describe", (0, READY))
    cloud.answers("version", version)
    done = cloud.start(*tpu(f"--python={python}"))
    assert done.returncode == 2
    assert f"error: tmljax needs Python 3.11 or newer, and {python} of demo is older or not there; " in done.stderr
    assert "demo still exists, and costs" in done.stderr
    assert verbs(cloud) == ["describe", "ssh", "ssh", "scp", "ssh setup-ran"]
    assert not cloud.calls("pip")


def test_the_python_of_a_worker_is_as_new_as_the_project_wants():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert wanted == ">=" + ".".join(map(str, tpu_vm.NEEDED))


def test_who_is_not_logged_in_is_told_at_once(cloud):
    cloud.answers("list", (1, ""))
    done = cloud.start(*tpu())
    assert done.returncode == 2
    assert "gcloud compute tpus tpu-vm list ... failed with exit code 1" in done.stderr
    assert len(cloud.calls("gcloud")) == 1


def test_start_on_a_worker_is_once_and_stop_is_sigterm(cloud):
    machine = cloud.folder / "machine"
    shutil.copytree(ROOT / "launch", machine / "launch")
    (cloud.folder / "train.waits").touch()

    def on_worker(*words):
        return subprocess.run(["bash", "launch/tpu_vm.sh", *words], cwd=machine, env=cloud.environment, check=False)

    for _ in range(2):
        assert on_worker("start", *TRAIN).returncode == 0
        wait_for(lambda: (cloud.folder / "train.started").exists())
    assert len(train_calls(cloud)) == 1
    assert on_worker("stop", "20").returncode == 0
    assert (cloud.folder / "train.stopped").exists()
    assert on_worker("follow").returncode == 0


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
