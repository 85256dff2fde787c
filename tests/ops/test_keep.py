"""remat="dots" makes no product again that a kernel or a loop gave, nor attention."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmljax.model.trunk import REMAT
from tmljax.ops import experts
from tmljax.ops.attention import attend_in_blocks, attend_one_by_one, forgetful, in_blocks
from tmljax.ops.experts import Experts
from tmljax.ops.splash import through_splash


def count(operation: str, f, policy: str, *args: jax.Array) -> int:
    """How often it stands in the gradients' program, when f is part of a layer: what it gives is used once more."""
    return count_of_layer(operation, lambda *args: jnp.sin(f(*args) * jnp.sin(args[0])), policy, *args)


def count_of_layer(operation: str, layer, policy: str, *args: jax.Array) -> int:
    kept = jax.checkpoint(layer, policy=REMAT[policy]) if policy != "none" else layer
    grads = jax.grad(lambda *args: jnp.sum(kept(*args)), argnums=range(len(args)))
    return count_in(jax.make_jaxpr(grads)(*args), operation)


def count_in(program: Any, operation: str) -> int:
    """Of a jaxpr and, each time it is called, of those inside. What gives nothing is not in the compiled program."""
    eqns = [eqn for eqn in getattr(program, "jaxpr", program).eqns if eqn.outvars]
    inside = [x for eqn in eqns for x in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr) if is_jaxpr(x)]
    return sum(eqn.primitive.name == operation for eqn in eqns) + sum(count_in(x, operation) for x in inside)


def is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def draw(*shapes: tuple[int, ...]) -> list[jax.Array]:
    return [
        jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0), len(shapes)), shapes)
    ]


@pytest.mark.parametrize(
    ("product", "operation"), [(experts.ragged, "ragged_dot_general"), (experts.grouped, "pallas_call")]
)
def test_products_of_experts(product, operation):
    """Three, and two gradients of each; all three again where nothing is kept."""
    x_RD, *weights = draw((512, 32), (4, 32, 32), (4, 32, 32), (4, 32, 32))
    f = lambda x_RD, *weights: product(x_RD, jnp.array([100, 200, 12, 200]), Experts(*weights))  # noqa: E731
    assert [count(operation, f, policy, x_RD, *weights) for policy in ("none", "dots", "full")] == [9, 9, 12]


@pytest.mark.parametrize(
    ("product", "operation"), [(experts.ragged, "ragged_dot_general"), (experts.grouped, "pallas_call")]
)
def test_gates_before_the_last_product_of_experts_do_not_ask_for_it(product, operation):
    """Nor does a sum. Where gates multiply its results, a full remat makes all three again."""
    x_RD, gate_R, *weights = draw((512, 32), (512,), (4, 32, 32), (4, 32, 32), (4, 32, 32))
    rows_E = jnp.array([100, 200, 12, 200])
    before = lambda x_RD, gate_R, *weights: product(x_RD, rows_E, Experts(*weights), gate_R)  # noqa: E731
    after = lambda x_RD, gate_R, *weights: product(x_RD, rows_E, Experts(*weights)) * gate_R[:, None]  # noqa: E731
    found = [count_of_layer(operation, f, "full", x_RD, gate_R, *weights) for f in (before, after)]
    assert found == [11, 12]


@pytest.mark.parametrize(
    ("plan", "operation", "found"),
    [
        (through_splash(interpret=True), "pallas_call", [3, 3, 4]),
        (in_blocks(16, partial(attend_in_blocks, attend=forgetful)), "exp", [8, 8, 12]),
        (in_blocks(16, attend_one_by_one), "exp", [7, 7, 11]),
    ],
    ids=["splash", "blocks", "one by one"],
)
def test_attention(plan, operation, found):
    turn_P, slot_P = np.divmod(np.arange(128), 4)
    q_BPHh, k_BPKh, v_BPKh, sink_H = draw((1, 128, 2, 128), (1, 128, 1, 128), (1, 128, 1, 128), (2,))
    sight = plan(turn_P, slot_P, 128, 8)
    masks = sight.mask(jnp.ones((1, 128), bool))
    f = lambda q, k, v, sink_H: sight.attend(q, k, v, masks, sink_H)  # noqa: E731
    args = (q_BPHh, k_BPKh, v_BPKh, sink_H)
    assert [count(operation, f, policy, *args) for policy in ("none", "dots", "full")] == found
