"""Against complex numbers. Legend: B batch, P positions, H heads, h head dim, w half of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmljax.ops.rope import PERIOD, rotation

PLATFORMS = pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
TIME_BP = jnp.array([[0, 1, 1, 7, 18_000], [3, 3, 4, 5, 6]], jnp.int32)


@PLATFORMS
def test_pairs_turn_as_complex_numbers_do(platform):
    x_BPHh = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    rate_w = PERIOD ** (-np.arange(4) / 4)
    turn_BP1w = np.exp(1j * np.asarray(TIME_BP)[..., None, None] * rate_w)
    pair_BPHw = (x_BPHh[..., :4] + 1j * x_BPHh[..., 4:]) * turn_BP1w
    expected_BPHh = np.concatenate([pair_BPHw.real, pair_BPHw.imag], axis=-1)
    rotate = jax.jit(lambda x, t: rotation(t, 8, platform)(x))
    np.testing.assert_allclose(rotate(x_BPHh, TIME_BP), expected_BPHh, atol=5e-3)  # an hour's angles in float32
    np.testing.assert_allclose(rotate(x_BPHh, TIME_BP)[1], expected_BPHh[1], atol=1e-5)


@PLATFORMS
def test_gradients_turn_back(platform):
    x_BPHh = jnp.array(np.random.default_rng(1).normal(size=(2, 5, 3, 8)), jnp.float32)
    turned, back = jax.vjp(lambda x: rotation(TIME_BP, 8, platform)(x), x_BPHh)
    np.testing.assert_allclose(back(turned)[0], x_BPHh, atol=1e-5)


@PLATFORMS
def test_scores_depend_on_the_time_between(platform):
    q_h, k_h = np.random.default_rng(2).normal(size=(2, 8)).astype(np.float32)
    rotate = rotation(jnp.arange(6)[None], 8, platform)
    q_Ph, k_Ph = (rotate(jnp.broadcast_to(x_h, (1, 6, 1, 8)))[0, :, 0] for x_h in (q_h, k_h))
    score_PQ = q_Ph @ k_Ph.T
    for lag in range(6):
        np.testing.assert_allclose(np.diagonal(score_PQ, -lag), score_PQ[lag, 0], rtol=1e-4)
