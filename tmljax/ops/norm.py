"""Root-mean-square normalisation (arXiv 1910.07467), always accumulated in float32."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array | None = None, eps: float = 1e-6) -> jax.Array:
    """Normalises the last dim of `x` [..., D]; `scale` [D] multiplies it. Same dtype as `x`."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * jnp.reshape(scale, (1,) * (x.ndim - 1) + scale.shape)
    return y.astype(x.dtype)
