"""Early fusion: dMel, pixels and tokens become positions of the trunk, without encoders.

Legend: B batch, T micro-turns, S slots of one stream, F mel frames of a slot, M mel channels, D d_model, E frame width,
N video frames, P patches.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tmljax.model.params import dense
from tmljax.ops.norm import rms_norm
from tmljax.stream.microturn import BINS, MEL, PATCH, Layout


class DmelEmbed(nnx.Module):
    """A bag of embeddings per frame (facts §8.1: one row per channel and bin, summed), frames of a slot side by side.

    The table is shared by the frames, so that a sound has one look wherever in the slot it falls.
    """

    def __init__(self, layout: Layout, d_model: int, rngs: nnx.Rngs):
        self.frames = layout.stream.frames_per_slot
        width = max(32, d_model * 3 // 8)
        self.table = dense(rngs, (MEL * BINS, width), ("input", "frame"), fan_in=MEL)
        self.merge = dense(rngs, (self.frames * width, d_model), ("input", "embed"), fan_in=self.frames * width)

    def __call__(self, dmel_BTFM: jax.Array) -> jax.Array:
        """uint8 [B, T, 8, 80] -> [B, T, S, D]."""
        B, T, F, M = dmel_BTFM.shape
        # A one-hot matmul: its gradient is a matmul too, where that of a gather is a scatter.
        one_hot = dmel_BTFM[..., None] == jnp.arange(BINS, dtype=dmel_BTFM.dtype).reshape(1, 1, 1, 1, -1)
        bag_BTFE = jnp.dot(one_hot.reshape(B, T, F, M * BINS).astype(self.table.dtype), self.table[...])
        slot_BTS = jax.nn.gelu(bag_BTFE).reshape(B, T, F // self.frames, -1)
        return jnp.dot(slot_BTS, self.merge[...])


class PatchEmbed(nnx.Module):
    """hMLP stem (arXiv 2203.09795) for 40x40 patches: 4x4 pixels, then 2x2, then 5x5 merges.

    RMS normalisation per sub-patch in place of batch normalisation: nothing leaks between patches or examples.
    The last merge has its own weights for each place in the slot, which tells the patches of a slot apart.
    """

    def __init__(self, layout: Layout, d_model: int, rngs: nnx.Rngs):
        self.slots, self.per_slot = layout.user_video, layout.stream.patches_per_slot
        w = d_model // 4
        self.pixels = dense(rngs, (4 * 4 * 3, w), ("input", "small"), fan_in=48)
        self.merge = dense(rngs, (2 * 2 * w, w), ("embed", "small"), fan_in=4 * w)
        self.last = dense(
            rngs, (self.per_slot, 25 * w, d_model), ("small", "input", "embed"), fan_in=25 * w * self.per_slot
        )

    def __call__(self, patch_BNPX: jax.Array) -> jax.Array:
        """uint8 [B, N, P, 4800] -> [B, N, S, D]."""
        B, N, P, _ = patch_BNPX.shape
        x = patch_BNPX.astype(self.pixels.dtype) / 127.5 - 1.0
        x = merge_squares(x.reshape(B * N * P, PATCH, PATCH, 3), 4)
        x = jax.nn.gelu(rms_norm(jnp.dot(x, self.pixels[...])))
        x = merge_squares(x, 2)
        x = jax.nn.gelu(rms_norm(jnp.dot(x, self.merge[...])))
        x_BNPY = merge_squares(x, 5).reshape(B, N, P, -1)
        x_BNPY = jnp.pad(x_BNPY, ((0, 0), (0, 0), (0, self.slots * self.per_slot - P), (0, 0)))
        x_BNSpY = x_BNPY.reshape(B, N, self.slots, self.per_slot, -1)
        return jnp.einsum("BNSpY,pYD->BNSD", x_BNSpY, self.last[...])


def merge_squares(x: jax.Array, side: int) -> jax.Array:
    """[n, H, W, C] -> [n, H/side, W/side, side*side*C]."""
    n, H, W, C = x.shape
    x = x.reshape(n, H // side, side, W // side, side, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, H // side, W // side, side * side * C)
