"""What a prediction costs, by position."""

import jax
import jax.numpy as jnp


def cross_entropy(logit_V: jax.Array, target: jax.Array) -> jax.Array:
    """Per position, float32: `logit_V` [..., V], `target` int32 [...]."""
    logit_V = logit_V.astype(jnp.float32)
    chosen = jnp.take_along_axis(logit_V, target[..., None], axis=-1)[..., 0]
    return jax.scipy.special.logsumexp(logit_V, axis=-1) - chosen
