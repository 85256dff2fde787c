"""Attention in blocks against attention at once, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmljax.ops import splash
from tmljax.ops.attention import attend, attend_in_blocks, attend_one_by_one, forgetful, query_blocks, see
from tmljax.ops.project import FEW, project
from tmljax.ops.splash import count_worked, make_mask, through_splash

B, H, K, h = 2, 4, 2, 8


def dense(q, k, v, visible, sink):
    """Query by query, key by key, in float64."""
    q, k, v, sink = (np.asarray(x, np.float64) for x in (q, k, v, sink))
    out = np.zeros(q.shape)
    for b, p, head in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(visible[b, p])
        weight = np.exp(k[b, keys, head // (H // K)] @ q[b, p, head] / np.sqrt(h))
        out[b, p, head] = weight @ v[b, keys, head // (H // K)] / (weight.sum() + np.exp(sink[head]))
    return out


def example(slots_of_turns: list[int], window: int):
    """Turns with a different number of slots each, as an example with video has."""
    turn_P = np.repeat(np.arange(len(slots_of_turns)), slots_of_turns)
    slot_P = np.concatenate([np.arange(n) for n in slots_of_turns])
    keys = jax.random.split(jax.random.key(0), 5)
    P = len(turn_P)
    q, k, v = (jax.random.normal(x, (B, P, n, h)) for x, n in zip(keys, (H, K, K)))
    present_BP = jax.random.bernoulli(keys[3], 0.7, (B, P))
    time_BP = jnp.asarray(turn_P)[None] + jnp.array([[0], [7]])
    return q, k, v, jax.random.normal(keys[4], (H,)), turn_P, slot_P, time_BP, present_BP


@pytest.mark.parametrize(("block", "window"), [(1, 2), (1, 5), (3, 2), (3, 5), (3, 50), (50, 5)])
@pytest.mark.parametrize(
    "how", [partial(attend_in_blocks, attend=forgetful), attend_one_by_one], ids=["together", "one by one"]
)
def test_blocks_equal_the_whole(block, window, how):
    q, k, v, sink, turn_P, slot_P, time_BP, present_BP = example([4, 2, 2] * 3, window)
    blocks = query_blocks(turn_P, block, window)
    masks = [see(time_BP[:, a], slot_P[a], time_BP[:, b], slot_P[b], present_BP[:, b], window) for a, b in blocks]
    whole = see(time_BP, slot_P, time_BP, slot_P, present_BP, window)
    mix = jax.random.normal(jax.random.key(9), q.shape)

    def in_blocks(q, k, v, sink):
        return jnp.sum(mix * how(q, k, v, blocks, masks, sink))

    def at_once(q, k, v, sink):
        return jnp.sum(mix * attend(q, k, v, whole, sink))

    np.testing.assert_allclose(
        how(q, k, v, blocks, masks, sink),
        dense(q, k, v, np.asarray(whole), sink),
        rtol=1e-4,
        atol=1e-5,
    )
    grads = [jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(q, k, v, sink) for f in (in_blocks, at_once)]
    for a, b in zip(*grads):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("pattern", ["all", "causal", "itself", "some", "none"])
@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_the_backward_pass_by_hand_equals_the_derived_one(kv_heads, pattern, dtype, error):
    """That of the sinks too, and of queries that see nothing but the sink; in blocks that share some keys."""
    blocks = [(slice(0, 5), slice(0, 9)), (slice(5, 12), slice(3, 12))]
    P, keys = 12, jax.random.split(jax.random.key(1), 6)
    q, k, v, mix = (jax.random.normal(x, (B, P, n, h)) for x, n in zip(keys, (H, kv_heads, kv_heads, H)))
    sink = 2 * jax.random.normal(keys[4], (H,))
    seen_BPP = {
        "all": jnp.ones((B, P, P), bool),
        "causal": jnp.tile(jnp.tri(P, dtype=bool), (B, 1, 1)),
        "itself": jnp.tile(jnp.eye(P, dtype=bool), (B, 1, 1)),
        "some": jax.random.bernoulli(keys[5], 0.3, (B, P, P)) | jnp.eye(P, dtype=bool)[None],
        "none": jnp.zeros((B, P, P), bool),
    }[pattern]
    reach_PP = np.zeros((P, P), bool)
    for block in blocks:
        reach_PP[block] = True
    visible = seen_BPP & reach_PP[None]

    def by_hand(q, k, v, sink):
        narrow = (x.astype(dtype) for x in (q, k, v))
        return attend_one_by_one(*narrow, blocks, [visible[:, a, b] for a, b in blocks], sink).astype(jnp.float32)

    def derived(q, k, v, sink):
        return attend(q, k, v, visible, sink)

    gradients = [jax.grad(lambda *x, f=f: jnp.sum(mix * f(*x)), argnums=(0, 1, 2, 3)) for f in (by_hand, derived)]
    for found, wanted in ((by_hand, derived), gradients):
        for a, b in zip(jax.tree.leaves(found(q, k, v, sink)), jax.tree.leaves(wanted(q, k, v, sink)), strict=True):
            np.testing.assert_allclose(a, b, rtol=error, atol=error * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize(("window", "past", "turns"), [(2, 0, 9), (50, 0, 9), (4, 8, 9), (60, 0, 138)])
def test_splash_equals_the_whole(window, past, turns, monkeypatch):
    """The kernel for TPUs, interpreted: absent streams, sinks, keys of earlier members before the own ones; in the last
    case three blocks of queries, and keys that the window hides in part or whole blocks."""
    monkeypatch.setattr(splash, "BLOCK", 128)
    q, k, v, sink, turn_P, slot_P, time_BP, present_BP = example([4, 2, 2] * (turns // 3), window)
    own = len(turn_P) - past
    sight = through_splash(interpret=True)(turn_P - turn_P[past], slot_P, own, window)
    whole = see(time_BP[:, past:], slot_P[past:], time_BP, slot_P, present_BP, window)
    mix = jax.random.normal(jax.random.key(9), (B, own, H, h))

    def splashed(q, k, v, sink):
        return sight.attend(q[:, past:], k, v, sight.mask(present_BP), sink)

    def at_once(q, k, v, sink):
        return attend(q[:, past:], k, v, whole, sink)

    gradients = [jax.grad(lambda *x, f=f: jnp.sum(mix * f(*x)), argnums=(0, 1, 2, 3)) for f in (splashed, at_once)]
    for found, wanted in ((splashed, at_once), gradients):
        for a, b in zip(jax.tree.leaves(found(q, k, v, sink)), jax.tree.leaves(wanted(q, k, v, sink)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_splash_leaves_out_blocks_that_nobody_sees():
    turn_P, slot_P = np.divmod(np.arange(2048), 4)
    assert count_worked(make_mask(turn_P, slot_P, 2048, 512)) == (36 + 8) * 256**2  # causal; each query's own key
    assert count_worked(make_mask(turn_P, slot_P, 2048, 129)) == (21 + 8) * 256**2  # two blocks back


def test_what_a_query_sees():
    """Against the words of the contract, position by position."""
    _, _, _, _, turn_P, slot_P, time_BP, present_BP = example([3, 2, 2, 3], 2)
    visible = np.asarray(see(time_BP, slot_P, time_BP, slot_P, present_BP, 2))
    for b, p, q in np.ndindex(visible.shape):
        earlier = (turn_P[q], slot_P[q]) < (turn_P[p], slot_P[p])
        near = turn_P[p] - turn_P[q] < 2
        assert visible[b, p, q] == (p == q or bool(earlier and near and present_BP[b, q]))


@pytest.mark.parametrize("rows", [FEW, FEW + 1])
def test_products_of_one_input(rows):
    x, a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(rows, 8), (8, 6), (8, 6)]))

    def loss(x, a, b):
        y, z = project(x, a, b)
        return jnp.sum(jnp.sin(y) * jnp.cos(2 * z))

    def plain(x, a, b):
        return jnp.sum(jnp.sin(jnp.dot(x, a)) * jnp.cos(2 * jnp.dot(x, b)))

    for found, wanted in zip(jax.grad(loss, (0, 1, 2))(x, a, b), jax.grad(plain, (0, 1, 2))(x, a, b)):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
