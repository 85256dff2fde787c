"""Mesh axes, and the one table from the dimensions of parameters to them.

`data` holds replicas and may cross DCN; `fsdp` splits parameters and examples, `expert` experts and examples,
`context` the micro-turns of an example, `tensor` heads and widths. Any of them may be 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tmljax.config import Experiment, Mesh, Model, UserError

AXES = ("data", "fsdp", "expert", "context", "tensor")  # the slowest network first
BATCH_AXES = ("data", "fsdp", "expert")  # these work on examples of their own
TOKEN_AXES = (*BATCH_AXES, "context")  # and these on positions of their own


class Place(NamedTuple):
    axes: tuple[str, ...]  # of the mesh, that divide it together
    field: str | None  # of the config, that says how many there are to divide


# Logical dimension of a parameter -> where it goes. The one table to edit for a new topology.
# What all experts share is divided by the expert axis too, so that no device holds a second copy of it.
PLACEMENT: dict[str, Place] = {
    "layers": Place((), "model.layers"),
    "embed": Place(("fsdp", "expert"), "model.d_model"),
    "expert_embed": Place(("fsdp",), "model.d_model"),  # the same dimension of an expert's matrices
    "heads": Place(("tensor",), "model.heads"),
    "kv_heads": Place(("tensor",), "model.kv_heads"),
    "experts": Place(("expert",), "model.moe.experts"),
    "width": Place(("tensor",), "model.moe.expert_width"),
    "shared_width": Place(("tensor",), "model.moe.shared_width"),
    # The first of matrices whose last dim XLA:TPU would sum whole before it scatters the gradient.
    "inner_width": Place(("tensor", "fsdp"), "model.moe.expert_width"),
    "inner_shared_width": Place(("tensor", "fsdp", "expert"), "model.moe.shared_width"),
    "vocab": Place(("tensor",), "stream.vocab_size"),
    "frame": Place(("fsdp",), "model.d_model"),
    "flow": Place(("fsdp", "expert"), "model.flow.width"),
    "input": Place((), None),
    "small": Place((), None),
}


def make_mesh(config: Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Raises UserError when the sizes do not make up the number of devices or do not lie along their torus, or the
    slices are not there."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = fill(config, len(devices))
    try:
        places = arrange(sizes, config.slices, devices)
    except NotImplementedError:  # of JAX
        said = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        raise UserError(
            f"config.mesh ({said}) does not lie along the torus of these {len(devices)} devices; "
            f"try sizes that are products of its dims or of their factors"
        ) from None
    return jax.sharding.Mesh(places, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fill(config: Mesh, devices: int) -> dict[str, int]:
    """Size of each axis, an open one filled. Raises UserError naming the nearest size that works."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()) or config.slices < 1:
        raise UserError(f"config.mesh {sizes} needs sizes of at least 1, and -1 on one axis at most")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and devices % fixed == 0:
        sizes[open_axes[0]] = devices // fixed
    if math.prod(sizes.values()) == devices:
        return sizes
    remedies = []
    for axis, size in sizes.items():
        others = fixed // size
        if axis not in open_axes and (size > 1 or fixed == 1) and devices % others == 0:
            remedies.append(
                either(f"mesh.{axis}", divisors(devices // others, size) if open_axes else [devices // others])
            )
    said = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "1 on each axis"
    remedy = ", or ".join(remedies) or f"sizes that divide {devices}"
    raise UserError(f"config.mesh ({said}) has {fixed} places for {devices} devices; {remedy} would do")


def arrange(sizes: dict[str, int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """Devices in mesh order: neighbours on the fast network, and `slices` groups along `data`, which DCN joins.

    Groups are what the devices call a slice, or the processes where they name none. Raises UserError.
    """
    shape = tuple(sizes.values())
    found = len({getattr(device, "slice_index", 0) for device in devices})
    processes = len({device.process_index for device in devices})
    if slices == 1 and (found == 1 or devices[0].platform != "tpu"):
        return arrange_slice(shape, devices)
    if slices != found and not (found == 1 and slices == processes):
        raise UserError(
            f"config.mesh.slices={slices}, but the devices are in {found} slices and {processes} processes; "
            f"set config.mesh.slices={found}"
        )
    if sizes["data"] % slices:
        near = " or ".join(str(size) for size in multiples(sizes["data"], slices))
        raise UserError(
            f"config.mesh.data={sizes['data']} is not a multiple of config.mesh.slices={slices}; try {near}"
        )
    inside, across = (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, process_is_granule=slices != found, allow_split_physical_axes=True
    )


def arrange_slice(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # of JAX: an axis is no product of whole physical ones
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def multiples(size: int, of: int) -> list[int]:
    """The nearest multiples, below and above."""
    below = size // of * of
    return [near for near in (below, below + of) if near]


def divisors(size: int, near: int) -> list[int]:
    """The nearest divisors, below and above."""
    all_of_them = [n for n in range(1, size + 1) if size % n == 0]
    below, above = (n for n in all_of_them if n < near), (n for n in all_of_them if n > near)
    return [*list(below)[-1:], *list(above)[:1]]


def either(field: str, sizes: Iterable[int]) -> str:
    return f"config.{field}=" + " or ".join(str(size) for size in sizes)


def check(experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError for what the mesh does not divide or its platform lacks, naming the field and a remedy."""
    check_sizes(experiment, mesh.shape)
    check_platform(experiment.model, mesh.shape, platform(mesh), mesh.devices.flat[0].device_kind)


def check_sizes(experiment: Experiment, sizes: Mapping[str, int]) -> None:
    """Raises UserError for what mesh axes of these sizes do not divide, naming the nearest that work."""
    for place in dict.fromkeys(PLACEMENT.values()):
        if place.axes and place.field is not None:
            size = reduce(getattr, place.field.split("."), experiment)
            copied = place.field == "model.kv_heads" and members(sizes, place.axes) % size == 0
            if size % members(sizes, place.axes) and not copied:
                near = either(place.field, multiples(size, members(sizes, place.axes)))
                mesh_near = nearest_axes(sizes, place.axes, size)
                remedy = f"{mesh_near} does, and so would {near}" if mesh_near else f"{near} would do"
                raise UserError(f"{said(sizes, place.axes)} does not divide config.{place.field}={size}; {remedy}")
    groups, parts = members(sizes, BATCH_AXES), experiment.optimizer.accumulate
    batch, window = experiment.data.batch, experiment.data.window
    if batch % (groups * parts):
        near = divisors(batch // parts, groups) if batch % parts == 0 else []
        mesh = f"a mesh where that is {' or '.join(map(str, near))}, or " if near else ""
        raise UserError(
            f"config.data.batch={batch} does not divide over {' x '.join(BATCH_AXES)} = {groups} of config.mesh and "
            f"config.optimizer.accumulate={parts}; try {mesh}{either('data.batch', multiples(batch, groups * parts))}"
        )
    context, every = sizes["context"], experiment.stream.video_every
    if context > 1 and window % (context * every):
        raise UserError(
            f"config.mesh.context={context} does not divide config.data.window={window} into whole multiples of "
            f"config.stream.video_every={every}; try {either('data.window', multiples(window, context * every))}"
        )


def platform(mesh: jax.sharding.Mesh | None) -> str:
    """What a program on this mesh, or without one, is compiled for: "cpu", "gpu" or "tpu"."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


HOPPER = ("h100", "h200")  # in the kinds of these devices
HOPPER_WIDTH = 128  # of which both sides of a matrix must be multiples


def check_platform(model: Model, sizes: Mapping[str, int], platform: str, kind: str) -> None:
    """Raises UserError for what the platform lacks, or this kind of its devices, naming what it has."""
    moe = model.moe
    if model.attention == "splash" and platform != "tpu":
        raise UserError(
            f"config.model.attention='splash' is a kernel for TPUs; on {platform} use config.model.attention='blocks'"
        )
    if moe.exchange == "ragged" and sizes["expert"] > 1 and platform == "cpu":
        raise UserError(
            f"config.model.moe.exchange='ragged' needs jax.lax.ragged_all_to_all, which XLA has on TPU and GPU, not on "
            f"{platform}; with config.mesh.expert={sizes['expert']} use config.model.moe.exchange='padded' here"
        )
    remedy = {"cpu": "'blocks'", "tpu": "'grouped'", "gpu": "'hopper' (H100, H200) or 'ragged'"}[platform]
    if moe.matmul == "grouped" and platform != "tpu":
        raise UserError(
            f"config.model.moe.matmul='grouped' is a kernel for TPUs; on {platform} use "
            f"config.model.moe.matmul={remedy}"
        )
    if moe.matmul == "hopper":
        if not any(name in kind.lower() for name in HOPPER):
            remedy = "'ragged'" if platform == "gpu" else remedy
            raise UserError(
                f"config.model.moe.matmul='hopper' is a kernel for NVIDIA H100 and H200; on {kind} use "
                f"config.model.moe.matmul={remedy}"
            )
        check_hopper(model, sizes)


def check_hopper(model: Model, sizes: Mapping[str, int]) -> None:
    """What the kernels of tmljax/ops/hopper.py ask for."""
    if model.dtype != "bfloat16":
        raise UserError(
            f"config.model.moe.matmul='hopper' multiplies bfloat16; with it set config.model.dtype='bfloat16', or keep "
            f"'{model.dtype}' and use config.model.moe.matmul='ragged'"
        )
    for field, size, axes in (
        ("d_model", model.d_model, ()),
        ("moe.expert_width", model.moe.expert_width, ("tensor",)),
    ):
        unit = HOPPER_WIDTH * members(sizes, axes)
        if size % unit:
            over = f" on {said(sizes, axes)}" if unit > HOPPER_WIDTH else ""
            raise UserError(
                f"config.model.moe.matmul='hopper' needs multiples of {unit}{over}, and config.model.{field}={size}; "
                f"try {either(f'model.{field}', multiples(size, unit))}"
            )


def members(sizes: Mapping[str, int], axes: Iterable[str]) -> int:
    """Of these axes together."""
    return math.prod(sizes[axis] for axis in axes)


def said(sizes: Mapping[str, int], axes: Iterable[str]) -> str:
    return " x ".join(f"config.mesh.{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1)


def nearest_axes(sizes: Mapping[str, int], axes: Iterable[str], size: int) -> str:
    """The nearest sizes of each axis, the others as they are, that divide `size`; "" where there are none."""
    remedies = []
    for axis in axes:
        others = members(sizes, axes) // sizes[axis]
        if sizes[axis] > 1 and size % others == 0:
            remedies.append(either(f"mesh.{axis}", divisors(size // others, sizes[axis])))
    return ", or ".join(remedies)


def param_shardings(mesh: jax.sharding.Mesh, axes: Any, params: Any) -> Any:
    """NamedShardings for a tree of parameters, from the tree of their logical dimensions.

    Raises UserError for a dimension that its mesh axes do not divide, and for two on one axis.
    """

    def place(names: tuple[str, ...], param: Any) -> NamedSharding:
        for name, size in zip(names, param.shape, strict=True):
            axes, field = PLACEMENT[name]
            if size % members(mesh.shape, axes):
                near = nearest_axes(mesh.shape, axes, size)
                raise UserError(
                    f"{said(mesh.shape, axes)} does not divide the model's {name} dimension of {size} "
                    f"(config.{field}){f'; {near} does' if near else ''}"
                )
        return NamedSharding(mesh, spec(names))

    return jax.tree.map(place, axes, params, is_leaf=lambda x: isinstance(x, tuple))


def spec(names: Sequence[str]) -> PartitionSpec:
    """Of an array with these logical dimensions. Raises UserError where two of them take one mesh axis."""
    places = [PLACEMENT[name].axes for name in names]
    for axis in AXES:
        both = [name for name, axes in zip(names, places, strict=True) if axis in axes]
        if len(both) > 1:
            raise UserError(
                f"PLACEMENT in tmljax/sharding.py puts {' and '.join(both)} of one parameter on mesh axis {axis!r}; "
                "move one"
            )
    return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in places))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """For arrays whose first dim is the batch, as they come from the loader: every member of `context` has all of T."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def spread(batch: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Arrays [B, T, ...] of a batch, or of what became of it, with T split over `context`."""
    if mesh is None or mesh.size == 1:
        return batch
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context"))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding) if x.ndim > 1 else x, batch)


def whole(weight: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """A weight gathered for use. Said where XLA would rather gather all examples to work on a part of the weight."""
    if mesh is None or mesh.size == 1:
        return weight
    return jax.lax.with_sharding_constraint(weight, replicated(mesh))


def look_up(table: jax.Array, index: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """Rows [B, T, ..., D] of a table ("vocab", "embed").

    Within a group along `data` each device takes the part of the rows that it holds, of all the group's examples. Not
    told so, XLA gathers the gradients of all groups' examples over the slowest network, to add them up in each.
    """
    rows = table[index]
    if mesh is None or mesh.shape["data"] == 1:
        return rows
    between = (None,) * (rows.ndim - 3)
    held = NamedSharding(mesh, PartitionSpec("data", "context", *between, PLACEMENT["embed"].axes))
    return spread(jax.lax.with_sharding_constraint(rows, held), mesh)


def process_rows(mesh: jax.sharding.Mesh, batch: int, process: int | None = None) -> np.ndarray:
    """Which rows of a batch a process reads, this one by default: those of its devices, in ascending order.

    Processes that `context` or `tensor` joins read the same rows. Raises UserError where two share some rows only.
    """
    process = jax.process_index() if process is None else process
    groups = members(mesh.shape, BATCH_AXES)
    owner = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(groups, -1)
    held = {index: (owner == index).any(axis=1) for index in np.unique(owner).tolist()}
    mine = held[process]
    if any((mine & other).any() and (mine != other).any() for other in held.values()):
        raise UserError(
            f"processes of {np.sum(owner == process)} devices share some of their examples but not all, with "
            f"config.mesh.context={mesh.shape['context']} and config.mesh.tensor={mesh.shape['tensor']}; choose sizes "
            "that divide a process or are divided by it"
        )
    return np.flatnonzero(np.repeat(mine, batch // groups))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
