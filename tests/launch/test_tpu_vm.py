"""launch.tpu_vm. Far sides are run by a fake gcloud: a flag with spaces and quotes has been through every shell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import tomllib

import pytest

from launch import tpu_vm, training
from launch.starter import Shell
from tests.launch.fakes import (
    GCLOUD,
    INSTALLER,
    PYTHON,
    ROOT,
    STARTERS,
    TRAIN,
    Fakes,
    refuses,
    train_calls,
    wait_for,
)
from tmljax.config import Experiment, UserError


@pytest.mark.parametrize("place", ["--workdir=runs/a", "--config.data.root=data"])
def test_a_folder_of_each_worker_alone_is_refused(tmp_path, place):
    done = Fakes(tmp_path).start("tpu_vm", *STARTERS["tpu_vm"], "--dry-run", "--", *TRAIN, place)
    refuses(done, f"{place} behind -- would be another folder on each worker, and go with it; name one of a disk that")


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
