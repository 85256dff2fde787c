"""Reading a compiled program, against one written by hand: 3 layers, one gather each, and its traffic in bytes."""

import pytest

from tmljax.plan import hlo
from tmljax.plan.hardware import find_slice
from tmljax.plan.inspect import gathered_layers
from tmljax.plan.setting import settle

TEXT = """\
HloModule jit_f, is_scheduled=true

%fused (p.0: bf16[3,8,4], p.1: s32[]) -> bf16[1,8,4] {
  %p.0 = bf16[3,8,4]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  ROOT %slice.1 = bf16[1,8,4]{2,1,0} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,8,4}
}

%all-reduce-scatter.1 (q: f32[16,8]) -> f32[8,8] {
  %q = f32[16,8]{1,0} parameter(0)
  %all-reduce.3 = f32[16,8]{1,0} all-reduce(%q), replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %part = f32[8,8]{1,0} slice(%all-reduce.3), slice={[0:8], [0:8]}
}

%cond (c: (s32[], bf16[3,8,4])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[3,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (b: (s32[], bf16[3,8,4])) -> (s32[], bf16[3,8,4]) {
  %b = (s32[]{:T(128)}, bf16[3,8,4]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%b), index=0
  %stack = bf16[3,8,4]{2,1,0} get-tuple-element(%b), index=1
  %fusion.1 = bf16[1,8,4]{2,1,0} fusion(%stack, %i.1), kind=kLoop, calls=%fused
  %gather-start = (bf16[1,8,4]{2,1,0}, bf16[1,16,4]{2,1,0}) all-gather-start(%fusion.1), replica_groups=[2,2]<=[2,2], \
dimensions={1}, metadata={op_name="jit(f)/while/body/dot_general"}
  %gather-done = bf16[1,16,4]{2,1,0} all-gather-done(%gather-start)
  %big = f32[16,8]{1,0} convert(%gather-done)
  %scattered = f32[8,8]{1,0:T(8,128)S(1)} fusion(%big), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], bf16[3,8,4]{2,1,0}) tuple(%i.1, %stack)
}

ENTRY %main (x: bf16[3,8,4]) -> bf16[3,8,4] {
  %x = bf16[3,8,4]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[3,8,4]{2,1,0}) tuple(%zero, %x)
  %loop = (s32[], bf16[3,8,4]{2,1,0}) while(%init), condition=%cond, body=%body
  %whole = bf16[12,8,4]{2,1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}
  ROOT %y = bf16[3,8,4]{2,1,0} get-tuple-element(%loop), index=1
}
"""
AXES = {"data": 1, "fsdp": 2, "expert": 2, "context": 1, "tensor": 1}


@pytest.fixture(scope="module")
def program():
    return hlo.read(TEXT)


def test_the_body_of_a_loop_counts_as_often_as_it_runs(program):
    assert program.times["main"] == 1
    assert program.times["body"] == program.times["all-reduce-scatter.1"] == 3


def test_collectives(program):
    found = {c.operation: (c.bytes, hlo.axis_of(c.members, AXES), c.times, c.waits) for c in program.collectives()
             if c.times > 1}  # fmt: skip
    assert found == {
        "all-gather": (16 * 4 * 2, "expert", 3, True),
        "reduce-scatter": (16 * 8 * 4, "fsdp", 3, True),
    }
    (once,) = [c for c in program.collectives() if c.times == 1]
    assert (once.bytes, hlo.axis_of(once.members, AXES), once.waits) == (12 * 8 * 4 * 2, "fsdp+expert", True)


@pytest.mark.parametrize(
    ("between", "waits"),
    [
        ("%p = f32[8,8]{1,0} dot(%a, %a)", False),
        ("%p = f32[8,8]{1,0} fusion(%a), kind=kOutput, calls=%multiplies", False),
        ("%p = f32[8,8]{1,0} fusion(%a), kind=kOutput, calls=%around", False),
        ("%p = f32[8,8]{1,0} fusion(%a), kind=kLoop, calls=%fused", True),
        ('%gmm.1 = f32[8,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"', False),
        ('%unknown.1 = f32[8,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"', True),
        ('%p = f32[8,8]{1,0} custom-call(%a), custom_call_target="AsyncCollectiveDone"', True),
    ],
)
def test_what_runs_beside_nothing_is_waited_for(between, waits):
    """Begun early or not: a collective is hidden where a product or a known kernel runs before its end."""
    done = "  %gather-done"
    text = TEXT.replace(done, f"  {between}\n{done}").replace(
        "%body (b", "%multiplies (m: f32[8,8]) -> f32[8,8] {\n  %m = f32[8,8]{1,0} parameter(0)\n"
        "  ROOT %d = f32[8,8]{1,0} convolution(%m, %m)\n}\n\n%around (n: f32[8,8]) -> f32[8,8] {\n"
        "  %n = f32[8,8]{1,0} parameter(0)\n  ROOT %f = f32[8,8]{1,0} fusion(%n), kind=kOutput, calls=%multiplies\n"
        "}\n\n%body (b"
    )  # fmt: skip
    found = hlo.read(text).collectives({"gmm": 100.0})
    (gather,) = [c for c in found if c.operation == "all-gather" and c.times == 3]
    assert gather.waits == waits


