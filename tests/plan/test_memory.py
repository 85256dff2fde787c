"""Bytes against arithmetic done by hand, on a mesh of fsdp 2 x expert 2."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from tmljax import config
from tmljax.model.trunk import REMAT
from tmljax.ops import dispatch, experts
from tmljax.ops.route import route
from tmljax.plan import memory, work
from tmljax.plan.compile import Compiled
from tmljax.plan.forecast import by_compiler, by_formula
from tmljax.plan.hardware import find_slice
from tmljax.plan.setting import settle, shard_bytes
from tmljax.sharding import make_mesh

WHERE = find_slice("v5p:2x2x1")
D, L, E, W, S, V, H, K, h = 64, 2, 8, 64, 128, 320, 4, 4, 16
N = 16 // 4 * (4 * 5 - 2)  # positions of a device; two frames are left out


@pytest.fixture
def setting(small):
    return settle(small, WHERE)


def change(small, **moe):
    return dataclasses.replace(
        small, model=dataclasses.replace(small.model, moe=dataclasses.replace(small.model.moe, **moe))
    )


def test_the_optimizer_lies_where_its_parameters_lie(setting):
    estimate = memory.estimate(setting)
    assert estimate.parameters == estimate.gradients
    assert estimate.optimizer == pytest.approx(2 * estimate.parameters, rel=1e-3)


def test_gradients_of_micro_batches_lie_beside_their_sum(small, setting):
    twice = dataclasses.replace(small, optimizer=dataclasses.replace(small.optimizer, accumulate=2))
    assert memory.estimate(settle(twice, WHERE)).gradients == 2 * memory.estimate(setting).gradients


def test_two_batches_are_there_one_of_which_is_the_programs_argument(setting):
    examples, T, patch = 16 // 4, 4, 40 * 40 * 3
    of_frame = patch + 1 + 2 * 4  # bytes: the patch, whether it is there, two words
    of_turn = 3 * 8 * 80 + 1 + 3 * 4 + 1  # dMel and mel of two bytes, whether the user is there, three words, validity
    batch = examples * (T * of_turn + T // 2 * of_frame + 4)
    assert memory.batch_bytes(setting) == batch
    exact = memory.estimate(setting)
    assert exact.buffers == 2 * batch
    compiled = Compiled(exact.parameters + exact.optimizer + batch, 1e6, 100.0, None, 1.0)
    assert by_compiler(setting, compiled).memory.buffers == 2 * batch + 100


def test_full_remat_keeps_the_input_of_each_layer(setting):
    assert memory.saved(setting) == L * N * D * 4


def test_rows_of_the_experts(small, setting):
    assert memory.rows(settle(change(small, capacity_factor=1.25), WHERE)) == N * 2 * 1.25
    assert memory.rows(setting) == N * 2 * 2  # dropless: all positions of both members, twice each
    alone = dataclasses.replace(small, mesh=config.Mesh(fsdp=4, data=1))
    assert memory.rows(settle(alone, WHERE)) == N * 2


def test_weights_of_a_layer_in_use(setting):
    routed = 3 * E // 2 * D * W
    dense = D * (H + K) * h * 2 + 3 * D * S
    assert memory.layer_weights(setting) == (routed + dense) * 4 + D * E * 4


def test_executed_flops_recompute_every_layer_once(setting):
    """The forward pass of a layer again, and the scores twice: by the layer and by the block of queries."""
    there = [(t, s) for t in range(4) for s in range(5) if s != 1 or t % 2 == 0]
    pairs = sum(key <= query for query in there for key in there)
    scores = 16 * 4 * L * H * h * pairs
    matrices = 2 * 16 * 18 * L * (2 * D * (H + K) * h + 3 * D * S + D * E + 2 * 3 * D * W)
    assert work.executed_flops(setting) - work.model_flops(setting) == pytest.approx(matrices + 2 * scores)


def test_exchanges_in_bytes(small):
    padded = settle(change(small, capacity_factor=1.25), WHERE)
    (exchange,) = [t for t in work.link_traffic(padded) if t.axis == "expert"]
    assert (exchange.operation, exchange.bytes) == ("all-to-all", 3 * L * 2 * N * 2 * 1.25 * D * 4)
    ragged = settle(change(small, exchange="ragged"), WHERE)
    (exchange,) = [t for t in work.link_traffic(ragged) if t.axis == "expert"]
    assert (exchange.operation, exchange.bytes) == ("ragged-all-to-all", 3 * L * 2 * N * 2 * D * 4)
    gathered = settle(change(small, exchange="gathered", matmul="ragged"), WHERE)
    sums = {t.operation: t.bytes for t in work.link_traffic(gathered) if t.axis == "expert"}
    assert sums == {"all-gather": 3 * L * 2 * N * D * 4, "reduce-scatter": 2 * L * 2 * N * D * 4}


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gathered_exchanges_are_as_many_as_in_the_program(small, remat):
    """Of a layer and its gradients, traced: collectives of positions along the expert axis."""
    mesh = make_mesh(config.Mesh(data=1, expert=2), jax.devices()[:2])

    def layer(x_BPD, weights, router_DE):
        routing = route(x_BPD, router_DE, jnp.zeros(E), 2)
        local = dispatch.in_rows(experts.ragged)
        return x_BPD + dispatch.apply_experts(x_BPD, routing, weights, local, dispatch.gathered, 1.25, mesh)[0]

    kept = layer if remat == "none" else jax.checkpoint(layer, policy=REMAT[remat])
    weights = experts.Experts(jnp.zeros((E, D, W)), jnp.zeros((E, D, W)), jnp.zeros((E, W, D)))
    loss = lambda *given: jnp.sum(jnp.sin(kept(*given)))  # noqa: E731
    program = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(jnp.zeros((4, 8, D)), weights, jnp.zeros((D, E)))
    moved = [e for e in eqns_of(program) if e.params.get("axis_name") in ("expert", ("expert",))]
    found = Counter(e.primitive.name for e in moved if e.outvars[0].aval.shape[-1:] == (D,))

    model = dataclasses.replace(small.model, remat=remat)
    planned = work.exchange(settle(change(dataclasses.replace(small, model=model), exchange="gathered"), WHERE), 1)
    assert found == {t.operation.replace("-", "_"): t.count for t in planned}


def eqns_of(program):
    """Of a jaxpr and those inside it; what gives nothing is not in the compiled program."""
    for eqn in getattr(program, "jaxpr", program).eqns:
        if eqn.outvars:
            yield eqn
        is_jaxpr = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")  # noqa: E731
        for inside in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr):
            if eqn.outvars and is_jaxpr(inside):
                yield from eqns_of(inside)


def test_copies_sum_their_gradients_in_each_micro_batch(small):
    """The same examples in two: their sums, of a scan over micro-batches, go over the links twice."""
    twice = dataclasses.replace(small, optimizer=dataclasses.replace(small.optimizer, accumulate=2))
    once, twice = (settle(dataclasses.replace(e, mesh=config.Mesh(data=2, fsdp=2)), WHERE) for e in (small, twice))
    (a,), (b,) = ([t for t in work.link_traffic(s) if t.axis == "data"] for s in (once, twice))
    assert (a.operation, a.bytes) == ("all-reduce", shard_bytes(once.state.params))
    assert (b.bytes, b.count) == (2 * a.bytes, 2)


def test_keys_of_members_further_back_go_over_more_links(small):
    """Eight members of two micro-turns that see five back, on a ring: 1, 2, 3, 4 and 3 links."""
    model = dataclasses.replace(small.model, window=11)
    long = dataclasses.replace(small, model=model, data=dataclasses.replace(small.data, window=16))
    far = settle(dataclasses.replace(long, mesh=config.Mesh(data=1, context=8, fsdp=16)), find_slice("v5p:4x4x8"))
    (keys,) = [t for t in work.link_traffic(far) if t.operation == "collective-permute"]
    assert keys.hops == (1 + 2 + 3 + 4 + 3) / 5


def test_split_examples_leave_each_device_its_part_and_send_keys(small):
    """On context 2 the second half of the micro-turns looks back at the first: keys and values of all its positions."""
    half = settle(dataclasses.replace(small, mesh=config.Mesh(data=1, fsdp=2, context=2)), WHERE)
    assert (half.examples, half.positions) == (8, N)
    (keys,) = [t for t in work.link_traffic(half) if t.axis == "context" and t.operation == "collective-permute"]
    assert keys.bytes == 3 * L * N * 2 * K * h * 4
    assert memory.saved(half) == L * N * D * 4


def test_money_and_days(setting):
    forecast = by_formula(setting, price=2.0, tokens=1e9)
    assert forecast.rate == pytest.approx(16 * 4 * 0.2 / forecast.step_seconds)
    assert forecast.per_dollar == pytest.approx(forecast.rate * 3600 / 8)
    assert forecast.days == pytest.approx(1e9 / (16 * 18) * forecast.step_seconds / 86400)
    assert forecast.cost == pytest.approx(forecast.days * 24 * 2.0 * 4)
    assert forecast.mfu == pytest.approx(work.model_flops(setting) / forecast.step_seconds / (4 * 459e12))


def test_a_mesh_that_does_not_make_up_the_slice_is_named(small):
    with pytest.raises(config.UserError, match=r"config\.mesh"):
        settle(dataclasses.replace(small, mesh=config.Mesh(data=3)), WHERE)
    with pytest.raises(config.UserError, match=r"config\.mesh\.slices=2: a plan is of one slice"):
        settle(dataclasses.replace(small, mesh=config.Mesh(data=2, fsdp=-1, slices=2)), WHERE)


def test_what_kernels_read_again(small, monkeypatch):
    """Splash: for its one block of 128 queries one of 256 keys, values and masks, in four kernels.

    Grouped, in tiles of 16 columns: rows for 3 more of them, in three products forward, three again, and six backward.
    """
    change_model = lambda **changes: dataclasses.replace(small, model=dataclasses.replace(small.model, **changes))  # noqa: E731
    splash = work.kernel_traffic(settle(change_model(attention="splash"), WHERE))
    assert splash == L * 4 * (16 // 4) * H * (256 * 2 * h * 4 + 128 * 256 * 4)
    assert memory.score_bytes(settle(change_model(attention="splash"), WHERE), N) == 0

    monkeypatch.setattr(work.experts, "tile", lambda rows, depth, columns: (8, depth, 16))
    monkeypatch.setattr(work.experts, "TILE_ROWS", 1)  # none is filled
    grouped = work.kernel_traffic(settle(change(small, matmul="grouped"), WHERE))
    assert grouped == L * 12 * N * 2 * D * 3 * 4


def test_the_last_tile_of_an_expert_is_half_full(small, setting, monkeypatch):
    """Of 7 rows that may be empty in each of 4 experts' last tiles: forward, again, and two backward."""
    monkeypatch.setattr(work.experts, "TILE_ROWS", 8)
    grouped = settle(change(small, matmul="grouped"), WHERE)
    assert memory.rows(grouped) == memory.rows(setting) + 24  # whole tiles, for the fullest last ones
    more = work.executed_flops(grouped) - work.executed_flops(setting)
    assert more == pytest.approx(4 * 2 * 16 * 18 * L * 2 * 3 * D * W * (14 / 144))


