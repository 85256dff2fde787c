"""launch.ssh. Far sides are run by a fake ssh: a flag with spaces and quotes has been through every shell."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.launch.fakes import (
    FINISHED,
    PYTHON,
    ROOT,
    SSH,
    TRAIN,
    Fakes,
    train_calls,
    wait_for,
)


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path, python=PYTHON, ssh=SSH)


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
