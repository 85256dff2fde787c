"""Trains on a Kubernetes cluster with the JobSet controller (GKE: TPU slices or GPU nodes), a process in each pod.

    python -m launch.gke --name=demo --image=REGISTRY/tmljax --hosts=4 --resource=google.com/tpu:4 \\
        --node=cloud.google.com/gke-tpu-accelerator=tpu-v5p-slice --node=cloud.google.com/gke-tpu-topology=2x2x4 \\
        --claim=shared:/mnt/shared -- python -m launch.train --config=configs/demo.py --workdir=/mnt/shared/demo \\
        --config.data.root=/mnt/shared/data

The image has this repository as its working directory, installed with the extra for its accelerator, as
launch/Dockerfile makes it:

    git archive HEAD | docker build --file=launch/Dockerfile --tag=REGISTRY/tmljax -

The workdir and config.data.root lie on a volume that all pods see (--claim). A pod that is evicted gets SIGTERM: the
training saves, and all pods are started again and go on, which does not count; a training that fails counts as one of
--restarts. --dry-run prints the manifest.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import yaml
from absl import flags

from launch import starter
from tmljax.config import Experiment, UserError

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # pods are called NAME-host-SLICE-HOST-xxxxx, in 63 letters
JOB = "host"  # the replicated job
CONTAINER = "train"
TPU = "google.com/tpu"
SHARED_MEMORY = ("memory", "/dev/shm")  # batches come from data workers through it; a pod has 64 MiB by default


def define_flags() -> None:
    flags.DEFINE_string("name", None, "of the job set", required=True)
    flags.DEFINE_string("image", None, "container image of this repository, by launch/Dockerfile say", required=True)
    flags.DEFINE_integer("hosts", None, "pods of a slice", required=True, lower_bound=1)
    flags.DEFINE_integer(
        "slices",
        1,
        "slices, joined by the data center's network; of TPUs, the training needs --config.mesh.slices=SLICES then",
        lower_bound=1,
    )
    flags.DEFINE_multi_string("resource", [], "what each pod gets, as NAME:AMOUNT; google.com/tpu:4, memory:400Gi")
    flags.DEFINE_multi_string("node", [], "label that the nodes must have, as NAME=VALUE")
    flags.DEFINE_multi_string("claim", [], "volume that all pods see, as CLAIM:/MOUNT")
    flags.DEFINE_string("namespace", None, "of Kubernetes; kubectl's own by default")
    flags.DEFINE_integer("grace", 300, "seconds between the notice of an eviction and the end", lower_bound=1)
    flags.DEFINE_integer("restarts", 10, "how often a training that fails is started again", lower_bound=0)
    flags.DEFINE_bool("dry-run", False, "print the manifest, and create nothing")


class Job(NamedTuple):
    """The flags."""

    name: str
    image: str
    hosts: int
    slices: int
    resources: dict[str, str]
    nodes: dict[str, str]
    claims: dict[str, str]  # claim -> where it is mounted
    grace: int
    restarts: int


def main(argv: Sequence[str]) -> int:
    command, given = starter.command(), flags.FLAGS
    if not NAME.fullmatch(given.name):
        raise UserError(f"--name={given.name} must be at most 40 of a-z, 0-9 and -, beginning with a letter")
    job = Job(
        given.name,
        given.image,
        given.hosts,
        given.slices,
        pairs("resource", ":", "AMOUNT"),
        pairs("node", "="),
        pairs("claim", ":", "/MOUNT"),
        given.grace,
        given.restarts,
    )
    if command.training.experiment is not None:
        check_slices(job, command.training.experiment)
    check_claims(job, command.training.places())
    text = yaml.safe_dump(manifest(job, command), sort_keys=False, width=120)
    where = [f"--namespace={given.namespace}"] if given.namespace else []
    if given["dry-run"].value:
        print(f"# kubectl {' '.join([*where, 'create', '--filename=-'])}")
        print(text, end="")
        return 0
    shell = starter.Shell(dry=False)
    shell.check("kubectl", *where, "create", "--filename=-", input=text)
    first = f"jobset.sigs.k8s.io/jobset-name={job.name},jobset.sigs.k8s.io/job-index=0"
    first += ",batch.kubernetes.io/job-completion-index=0"
    starter.say(f"follow it with: kubectl {' '.join([*where, 'logs', '--follow', f'--selector={first}'])}")
    return 0


def pairs(flag: str, between: str, right: str = "VALUE") -> dict[str, str]:
    """The values of a repeated flag, each NAME and `right` with `between` in the middle."""
    found = {}
    for item in flags.FLAGS[flag].value:
        name, separator, value = item.partition(between)
        if not (name and separator and value) or (right.startswith("/") and not value.startswith("/")):
            raise UserError(f"--{flag}={item} must be NAME{between}{right}")
        if name in found:
            raise UserError(f"--{flag} gives {name} twice, as {found[name]} and as {value}")
        found[name] = value
    return found


def check_slices(job: Job, experiment: Experiment) -> None:
    """Raises UserError where the mesh of the training has another number of slices, with which all pods would end.

    GPUs form no slices of themselves: `tmljax.sharding.arrange` counts their processes.
    """
    known = experiment.mesh.slices
    if TPU in job.resources and known != job.slices:
        raise UserError(
            f"config.mesh.slices is {known}; with --slices={job.slices} add --config.mesh.slices={job.slices} behind --"
        )


def check_claims(job: Job, places: dict[str, str]) -> None:
    """Raises UserError where what must outlive a pod would lie on the pod's own disk."""
    mounts = [PurePosixPath(mount) for mount in job.claims.values()]
    for name, path in places.items():
        if not any(PurePosixPath(path).is_relative_to(mount) for mount in mounts):
            raise UserError(
                f"--{name}={path} behind -- is on no volume that all pods see; mount one with --claim=CLAIM:/MOUNT "
                f"and name a folder there: --{name}=/MOUNT/..."
            )


