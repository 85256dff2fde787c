"""Flow matching on data whose field is known."""

import jax
import jax.numpy as jnp
import numpy as np

from tmljax.ops.flow import denormalise, integrate, matching_loss, normalise


def test_the_loss_is_that_of_the_field():
    """Of a network that is off by a constant, against (x_1 - x_0) computed directly."""
    key = jax.random.key(0)
    target, noise = jax.random.normal(key, (5, 7)), jax.random.normal(jax.random.fold_in(key, 1), (5, 7))
    time = jnp.linspace(0.0, 0.9, 5)
    loss = matching_loss(lambda x, t: target + 0.3, target, noise, time)
    x = (1 - time[:, None]) * noise + time[:, None] * target
    field = (target + 0.3 - x) / (1 - time[:, None])
    np.testing.assert_allclose(loss, jnp.mean((field - (target - noise)) ** 2, axis=-1), rtol=1e-4)


def test_the_loss_is_least_at_the_mean():
    """Given nothing but t = 0, the best guess of the end is the mean of the data."""
    data = jax.random.normal(jax.random.key(2), (4096, 1)) * 0.5 + 2.0
    noise = jax.random.normal(jax.random.key(3), data.shape)
    guesses = jnp.linspace(1.0, 3.0, 41)
    losses = [float(jnp.mean(matching_loss(lambda x, t, g=g: g, data, noise, jnp.zeros(4096)))) for g in guesses]
    assert abs(float(guesses[int(np.argmin(losses))]) - 2.0) <= 0.05


def test_integration_of_a_known_flow():
    """To a point, any number of steps lands on it; a linear field is followed as Euler follows it."""
    noise = jax.random.normal(jax.random.key(4), (3, 2))
    for steps in (1, 2, 5):
        np.testing.assert_allclose(integrate([lambda x: jnp.full_like(x, 1.5)] * steps, noise), 1.5, rtol=1e-6)
    half = integrate([lambda x: x + 1.0] * 2, noise)  # each step moves a half, then all, of the way that is left
    np.testing.assert_allclose(half, noise + 1.5, rtol=1e-6)


def test_normalisation_inverts():
    mel = np.linspace(-7, 2, 80, dtype=np.float16)
    np.testing.assert_allclose(denormalise(normalise(mel)), mel, rtol=1e-3)
    assert np.abs(normalise(mel)).max() < 3
