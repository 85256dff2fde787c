"""Mixture of experts against its plain version: every expert on every position, forward and backward.

XLA:CPU has no `ragged_all_to_all`. Here it is emulated from what each member passes to it, with nothing but an
`all_gather`; all around it is what runs on a TPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tmljax import config
from tmljax.ops import dispatch, experts
from tmljax.ops.experts import Experts
from tmljax.ops.route import NOBODY, route
from tmljax.sharding import BATCH_AXES, make_mesh, spec

B, P, D, E, W, K = 8, 8, 16, 8, 16, 3
TILE = 4
BLOCKS, RAGGED = dispatch.in_blocks(rows=8), dispatch.in_rows(experts.ragged)
LOCAL = {"blocks": BLOCKS, "ragged_dot": RAGGED, "tiles": dispatch.in_rows(experts.ragged, TILE)}
GROUPED = dispatch.in_rows(partial(experts.grouped, interpret=True), tile=8)
EXCHANGES = {"padded": dispatch.padded, "ragged": dispatch.ragged, "gathered": dispatch.gathered}


def plain_ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What its documentation says, row by row of the output; NaN where sender and receiver disagree."""
    everyone = jax.lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
    me = jax.lax.axis_index(axis_name)
    for sender in range(jax.lax.axis_size(axis_name)):
        rows, begin, size, land = (x[sender] if x.ndim > 2 else x[sender, me] for x in everyone)
        place = jnp.arange(output.shape[0]) - land
        came = rows[jnp.clip(begin + place, 0, rows.shape[0] - 1)]
        came = jnp.where(size == recv_sizes[sender], came, jnp.nan)
        output = jnp.where(((place >= 0) & (place < size))[:, None], came, output)
    return output


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", plain_ragged_all_to_all)


@pytest.fixture(scope="module")
def problem():
    k = jax.random.split(jax.random.key(0), 7)
    x_BPD = jax.random.normal(k[0], (B, P, D))
    weights = Experts(
        jax.random.normal(k[1], (E, D, W)), jax.random.normal(k[2], (E, D, W)), jax.random.normal(k[3], (E, W, D))
    )
    # A lopsided router, so that some experts are crowded and some nearly empty.
    router_DE = jax.random.normal(k[4], (D, E)) * jnp.arange(E)[None] / 4
    counts_BP = jax.random.uniform(k[6], (B, P)) < 0.8
    return x_BPD, weights, router_DE, counts_BP, jax.random.normal(k[5], (B, P, D))


def value_and_grads(apply, problem):
    x_BPD, weights, router_DE, counts_BP, direction_BPD = problem

    def loss(x_BPD, weights, router_DE):
        routing = route(x_BPD, router_DE, jnp.zeros(E), K, counts_BP)
        y_BPD, dropped = apply(x_BPD, routing, weights)
        return jnp.sum(y_BPD * direction_BPD), (y_BPD, dropped)

    (_, aux), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x_BPD, weights, router_DE)
    return aux, grads


def plain(x_BPD, routing, weights):
    flat = [x.reshape(B * P, -1) for x in (x_BPD, routing.expert_BPk, routing.gate_BPk)]
    return experts.every_expert(*flat, weights).reshape(x_BPD.shape), jnp.zeros(())


@pytest.fixture(scope="module")
def expected(problem):
    return value_and_grads(plain, problem)


def assert_same(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), a, b)


def place(problem, mesh):
    x_BPD, weights, *rest = problem
    matrices = Experts(*(NamedSharding(mesh, spec(names)) for names in 2 * [("experts", "expert_embed", "width")]),
                       NamedSharding(mesh, spec(("experts", "inner_width", "small"))))  # fmt: skip
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context"))
    return jax.device_put(x_BPD, rows), jax.device_put(weights, matrices), *rest


@pytest.mark.parametrize("local", [*LOCAL.values(), GROUPED], ids=[*LOCAL, "grouped"])
def test_one_device(problem, expected, local, monkeypatch):
    """Grouped in two dozen tiles, each one expert's."""
    monkeypatch.setattr(experts, "TILE_ROWS", 8)
    apply = partial(dispatch.apply_experts, local=local, exchange=dispatch.padded, capacity_factor=None, mesh=None)
    assert_same(value_and_grads(apply, problem), expected)


