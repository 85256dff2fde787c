"""Rotary positions (arXiv 2104.09864) whose position is the micro-turn index, so that it is time.

Legend: B batch, P positions, H heads, h head dim, w half of it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

PERIOD = 10_000.0  # longest wavelength, in micro-turns over 2 pi

# [B, P, H, h] -> the same, pairs of the last dim, half of it apart, rotated in float32
Rotate = Callable[[jax.Array], jax.Array]


def rotation(time_BP: jax.Array, head_dim: int, platform: str) -> Rotate:
    """By `time_BP` (int32 micro-turns). What all heads and layers share is worked out here, once."""
    w = head_dim // 2
    rate_w = PERIOD ** (-jnp.arange(w, dtype=jnp.float32) / w)
    angle_BP1w = (time_BP.astype(jnp.float32)[..., None] * rate_w[None, None])[:, :, None]
    return (rotate_pairs if platform == "cpu" else rotate_halves)(jnp.cos(angle_BP1w), jnp.sin(angle_BP1w))


once = jax.lax.optimization_barrier  # else XLA works them out for every head again


def rotate_halves(cos_BP1w: jax.Array, sin_BP1w: jax.Array) -> Rotate:
    """Each half by itself. On CPUs joining them costs three times what turning them does."""
    cos_BP1w, sin_BP1w = once((cos_BP1w, sin_BP1w))

    def rotate(x_BPHh: jax.Array) -> jax.Array:
        a, b = jnp.split(x_BPHh.astype(jnp.float32), 2, axis=-1)
        turned = [a * cos_BP1w - b * sin_BP1w, b * cos_BP1w + a * sin_BP1w]
        return jnp.concatenate(turned, axis=-1).astype(x_BPHh.dtype)

    return rotate


def rotate_pairs(cos_BP1w: jax.Array, sin_BP1w: jax.Array) -> Rotate:
    """Both halves at once, one beside the other. On TPUs the other layout costs a hundredth of a training step."""
    pairs = (cos_BP1w, cos_BP1w), (-sin_BP1w, sin_BP1w)
    cos_BP12w, sin_BP12w = once(tuple(jnp.stack(pair, axis=3) for pair in pairs))

    def rotate(x_BPHh: jax.Array) -> jax.Array:
        x_BPH2w = x_BPHh.astype(jnp.float32).reshape(*x_BPHh.shape[:3], 2, -1)
        turned_BPH2w = x_BPH2w * cos_BP12w + x_BPH2w[..., ::-1, :] * sin_BP12w
        return turned_BPH2w.reshape(x_BPHh.shape).astype(x_BPHh.dtype)

    return rotate
