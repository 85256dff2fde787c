"""Meshes and what does not fit them: each mistake in one line, with the field and what would work."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tmljax import config, sharding
from tmljax.config import Experiment, Mesh, UserError
from tmljax.model.interaction import Definition
from tmljax.sharding import Place, check, make_mesh, param_shardings, process_rows, spec


@dataclass(frozen=True)
class Device:
    """As much of a device as arranging them looks at."""

    id: int
    process_index: int = 0
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def complaint(call, *args) -> str:
    with pytest.raises(UserError) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def experiment(**groups: dict[str, Any]) -> Experiment:
    return config.from_tree(Experiment, groups)


@pytest.mark.parametrize("axis", sharding.AXES)
def test_an_open_axis_takes_what_is_left(axis):
    sizes = {"data": 1, "expert": 2} | {axis: -1}
    mesh = make_mesh(Mesh(**sizes))
    assert mesh.shape[axis] == (8 if axis == "expert" else 4)
    assert mesh.size == 8


def test_tensor_neighbours_are_next_to_each_other_and_replicas_furthest():
    mesh = make_mesh(Mesh(data=2, tensor=2, context=2))
    assert [device.id for device in mesh.devices[0, 0, 0, 0]] == [0, 1]
    assert mesh.devices[1, 0, 0, 0, 0].id == 4


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (Mesh(data=3, fsdp=2), "config.mesh (data=3, fsdp=2) has 6 places for 8 devices; config.mesh.data=4 would do"),
        (Mesh(data=2, tensor=2), "4 places for 8 devices; config.mesh.data=4, or config.mesh.tensor=4 would do"),
        (Mesh(fsdp=3), "(data=-1, fsdp=3) has 3 places for 8 devices; config.mesh.fsdp=2 or 4 would do"),
        (Mesh(data=3, fsdp=3), "has 9 places for 8 devices; sizes that divide 8 would do"),
        (Mesh(data=1), "config.mesh (1 on each axis) has 1 places for 8 devices; config.mesh.data=8, or"),
        (Mesh(data=-1, fsdp=-1), "-1 on one axis at most"),
        (Mesh(context=0), "sizes of at least 1"),
        (Mesh(slices=0), "sizes of at least 1"),
    ],
    ids=str,
)
def test_sizes_that_do_not_make_up_the_devices(mesh, said):
    assert said in complaint(make_mesh, mesh)


def test_slices_lie_along_data_and_nothing_else_leaves_its_slice():
    devices = [Device(i, process_index=i // 2, slice_index=i % 2) for i in range(16)]
    sizes = {"data": 4, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    arranged = sharding.arrange(sizes, 2, devices)
    assert arranged.shape == tuple(sizes.values())
    for replica in arranged:
        assert len({device.slice_index for device in replica.flat}) == 1
    assert [replica.flat[0].slice_index for replica in arranged] == [0, 0, 1, 1]


def test_processes_are_slices_where_devices_name_none():
    devices = [Device(i, process_index=i % 4) for i in range(8)]
    arranged = sharding.arrange(dict.fromkeys(sharding.AXES, 1) | {"data": 4, "fsdp": 2}, 4, devices)
    assert [[device.process_index for device in replica.flat] for replica in arranged] == [[i, i] for i in range(4)]


def test_slices_that_are_not_there_are_named():
    sizes = dict.fromkeys(sharding.AXES, 1) | {"data": 8}
    devices = [Device(i, process_index=i // 4) for i in range(8)]
    assert "config.mesh.slices=4, but the devices are in 1 slices and 2 proc" in complaint(
        sharding.arrange, sizes, 4, devices
    )
    pod = [Device(i, slice_index=i // 4, platform="tpu") for i in range(8)]
    assert complaint(sharding.arrange, sizes, 1, pod).endswith("set config.mesh.slices=2")
    odd = sizes | {"data": 3, "fsdp": 2}
    six = [Device(i, slice_index=i // 3) for i in range(6)]
    assert complaint(sharding.arrange, odd, 2, six) == (
        "config.mesh.data=3 is not a multiple of config.mesh.slices=2; try 2 or 4"
    )


def eight(**sizes: int) -> jax.sharding.Mesh:
    return make_mesh(Mesh(**{"data": 1} | sizes))


@pytest.mark.parametrize(
    ("groups", "sizes", "said"),
    [
        (
            {"model": {"moe": {"experts": 12}}},
            {"expert": 8},
            "config.mesh.expert=8 does not divide config.model.moe.experts=12; config.mesh.expert=6 or 12 does, "
            "and so would config.model.moe.experts=8 or 16",
        ),
        ({"model": {"heads": 6, "kv_heads": 2}}, {"tensor": 8}, "config.model.heads=6; config.mesh.tensor=6 does"),
        (
            {"model": {"heads": 12, "kv_heads": 6}},
            {"tensor": 4, "data": 2},
            "kv_heads=6; config.mesh.tensor=3 or 6 does",
        ),
        ({"model": {"d_model": 100}}, {"fsdp": 8}, "config.model.d_model=96 or 104"),
        (
            {"model": {"d_model": 32, "moe": {"shared_width": 36}}},
            {"fsdp": 4, "expert": 2},
            "config.mesh.fsdp=4 x config.mesh.expert=2 does not divide config.model.moe.shared_width=36; ",
        ),
        ({"stream": {"vocab_size": 1001}}, {"tensor": 2, "data": 4}, "config.stream.vocab_size=1000 or 1002"),
        (
            {"data": {"batch": 12}},
            {"data": 2, "fsdp": 2, "expert": 2},
            "config.data.batch=12 does not divide over data x fsdp x expert = 8 of config.mesh and "
            "config.optimizer.accumulate=1; try a mesh where that is 6 or 12, or config.data.batch=8 or 16",
        ),
        (
            {"data": {"batch": 40}, "optimizer": {"accumulate": 4}},
            {"data": 8},
            "config.optimizer.accumulate=4; try a mesh where that is 5 or 10, or config.data.batch=32 or 64",
        ),
        (
            {"data": {"window": 54, "batch": 2}},
            {"context": 4, "fsdp": 2},
            "config.mesh.context=4 does not divide config.data.window=54 into whole multiples of "
            "config.stream.video_every=2; try config.data.window=48 or 56",
        ),
        (
            {"model": {"moe": {"exchange": "ragged"}}},
            {"expert": 2, "data": 4},
            "config.model.moe.exchange='ragged' needs jax.lax.ragged_all_to_all, which XLA has on TPU and GPU, not on "
            "cpu; with config.mesh.expert=2 use config.model.moe.exchange='padded' here",
        ),
        (
            {"model": {"attention": "splash"}},
            {"fsdp": 8},
            "config.model.attention='splash' is a kernel for TPUs; on cpu use config.model.attention='blocks'",
        ),
        (
            {"model": {"moe": {"matmul": "grouped"}}},
            {"fsdp": 8},
            "config.model.moe.matmul='grouped' is a kernel for TPUs; on cpu use config.model.moe.matmul='blocks'",
        ),
        (
            {"model": {"moe": {"matmul": "hopper"}}},
            {"fsdp": 8},
            "config.model.moe.matmul='hopper' is a kernel for NVIDIA H100 and H200; on cpu use "
            "config.model.moe.matmul='blocks'",
        ),
        (
            {"model": {"d_model": 36}},
            {"fsdp": 4, "expert": 2},
            "config.mesh.fsdp=4 x config.mesh.expert=2 does not divide config.model.d_model=36; config.mesh.fsdp=3 or "
            "6, or config.mesh.expert=1 or 3 does, and so would config.model.d_model=32 or 40",
        ),
        (
            {"model": {"d_model": 33}},
            {"fsdp": 4, "expert": 2},
            "config.model.d_model=33; config.model.d_model=32 or 40 would do",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_the_mesh_does_not_divide_is_named_with_what_would_work(groups, sizes, said):
    roomy = {"model": {"heads": 8, "kv_heads": 8}}
    assert said in complaint(check, experiment(**roomy | groups), eight(**sizes))


def test_what_the_mesh_divides_passes():
    check(experiment(data={"window": 56}), eight(expert=4, context=2))
    check(experiment(model={"heads": 8, "kv_heads": 2}), eight(tensor=8))  # kv heads are copied
    check(experiment(model={"moe": {"exchange": "ragged"}}), eight(fsdp=8))  # nothing to exchange


def test_a_dimension_that_does_not_divide_is_named():
    model = config.Model(d_model=32, heads=8, kv_heads=8, head_dim=8, moe=config.Moe(expert_width=12))
    narrow = Definition(config.Stream(), model)
    said = complaint(param_shardings, eight(tensor=8), narrow.axes(), narrow.abstract())
    assert "config.mesh.tensor=8 does not divide the model's inner_width dimension of 12 (config.model.moe." in said


def test_two_dimensions_on_one_axis_are_named(monkeypatch):
    assert spec(("layers", "experts", "expert_embed", "width")) == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert spec(("embed", "shared_width")) == PartitionSpec(("fsdp", "expert"), "tensor")
    assert complaint(spec, ("experts", "embed")) == (
        "PLACEMENT in tmljax/sharding.py puts experts and embed of one parameter on mesh axis 'expert'; move one"
    )
    monkeypatch.setitem(sharding.PLACEMENT, "embed", Place(("tensor",), "model.d_model"))
    assert complaint(spec, ("embed", "heads")) == (
        "PLACEMENT in tmljax/sharding.py puts embed and heads of one parameter on mesh axis 'tensor'; move one"
    )


def test_every_parameter_of_the_model_is_in_the_table():
    definition = Definition(config.Stream(), config.Model())
    placed = jax.tree.leaves(
        param_shardings(eight(fsdp=2, expert=2, tensor=2), definition.axes(), definition.abstract())
    )
    entries = {entry for sharding in placed for entry in sharding.spec if entry is not None}
    axes = {axis for entry in entries for axis in ([entry] if isinstance(entry, str) else entry)}
    assert axes == {"fsdp", "expert", "tensor"}


def rows_by_process(sizes: dict[str, int], processes: int, batch: int) -> list[list[int]]:
    """Of a mesh whose devices belong to `processes` in turn."""
    per = int(np.prod(list(sizes.values()))) // processes
    devices = np.array([Device(i, process_index=i // per) for i in range(per * processes)])
    mesh = replace_devices(sizes, devices)
    return [process_rows(mesh, batch, process).tolist() for process in range(processes)]


class FakeMesh:
    def __init__(self, sizes, devices):
        self.shape, self.devices = sizes, devices


def replace_devices(sizes, devices):
    sizes = {axis: sizes.get(axis, 1) for axis in sharding.AXES}
    return FakeMesh(sizes, devices.reshape(tuple(sizes.values())))


def test_processes_read_each_row_once():
    assert rows_by_process({"data": 2, "expert": 4}, 4, 16) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]


def test_processes_that_share_an_example_read_the_same_rows():
    assert rows_by_process({"data": 2, "context": 4}, 4, 4) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_rows_follow_the_devices_wherever_they_lie():
    devices = np.array([Device(i, process_index=i % 2) for i in range(4)])
    mesh = replace_devices({"fsdp": 4}, devices)
    assert [process_rows(mesh, 8, p).tolist() for p in (0, 1)] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_processes_that_share_only_some_examples_are_told():
    devices = np.array([Device(i, process_index=i // 3) for i in range(6)])
    mesh = replace_devices({"data": 3, "tensor": 2}, devices)
    assert "config.mesh.tensor=2; choose sizes" in complaint(process_rows, mesh, 6, 0)


def test_axes_that_no_part_of_the_torus_makes_up_are_named(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", refuse)
    with pytest.raises(UserError, match=r"config.mesh \(fsdp=2, expert=4\) does not lie along the torus of these 8"):
        make_mesh(Mesh(data=1, fsdp=2, expert=4))
