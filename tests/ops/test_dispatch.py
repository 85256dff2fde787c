"""Mixture of experts against its plain version: every expert on every token, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tmljax import config
from tmljax.ops import dispatch, experts
from tmljax.ops.experts import Experts
from tmljax.ops.route import route
from tmljax.sharding import make_mesh

N, D, E, W, K = 64, 12, 8, 16, 3
BLOCKS = partial(dispatch.in_blocks, rows=8)
RAGGED = partial(dispatch.in_rows, multiply=experts.ragged)
GROUPED = partial(dispatch.in_rows, multiply=partial(experts.grouped, interpret=True))


@pytest.fixture(scope="module")
def problem():
    k = jax.random.split(jax.random.key(0), 6)
    x_ND = jax.random.normal(k[0], (N, D))
    weights = Experts(
        jax.random.normal(k[1], (E, D, W)), jax.random.normal(k[2], (E, D, W)), jax.random.normal(k[3], (E, W, D))
    )
    # A lopsided router, so that some experts are crowded and some nearly empty.
    router_DE = jax.random.normal(k[4], (D, E)) * jnp.arange(E)[None] / 4
    return x_ND, weights, router_DE, jax.random.normal(k[5], (N, D))


def value_and_grads(apply, problem):
    x_ND, weights, router_DE, direction_ND = problem

    def loss(x_ND, weights, router_DE):
        routing = route(x_ND, router_DE, jnp.zeros(E), K)
        y_ND, dropped = apply(x_ND, routing, weights)
        return jnp.sum(y_ND * direction_ND), (y_ND, dropped)

    (_, aux), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x_ND, weights, router_DE)
    return aux, grads


def plain(x_ND, routing, weights):
    return experts.every_expert(x_ND, routing.expert_Nk, routing.gate_Nk, weights), jnp.zeros(())


def assert_same(a, b):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-4), a, b)


@pytest.mark.parametrize("local", [BLOCKS, RAGGED, GROUPED], ids=["blocks", "ragged", "grouped"])
def test_one_device(problem, local):
    apply = partial(dispatch.apply_experts, local=local, capacity_factor=None, mesh=None)
    assert_same(value_and_grads(apply, problem), value_and_grads(plain, problem))


def test_gathered(problem):
    def apply(x_ND, routing, weights):
        return experts.gathered(x_ND, routing.expert_Nk, routing.gate_Nk, weights), jnp.zeros(())

    assert_same(value_and_grads(apply, problem), value_and_grads(plain, problem))


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (4, 1, 2, 1), (1, 2, 4, 1), (1, 1, 4, 2), (1, 1, 8, 1)], ids=str)
def test_expert_parallel(problem, sizes):
    """Dropless on eight devices, expert axis 1, 2, 4 and 8, alone and beside the other axes."""
    mesh = make_mesh(config.Mesh(*sizes))
    apply = partial(dispatch.apply_experts, local=BLOCKS, capacity_factor=None, mesh=mesh)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    by_expert = NamedSharding(mesh, PartitionSpec("expert"))
    x_ND, weights, router_DE, direction_ND = problem
    sharded = (jax.device_put(x_ND, rows), jax.device_put(weights, by_expert), router_DE, direction_ND)
    assert_same(value_and_grads(apply, sharded), value_and_grads(plain, problem))


def test_capacity_drops_are_counted(problem):
    """With little room some assignments are lost: exactly as many as reported, and only those."""
    mesh = make_mesh(config.Mesh(data=2, fsdp=1, expert=4, tensor=1))
    x_ND, weights, router_DE, _ = problem
    routing = jax.jit(route, static_argnums=3)(x_ND, router_DE, jnp.zeros(E), K)

    def run(factor):
        apply = partial(dispatch.apply_experts, local=BLOCKS, capacity_factor=factor, mesh=mesh)
        return jax.jit(apply)(x_ND, routing, weights)

    (tight_ND, dropped), (_, none) = run(0.5), run(None)
    expert_Nk, lost = np.asarray(routing.expert_Nk), 0
    room = dispatch.room_per_member(N // 8, K, E, 4, 0.5)
    kept_Nk = np.ones((N, K), bool)
    for device in range(8):  # what the exchange should drop, counted the slow way
        sent = [0] * 4
        for n in range(device * N // 8, (device + 1) * N // 8):
            for k in range(K):
                owner = expert_Nk[n, k] // (E // 4)
                sent[owner] += 1
                kept_Nk[n, k] = sent[owner] <= room
                lost += sent[owner] > room
    assert lost > 0
    assert float(dropped) == lost
    assert float(none) == 0
    gate_Nk = jnp.where(kept_Nk, routing.gate_Nk, 0)
    np.testing.assert_allclose(
        tight_ND, experts.every_expert(x_ND, routing.expert_Nk, gate_Nk, weights), rtol=1e-4, atol=2e-4
    )


@pytest.mark.parametrize("sizes", [(2, 1, 4, 1), (1, 2, 2, 2)], ids=str)
def test_gathering_all_tokens_is_an_exchange_too(problem, sizes):
    mesh = make_mesh(config.Mesh(*sizes))
    apply = partial(dispatch.apply_experts, local=BLOCKS, capacity_factor=None, mesh=mesh, gathers=experts.ragged)
    assert_same(value_and_grads(apply, problem), value_and_grads(plain, problem))


def test_gathered_tokens_have_room_by_device():
    """What does not fit a device's rows is counted and adds nothing: the last of its experts lose first."""
    mesh = make_mesh(config.Mesh(data=2, fsdp=1, expert=4, tensor=1))
    k = jax.random.split(jax.random.key(0), 4)
    weights = Experts(*(jax.random.normal(key, (E, 16, 16)) for key in k[:3]))
    x_ND = jax.random.normal(k[3], (N, 16))
    routing = jax.jit(route, static_argnums=3)(x_ND, jnp.zeros((16, E)).at[:, :2].set(0.1), jnp.zeros(E), 2)
    expert_Nk = jnp.tile(jnp.array([[0, 1]]), (N, 1))  # all of them the first device's
    routing = routing._replace(expert_Nk=expert_Nk, gate_Nk=jnp.full((N, 2), 0.5))
    apply = partial(dispatch.apply_experts, local=BLOCKS, capacity_factor=2.0, mesh=mesh, gathers=experts.ragged)
    y_ND, dropped = jax.jit(apply)(x_ND, routing, weights)
    room = N // 8 * 2 * 2  # rows of a device; its four members' tokens ask for twice that
    assert float(dropped) == N * 2 - 2 * room
    first_ND = experts.every_expert(x_ND, expert_Nk, jnp.array([[0.5, 0.0]] * N), weights)
    np.testing.assert_allclose(y_ND, first_ND, rtol=1e-4, atol=1e-4)


