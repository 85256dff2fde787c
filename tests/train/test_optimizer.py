"""Legend: L layers, E experts, D width."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train import toy
from tmljax import config
from tmljax.train.optimizer import MUON_RMS, make_optimizer, schedule
from tmljax.train.state import ROUTING, split


def rates(steps: int, **fields) -> list[float]:
    rate = schedule(config.Optimizer(learning_rate=1.0, **fields), steps)
    return [float(rate(step)) for step in range(steps + 1)]


def test_wsd_warms_up_stays_and_decays_to_zero():
    rate = rates(20, schedule="wsd", warmup=4, decay=0.25)
    np.testing.assert_allclose(rate[:4], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(rate[4:16], 1.0)
    np.testing.assert_allclose(rate[15:], [1.0, 0.8, 0.6, 0.4, 0.2, 0.0], atol=1e-6)


def test_cosine_warms_up_and_follows_the_cosine():
    rate = rates(20, schedule="cosine", warmup=4)
    np.testing.assert_allclose(rate[:4], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(rate[4:], 0.5 * (1 + np.cos(np.pi * np.arange(17) / 16)), atol=1e-6)


@pytest.mark.parametrize("name", ["wsd", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 50])
def test_schedules_of_odd_lengths_stay_within_bounds(name, warmup):
    rate = rates(10, schedule=name, warmup=warmup)
    assert all(0 <= r <= 1 for r in rate)
    assert rate[0] > 0


def directions(grads, **fields):
    definition = toy.Definition()
    trained = split(definition.init(jax.random.key(0)))[0]
    optimizer = make_optimizer(config.Optimizer(**fields), split(definition.axes())[0])
    return trained, jax.jit(lambda g: optimizer.update(g, optimizer.init(trained), trained)[0])(grads(trained))


def no_grads(trained):
    return jax.tree.map(jnp.zeros_like, trained)


def random_grads(trained):
    leaves, shape = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return shape.unflatten([jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_takes_matrices_only(name):
    trained, moves = directions(no_grads, name=name, weight_decay=0.5)
    for path, move in jax.tree_util.tree_leaves_with_path(moves):
        param = trained
        for key in path:
            param = param[key.key]
        decayed = path[-1].key in ("enter", "mix", "experts", "leave")  # not norm [L, D], nor bias
        np.testing.assert_allclose(move, -0.5 * param if decayed else 0 * param, atol=1e-6, err_msg=str(path))


def test_muon_orthogonalises_every_matrix_of_a_stack():
    """Each [D, D] of [L, E, D, D] moves along the orthogonal factor of its own gradient: the oracle is the SVD."""
    trained, moves = directions(random_grads, name="muon", weight_decay=0.0)
    grads = random_grads(trained)
    for name in ("mix", "experts"):
        move, grad = np.asarray(moves["blocks"][name]), np.asarray(grads["blocks"][name])
        u, _, v = np.linalg.svd(grad)
        scale = MUON_RMS * np.sqrt(toy.D)
        values = np.linalg.svd(move, compute_uv=False) / scale
        assert values.min() > 0.5
        assert values.max() < 1.35
        cosine = -np.sum(move * (u @ v), axis=(-1, -2)) / (scale * toy.D)
        assert cosine.min() > 0.7, "not along U V^T"


def test_muon_keeps_stacked_matrices_apart():
    def one_expert_louder(trained):
        grads = random_grads(trained)
        grads["blocks"]["experts"] = grads["blocks"]["experts"].at[1, 2].multiply(-37.0)
        return grads

    _, moves = directions(random_grads, name="muon", weight_decay=0.0)
    _, others = directions(one_expert_louder, name="muon", weight_decay=0.0)
    same = np.isclose(moves["blocks"]["experts"], others["blocks"]["experts"], atol=1e-5).all(axis=(-1, -2))
    expected = np.ones((toy.L, toy.E), bool)
    expected[1, 2] = False
    np.testing.assert_array_equal(same, expected)


def test_muon_leaves_embeddings_heads_norms_and_biases_to_adamw():
    _, muon = directions(random_grads, name="muon")
    _, adamw = directions(random_grads, name="adamw")
    for moves in (muon, adamw):
        del moves["blocks"]["mix"], moves["blocks"]["experts"]
    jax.tree.map(np.testing.assert_array_equal, muon, adamw)


def test_adamw_is_optax_adamw():
    fields = {"learning_rate": 0.3, "b1": 0.8, "b2": 0.9, "weight_decay": 0.1}
    trained, moves = directions(random_grads, name="adamw", **fields)
    matrices = jax.tree.map(lambda p: True, trained) | {"bias": False}
    matrices["blocks"]["norm"] = False
    oracle = optax.adamw(0.3, b1=0.8, b2=0.9, weight_decay=0.1, mask=matrices)
    expected, _ = oracle.update(random_grads(trained), oracle.init(trained), trained)
    jax.tree.map(lambda move, want: np.testing.assert_allclose(0.3 * move, want, rtol=1e-5), moves, expected)


def test_routing_biases_have_no_moments():
    definition = toy.Definition()
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(config.Optimizer(name=name), split(definition.axes())[0])
        state = jax.eval_shape(optimizer.init, split(definition.abstract())[0])
        assert ROUTING not in str(jax.tree_util.tree_leaves_with_path(state))
