"""Rotary positions (arXiv 2104.09864) whose position is the micro-turn index, so that it is time."""

import jax
import jax.numpy as jnp

PERIOD = 10_000.0  # longest wavelength, in micro-turns over 2 pi


def rotate(x_BPHh: jax.Array, time_BP: jax.Array) -> jax.Array:
    """Rotates pairs of the last dim by `time_BP` (int32 micro-turns), computed in float32."""
    half = x_BPHh.shape[-1] // 2
    rate_h = PERIOD ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BPh = time_BP.astype(jnp.float32)[..., None] * rate_h[None, None]
    cos, sin = jnp.cos(angle_BPh)[:, :, None], jnp.sin(angle_BPh)[:, :, None]
    a, b = jnp.split(x_BPHh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BPHh.dtype)
