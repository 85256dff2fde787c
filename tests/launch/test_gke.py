"""The manifest for Kubernetes keeps to the JobSet API, and its pods do what their scheduler needs of them."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from launch import gke as gke_starter
from tests.launch.fakes import ANSWER, PYTHON, ROOT, STARTERS, TRAIN, Fakes, refuses, wait_for


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path, python=PYTHON)


def gke(*more, train=()):
    resources = ["--resource=google.com/tpu:4", "--resource=memory:400Gi"]
    where = ["--node=cloud.google.com/gke-tpu-topology=2x2x2"]
    return ("gke", *STARTERS["gke"], *resources, *where, *more, "--", *TRAIN, *train)


KEEP = "open(here + '/manifest', 'w').write(sys.stdin.read())\n" + ANSWER


def test_the_manifest_keeps_to_the_schema_and_is_what_kubectl_gets(tmp_path):
    fakes = Fakes(tmp_path, kubectl=KEEP)
    slices = ["--config.mesh.slices=3"]
    done = fakes.start(*gke("--slices=3", "--namespace=ml", train=slices))
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls("kubectl")
    assert call["argv"] == ["--namespace=ml", "create", "--filename=-"]
    dry = fakes.start(*gke("--slices=3", "--namespace=ml", "--dry-run", train=slices))
    found = yaml.safe_load((tmp_path / "manifest").read_text())
    assert yaml.safe_load(dry.stdout) == found
    schema = json.loads((Path(__file__).with_name("jobset.schema.json")).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(found, schema)
    (job,) = found["spec"]["replicatedJobs"]
    assert (job["replicas"], job["template"]["spec"]["completions"]) == (3, 2)
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    told = {item["name"]: item.get("value") for item in container["env"]}
    assert told["JAX_NUM_PROCESSES"] == "6"
    assert told["JAX_COORDINATOR_ADDRESS"] == "demo-host-0-0.demo:8476"
    assert [word.replace("$$", "$") for word in container["command"]] == ["bash", "launch/pod.sh", "2", *TRAIN, *slices]
    assert not any("$" in word.replace("$$", "") for word in container["command"])  # Kubernetes expands what is single


def test_the_schema_sees_what_is_wrong(tmp_path):
    found = yaml.safe_load(Fakes(tmp_path).start(*gke("--dry-run")).stdout)
    schema = json.loads((Path(__file__).with_name("jobset.schema.json")).read_text())
    found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["restartPolicy"] = "OnFailure"
    with pytest.raises(jsonschema.ValidationError, match="Never"):
        jsonschema.validate(found, schema)


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--name=Demo", "--name=Demo"),
        ("--resource=tpu", "NAME:AMOUNT"),
        ("--node=x", "NAME=VALUE"),
        ("--claim=c:mnt", "--claim=c:mnt must be NAME:/MOUNT"),
        ("--resource=google.com/tpu:8", "--resource gives google.com/tpu twice, as 4 and as 8"),
        ("--hosts=0", "hosts"),
    ],
)
def test_gke_refuses_what_kubernetes_would(tmp_path, flag, complaint):
    refuses(Fakes(tmp_path).start(*gke(flag, "--dry-run")), complaint)


@pytest.mark.parametrize(
    ("slices", "train", "known"),
    [
        (4, [], 1),
        (4, ["--config.mesh.slices=4", "--config.mesh.slices", "2"], 2),
        (4, ["--config_field=mesh.slices=2"], 2),
        (1, ["--config.mesh.slices=2"], 2),
    ],
)
def test_slices_that_the_mesh_does_not_know_of_are_refused(tmp_path, slices, train, known):
    done = Fakes(tmp_path).start(*gke(f"--slices={slices}", "--dry-run", train=train))
    refuses(
        done,
        f"config.mesh.slices is {known}; with --slices={slices} add --config.mesh.slices={slices} behind --",
    )


@pytest.mark.parametrize("place", ["--workdir=/elsewhere/run", "--config.data.root=data"])
def test_what_must_outlive_a_pod_lies_on_a_volume(tmp_path, place):
    done = Fakes(tmp_path).start(*gke("--dry-run", train=[place]))
    refuses(done, f"{place} behind -- is on no volume that all pods see; mount one with --claim=CLAIM:/MOUNT")


def test_groups_of_gpu_nodes_may_be_one_mesh(fakes):
    nodes = ["--hosts=1", "--slices=4", "--resource=nvidia.com/gpu:8", "--dry-run"]
    done = fakes.start("gke", *STARTERS["gke"], *nodes, "--", *TRAIN)
    assert done.returncode == 0, done.stderr


def test_the_image_is_of_what_the_repository_has():
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    said = dict(line.split(" ", 1) for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    argument, extra = said["ARG"].split("=")
    assert extra in project["optional-dependencies"]
    assert said["RUN"].endswith(f'--constraint constraints.txt --editable ".[${argument}]"')
    assert "--file=launch/Dockerfile" in lines[1]
    assert lines[1].lstrip("# ") in gke_starter.__doc__


@pytest.mark.parametrize(("train", "finished", "expected"), [(0, 0, 0), (0, 75, 75), (7, 0, 7), (2, 0, 2)])
def test_a_pod_knows_its_number_and_leaves_with_75_when_there_is_more_to_do(fakes, train, finished, expected):
    fakes.answers("launch.train", (train, ""))
    fakes.answers("launch.finished", (finished, ""))
    fakes.environment |= {"JOB_INDEX": "2", "JOB_COMPLETION_INDEX": "3"}
    assert fakes.run("bash", "launch/pod.sh", "4", *TRAIN).returncode == expected
    call = fakes.calls("python")[0]
    assert (call["argv"], call["told"]) == (TRAIN[1:], {"JAX_PROCESS_ID": "11"})


def test_a_pod_that_is_evicted_stops_the_training_and_waits_until_it_has_saved(fakes):
    (fakes.folder / "train.waits").touch()
    fakes.answers("launch.finished", (75, ""))
    environment = fakes.environment | {"JOB_INDEX": "0", "JOB_COMPLETION_INDEX": "0"}
    pod = subprocess.Popen(["bash", "launch/pod.sh", "1", *TRAIN], cwd=ROOT, env=environment)
    wait_for(lambda: (fakes.folder / "train.started").exists())
    pod.terminate()
    assert pod.wait(timeout=30) == 75
    assert (fakes.folder / "train.stopped").exists()


def test_the_code_of_a_child_that_ends_within_the_signal_is_not_lost(tmp_path):
    """The trap returns when the child is no more; `wait` had already left with the signal's own code."""
    script = f"""
        . launch/child.sh
        kill() {{ builtin kill "$@" && sleep 0.5; }}
        begin bash -c "trap 'exit 3' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
        await
        exit $code
    """
    shell = subprocess.Popen(["bash", "-c", script], cwd=ROOT)
    wait_for(lambda: (tmp_path / "up").exists())
    shell.terminate()
    assert shell.wait(timeout=30) == 3
