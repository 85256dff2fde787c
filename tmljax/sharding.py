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

# Logical dimension of a parameter -> mesh axis. The one table to edit for a new topology.
PLACEMENT: dict[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
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
    sizes = {axis: getattr(config, axis) for axis in AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"config.mesh {sizes} needs sizes of at least 1, and -1 on one axis at most")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise UserError(f"config.mesh {sizes} has {math.prod(sizes.values())} places for {len(devices)} devices")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def param_shardings(mesh: jax.sharding.Mesh, axes: Any, params: Any) -> Any:
    """NamedShardings for a tree of parameters, from the tree of their logical dimensions.

    Raises UserError for a dimension that its mesh axis does not divide.
    """

    def place(names: tuple[str, ...], param: Any) -> NamedSharding:
        spec = [PLACEMENT[name] for name in names]
        taken = [axis for axis in spec if axis is not None]
        assert len(taken) == len(set(taken)), f"{names} puts two dimensions on one mesh axis"
        for name, axis, size in zip(names, spec, param.shape, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"config.mesh.{axis}={mesh.shape[axis]} does not divide the model's {name} dimension of {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, axes, params, is_leaf=lambda x: isinstance(x, tuple))


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
