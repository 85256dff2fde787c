"""Mesh axes, and the one table from the dimensions of parameters to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tmljax.config import Mesh, UserError

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # every device but a tensor neighbour works on its own examples

# Logical dimension of a parameter -> mesh axis or axes. The one table to edit for a new topology.
# What all experts share is split over the expert axis too: no device holds a second copy of anything.
PLACEMENT: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "embed": ("fsdp", "expert"),
    "expert_embed": "fsdp",  # the same dimension of an expert's matrices
    "flow": ("fsdp", "expert"),  # the hidden dimension of the flow head
    "heads": "tensor",
    "kv_heads": "tensor",
    "experts": "expert",
    "width": "tensor",
    "vocab": "tensor",
    "input": None,
    "small": None,
}


def make_mesh(config: Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Raises UserError when the sizes do not make up the number of devices."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = fill(config, len(devices))
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def fill(config: Mesh, devices: int) -> dict[str, int]:
    """Size of each axis, an open one filled. Raises UserError when they do not make up the number of devices."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"config.mesh {sizes} needs sizes of at least 1, and -1 on one axis at most")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = devices // fixed
    if math.prod(sizes.values()) != devices:
        raise UserError(f"config.mesh {sizes} has {math.prod(sizes.values())} places for {devices} devices")
    return sizes


def param_shardings(mesh: jax.sharding.Mesh, axes: Any, params: Any) -> Any:
    """NamedShardings for a tree of parameters, from the tree of their logical dimensions.

    Raises UserError for a dimension that its mesh axis does not divide.
    """

    def place(names: tuple[str, ...], param: Any) -> NamedSharding:
        spec = [PLACEMENT[name] for name in names]
        taken = [axis for entry in spec for axis in axes_of(entry)]
        assert len(taken) == len(set(taken)), f"{names} puts two dimensions on one mesh axis"
        for name, entry, size in zip(names, spec, param.shape, strict=True):
            if size % math.prod(mesh.shape[axis] for axis in axes_of(entry)):
                sizes = " x ".join(f"config.mesh.{axis}={mesh.shape[axis]}" for axis in axes_of(entry))
                raise UserError(f"{sizes} does not divide the model's {name} dimension of {size}")
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, axes, params, is_leaf=lambda x: isinstance(x, tuple))


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """For arrays whose first dim is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: jax.sharding.Mesh, batch: int) -> None:
    """Raises UserError when the batch cannot be split over the mesh."""
    members = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch % members:
        raise UserError(
            f"config.data.batch={batch} is not divisible by the {members} devices of the mesh axes "
            f"{' x '.join(BATCH_AXES)}; the nearest that is: {max(1, round(batch / members)) * members}"
        )


def check_matmul(mesh: jax.sharding.Mesh, matmul: str) -> None:
    """Raises UserError where the platform lacks it."""
    platform = mesh.devices.flat[0].platform
    if matmul == "grouped" and platform != "tpu":
        raise UserError(f"config.model.moe.matmul='grouped' is a TPU kernel; on {platform} use 'ragged' or 'blocks'")
