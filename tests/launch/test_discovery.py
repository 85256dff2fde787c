"""Processes find one another by what each starter leaves in their environment: two real ones, every time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import jax
import pytest

from tests.launch.fakes import ROOT
from tmljax import cluster

MEET = """
from tmljax import cluster
cluster.initialize()
print(cluster.process_index(), cluster.process_count(), cluster.is_lead())
"""
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "TPU_"))}
QUIET = CLEAN | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def free_slurm_job() -> int:
    """A job number whose port, as JAX derives it, is free."""
    for job in range(1, 4096):
        with socket.socket() as s:
            if s.connect_ex(("localhost", job + 61440)):
                return job
    raise AssertionError("every port is taken")


def meet(environments: list[dict[str, str]], *command: str) -> list[str]:
    command = command or (sys.executable, "-c", MEET)
    children = [
        subprocess.Popen(command, env=QUIET | told, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for told in environments
    ]
    return [child.communicate(timeout=300)[0].splitlines()[-1] for child in children]


BOTH = ["0 2 True", "1 2 False"]


def test_slurm_steps_find_one_another():
    """What srun sets, as launch/slurm.sh calls it."""
    told = {
        "SLURM_JOB_ID": str(free_slurm_job()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
        "JAX_LOCAL_DEVICE_IDS": "0",
    }
    assert meet([told | {"SLURM_PROCID": str(i)} for i in range(2)]) == BOTH


def test_pods_and_hosts_by_ssh_find_one_another(tmp_path):
    """Two slices of one pod each, through launch/pod.sh; launch/ssh.py sets the same three variables."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" = launch.finished ] || exec {sys.executable} -c "$MEET"\n')
    python.chmod(0o755)
    told = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2", "MEET": MEET}
    pods = [told | {"JOB_INDEX": str(i), "JOB_COMPLETION_INDEX": "0"} for i in range(2)]
    assert meet(pods, "bash", "launch/pod.sh", "1", str(python), "-m", "launch.train") == BOTH


@pytest.mark.parametrize("index", [None, "3"])
def test_a_worker_of_a_tpu_vm_asks_the_machine_for_its_number(monkeypatch, index):
    """launch/tpu_vm.py names the first worker and their number; JAX has the rest from the metadata server."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **known: asked.append(known))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:8476")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", index) if index else monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    cluster.initialize()
    assert asked == [{"num_processes": 4, "process_id": None if index is None else 3}]