def test_gathered(problem, expected):
    def apply(x_BPD, routing, weights):
        flat = [x.reshape(B * P, -1) for x in (x_BPD, routing.expert_BPk, routing.gate_BPk)]
        return experts.gathered(*flat, weights).reshape(x_BPD.shape), jnp.zeros(())

    assert_same(value_and_grads(apply, problem), expected)


@pytest.mark.parametrize("local", ["blocks", "tiles"])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    "sizes", [{"expert": 8}, {"fsdp": 2, "expert": 4}, {"expert": 4, "tensor": 2}, {"context": 4, "expert": 2}], ids=str
)
def test_expert_parallel(problem, expected, sizes, exchange, local):
    """Dropless on eight devices, the expert axis alone and beside the others."""
    mesh = make_mesh(config.Mesh(**{"data": 1} | sizes))
    apply = partial(
        dispatch.apply_experts,
        local=LOCAL[local],
        exchange=EXCHANGES[exchange],
        capacity_factor=None,
        mesh=mesh,
    )
    assert_same(value_and_grads(apply, place(problem, mesh)), expected)


@jax.custom_vjp
def careless(x_RD, rows_E, weights, share_R):
    """As `experts.ragged`; rows beyond the experts', and their gradients, are anything, as with kernels for TPUs."""
    return careless_forward(x_RD, rows_E, weights, share_R)[0]


def careless_forward(x_RD, rows_E, weights, share_R):
    y_RD, pull = jax.vjp(lambda x, w, share: experts.ragged(x, rows_E, w, share), x_RD, weights, share_R)
    beyond_R = jnp.arange(len(x_RD)) >= jnp.sum(rows_E)
    return jnp.where(beyond_R[:, None], jnp.nan, y_RD), (pull, beyond_R, rows_E)


def careless_backward(saved, d_RD):
    pull, beyond_R, rows_E = saved
    dx_RD, d_weights, dshare_R = pull(d_RD)
    no_grad = np.zeros(rows_E.shape, jax.dtypes.float0)
    return jnp.where(beyond_R[:, None], jnp.nan, dx_RD), no_grad, d_weights, jnp.where(beyond_R, jnp.nan, dshare_R)


careless.defvjp(careless_forward, careless_backward)


def test_rows_of_nobody_are_never_read(problem, expected):
    mesh = make_mesh(config.Mesh(data=2, expert=4))
    apply = partial(
        dispatch.apply_experts,
        local=dispatch.in_rows(careless, TILE),
        exchange=dispatch.gathered,
        capacity_factor=None,
        mesh=mesh,
    )
    assert_same(value_and_grads(apply, place(problem, mesh)), expected)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_bfloat16_is_as_close_as_its_digits(problem, expected, exchange):
    mesh = make_mesh(config.Mesh(data=2, expert=4))
    x_BPD, weights, *rest = place(problem, mesh)

    def apply(x_BPD, routing, weights):
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (x_BPD, weights))
        y_BPD, dropped = dispatch.apply_experts(half[0], routing, half[1], RAGGED, EXCHANGES[exchange], None, mesh)
        assert y_BPD.dtype == jnp.bfloat16
        return y_BPD.astype(jnp.float32), dropped

    there = value_and_grads(apply, (x_BPD, weights, *rest))
    away = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-9))  # noqa: E731
    errors = jax.tree.leaves(jax.tree.map(away, there, expected))
    assert max(errors) < 0.02
    assert max(errors) > 1e-4, "this was no bfloat16"


def lost_in_padded(owner_NM, room):
    """Assignments beyond the room of each pair of devices, first come first kept; [senders, A] of owners."""
    return np.array([[list(row[:a]).count(row[a]) >= room for a in range(len(row))] for row in owner_NM])


