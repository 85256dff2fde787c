"""Patches some frames at a time are patches all at once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.model.test_laws import MODEL, STREAM
from tmljax.model.embed import FRAMES_AT_ONCE, PatchEmbed
from tmljax.stream.microturn import Layout

B = 2


@pytest.mark.parametrize("frames", [2 * FRAMES_AT_ONCE, 3 * (FRAMES_AT_ONCE + 1)])
def test_patches_some_frames_at_a_time_are_patches_all_at_once(frames):
    layout = Layout(STREAM)
    patch_BNPX = np.random.default_rng(0).integers(0, 256, (B, frames, layout.patches, 4800), dtype=np.uint8)
    weight_BNSD = jax.random.normal(jax.random.key(1), (B, frames, layout.user_video, MODEL.d_model))

    @jax.jit
    def look(params, patch):
        def loss(params):
            x_BNSD = nnx.merge(graph, params)(patch)
            return jnp.sum(x_BNSD * weight_BNSD), x_BNSD

        (_, x_BNSD), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return x_BNSD, nnx.to_pure_dict(grads)

    found = []
    for remat in ("none", "full"):
        graph, params = nnx.split(PatchEmbed(layout, replace(MODEL, remat=remat), nnx.Rngs(params=0)))
        look.clear_cache()
        found.append(look(params, patch_BNPX))
    (plain, plain_grads), (parts, parts_grads) = found
    np.testing.assert_allclose(parts, plain, rtol=1e-5, atol=1e-5)
    for name, grad in plain_grads.items():
        np.testing.assert_allclose(parts_grads[name], grad, rtol=1e-4, atol=1e-4 * np.abs(grad).max())
