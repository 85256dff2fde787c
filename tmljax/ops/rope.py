"""Rotary positions (arXiv 2104.09864) whose position is the micro-turn index, so that it is time.

Legend: B batch, P positions, H heads, h head dim, w half of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

PERIOD = 10_000.0  # longest wavelength, in micro-turns over 2 pi


class Rotation(NamedTuple):
    """By how much each position turns; float32, the same for all heads and layers."""

    cos_BP12w: jax.Array
    sin_BP12w: jax.Array  # of the first of a pair, negated, and of the second


def rotation(time_BP: jax.Array, head_dim: int) -> Rotation:
    """By `time_BP` (int32 micro-turns)."""
    w = head_dim // 2
    rate_w = PERIOD ** (-jnp.arange(w, dtype=jnp.float32) / w)
    angle_BPw = time_BP.astype(jnp.float32)[..., None] * rate_w[None, None]
    cos_BPw, sin_BPw = jnp.cos(angle_BPw), jnp.sin(angle_BPw)
    pairs = (jnp.stack(pair, axis=2)[:, :, None] for pair in ((cos_BPw, cos_BPw), (-sin_BPw, sin_BPw)))
    return Rotation(*jax.lax.optimization_barrier(tuple(pairs)))  # else XLA works them out for every head again


def rotate(x_BPHh: jax.Array, by: Rotation) -> jax.Array:
    """Rotates pairs of the last dim, half of it apart, computed in float32."""
    x_BPH2w = x_BPHh.astype(jnp.float32).reshape(*x_BPHh.shape[:3], 2, -1)
    turned_BPH2w = x_BPH2w * by.cos_BP12w + x_BPH2w[..., ::-1, :] * by.sin_BP12w  # halves joined again cost thrice
    return turned_BPH2w.reshape(x_BPHh.shape).astype(x_BPHh.dtype)