def lost_in_ragged(expert_NM, mine, room):
    """Assignments beyond the room of each owner: its buffer is filled sender by sender, in the order of experts."""
    lost_NM, held = np.zeros(expert_NM.shape, bool), np.zeros(E // mine, int)
    for sender, row in enumerate(expert_NM):
        for a in np.argsort(row, kind="stable"):
            if row[a] != NOBODY:
                lost_NM[sender, a] = held[row[a] // mine] >= room
                held[row[a] // mine] += 1
    return lost_NM


def lost_in_gathered(expert_NM, mine, room, tile):
    """Assignments beyond the rows of each owner: the last of its experts lose first, in them the last assignments.
    Each expert begins a tile, so that those of before it take whole ones."""
    expert_A, lost_A = expert_NM.ravel(), np.zeros(expert_NM.size, bool)
    for owner in range(E // mine):
        begin = 0
        for expert in range(owner * mine, (owner + 1) * mine):
            own = np.flatnonzero(expert_A == expert)
            lost_A[own[max(experts.laid_rows(room, mine, tile) - begin, 0) :]] = True
            begin += -(-len(own) // tile) * tile
    return lost_A.reshape(expert_NM.shape)


@pytest.mark.parametrize("local", LOCAL)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_capacity_drops_are_counted(problem, exchange, local):
    """With little room some assignments are lost: exactly as many as reported."""
    mesh = make_mesh(config.Mesh(data=2, expert=4))
    x_BPD, weights, router_DE, counts_BP, _ = problem
    routing = jax.jit(route, static_argnums=3)(x_BPD, router_DE, jnp.zeros(E), K, counts_BP)

    def run(factor):
        apply = partial(
            dispatch.apply_experts, local=LOCAL[local], exchange=EXCHANGES[exchange], capacity_factor=factor, mesh=mesh
        )
        return jax.jit(apply)(x_BPD, routing, weights)

    (tight_BPD, dropped), (whole_BPD, none) = run(0.5), run(None)
    sizes = (B * P // 8, K, E // 4, 4, 0.5)
    expert_NM = np.asarray(routing.expert_BPk).reshape(8, -1)  # of each device; they are in two groups of four
    owner_NM = np.where(expert_NM == NOBODY, -1, expert_NM // (E // 4))
    if exchange == "padded":
        room = dispatch.room_per_pair(*sizes)
        lost_NM = lost_in_padded(owner_NM, room) & (owner_NM >= 0)
    else:
        room = dispatch.room_per_member(*sizes)
        groups = (slice(0, 4), slice(4, 8))
        if exchange == "gathered":
            tile = TILE if local == "tiles" else 1
            lost = [lost_in_gathered(expert_NM[group], E // 4, room, tile) for group in groups]
        else:
            lost = [lost_in_ragged(expert_NM[group], E // 4, room) for group in groups]
        lost_NM = np.concatenate(lost)
    assert lost_NM.any()
    assert float(dropped) == lost_NM.sum()
    assert float(none) == 0

    touched_BP = lost_NM.reshape(B, P, K).any(axis=2)  # these positions lost something, the others nothing
    off_BP = np.abs(np.asarray(tight_BPD - whole_BPD)).max(axis=2) > 1e-4
    np.testing.assert_array_equal(off_BP, touched_BP)
    kept_BPk = jnp.where(lost_NM.reshape(B, P, K), 0, routing.gate_BPk)
    kept_BPD, _ = plain(x_BPD, routing._replace(gate_BPk=kept_BPk), weights)
    np.testing.assert_allclose(tight_BPD, kept_BPD, rtol=1e-4, atol=1e-4)


def test_more_room_drops_less_until_nothing_is_lost(problem):
    mesh = make_mesh(config.Mesh(data=1, expert=8))
    x_BPD, weights, router_DE, counts_BP, _ = problem
    routing = jax.jit(route, static_argnums=3)(x_BPD, router_DE, jnp.zeros(E), K, counts_BP)
    for exchange in EXCHANGES.values():
        dropped = [
            float(jax.jit(partial(
                dispatch.apply_experts, local=BLOCKS, exchange=exchange, capacity_factor=factor, mesh=mesh
            ))(x_BPD, routing, weights)[1]) for factor in (0.5, 1.0, 8.0)
        ]  # fmt: skip
        assert dropped[0] > dropped[1] > dropped[2] == 0


@pytest.mark.parametrize("room", [0, 5, 23, 400])
def test_exchange_plan_moves_each_row_to_its_place(room):
    """The offsets, played by hand: what lands in each buffer, and that the way back undoes the way there."""
    rng, M, experts_each = np.random.default_rng(room), 4, 3
    rows_ME = rng.integers(0, 6, (M, M * experts_each))
    rows_ME[2] = 0  # a member with nothing to send
    plans = [
        jax.tree.map(np.asarray, dispatch.plan_exchange(jnp.asarray(rows_ME), jnp.int32(m), room)) for m in range(M)
    ]
    sent = [[(m, e, i) for e in range(M * experts_each) for i in range(rows_ME[m, e])] for m in range(M)]

    buffers = [[None] * room for _ in range(M)]
    for m, (there, _, _) in enumerate(plans):
        for d in range(M):
            assert there.send_M[d] == plans[d][0].recv_M[m]
            for i in range(there.send_M[d]):
                assert buffers[d][there.output_M[d] + i] is None, "two rows in one place"
                buffers[d][there.output_M[d] + i] = sent[m][there.input_M[d] + i]

    home = [[None] * len(rows) for rows in sent]
    for m, (_, back, ids_R) in enumerate(plans):
        wanted = [row for rows in sent for row in rows if row[1] // experts_each == m]
        assert [row for row in buffers[m] if row is not None] == wanted[:room]
        assert ids_R.tolist() == [-1 if row is None else row[1] % experts_each for row in buffers[m]]
        for d in range(M):
            assert back.send_M[d] == plans[d][1].recv_M[m]
            for i in range(back.send_M[d]):
                home[d][back.output_M[d] + i] = buffers[m][back.input_M[d] + i]
    for rows, came in zip(sent, home):
        assert all(c in (None, row) for row, c in zip(rows, came))
    assert sum(row is not None for rows in home for row in rows) == sum(row is not None for b in buffers for row in b)


def test_blocks_hold_each_assignment_once():
    expert_A = jnp.array([3, 0, -1, 3, 3, 1, 0, 3, -1, 3])
    laid = jax.tree.map(np.asarray, jax.jit(partial(experts.lay_blocks, experts=4, room=10, rows=2))(expert_A))
    for a, e in enumerate(np.array(expert_A)):
        row = int(laid.row_A[a])
        if e < 0:
            assert row == len(laid.source_R)
        else:
            assert int(laid.source_R[row]) == a
            assert np.searchsorted(laid.end_E, row // 2, side="right") == e
    assert int((laid.source_R < len(expert_A)).sum()) == 8


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-5), (jnp.bfloat16, 4e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("chosen", [[0] * 6, [3, 0, 3, 3, 0, 3]], ids=["one expert", "two without work"])
def test_block_by_block_equals_every_expert(chosen, dtype, error):
    """Forward, and the backward pass by hand; an expert that nobody chose has no gradient."""
    expert_N, D, W = jnp.array(chosen, jnp.int32), 8, 4
    number, keys = max(chosen) + 1, jax.random.split(jax.random.key(0), 5)
    x_ND, mix_ND = (jax.random.normal(k, (len(chosen), D)) for k in keys[:2])
    shapes = 2 * [(number, D, W)] + [(number, W, D)]
    weights = Experts(*(jax.random.normal(k, shape) for k, shape in zip(keys[2:], shapes, strict=True)))
    local = dispatch.in_blocks(2)

    def block_by_block(x_ND, weights):
        narrow = jax.tree.map(lambda x: x.astype(dtype), (x_ND, weights))
        return dispatch.work(narrow[0], expert_N, narrow[1], local).astype(jnp.float32)

    def plain(x_ND, weights):
        return experts.every_expert(x_ND, expert_N[:, None], jnp.ones((len(chosen), 1)), weights)

    gradients = [jax.grad(lambda *x, f=f: jnp.sum(mix_ND * f(*x)), argnums=(0, 1)) for f in (block_by_block, plain)]
    for found, wanted in ((block_by_block, plain), gradients):
        for a, b in zip(jax.tree.leaves(found(x_ND, weights)), jax.tree.leaves(wanted(x_ND, weights)), strict=True):
            np.testing.assert_allclose(a, b, rtol=error, atol=error * max(1, float(jnp.abs(b).max())))


def test_sorted_rows_hold_each_assignment_once():
    expert_A = np.array([3, 0, -1, 3, 3, 1, 0, 3, -1, 3])
    laid = jax.tree.map(np.asarray, experts.sort_rows(jnp.asarray(expert_A), 4, 10))
    assert laid.rows_E.tolist() == [2, 1, 0, 5]
    assert laid.source_R.tolist() == [1, 6, 5, 0, 3, 4, 7, 9, 10, 10]
    for a, e in enumerate(expert_A):
        assert laid.row_A[a] == (10 if e < 0 else laid.source_R.tolist().index(a))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("room", [3, 17])
@pytest.mark.parametrize("tile", [1, 2, 4])
def test_each_expert_begins_a_tile(tile, room, seed):
    """Whoever is among the first `room` assignments, by expert, has a row, and with a tile of one nobody else."""
    rng, experts_here = np.random.default_rng(seed), 5
    expert_A = rng.choice(np.arange(-1, experts_here), 24, p=[0.2, 0.4, 0.2, 0.15, 0.05, 0.0])
    sort = partial(experts.sort_rows, experts=experts_here, room=room, tile=tile)
    laid = jax.tree.map(np.asarray, jax.jit(sort)(jnp.asarray(expert_A)))
    R = len(laid.source_R)
    end_E = np.cumsum(laid.rows_E)
    assert (laid.rows_E % tile == 0).all()
    assert end_E[-1] <= R
    for a, e in enumerate(expert_A):
        if laid.row_A[a] < R:
            assert laid.source_R[laid.row_A[a]] == a
            assert np.searchsorted(end_E, laid.row_A[a], side="right") == e
    held = laid.source_R[laid.source_R < 24]
    assert len(set(held)) == len(held) == (laid.row_A < R).sum()
    order = [a for a in np.argsort(expert_A, kind="stable") if expert_A[a] >= 0]
    assert set(order[:room]) <= set(held)
    assert tile > 1 or set(order[:room]) == set(held)


@pytest.mark.parametrize("lay", [partial(experts.lay_blocks, rows=2), experts.sort_rows], ids=["blocks", "sorted"])
def test_what_finds_no_room_is_the_last_experts(lay):
    """Of eight assignments five: those of experts 0 and 1, and the first two of expert 3's five."""
    expert_A = jnp.array([3, 0, -1, 3, 3, 1, 0, 3, -1, 3])
    laid = jax.tree.map(np.asarray, lay(expert_A, 4, room=5))
    rows = len(laid.source_R)
    assert np.flatnonzero(laid.row_A < rows).tolist() == [0, 1, 3, 5, 6]
    assert set(laid.row_A[[2, 4, 7, 8, 9]].tolist()) == {rows}
    assert sorted(laid.source_R[laid.source_R < 10].tolist()) == [0, 1, 3, 5, 6]
    assert laid.source_R[laid.row_A[[0, 1, 3, 5, 6]]].tolist() == [0, 1, 3, 5, 6]


def test_balance_bias_selects_but_does_not_weigh(problem):
    x_BPD, _, router_DE, *_ = problem
    pushed = route(x_BPD, router_DE, jnp.zeros(E).at[5].set(10.0), K)
    assert (pushed.expert_BPk == 5).any(axis=-1).all()
    score_BPE = jax.nn.sigmoid(x_BPD @ router_DE)
    chosen_BPk = jnp.take_along_axis(score_BPE, pushed.expert_BPk, axis=-1)
    np.testing.assert_allclose(pushed.gate_BPk, chosen_BPk / chosen_BPk.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(pushed.load_E.sum(), 1.0, rtol=1e-6)


def test_positions_that_do_not_count_have_no_say(problem):
    """Load and z-loss are those of the others alone, and no expert sees the rest."""
    x_BPD, weights, router_DE, counts_BP, _ = problem
    whole = route(x_BPD, router_DE, jnp.zeros(E), K, counts_BP)
    others = route(x_BPD[counts_BP][None], router_DE, jnp.zeros(E), K)
    np.testing.assert_allclose(whole.load_E, others.load_E, rtol=1e-6)
    np.testing.assert_allclose(whole.z_loss, others.z_loss, rtol=1e-6)
    np.testing.assert_array_equal(whole.expert_BPk == NOBODY, ~np.asarray(counts_BP)[..., None].repeat(K, -1))
    y_BPD, _ = dispatch.apply_experts(x_BPD, whole, weights, BLOCKS, dispatch.padded, None, None)
    assert (np.abs(y_BPD).max(axis=2) > 0).tolist() == np.asarray(counts_BP).tolist()


def test_nobody_who_counts_is_no_division_by_zero(problem):
    x_BPD, _, router_DE, *_ = problem
    routing = route(x_BPD, router_DE, jnp.zeros(E), K, jnp.zeros((B, P), bool))
    assert np.isfinite(routing.z_loss)
    np.testing.assert_array_equal(routing.load_E, 0)
