"""Times against arithmetic done by hand."""

import contextlib
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from tmljax import config
from tmljax.plan.hardware import CHIPS, Run, find_slice, runs_of
from tmljax.plan.roofline import Traffic, Work, collective_seconds, hops_of, terms
from tmljax.sharding import AXES
from tmljax.train.speed import peak_flops

V5P = find_slice("v5p:4x8x8")
RING = (Run(8, True),)


def axes(**sizes):
    return dict.fromkeys(AXES, 1) | sizes


def test_a_gather_on_a_ring_goes_both_ways_round():
    """Seven eighths of 8 GB arrive over two links of 90 GB/s."""
    assert collective_seconds(Traffic("fsdp", "all-gather", 8e9, 0.0), 8, RING, V5P) == pytest.approx(7e9 / 180e9)


def test_a_reduction_to_all_is_a_scatter_and_a_gather():
    one = collective_seconds(Traffic("fsdp", "reduce-scatter", 8e9, 0.0), 8, RING, V5P)
    assert collective_seconds(Traffic("fsdp", "all-reduce", 8e9, 0.0), 8, RING, V5P) == pytest.approx(2 * one)


def test_an_exchange_is_as_fast_as_the_middle_of_the_ring():
    """Eight devices send 1 GB each; half of what four of them send crosses to the other side over two cuts."""
    crossing = 4 * 1e9 / 2
    assert collective_seconds(Traffic("expert", "all-to-all", 1e9, 1.0), 8, RING, V5P) == pytest.approx(
        crossing / (2 * 90e9)
    )
    line = collective_seconds(Traffic("expert", "all-to-all", 1e9, 1.0), 8, (Run(8, False),), V5P)
    assert line == pytest.approx(crossing / 90e9)


@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("sizes", [(2,), (5,), (8,), (4, 8), (8, 8), (2, 4, 4)], ids=str)
def test_a_shift_crosses_as_many_links_as_there_are_messages_on_the_busiest(sizes, ring):
    """Message by message, one dim after another, each the shorter way round where there are two."""
    runs = [Run(size, ring) for size in sizes]
    for shift in range(1, math.prod(sizes)):
        load = Counter[tuple]()
        for sender in range(math.prod(sizes) - shift):
            at, end = (list(map(int, np.unravel_index(device, sizes))) for device in (sender, sender + shift))
            for dim, size in enumerate(sizes):
                way = (end[dim] - at[dim]) % size if ring else end[dim] - at[dim]
                way = way - size if ring and way > size / 2 else way
                for _ in range(abs(way)):
                    load[dim, *at, way > 0] += 1
                    at[dim] = (at[dim] + (1 if way > 0 else -1)) % size
        assert hops_of(shift, runs) == max(load.values())


def test_a_shift_goes_over_one_link_at_a_time():
    """The fourth before: a gigabyte from each of four passes the middle, one way."""
    shift = Traffic("context", "collective-permute", 1e9, 1.0, hops=hops_of(4, RING))
    assert collective_seconds(shift, 8, RING, V5P) == pytest.approx(4e9 / 90e9)
    h200 = find_slice("h200:2x4")
    inside, across = (Run(4, True), Run(1, False)), (Run(1, True), Run(2, False))
    assert collective_seconds(shift, 4, inside, h200) == pytest.approx(1e9 / CHIPS["h200"].link)
    assert collective_seconds(shift, 2, across, h200) == pytest.approx(1e9 / CHIPS["h200"].host_link)


def test_a_chip_of_two_devices_has_the_links_of_one():
    one, two = (find_slice(f"{kind}:4x4x4").chip for kind in ("v5p", "tpu7x"))  # 1200 GB/s a chip, both
    assert two.link == one.link / 2


@pytest.mark.parametrize(
    ("name", "kind", "peak"),
    [
        ("v5e:2x2", "TPU v5 lite", 4 * 197e12),
        ("tpu7x:2x2x1", "TPU7x", 4 * 2307e12),
        ("h200:1x8", "NVIDIA H200", 8 * 989e12),
    ],
)
def test_a_plan_and_a_run_count_on_the_same_flops(name, kind, peak):
    """A chip of TPU7x is two devices."""
    where = find_slice(name)
    assert where.devices * where.chip.flops == peak
    assert peak_flops([SimpleNamespace(device_kind=kind)] * where.devices) == peak