def test_blocks_hold_each_assignment_once():
    expert_A = jnp.array([3, 0, -1, 3, 3, 1, 0, 3, -1, 3])
    laid = jax.tree.map(np.asarray, jax.jit(partial(experts.lay_blocks, experts=4, rows=2))(expert_A))
    for a, e in enumerate(np.array(expert_A)):
        row = int(laid.row_A[a])
        if e < 0:
            assert row == len(laid.source_R)
        else:
            assert int(laid.source_R[row]) == a
            assert int(laid.expert_n[row // 2]) == e
    assert int((laid.source_R < len(expert_A)).sum()) == 8


def test_balance_bias_selects_but_does_not_weigh():
    x_ND, router_DE = jax.random.normal(jax.random.key(0), (N, D)), jax.random.normal(jax.random.key(1), (D, E))
    pushed = route(x_ND, router_DE, jnp.zeros(E).at[5].set(10.0), K)
    assert (pushed.expert_Nk == 5).any(axis=1).all()
    score_NE = jax.nn.sigmoid(x_ND @ router_DE)
    chosen_Nk = jnp.take_along_axis(score_NE, pushed.expert_Nk, axis=1)
    np.testing.assert_allclose(pushed.gate_Nk, chosen_Nk / chosen_Nk.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(pushed.load_E.sum(), 1.0, rtol=1e-6)
