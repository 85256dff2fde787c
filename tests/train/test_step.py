"""Legend: B batch, L layers, E experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import toy
from tmljax.config import Experiment, UserError
from tmljax.sharding import batch_sharding, make_mesh
from tmljax.train.feed import to_devices
from tmljax.train.state import create_state
from tmljax.train.step import make_program


def noiseless(definition, params, batch, key, weights, mesh=None, whole=None):
    """The toy objective, with nothing drawn: the mean over a batch is the mean over its parts."""
    batch = batch | {"y": batch["y"] - 0.01 * jax.random.uniform(key, batch["y"].shape)}
    return toy.objective(definition, params, batch, key, weights, mesh)


def one_step(experiment: Experiment, objective=toy.objective, devices: int = 1, poison: tuple[int, ...] = (), steps=1):
    """(state before, state after, metrics); states as numpy."""
    mesh = make_mesh(experiment.mesh, jax.devices()[:devices])
    program = make_program(experiment, toy.Definition(), objective, mesh)
    state = create_state(toy.Definition(), program.optimizer, mesh, experiment.train.seed)
    source = toy.Source(experiment.data.batch, poison=poison)
    for _ in range(steps):
        before = jax.tree.map(np.array, state)
        state, metrics = program.step(state, to_devices(next(source), batch_sharding(mesh)))
    return before, jax.tree.map(np.array, state), jax.tree.map(np.array, metrics)


def assert_close(a, b, rtol=2e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_a_batch_with_nan_changes_nothing_but_the_counts():
    before, after, metrics = one_step(toy.experiment(), poison=(1,), steps=2)
    assert not np.isfinite(metrics["loss/total"])
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    jax.tree.map(np.testing.assert_array_equal, before.optimizer, after.optimizer)
    assert (int(after.step), int(after.skipped), float(metrics["skipped"])) == (2, 1, 1.0)


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too():
    def cliff(definition, params, batch, key, weights, mesh=None, whole=None):
        _, aux = toy.objective(definition, params, batch, key, weights, mesh)
        return jnp.sum(jnp.sqrt(params["bias"])), aux  # 0 with slope infinity

    before, after, metrics = one_step(toy.experiment(), cliff)
    assert np.isfinite(metrics["loss/total"])
    assert not np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert int(after.skipped) == 1


def test_training_goes_on_after_a_skipped_step():
    before, after, _ = one_step(toy.experiment(), poison=(1,), steps=3)
    assert (int(after.step), int(after.skipped)) == (3, 1)
    assert not np.array_equal(before.params["enter"], after.params["enter"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize(("devices", "parts"), [(1, 2), (4, 8)])
def test_accumulation_equals_one_big_batch(devices, parts):
    whole = toy.experiment(data={"batch": 32})
    _, expected, metrics = one_step(whole, noiseless)
    split = toy.experiment(data={"batch": 32}, optimizer={"accumulate": parts})
    _, state, split_metrics = one_step(split, noiseless, devices)
    assert_close(state.params, expected.params)
    assert float(split_metrics.pop("experts/dropped")) == parts * float(metrics.pop("experts/dropped"))
    assert_close(split_metrics, metrics)


@pytest.mark.parametrize("devices", [1, 4])
def test_evaluation_takes_no_more_at_once_than_the_step(devices):
    """In micro-batches too: the same values, of examples that are as few."""
    sizes = []

    def watched(definition, params, batch, key, weights, mesh=None, whole=None):
        sizes.append(len(batch["x"]))
        return toy.objective(definition, params, batch, key, weights, mesh)

    def evaluate(parts: int, devices: int):
        experiment = toy.experiment(data={"batch": 32}, optimizer={"accumulate": parts})
        mesh = make_mesh(experiment.mesh, jax.devices()[:devices])
        program = make_program(experiment, toy.Definition(), watched, mesh)
        state = create_state(toy.Definition(), program.optimizer, mesh, 0)
        batch = to_devices(next(toy.Source(32)), batch_sharding(mesh))
        return jax.tree.map(np.array, program.evaluate(state.params, batch))

    whole = evaluate(1, 1)
    assert set(sizes) == {32}
    sizes.clear()
    parts = evaluate(8, devices)
    assert set(sizes) == {4}
    assert float(parts.pop("experts/dropped")) == 8 * float(whole.pop("experts/dropped"))
    assert_close(parts, whole)


def test_eight_devices_step_as_one():
    experiment = toy.experiment()
    _, expected, metrics = one_step(experiment, steps=3)
    sharded = dataclasses.replace(experiment, mesh=dataclasses.replace(experiment.mesh, data=2, fsdp=2, expert=2))
    _, state, sharded_metrics = one_step(sharded, devices=8, steps=3)
    assert_close(state.params, expected.params)
    assert_close(sharded_metrics, metrics)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_lie_where_their_parameters_lie(name):
    experiment = toy.experiment(optimizer={"name": name}, mesh={"data": 2, "fsdp": 2, "expert": 2})
    program = make_program(experiment, toy.Definition(), toy.objective, make_mesh(experiment.mesh))
    specs = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(program.abstract.params)}
    moments = [leaf for leaf in jax.tree.leaves(program.abstract.optimizer) if leaf.shape in specs and leaf.ndim]
    assert len(moments) >= 6
    for moment in moments:
        assert moment.sharding.spec == specs[moment.shape]
    assert specs[(toy.L, toy.E, toy.D, toy.D)][1] == "expert"


def test_gradients_are_clipped_to_the_norm():
    experiment = toy.experiment(optimizer={"clip": 0.25, "b1": 0.9})
    _, after, metrics = one_step(experiment)
    assert metrics["grad_norm"] > 0.25
    first_moments = after.optimizer[0].mu
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(first_moments)))
    np.testing.assert_allclose(norm, (1 - 0.9) * 0.25, rtol=1e-5)


def test_routing_bias_moves_against_the_load_by_the_rate():
    experiment = toy.experiment(model={"moe": {"balance_rate": 0.125}})

    def listening(*args, **kwargs):
        loss, (metrics, routing) = toy.objective(*args, **kwargs)
        load = {f"load/{i}": routing.load_LE.reshape(-1)[i] for i in range(toy.L * toy.E)}
        return loss, (metrics | load, routing)

    before, after, metrics = one_step(experiment, listening)
    load_LE = np.array([metrics[f"load/{i}"] for i in range(toy.L * toy.E)]).reshape(toy.L, toy.E)
    moved = after.params["blocks"]["balance_bias"] - before.params["blocks"]["balance_bias"]
    np.testing.assert_allclose(moved, 0.125 * np.sign(1 / toy.E - load_LE))
    assert len(np.unique(moved)) > 1


def test_a_batch_that_does_not_divide_names_the_nearest():
    experiment = toy.experiment(data={"batch": 12})
    with pytest.raises(UserError, match=r"config.data.batch=12 .* try a mesh .* or config.data.batch=8 or 16$"):
        make_program(experiment, toy.Definition(), toy.objective, make_mesh(experiment.mesh))
