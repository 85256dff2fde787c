"""The supervisor, with hosts that are a few lines of Python and need no JAX."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local

ROOT = Path(__file__).parents[2]
PRELUDE = "import os, signal, sys, time; from tmljax import pulse; me = int(os.environ['JAX_PROCESS_ID']); "
SLEEP = "time.sleep(60)"


def host(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", PRELUDE + "\n" + code)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def supervise(code: str, hosts: int = 2, **options) -> int:
    return local.supervise(local.Options(host(code), hosts, **options))


def test_each_line_says_whose_it_is_and_hosts_differ_only_by_their_number(capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_other")
    names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PLATFORMS")
    code = f"print(*(os.environ['JAX_' + n] for n in {names}), os.environ['XLA_FLAGS']); print('bad', file=sys.stderr)"
    assert supervise(code, hosts=3, devices=4) == 0
    out, err = capfd.readouterr()
    (said,) = {line.split(" | ")[1] for line in out.splitlines()}
    assert sorted(line.split(" | ")[0] for line in out.splitlines()) == ["host 0", "host 1", "host 2"]
    assert said.startswith("127.0.0.1:")
    assert said.endswith(" 3 cpu --xla_other --xla_force_host_platform_device_count=4")
    assert sorted(err.splitlines()) == ["host 0 | bad", "host 1 | bad", "host 2 | bad"]


def test_help_says_that_nothing_is_started_again_by_default():
    helped = subprocess.run([sys.executable, "-m", "launch.local", "--help"], capture_output=True, text=True)
    (line,) = (line for line in helped.stdout.splitlines() if line.startswith("  --max-restarts"))
    assert line.endswith("; with 0 one ends the run (default: '0')")
    assert "because one of them got SIGTERM say, succeeded: the run ends with 0" in " ".join(helped.stdout.split())


def test_of_a_progress_bar_a_state_now_and_then(capfd):
    code = "sys.stderr.write(''.join(f'\\r{n}' for n in range(1000)) + '\\nend\\n')"
    assert supervise(code, hosts=1) == 0
    said = capfd.readouterr().err.splitlines()
    assert said[-2:] == ["host 0 | 999", "host 0 | end"]
    assert len(said) < 5


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("sys.exit(7)", 7, "host 1 ended with exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "host 1 was ended by SIGKILL"),
    ],
)
def test_one_failure_ends_all_and_is_named(capfd, end, code, said):
    began = time.monotonic()
    assert supervise(f"{end} if me == 1 else {SLEEP}") == code
    assert time.monotonic() - began < 30
    assert capfd.readouterr().err == f"error: {said}; all hosts were ended\n"


def test_all_start_again_over_a_fresh_port_as_often_as_allowed(capfd, tmp_path):
    note = f"open('{tmp_path}/' + str(me), 'a').write(os.environ['JAX_COORDINATOR_ADDRESS'] + '\\n')"
    fails = f"{note}; sys.exit(3 if me == 1 and len(open('{tmp_path}/1').readlines()) < 3 else 0)"
    assert supervise(fails, restarts=1) == 3
    assert "all hosts start again (1 of 1)" in capfd.readouterr().err
    assert supervise(fails, restarts=1) == 0
    assert len(set((tmp_path / "1").read_text().splitlines())) == 3


def test_a_users_mistake_is_not_tried_again(capfd):
    assert supervise("print('error: the cause', file=sys.stderr); sys.exit(2)", hosts=1, restarts=5) == 2
    assert capfd.readouterr().err == "host 0 | error: the cause\n"


def test_sigterm_is_handed_on_and_hosts_that_saved_have_succeeded(capfd, tmp_path):
    saves = "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(0)))"
    ready = f"open('{tmp_path}/' + str(me), 'w').close()"
    waits = f"\nwhile me == 0 and len(os.listdir('{tmp_path}')) < 2: time.sleep(0.01)"
    asks = "\nif me == 0: os.kill(os.getppid(), signal.SIGTERM)"
    assert supervise(f"{saves}; {ready}{waits}{asks}\n{SLEEP}", restarts=3) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["host 0 | saved", "host 1 | saved"]


def test_ctrl_c_lets_hosts_finish_and_a_second_one_does_not(capfd):
    saves = "signal.signal(signal.SIGINT, lambda *_: (print('saved'), sys.exit(130)))"
    asks = "if me == 0: os.kill(os.getppid(), signal.SIGINT)"
    assert supervise(f"{saves}\n{asks}\n{SLEEP}", hosts=1, restarts=3) == 130
    assert capfd.readouterr().out == "host 0 | saved\n"
    stubborn = "signal.signal(signal.SIGINT, lambda *_: os.kill(os.getppid(), signal.SIGINT))"
    assert supervise(f"{stubborn}\n{asks}\nwhile True: {SLEEP}", hosts=1, restarts=3) == 130


FROZEN = "pulse.begin(); pulse.at('step 7', 14, True)\nif me == 1: os.kill(os.getpid(), signal.SIGSTOP)\n" + SLEEP
STUCK = "pulse.at(f'step {8 - me}', 8 - me, True); pulse.begin()\n" + SLEEP


STALLED = "pulse.at('checkpoint') if me == 1 else pulse.at('step 8', 8, True); pulse.begin()\n" + SLEEP
TOGETHER = "pulse.at('checkpoint'); pulse.begin()\n" + SLEEP


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (FROZEN, "host 1 hangs: it has given no sign of life since"),
        (STUCK, "host 1 hangs: it has been at step 7 since"),
        (STALLED, "host 1 hangs: it has been at checkpoint since"),
        (TOGETHER, "one of 2 hosts hangs: all have been at checkpoint since"),
    ],
)
def test_a_host_that_hangs_is_named(capfd, code, said):
    assert supervise(code, hang_seconds=8.0, stall_seconds=9.0) == 124
    err = capfd.readouterr().err
    assert err.startswith(f"error: {said}")
    assert len(err.splitlines()) == 1


def test_what_gets_on_does_not_stall():
    code = "pulse.at('building'); pulse.begin()\nfor _ in range(8): time.sleep(0.5); pulse.goes_on()"
    assert supervise(code, stall_seconds=2.0) == 0


def test_a_command_without_signs_of_life_does_not_hang():
    assert supervise("time.sleep(2)", hang_seconds=1.0) == 0


def test_no_host_outlives_a_supervisor_that_is_killed(tmp_path):
    child = f"import subprocess; subprocess.Popen(['sleep', '77']); open('{tmp_path}/' + str(me), 'w'); {SLEEP}"
    code = f"from launch import local; local.supervise(local.Options({host(child)!r}, 2))"
    supervisor = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    while len(list(tmp_path.iterdir())) < 2:
        assert supervisor.poll() is None
        time.sleep(0.05)
    assert len(members(supervisor.pid)) >= 6  # itself, guard, hosts, their children
    supervisor.kill()
    supervisor.wait()
    deadline = time.monotonic() + 30
    while members(supervisor.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members(supervisor.pid)


def members(session: int) -> list[str]:
    """Processes of a session, but for the dead."""
    found = subprocess.run(["ps", "-A", "-o", "sess=,stat=,args="], capture_output=True, text=True, check=True)
    lines = [line.split(None, 2) for line in found.stdout.splitlines()]
    return [args for sess, stat, args in lines if sess == str(session) and not stat.startswith("Z")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hosts=2"], "there is nothing to run: end with -- python -m launch.train"),
        (["--hosts=0", "--", "true"], "hosts"),
        (["--host=2", "--", "true"], "host"),
        (["--hosts=2", "--", "no-such-program"], "cannot start no-such-program: No such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(words, said):
    done = subprocess.run([sys.executable, "-m", "launch.local", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert said in done.stderr


def test_help_is_its_own_and_not_the_commands():
    words = [sys.executable, "-m", "launch.local"]
    asked = subprocess.run([*words, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0
    assert "--max-restarts" in asked.stdout
    handed_on = subprocess.run(
        [*words, "--hosts=1", "--", "sh", "-c", "echo $0", "--help"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert handed_on.stdout == "host 0 | --help\n"
