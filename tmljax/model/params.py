"""How modules declare parameters: a float32 value and the logical name of each dim (`tmljax.sharding.PLACEMENT`).

A `matrix` is only ever read in the dtype of the activations, so that a tick may hold it in that; training keeps all in
float32, and whatever is no matrix works in it.
"""

import jax
import jax.numpy as jnp
from flax import nnx


def dense(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, gain: float = 1.0, **metadata: object
) -> nnx.Param:
    """Truncated normal of standard deviation gain / sqrt(fan_in)."""
    value = jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32) * (gain * fan_in**-0.5)
    return nnx.Param(value, axes=axes, **metadata)


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, gain: float = 1.0) -> nnx.Param:
    """As `dense`, for activations to be multiplied with in their own dtype."""
    return dense(rngs, shape, axes, fan_in, gain, in_activations_dtype=True)


def constant(shape: tuple[int, ...], axes: tuple[str, ...], value: float = 0.0) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)
