"""Early fusion: dMel, pixels and tokens become positions of the trunk, without encoders.

Legend: B batch, T micro-turns, S slots of one stream, F mel frames of a slot, M mel channels, D d_model, E frame width,
N video frames, P patches, X values of a patch, Y of its places, t times, n frames of one time.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from tmljax import config
from tmljax.model.params import dense, matrix
from tmljax.ops.norm import rms_norm
from tmljax.sharding import spread, whole
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

    def __call__(self, dmel_BTFM: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """uint8 [B, T, 8, 80] -> [B, T, S, D]."""
        B, T, F, M = dmel_BTFM.shape
        # A one-hot matmul: its gradient is a matmul too, where that of a gather is a scatter.
        one_hot = dmel_BTFM[..., None] == jnp.arange(BINS, dtype=dmel_BTFM.dtype).reshape(1, 1, 1, 1, -1)
        table, merge = whole(self.table[...], mesh), whole(self.merge[...], mesh)
        bag_BTFE = jnp.dot(one_hot.reshape(B, T, F, M * BINS).astype(table.dtype), table)
        slot_BTS = jax.nn.gelu(bag_BTFE).reshape(B, T, F // self.frames, -1)
        return spread(jnp.dot(spread(slot_BTS, mesh), merge), mesh)


FRAMES_AT_ONCE = 16  # whose sub-patches are in memory, unless config.model.remat is "none"


class PatchEmbed(nnx.Module):
    """hMLP stem (arXiv 2203.09795) for 40x40 patches: 4x4 pixels, then 2x2, then 5x5 merges.

    RMS normalisation per sub-patch in place of batch normalisation: nothing leaks between patches or examples.
    The last merge has its own weights for each place in the slot, which tells the patches of a slot apart.
    """

    def __init__(self, layout: Layout, model: config.Model, rngs: nnx.Rngs):
        self.slots, self.per_slot = layout.user_video, layout.stream.patches_per_slot
        self.dtype, self.remat, D, w = model.dtype, model.remat, model.d_model, model.d_model // 4
        self.pixels = matrix(rngs, (4 * 4 * 3, w), ("input", "small"), fan_in=48)
        self.merge = matrix(rngs, (2 * 2 * w, w), ("embed", "small"), fan_in=4 * w)
        self.last = matrix(rngs, (self.per_slot, 25 * w, D), ("small", "input", "embed"), fan_in=25 * w * self.per_slot)

    def __call__(self, patch_BNPX: jax.Array) -> jax.Array:
        """uint8 [B, N, P, 4800] -> [B, N, S, D].

        A patch becomes a hundred sub-patches of D / 4 numbers. With rematerialisation that is some frames at a time,
        in the backward pass again; the frames of one time lie N / n apart, so that a mesh may split N.
        """
        frames = patch_BNPX.shape[1]
        n = max(n for n in range(1, FRAMES_AT_ONCE + 1) if frames % n == 0)
        if self.remat == "none" or n == frames:
            return self.fill_slots(self.look(patch_BNPX))

        def embed(patch_BNPX: jax.Array) -> jax.Array:
            patch_tBnPX = jnp.moveaxis(patch_BNPX.reshape(-1, n, frames // n, *patch_BNPX.shape[2:]), 2, 0)
            x_tBnPY = jax.lax.map(jax.checkpoint(self.look), patch_tBnPX)
            x_BntPY = jnp.moveaxis(x_tBnPY, 0, 2)
            return self.fill_slots(x_BntPY.reshape(*patch_BNPX.shape[:3], -1))

        return jax.checkpoint(embed)(patch_BNPX)

    def look(self, patch_BNPX: jax.Array) -> jax.Array:
        """[B, N, P, 25 D / 4]: what 5x5 places of a patch look like."""
        B, N, P, _ = patch_BNPX.shape
        pixels, merge = self.pixels[...].astype(self.dtype), self.merge[...].astype(self.dtype)
        x = patch_BNPX.astype(self.dtype) / 127.5 - 1.0
        x = merge_squares(x.reshape(B * N * P, PATCH, PATCH, 3), 4)
        x = jax.nn.gelu(rms_norm(jnp.dot(x, pixels)))
        x = merge_squares(x, 2)
        x = jax.nn.gelu(rms_norm(jnp.dot(x, merge)))
        return merge_squares(x, 5).reshape(B, N, P, -1)

    def fill_slots(self, x_BNPY: jax.Array) -> jax.Array:
        B, N, P, _ = x_BNPY.shape
        x_BNPY = jnp.pad(x_BNPY, ((0, 0), (0, 0), (0, self.slots * self.per_slot - P), (0, 0)))
        x_BNSpY = x_BNPY.reshape(B, N, self.slots, self.per_slot, -1)
        return jnp.einsum("BNSpY,pYD->BNSD", x_BNSpY, self.last[...].astype(self.dtype))


def merge_squares(x: jax.Array, side: int) -> jax.Array:
    """[n, H, W, C] -> [n, H/side, W/side, side*side*C]."""
    n, H, W, C = x.shape
    x = x.reshape(n, H // side, side, W // side, side, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, H // side, W // side, side * side * C)
