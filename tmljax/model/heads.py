"""What the trunk's positions say: tokens, and the mel of the next 200 ms.

Legend: D d_model, V vocab, N sessions, T steps of the flow, X values of a slot of mel, W flow width.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tmljax import config
from tmljax.model.params import constant, dense, matrix
from tmljax.ops.flow import integrate
from tmljax.stream.microturn import MEL, Layout

TIME_WAVES = 64


class TextHead(nnx.Module):
    def __init__(self, d_model: int, vocab_size: int, rngs: nnx.Rngs):
        self.unembed = matrix(rngs, (d_model, vocab_size), ("embed", "vocab"), fan_in=d_model)

    @jax.named_scope("text_head")
    def __call__(self, z_D: jax.Array) -> jax.Array:
        return jnp.dot(z_D, self.unembed[...].astype(z_D.dtype))


class FlowHead(nnx.Module):
    """The denoising MLP of MAR (arXiv 2406.11838): residual blocks modulated by time and condition (adaLN-zero)."""

    def __init__(self, layout: Layout, model: config.Model, rngs: nnx.Rngs):
        D, W, depth = model.d_model, model.flow.width, model.flow.depth
        self.values = layout.stream.frames_per_slot * MEL
        self.depth = depth
        self.time_in = dense(rngs, (2 * TIME_WAVES, W), ("input", "small"), fan_in=2 * TIME_WAVES)
        self.time_out = dense(rngs, (W, W), ("flow", "small"), fan_in=W)
        self.condition = dense(rngs, (D, W), ("embed", "small"), fan_in=D)
        self.enter = dense(rngs, (self.values, W), ("input", "small"), fan_in=self.values)
        self.inner = dense(rngs, (depth, W, W), ("layers", "flow", "small"), fan_in=W)
        self.outer = dense(rngs, (depth, W, W), ("layers", "flow", "small"), fan_in=W)
        self.modulate = constant((depth, W, 3 * W), ("layers", "flow", "small"))
        self.modulate_last = constant((W, 2 * W), ("flow", "small"))
        self.leave = constant((W, self.values), ("flow", "small"))
        self.bias = constant((self.values,), ("small",))

    def endpoint(self, z_D: jax.Array, x_X: jax.Array, time: jax.Array) -> jax.Array:
        """Where the path through `x_X` [..., X] at `time` [...] ends, given the condition `z_D` [..., D]; float32."""
        return self.denoise(x_X, self.modulation(z_D, time))

    def modulation(self, z_D: jax.Array, time: jax.Array) -> list[jax.Array]:
        """What time and condition say to each block, [..., 3 W], and to the end, [..., 2 W]."""
        y_W = jnp.dot(time_waves(time), self.time_in[...])
        y_W = jnp.dot(jax.nn.silu(y_W), self.time_out[...]) + jnp.dot(z_D.astype(jnp.float32), self.condition[...])
        y_W = jax.nn.silu(y_W)
        return [jnp.dot(y_W, w) for w in (*(self.modulate[i] for i in range(self.depth)), self.modulate_last[...])]

    def denoise(self, x_X: jax.Array, modulation: Sequence[jax.Array]) -> jax.Array:
        h_W = jnp.dot(x_X, self.enter[...])
        for i in range(self.depth):
            scale_W, shift_W, gate_W = jnp.split(modulation[i], 3, axis=-1)
            r_W = standardise(h_W) * (1 + scale_W) + shift_W
            h_W = h_W + gate_W * jnp.dot(jax.nn.silu(jnp.dot(r_W, self.inner[i])), self.outer[i])
        scale_W, shift_W = jnp.split(modulation[-1], 2, axis=-1)
        h_W = standardise(h_W) * (1 + scale_W) + shift_W
        return jnp.dot(h_W, self.leave[...]) + self.bias[...].reshape((1,) * (h_W.ndim - 1) + (-1,))

    def sample(self, z_ND: jax.Array, noise_NX: jax.Array, steps: int) -> jax.Array:
        """[N, X] in so many steps. The times are known, so what they say is computed for all steps in one product."""
        time_TN = jnp.repeat(jnp.arange(steps, dtype=jnp.float32)[:, None] / steps, len(z_ND), axis=1)
        modulations = self.modulation(z_ND[None], time_TN)
        return integrate(
            [partial(self.denoise, modulation=[m[i] for m in modulations]) for i in range(steps)], noise_NX
        )


def standardise(x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def time_waves(time: jax.Array) -> jax.Array:
    """Sinusoids of `time` in [0, 1]: [...] -> [..., 2 x TIME_WAVES]."""
    rate = 1000.0 * 10_000.0 ** (-jnp.arange(TIME_WAVES, dtype=jnp.float32) / TIME_WAVES)
    angle = time[..., None] * rate.reshape((1,) * time.ndim + (-1,))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
