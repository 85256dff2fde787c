"""Legend: P positions, D d_model, H heads, h head dim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tmljax import config
from tmljax.model.block import Attention


def test_at_first_a_position_attends_to_what_is_like_it():
    """Each head's queries are as near to the keys of the same content as half of their variance makes them, and no
    nearer to others; their scale is that of any other matrix."""
    model = config.Model(d_model=256, heads=4, kv_heads=2, head_dim=64)
    attention = Attention(model, nnx.Rngs(params=jax.random.key(0)))
    x_PD = jax.random.normal(jax.random.key(1), (200, 256))
    unit = lambda y: y / jnp.linalg.norm(y, axis=-1, keepdims=True)  # noqa: E731
    q_PHh = unit(jnp.dot(x_PD, attention.q[...]).reshape(-1, 4, 64))
    k_PHh = unit(jnp.repeat(jnp.dot(x_PD, attention.k[...]).reshape(-1, 2, 64), 2, axis=1))
    own_H, other_H = (np.mean(np.sum(q_PHh * k, axis=-1), axis=0) for k in (k_PHh, jnp.roll(k_PHh, 1, axis=0)))
    np.testing.assert_allclose(own_H, 0.5**0.5, atol=0.05)
    np.testing.assert_allclose(other_H, 0, atol=0.05)
    assert float(jnp.std(attention.q[...])) == pytest.approx(256**-0.5, rel=0.03)
