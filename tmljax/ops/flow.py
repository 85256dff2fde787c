"""Conditional flow matching on the mel of a micro-turn (Lipman et al., arXiv 2210.02747).

x_t = (1 - t) x_0 + t x_1 with x_0 ~ N(0, I); the field to learn is u = x_1 - x_0. The network says where the path
ends, x_1, and the field follows as (x_1 - x_t) / (1 - t): the loss stays on the field, and a narrow network need not
carry the noise through (arXiv 2511.13720, "x-prediction, v-loss").
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

MEL_MEAN, MEL_SCALE = -3.0, 2.0  # log10 mel lies in about [-6.5, 1.5]
LEAST_REMAINDER = 0.05  # 1 - t is not taken smaller where it divides

Endpoint = Callable[[jax.Array, jax.Array], jax.Array]  # (x_t [..., X], t [...]) -> x_1 [..., X]


def normalise(mel: jax.Array) -> jax.Array:
    return (mel.astype(jnp.float32) - MEL_MEAN) / MEL_SCALE


def denormalise(x: jax.Array) -> jax.Array:
    return x * MEL_SCALE + MEL_MEAN


def matching_loss(endpoint: Endpoint, target_X: jax.Array, noise_X: jax.Array, time: jax.Array) -> jax.Array:
    """Mean squared error of the field, per element of `time` [...]; target and noise are [..., X]."""
    t = time[..., None]
    x_X = (1 - t) * noise_X + t * target_X
    error_X = (endpoint(x_X, time) - target_X) / jnp.maximum(1 - t, LEAST_REMAINDER)
    return jnp.mean(error_X**2, axis=-1)


def integrate(endpoints: Sequence[Callable[[jax.Array], jax.Array]], noise_X: jax.Array) -> jax.Array:
    """Euler from t = 0 to 1 in equal steps: `endpoints[i]` says where the path ends from x_t [..., X], t = i / steps.

    With the field implied by an endpoint, the last step lands on it.
    """
    x_X, steps = noise_X, len(endpoints)
    for i, endpoint in enumerate(endpoints):
        x_X = x_X + (endpoint(x_X) - x_X) / (steps - i)
    return x_X