def test_gates_before_the_last_product_spare_it_and_what_it_gave(small, setting):
    padded, gathered = (settle(change(small, matmul="ragged", exchange=e), WHERE) for e in ("padded", "gathered"))
    assert padded.axes["expert"] > 1
    product = 2 * 16 * 18 * L * 2 * D * W
    assert work.executed_flops(padded) - work.executed_flops(gathered) == pytest.approx(product)
    blocks = settle(change(small, exchange="gathered"), WHERE)
    assert work.executed_flops(blocks) == work.executed_flops(setting)

    dots = dataclasses.replace(small, model=dataclasses.replace(small.model, remat="dots"))
    padded, gathered = (settle(change(dots, matmul="ragged", exchange=e), WHERE) for e in ("padded", "gathered"))
    assert memory.saved(padded) - memory.saved(gathered) == pytest.approx(L * 4 * memory.rows(padded) * D)


def test_dots_keep_products_and_attention(small):
    """Of kernels too: what experts' gate, up and down gave is kept, and nothing but scores is made again."""
    small = dataclasses.replace(small, model=dataclasses.replace(small.model, remat="dots"))
    dots = settle(change(small, matmul="ragged"), WHERE)
    full = settle(dataclasses.replace(small, model=dataclasses.replace(small.model, remat="full")), WHERE)
    kept = 2 * D + (H + 2 * K) * h + H * h + 2 * S + E  # numbers a position, beside the layer's input
    more = memory.saved(dots) - memory.saved(full)
    assert more == pytest.approx(L * 4 * (N * kept + memory.rows(dots) * (2 * W + D)))
    scores = 2 * small.data.batch * work.attention_flops(small) / 6
    assert work.executed_flops(dots) - work.model_flops(dots) == pytest.approx(scores)


def test_gpus_work_on_every_row_for_each_expert(small):
    """But for kernels of their own: forward, again and twice backward, and half of the experts are here."""
    wide = dataclasses.replace(small.model, d_model=128, dtype="bfloat16")
    small = change(dataclasses.replace(small, model=wide), expert_width=128)
    ragged, hopper = (settle(change(small, matmul=m), find_slice("h200:1x4")) for m in ("ragged", "hopper"))
    routed = 2 * 16 * 18 * L * 2 * 3 * 128 * 128
    assert work.executed_flops(ragged) - work.executed_flops(hopper) == pytest.approx(4 * routed * (E / 2 - 1))
