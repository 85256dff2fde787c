"""How modules declare parameters: a float32 value and the logical name of each dim (`tmljax.sharding.PLACEMENT`)."""

import jax
import jax.numpy as jnp
from flax import nnx


def dense(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, gain: float = 1.0) -> nnx.Param:
    """Truncated normal of standard deviation gain / sqrt(fan_in)."""
    value = jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32) * (gain * fan_in**-0.5)
    return nnx.Param(value, axes=axes)


def constant(shape: tuple[int, ...], axes: tuple[str, ...], value: float = 0.0) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)