PRODUCT = 2 * 8 * 4 * 16  # FLOPs of [8, 4] x [4, 16]


@pytest.mark.parametrize(
    ("between", "beside"),
    [
        ("%p = f32[8,16]{1,0} dot(%l, %r)", PRODUCT),
        ("%p = f32[8,16]{1,0} dot(%l, %r)\n  %q = f32[8,16]{1,0} dot(%l, %r)", 2 * PRODUCT),
        ("", 0),
    ],
)
def test_what_the_sparse_core_scatters_is_hidden_as_long_as_products_run(between, beside):
    scattered = "  %scattered = f32[8,8]{1,0:T(8,128)S(1)} fusion(%big), kind=kCustom, calls=%all-reduce-scatter.1"
    text = TEXT.replace(
        scattered,
        "  %l = f32[8,4]{1,0} copy(%big)\n  %r = f32[4,16]{1,0} copy(%big)\n"
        '  %begun = ((f32[16,8]{1,0}), f32[8,8]{1,0}) call-start(%big), async_execution_thread="sparsecore", '
        f"to_apply=%offloaded\n  {between}\n  %scattered = f32[8,8]{{1,0}} call-done(%begun)\n"
        "  %after = f32[8,16]{1,0} dot(%l, %r)",
    ).replace(
        "%cond (c",
        "%offloaded (o: f32[16,8]) -> f32[8,8] {\n  %o = f32[16,8]{1,0} parameter(0)\n  ROOT %r = f32[8,8]{1,0} "
        'reduce-scatter(%o), replica_groups={{0,2},{1,3}}, dimensions={0}\n}, execution_thread="sparsecore"\n\n'
        "%cond (c",
    )
    (scatter,) = [c for c in hlo.read(text).collectives() if c.operation == "reduce-scatter"]
    assert (scatter.bytes, scatter.times, scatter.beside) == (16 * 8 * 4, 3, pytest.approx(beside))


@pytest.mark.parametrize(
    "product",
    [
        "%d = f32[6,8,16]{2,1,0} dot(%l, %r), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}",
        "%d = f32[6,8,16]{2,1,0} convolution(%l, %r), window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf",
    ],
)
def test_products_of_a_batch_are_as_many(product):
    text = (
        "ENTRY %main (l: f32[6,8,4], r: f32[6,4,16]) -> f32[6,8,16] {\n  %l = f32[6,8,4]{2,1,0} parameter(0)\n"
        f"  %r = f32[6,4,16]{{2,1,0}} parameter(1)\n  ROOT {product}\n}}\n"
    )
    program = hlo.read(text)
    assert program.flops(program.computations["main"][-1], "main", {}) == pytest.approx(6 * PRODUCT)


def test_traffic_counts_slices_for_their_size_and_nothing_that_stays_on_chip(program):
    slice_, gathered, big = 8 * 4 * 2, 16 * 4 * 2, 16 * 8 * 4
    layer = (slice_ + 4) + slice_  # the slice and its index read, the slice written
    layer += slice_ + (slice_ + gathered)  # the gather: operand, and the pair that it gives
    layer += gathered + big  # converted
    layer += big  # scattered into on-chip memory
    assert program.traffic_bytes() == 3 * layer + 3 * slice_ * 1 + 12 * 8 * 4 * 2 - 0


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", (0, 2)),
        ("replica_groups=[2,2]<=[4]", (0, 1)),
        ("replica_groups=mesh['x'=2,'y'=1,'z'=2] {'x'}", (0, 2)),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'y','z'}", (0, 4)),
        ("channel_id=1, replica_groups={}", ()),
        ("channel_id=1", ()),
    ],
)
def test_groups_of_devices_in_each_way_that_xla_writes_them(text, members):
    assert hlo.first_group(text) == members


def test_groups_in_a_way_that_is_new_are_not_passed_over():
    with pytest.raises(ValueError, match="not known here"):
        hlo.first_group("replica_groups=V2(0-7)")


@pytest.mark.parametrize(("pair", "shift"), [((0, 1), 1), ((2, 0), 1), ((1, 7), 3), ((8, 0), 1), ((0, 14), 7)])
def test_how_far_a_shift_goes(pair, shift):
    """Devices of data 2 x fsdp 4 x expert 2."""
    assert hlo.shift_of(pair, {"data": 2, "fsdp": 4, "expert": 2}) == shift


