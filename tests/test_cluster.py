"""What a process does when it is asked to leave."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TRAINING = """
import ctypes, os, signal
from tmljax import cluster

cluster.leave_when_asked()
with cluster.StopNotice() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.wanted
print("saved", flush=True)
lock = ctypes.create_string_buffer(64)  # a mutex of C, which no signal ends the wait for
while True:
    ctypes.CDLL(None).pthread_mutex_lock(lock)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the layout of a mutex is Linux's")
def test_a_notice_is_the_loops_there_and_ends_the_process_elsewhere_whatever_it_waits_for():
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", TRAINING], cwd=ROOT, **streams) as process:
        assert process.stdout.readline() == "saved\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == "asked to leave, with nothing to save; the same command goes on\n"
