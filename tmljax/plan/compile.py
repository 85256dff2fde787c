"""The real training step, compiled for a slice that is not there: libtpu's compiler runs on any CPU."""

from __future__ import annotations

import importlib.util
import re
import time
from typing import NamedTuple

import jax
from jax.experimental import topologies

from tmljax.config import UserError
from tmljax.plan import hlo
from tmljax.plan.hardware import Slice, known
from tmljax.plan.setting import Setting, batch_shapes
from tmljax.sharding import batch_sharding, make_mesh
from tmljax.train.objective import objective
from tmljax.train.step import make_program

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class Compiled(NamedTuple):
    """What the compiler says of a device, in bytes; of a program that does not fit there is no text."""

    arguments: float
    temporaries: float
    other: float  # results that take no argument's place, and code
    program: hlo.Program | None
    seconds: float  # that compiling took

    @property
    def total(self) -> float:
        return self.arguments + self.temporaries + self.other


def devices_of(where: Slice) -> list[jax.Device]:
    """Raises UserError where libtpu is not installed or does not know the slice."""
    if not where.compiles:
        raise UserError(f"--topology={where.name} has no compiler that runs without it; use --method=formula")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu: pip install 'tmljax[tpu]'; --method=formula does without")
    try:
        return list(topologies.get_topology_desc(where.name, platform="tpu").devices)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as e:
        kind = where.name.partition(":")[0]
        reason = str(e).splitlines()[0][:200]
        raise UserError(f"--topology={where.name} is unknown to libtpu ({reason}); known are {known(kind)}") from None


def compile_step(setting: Setting, devices: list[jax.Device]) -> Compiled:
    """The step of `launch.train`, from the same source. Raises UserError where the mesh does not fit the torus, and
    where the compiler refuses the program for another reason than its size."""
    experiment = setting.experiment
    mesh = make_mesh(experiment.mesh, devices)
    program = make_program(experiment, setting.definition, objective, mesh)
    sharding = batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in batch_shapes(experiment, experiment.data.batch).items()
    }
    return compile_lowered(program.step.lower(program.abstract, batch))


def compile_lowered(lowered: jax.stages.Lowered) -> Compiled:
    since = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        return too_large(str(e), time.perf_counter() - since)
    memory = compiled.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes,
        hlo.read(compiled.as_text()),
        time.perf_counter() - since,
    )


def too_large(message: str, seconds: float) -> Compiled:
    """What the compiler says of a program that it refuses for its size. Any other complaint is a UserError."""
    found = {
        name: float(number) * UNITS[unit]
        for name, number, unit in re.findall(r"^\s*(program|arguments|reserved)\s+([\d.]+)([KMG])", message, re.M)
    }
    if "program" not in found:
        reason = next((line.strip() for line in message.splitlines() if line.strip()), "it does not say why")[:300]
        raise UserError(
            f"the compiler refuses this step ({reason}); try another mesh, config.model.moe.matmul or "
            "config.model.attention, or --method=formula, which compiles nothing"
        )
    return Compiled(found.get("arguments", 0.0), found["program"], found.get("reserved", 0.0), None, seconds)