def manifest(job: Job, command: starter.Command) -> dict[str, Any]:
    """JobSet of jobset.x-k8s.io/v1alpha2: one job a slice, one pod a host, all started again when one fails."""
    spec = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": job.restarts,
            "restartStrategy": "BlockingRecreate",  # never two generations of pods on one workdir
            "rules": [
                {
                    "name": "stopped",
                    "action": "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                }
            ],
        },
        "replicatedJobs": [{"name": JOB, "replicas": job.slices, "template": {"spec": slice_spec(job, command)}}],
    }
    metadata: dict[str, Any] = {"name": job.name}
    if TPU in job.resources:  # a slice is a node pool, whole
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def slice_spec(job: Job, command: starter.Command) -> dict[str, Any]:
    """The job of a slice. It fails for PodFailurePolicy when a pod was evicted, or stopped before training's end."""
    return {
        "parallelism": job.hosts,
        "completions": job.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [starter.AGAIN]},
                },
            ]
        },
        "template": {"spec": pod_spec(job, command)},
    }


def pod_spec(job: Job, command: starter.Command) -> dict[str, Any]:
    index = "metadata.labels['jobset.sigs.k8s.io/job-index']"
    words = ["bash", "launch/pod.sh", str(job.hosts), *command.words()]
    container = {
        "name": CONTAINER,
        "image": job.image,
        "command": [word.replace("$", "$$") for word in words],  # Kubernetes would expand $(NAME)
        "ports": [{"containerPort": starter.PORT}],
        "env": [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{job.name}-{JOB}-0-0.{job.name}:{starter.PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(job.hosts * job.slices)},
            {"name": "JOB_INDEX", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        ],
        "resources": {"requests": dict(job.resources), "limits": dict(job.resources)},
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in (SHARED_MEMORY, *job.claims.items())],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace,
        "nodeSelector": job.nodes,
        "containers": [container],
        "volumes": [
            {"name": SHARED_MEMORY[0], "emptyDir": {"medium": "Memory"}},
            *({"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in job.claims),
        ],
    }


if __name__ == "__main__":
    define_flags()
    sys.exit(starter.run(main))
