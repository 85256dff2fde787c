"""Choosing a token. Each session draws from its own key, so that its neighbours cannot change what it says."""

import jax
import jax.numpy as jnp

from tmljax.config import Sampling


def choose(logit_NV: jax.Array, keys_N: jax.Array, sampling: Sampling) -> jax.Array:
    """int32 [N]; greedy at temperature 0, else from the `top_k` likeliest (all when 0)."""
    logit_NV = logit_NV.astype(jnp.float32)
    if sampling.temperature == 0:
        return jnp.argmax(logit_NV, axis=-1).astype(jnp.int32)
    if sampling.top_k:
        least_N1 = jax.lax.top_k(logit_NV, sampling.top_k)[0][:, -1:]
        logit_NV = jnp.where(logit_NV < least_N1, -jnp.inf, logit_NV)
    draw = jax.vmap(jax.random.categorical)
    return draw(keys_N, logit_NV / sampling.temperature).astype(jnp.int32)