RAGGED = """\
ENTRY %main (x: bf16[{sent},64], o: bf16[{room},64], n: s32[4]) -> bf16[{room},64] {
  %x = bf16[{sent},64]{1,0} parameter(0)
  %o = bf16[{room},64]{1,0} parameter(1)
  %n = s32[4]{0} parameter(2)
  ROOT %r = bf16[{room},64]{1,0} ragged-all-to-all(%x, %o, %n, %n, %n, %n), replica_groups={{0,1,2,3}}
}
"""


@pytest.mark.parametrize(("sent", "room"), [(100, 400), (400, 100)], ids=["there", "back"])
def test_a_ragged_exchange_moves_the_rows_there_are_and_no_room(sent, room):
    text = RAGGED.replace("{sent}", str(sent)).replace("{room}", str(room))
    (exchange,) = hlo.read(text).collectives()
    assert (exchange.operation, exchange.bytes) == ("ragged-all-to-all", 100 * 64 * 2)


# A gather of weights under a kernel: begun, gone on beside the product, ended; and attributes on lines of their own.
ASYNC = """\
%begun (s: bf16[4,8]) -> (bf16[4,8], bf16[16,8], u32[]) {
  %s = bf16[4,8]{1,0} parameter(0)
  %gather.1 = bf16[16,8]{1,0} all-gather(%s), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %start = (bf16[4,8], bf16[16,8], u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (s: bf16[4,8], g: bf16[16,8], u: u32[], x: bf16[2,8]) -> (bf16[2,8], bf16[4,8], bf16[16,8], \
u32[]) {
  %x = bf16[2,8]{1,0} parameter(3)
  %kernel = bf16[2,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", kernel_metadata={"a": {
"b": 1
}}, backend_config={}
  %s = bf16[4,8]{1,0} parameter(0)
  %g = bf16[16,8]{1,0} parameter(1)
  %gather.2 = bf16[16,8]{1,0} all-gather(%s), replica_groups={{0,1,2,3}}, dimensions={0}
  %u = u32[]{:S(2)} parameter(2)
  ROOT %both = (bf16[2,8], bf16[4,8], bf16[16,8], u32[]{:S(2)}) tuple(%kernel, %s, %gather.2, %u)
}

%ended (s: bf16[4,8], g: bf16[16,8], u: u32[]) -> bf16[16,8] {
  %s = bf16[4,8]{1,0} parameter(0)
  %g = bf16[16,8]{1,0} parameter(1)
  %gather.3 = bf16[16,8]{1,0} all-gather(%s), replica_groups={{0,1,2,3}}, dimensions={0}
  %u = u32[]{:S(2)} parameter(2)
  ROOT %done = bf16[16,8]{1,0} custom-call(%s, %g, %gather.3, %u), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[4,8], y: bf16[2,8]) -> bf16[16,8] {
  %w = bf16[4,8]{1,0} parameter(0)
  %y = bf16[2,8]{1,0} parameter(1)
  %async-collective-start = (bf16[4,8], bf16[16,8], u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%begun
  %a = bf16[4,8]{1,0} get-tuple-element(%async-collective-start), index=0
  %b = bf16[16,8]{1,0} get-tuple-element(%async-collective-start), index=1
  %c = u32[]{:S(2)} get-tuple-element(%async-collective-start), index=2
  %gmm = (bf16[2,8], bf16[4,8], bf16[16,8], u32[]{:S(2)}) fusion(%a, %b, %c, %y), kind=kCustom, \
calls=%async_collective_fusion.7
  %d = bf16[4,8]{1,0} get-tuple-element(%gmm), index=1
  %e = bf16[16,8]{1,0} get-tuple-element(%gmm), index=2
  %f = u32[]{:S(2)} get-tuple-element(%gmm), index=3
  ROOT %async-collective-done = bf16[16,8]{1,0} fusion(%d, %e, %f), kind=kCustom, calls=%ended
}
"""


def test_a_collective_under_products_counts_once_and_nobody_waits_for_it():
    program = hlo.read(ASYNC)
    (gather,) = program.collectives()
    assert (gather.operation, gather.bytes, gather.times, gather.waits) == ("all-gather", 16 * 8 * 2, 1, False)
    shard, gathered, row = 4 * 8 * 2, 16 * 8 * 2, 2 * 8 * 2
    assert program.traffic_bytes() == shard + (shard + gathered) + (row + row)


@pytest.mark.parametrize(("shape", "seen"), [("2,64,64", 1), ("128,64", 1), ("64,64", 0), ("12,8,4", 0)])
def test_a_parameter_that_is_gathered_for_all_layers_is_seen_in_any_shape(small, shape, seen):
    """Of two layers of 64 x 64, not of one."""
    text = TEXT.replace("bf16[12,8,4]{2,1,0} all-gather", f"bf16[{shape}]{{1,0}} all-gather")
    assert len(gathered_layers(hlo.read(text), settle(small, find_slice("v5p:2x2x1")))) == seen
