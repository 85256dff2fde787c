"""What must go on does so when nobody reads what it says."""

import io
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tmljax import checkpoint
from tmljax.terminal import Terminal
from tmljax.train.metrics import FILE, read_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture
def start(monkeypatch):
    """Starts a process with three pipes, and ends it with what it started."""
    started = []

    def start(*words, **environment):
        started.append(
            subprocess.Popen(
                words, cwd=ROOT, env=os.environ | environment, stdin=-1, stdout=-1, stderr=-1, start_new_session=True
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def test_what_the_encoding_lacks_is_a_question_mark():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, "latin-1", errors="strict")
    Terminal(out).say("é — ☃ \udc80")
    assert raw.getvalue() == "é ? ? ?\n".encode("latin-1")


def test_a_full_disk_is_no_error():
    out = io.TextIOWrapper(open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    Terminal(out).say("hello")
    out.detach().close()


def test_nothing_is_left_to_fail_at_the_end_when_the_reader_leaves(start):
    code = (
        "import sys; from tmljax.terminal import Terminal; input(); [Terminal(sys.stdout).say('x') for _ in range(9)]"
    )
    process = start(sys.executable, "-c", code)
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert (process.wait(60), process.stderr.read()) == (0, b"")


@pytest.mark.parametrize("log_every", [1, 2])
def test_a_training_whose_connection_is_lost_saves_and_has_succeeded(tmp_path, start, log_every):
    """As by ssh from a machine that vanishes: what it reads and what it prints to are closed at once, and the step that
    it is told to stop at has a row to print."""
    train = [sys.executable, "tests/train/toy.py", str(tmp_path), "100000", "0.05", str(log_every)]
    process, said = start("bash", "launch/ssh.sh", "60", *train, PYTHONPATH=str(ROOT)), b""
    while b"step 6/" not in said:
        assert select.select([process.stderr], [], [], 60)[0]
        said += os.read(process.stderr.fileno(), 1 << 16)
    for pipe in (process.stdout, process.stderr, process.stdin):
        pipe.close()
    assert process.wait(60) == 0
    assert checkpoint.steps(tmp_path)[-1] >= read_rows(tmp_path / FILE)[-1]["step"] > 4


def test_hosts_that_fail_start_again_though_nobody_reads_it(tmp_path, start):
    mark = tmp_path / "mark"
    code = f"mark = open({str(mark)!r}, 'a+'); mark.write('x'); raise SystemExit(mark.tell() == 1)"
    words = [sys.executable, "-m", "launch.local", "--hosts=1", "--max-restarts=2", "--", sys.executable, "-c", code]
    process = start(*words)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 0
    assert mark.read_text() == "xx"


TRAIN = ["python", "-m", "launch.train", "--config=configs/smoke.py", "--workdir=/w"]


@pytest.mark.parametrize(
    ("starter", "command"),
    [
        (["launch.local", "--hosts=1"], ["ssh"]),
        (["launch.ssh", "--hosts=ada", "--folder=/", "--restarts=0"], TRAIN),
    ],
)
def test_whatever_a_host_prints_is_taken_from_it(tmp_path, start, starter, command):
    """More than a pipe holds, in no encoding, for a terminal that knows few letters and then for nobody."""
    flood = "printf '\\377 \\342\\200\\224\\n'; head -c 1000000 /dev/zero | tr '\\0' '\\n'"
    done = f"echo done >{tmp_path}/done"
    (tmp_path / "ssh").write_text(f"#!/bin/bash\ncase $* in *finished*) exit 0;; esac\n{flood}; {done}\n")
    (tmp_path / "ssh").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = start(sys.executable, "-m", *starter, "--", *command, PYTHONIOENCODING="latin-1", PATH=path)
    assert process.stdout.read(4)
    process.stdout.close()
    assert process.wait(60) == 0, process.stderr.read()
    assert (tmp_path / "done").exists()
