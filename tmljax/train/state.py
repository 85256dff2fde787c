"""All that a training step changes, and where its parts live on the mesh."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tmljax.cluster import compiler_options
from tmljax.sharding import param_shardings, replicated

ROUTING = "balance_bias"  # leaves of this name are moved by the experts' load, not by gradients


class Outline(Protocol):
    """What of a model says where its state lies: the shapes of its parameters and the names of their dims."""

    def abstract(self) -> Any: ...

    def axes(self) -> Any: ...


class Definition(Outline, Protocol):
    """What training needs of a model; `tmljax.model.interaction.Definition` is one."""

    def init(self, key: jax.Array) -> Any: ...


class State(NamedTuple):
    step: jax.Array  # int32 []: steps taken
    params: Any  # nested dict of float32 arrays
    optimizer: Any
    skipped: jax.Array  # int32 []: steps whose update was not finite


def split(tree: Any) -> tuple[Any, Any]:
    """(what gradients train, the routing biases): the whole tree each, with None for the leaves of the other."""
    is_leaf = lambda x: isinstance(x, tuple)  # noqa: E731  the axes tree has tuples for leaves
    routing = lambda path, leaf: leaf if is_routing(path) else None  # noqa: E731
    trained = lambda path, leaf: None if is_routing(path) else leaf  # noqa: E731
    return tuple(jax.tree.map_with_path(pick, tree, is_leaf=is_leaf) for pick in (trained, routing))


def is_routing(path: tuple[Any, ...]) -> bool:
    return jax.tree_util.DictKey(ROUTING) in path


def join(trained: Any, routing: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None else a, trained, routing, is_leaf=lambda x: x is None)


def init_state(definition: Definition, optimizer: optax.GradientTransformation, seed: int) -> State:
    params = definition.init(jax.random.key(seed))
    zero = jnp.zeros((), jnp.int32)
    return State(zero, params, optimizer.init(split(params)[0]), zero)


def abstract_state(definition: Outline, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """Shapes and shardings of a State: the optimizer's moments lie where their parameters lie."""
    params = definition.abstract()
    shardings = param_shardings(mesh, definition.axes(), params)
    everywhere = replicated(mesh)
    trained, where = split(params)[0], split(shardings)[0]
    moments = jax.eval_shape(optimizer.init, trained)
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731  another optimizer's leaf in a partition
    moment_shardings = optax.tree_map_params(
        optimizer,
        lambda moment, sharding: moment if masked(moment) else sharding,
        moments,
        where,
        transform_non_params=lambda _: everywhere,
        is_leaf=masked,
    )
    count = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        State(count, params, moments, count),
        State(everywhere, shardings, moment_shardings, everywhere),
    )


def create_state(definition: Definition, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> State:
    """A fresh State, made where it belongs: no device ever holds more than its part."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(definition, optimizer, mesh))
    make = jax.jit(
        lambda: init_state(definition, optimizer, seed),
        out_shardings=shardings,
        compiler_options=compiler_options(mesh, cpu_level=0),  # it runs once
    )
    return make()
