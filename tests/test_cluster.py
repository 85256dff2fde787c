"""What a process does when it is asked to leave."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TRAINING = """
import ctypes, os, signal, sys, time
from tmljax import cluster

sys.setswitchinterval(60)  # so that other threads hear of the signal after the notice only
cluster.leave_when_asked()
with cluster.StopNotice() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.wanted
time.sleep(0.2)
print("saved", flush=True)
lock = ctypes.create_string_buffer(64)  # a mutex of C, which no signal ends the wait for
while True:
    ctypes.CDLL(None).pthread_mutex_lock(lock)
"""


ALONE = """
from tmljax import cluster

cluster.leave_when_asked()
print("waits", flush=True)
cluster.initialize()
"""


def test_a_notice_ends_a_process_that_waits_for_the_others_to_start():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    named = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", ALONE], cwd=ROOT, env=os.environ | named, **streams) as process:
        assert process.stdout.readline() == "waits\n"
        while not listens(address):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert "asked to leave" in said


def listens(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as there:
        return there.connect_ex((host, int(port))) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the layout of a mutex is Linux's")
def test_a_notice_is_the_loops_there_and_ends_the_process_elsewhere_whatever_it_waits_for():
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", TRAINING], cwd=ROOT, **streams) as process:
        assert process.stdout.readline() == "saved\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == "asked to leave, with nothing to save; the same command goes on\n"
