"""One experiment on one slice: what every estimate starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from tmljax.config import Experiment, UserError
from tmljax.model.interaction import Definition
from tmljax.plan.hardware import Slice
from tmljax.sharding import AXES, BATCH_AXES, check_platform, check_sizes, fill, members
from tmljax.stream.microturn import FRAMES, MEL, MICROTURN_SECONDS, PATCH_VALUES, SEEN_WORDS, Layout
from tmljax.train.optimizer import make_optimizer
from tmljax.train.state import State, abstract_state, split

BYTES = {"float32": 4, "bfloat16": 2}  # of a number


@dataclass(frozen=True)
class Shapes:
    """A model's parameters without the model, which takes seconds to trace: all that a state and its cost need."""

    params: Any
    names: Any
    held: Any  # as a tick holds them

    def abstract(self) -> Any:
        return self.params

    def axes(self) -> Any:
        return self.names


def shapes_of(definition: Definition) -> Shapes:
    return _trace(replace(definition, model=replace(definition.model, remat="none")))


@lru_cache
def _trace(definition: Definition) -> Shapes:
    return Shapes(definition.abstract(), definition.axes(), definition.held())


@dataclass(frozen=True)
class Setting:
    experiment: Experiment
    where: Slice
    axes: Mapping[str, int]  # sizes of the mesh

    @property
    def definition(self) -> Definition:
        return Definition(self.experiment.stream, self.experiment.model)

    @property
    def shapes(self) -> Shapes:
        return shapes_of(self.definition)

    @property
    def layout(self) -> Layout:
        return Layout(self.experiment.stream)

    @property
    def mesh(self) -> AbstractMesh:
        return AbstractMesh(tuple(self.axes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))

    @cached_property
    def state(self) -> State:
        """Shapes and shardings of all that a training step changes."""
        optimizer = make_optimizer(self.experiment.optimizer, split(self.shapes.axes())[0])
        return abstract_state(self.shapes, optimizer, self.mesh)

    @property
    def members(self) -> int:
        """Devices that work on examples of their own."""
        return members(self.axes, BATCH_AXES)

    @property
    def examples(self) -> float:
        """Of a device, in one micro-batch."""
        return self.experiment.data.batch / self.experiment.optimizer.accumulate / self.members

    @property
    def length(self) -> int:
        """Positions of an example."""
        return len(self.layout.positions(self.experiment.data.window))

    @property
    def positions(self) -> float:
        """Of a device, in one micro-batch."""
        return self.examples * self.length / self.axes["context"]

    @property
    def conversation(self) -> float:
        """Seconds of it in a step, over all devices."""
        return self.experiment.data.batch * self.experiment.data.window * MICROTURN_SECONDS

    @property
    def width(self) -> int:
        """Bytes of a number in the activations."""
        return BYTES[self.experiment.model.dtype]


def settle(experiment: Experiment, where: Slice) -> Setting:
    """Raises UserError where the mesh does not make up the slice, the batch or the model does not divide over it, or
    its chips lack what the config asks for."""
    if experiment.mesh.slices != 1:
        raise UserError(
            f"config.mesh.slices={experiment.mesh.slices}: a plan is of one slice; set config.mesh.slices=1"
        )
    setting = Setting(experiment, where, fill(experiment.mesh, where.devices))
    check_sizes(experiment, setting.axes)
    check_platform(experiment.model, setting.axes, where.chip.kind, where.chip.name)
    _ = setting.state
    return setting


def shard_bytes(tree: Any) -> int:
    """What one device holds of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def batch_shapes(experiment: Experiment, examples: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of every array of a batch, as the loader makes it (tmljax/stream/weave.py)."""
    layout, T = Layout(experiment.stream), experiment.data.window
    frames = T // experiment.stream.video_every
    shapes = {
        "user_dmel": ((T, FRAMES, MEL), np.uint8),
        "user_present": ((T,), np.bool_),
        "video": ((frames, layout.patches, PATCH_VALUES), np.uint8),
        "video_present": ((frames,), np.bool_),
        "user_text": ((T, layout.user_text), np.int32),
        "model_text": ((T, layout.model_text), np.int32),
        "model_mel": ((T, FRAMES, MEL), np.float16),
        "heard": ((T,), np.int32),
        "seen": ((frames, SEEN_WORDS), np.int32),
        "valid": ((T,), np.bool_),
        "start": ((), np.int32),
    }
    return {name: ((examples, *shape), jnp.dtype(dtype)) for name, (shape, dtype) in shapes.items()}
