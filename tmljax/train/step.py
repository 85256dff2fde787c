"""The training step: one pure jitted function from (state, batch) to (state, metrics).

Legend: B batch, A micro-batches, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tmljax.cluster import compiler_options
from tmljax.config import Experiment
from tmljax.sharding import check, replicated
from tmljax.train.optimizer import make_optimizer, schedule
from tmljax.train.state import Definition, State, abstract_state, join, split

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]  # float32 scalars


class Routing(Protocol):
    """What the experts report for the balance update."""

    load_LE: jax.Array  # share of the assignments
    dropped: jax.Array  # number of assignments


# (definition, params, batch, key or None, loss weights, mesh, whole) -> (loss, (metrics, Routing)); of `whole`, where
# it is given, `batch` is a micro-batch.
Objective = Callable[..., tuple[jax.Array, tuple[Metrics, Routing]]]

# The same of one experiment: (trained parameters, routing biases, batch, key or None, whole).
LossFn = Callable[[Any, Any, Batch, jax.Array | None, Batch | None], tuple[jax.Array, tuple[Metrics, Routing]]]


class Program(NamedTuple):
    """The compiled functions of one experiment on one mesh."""

    optimizer: optax.GradientTransformation
    abstract: State  # shapes and shardings of the state
    step: Callable[[State, Batch], tuple[State, Metrics]]  # takes the state's buffers
    evaluate: Callable[[Any, Batch], Metrics]  # of params on a held-out batch


def make_program(experiment: Experiment, definition: Definition, objective: Objective, mesh: Mesh) -> Program:
    """Raises UserError where the batch or the model does not divide over the mesh."""
    check(experiment, mesh)
    optimizer = make_optimizer(experiment.optimizer, split(definition.axes())[0])
    abstract = abstract_state(definition, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    options = compiler_options(mesh, cpu_level=2)
    loss_fn = bind(objective, definition, experiment, mesh)
    step = jax.jit(
        partial(take_step, loss_fn, optimizer, experiment),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=options,
    )
    evaluate = jax.jit(
        partial(evaluate_batch, loss_fn, experiment.optimizer.accumulate),
        out_shardings=replicated(mesh),
        compiler_options=options,
    )
    return Program(optimizer, abstract, step, evaluate)


def bind(objective: Objective, definition: Definition, experiment: Experiment, mesh: Mesh) -> LossFn:
    """The objective as a function of what gradients train; without a key, that of held-out data."""

    def loss_fn(trained: Any, routing: Any, batch: Batch, key: jax.Array | None, whole: Batch | None) -> Any:
        return objective(definition, join(trained, routing), batch, key, experiment.loss, mesh, whole)

    return loss_fn


def evaluate_batch(loss_fn: LossFn, micro_batches: int, params: Any, batch: Batch) -> Metrics:
    """In micro-batches, as the step: what it has no room for at once evaluation may not have either."""

    def one(micro_batch: Batch, key: None, whole: Batch | None) -> tuple[Metrics, jax.Array]:
        _, (metrics, report) = loss_fn(*split(params), micro_batch, key, whole)
        return metrics, report.dropped

    metrics, dropped = sum_micro_batches(one, micro_batches, batch, None)
    return jax.tree.map(lambda x: x / micro_batches, metrics) | {"experts/dropped": dropped}


def take_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    experiment: Experiment,
    state: State,
    batch: Batch,
) -> tuple[State, Metrics]:
    """An update that is not finite is counted and not taken: the state stays, but for the step count."""
    config = experiment.optimizer
    trained, routing = split(state.params)
    key = jax.random.fold_in(jax.random.key(experiment.train.seed), state.step)
    (loss, (metrics, load_LE, dropped)), grads = accumulate(loss_fn, config.accumulate, trained, routing, batch, key)

    norm = optax.tree.norm(grads)
    clip = jnp.minimum(1.0, config.clip / jnp.maximum(norm, 1e-12))
    with jax.named_scope("optimizer"):
        directions, moments = optimizer.update(jax.tree.map(lambda g: g * clip, grads), state.optimizer, trained)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(directions))
    rate = schedule(config, experiment.train.steps)(state.step)
    moved = join(jax.tree.map(lambda p, d: p + rate * d, trained, directions), routing)
    balanced = balance(moved, load_LE, experiment.model.moe.balance_rate)

    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    params, moments = jax.tree.map(keep, (balanced, moments), (state.params, state.optimizer))
    skipped = state.skipped + jnp.where(finite, 0, 1)
    metrics = {
        **metrics,
        "learning_rate": rate,
        "grad_norm": norm,
        "experts/load_max": jnp.max(load_LE) * load_LE.shape[-1],  # 1 is balanced
        "experts/load_min": jnp.min(load_LE) * load_LE.shape[-1],
        "experts/dropped": dropped,
        "skipped": skipped,
    }
    return State(state.step + 1, params, moments, skipped), jax.tree.map(jnp.float32, metrics)


def accumulate(
    loss_fn: LossFn, micro_batches: int, trained: Any, routing: Any, batch: Batch, key: jax.Array
) -> tuple[tuple[jax.Array, tuple[Metrics, jax.Array, jax.Array]], Any]:
    """((loss, (metrics, load_LE, dropped)), gradients): means over micro-batches, and the sum of what was dropped."""
    differentiate = jax.value_and_grad(loss_fn, has_aux=True)

    def one(micro_batch: Batch, key: jax.Array, whole: Batch | None) -> Any:
        (loss, (metrics, report)), grads = differentiate(trained, routing, micro_batch, key, whole)
        return (loss, (metrics, report.load_LE, report.dropped)), grads

    total = sum_micro_batches(one, micro_batches, batch, key)
    (loss, (metrics, load_LE, dropped)), grads = jax.tree.map(lambda x: x / micro_batches, total)
    return (loss, (metrics, load_LE, dropped * micro_batches)), grads


def sum_micro_batches(one: Callable[..., Any], micro_batches: int, batch: Batch, key: jax.Array | None) -> Any:
    """The sum of `one` (micro-batch, a key of its own, whole batch) over micro-batches, one after another; of a batch
    that is not divided, `one` (batch, key, None)."""
    if micro_batches == 1:
        return one(batch, key, None)

    def add(total: Any, index_and_batch: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        index, micro_batch = index_and_batch
        own_key = None if key is None else jax.random.fold_in(key, index)
        return jax.tree.map(jnp.add, total, one(micro_batch, own_key, batch)), None

    # Every A-th example, so that each device keeps the examples that it holds.
    take_turns = lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1)  # noqa: E731
    batches = jax.tree.map(take_turns, batch)
    like = jax.eval_shape(one, jax.tree.map(lambda x: x[0], batches), key, batch)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    total, _ = jax.lax.scan(add, zero, (jnp.arange(micro_batches), batches))
    return total


def balance(params: Any, load_LE: jax.Array, rate: float) -> Any:
    """Raises the routing bias of experts with less than their share of the load and lowers the others'
    (loss-free balancing, arXiv 2408.15664)."""
    trained, routing = split(params)
    push_LE = rate * jnp.sign(jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE)
    return join(trained, jax.tree.map(lambda bias_LE: bias_LE + push_LE, routing))