def test_gpus_leave_the_node_over_their_network_card():
    where = find_slice("h200:8x8")
    placed = runs_of(where, axes(fsdp=8, expert=8))
    assert placed["expert"] == (Run(8, True), Run(1, False))
    assert placed["fsdp"] == (Run(1, True), Run(8, False))
    gather = Traffic("fsdp", "all-gather", 8e9, 0.0)
    assert collective_seconds(gather, 8, placed["expert"], where) == pytest.approx(7e9 / CHIPS["h200"].link)
    assert collective_seconds(gather, 8, placed["fsdp"], where) == pytest.approx(7e9 / CHIPS["h200"].host_link)
    both = (*placed["fsdp"], *placed["expert"])  # 64 members, eight of them in a node share what enters it
    assert collective_seconds(gather, 64, both, where) == pytest.approx(8e9 * 63 / 64 / 8 / CHIPS["h200"].host_link)


def test_later_axes_choose_their_torus_dims_first():
    placed = runs_of(V5P, axes(fsdp=4, expert=64))
    lying = {axis: runs for axis, runs in placed.items() if runs}
    assert lying == {"fsdp": (Run(4, True),), "expert": (Run(8, True), Run(8, True))}
    assert runs_of(find_slice("v5p:2x2x1"), axes(fsdp=2, expert=2))["expert"] == (Run(2, False),)


def test_rings_close_in_whole_cubes_and_along_sixteen_of_a_square():
    assert runs_of(find_slice("v5p:2x2x4"), axes(fsdp=4, expert=4))["fsdp"] == (Run(4, False),)
    assert runs_of(find_slice("v5p:4x4x4"), axes(fsdp=16, expert=4))["expert"] == (Run(4, True),)
    lying = runs_of(find_slice("v5e:8x16"), axes(fsdp=8, expert=16))
    assert (lying["fsdp"], lying["expert"]) == ((Run(8, False),), (Run(16, True),))


@pytest.mark.parametrize(("name", "made"), [("v4:16x16x16", True), ("v4:16x16x20", False), ("v5p:16x16x24", True)])
def test_no_slice_is_larger_than_its_pod(name, made):
    with contextlib.nullcontext() if made else pytest.raises(config.UserError, match="no slice of v4 has this shape"):
        assert find_slice(name).chips


def test_what_waits_is_added_and_the_rest_is_as_long_as_its_longest_part():
    work = Work(
        flops=459e12 * 0.8 * 3,
        memory=2.765e12 * 0.85 * 2,
        traffic=[
            Traffic("fsdp", "all-gather", 180e9 * 4 / 3, 0.0),
            Traffic("expert", "all-gather", 360e9 * 64 / 63 * 0.5, 1.0),
        ],
    )
    t = terms(work, V5P, axes(fsdp=4, expert=64))
    assert (t.matmul, t.memory) == (pytest.approx(3), pytest.approx(2))
    assert t.links == {"fsdp": pytest.approx(1), "expert": pytest.approx(0.5)}
    assert t.step == pytest.approx(3.5)
    assert t.binds == "matmul"
    half = work._replace(traffic=[work.traffic[0], work.traffic[1]._replace(waits=0.5)])
    assert terms(half, V5P, axes(fsdp=4, expert=64)).step == pytest.approx(3.25)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5q:4x8x8", "did you mean v5p.* v5p:4x8x8"),
        ("v5p:4x8", "a shape of v5p is 3 whole numbers from 1 on; known are v5p:2x2x1"),
        ("h200:8", "h200 is 2 whole numbers"),
        ("v5p", "known are"),
        ("v5e:0x4", "known are"),
        ("h200:0x8", "h200 is 2 whole numbers from 1 on"),
        ("v5p:1x4x1", "no slice of v5p has this shape"),
        ("v5p:4x4x4000", "no slice of v5p has this shape"),
        ("v5p:3x7x5", "no slice of v5p has this shape; known are v5p:2x2x1"),
        ("v6e:3x4", "no slice of v6e has this shape"),
        ("v5p:8x8x4", "did you mean v5p:4x8x8"),
        ("v5p:1x2x2", "did you mean v5p:2x2x1"),
        ("v5e:8x4", "did you mean v5e:4x8"),
    ],
)
def test_an_unknown_topology_lists_those_known(name, says):
    with pytest.raises(config.UserError, match=says):
        find_slice(name)


@pytest.mark.parametrize("name", ["v5p:2x2x2", "v5p:4x4x12", "v4:2x4x4", "tpu7x:8x8x8", "v5e:4x8", "b200:16x8"])
def test_slices_that_are_made_are_taken(name):
    assert find_slice(name).chips > 0
