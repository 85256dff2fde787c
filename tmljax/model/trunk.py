"""The stack of blocks: parameters stacked over layers, one block compiled and scanned.

Legend: B batch, P positions, D d_model, L layers, N sessions, n new positions.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tmljax import config
from tmljax.model import cache
from tmljax.model.block import Block, MoeReport
from tmljax.model.params import constant
from tmljax.ops.attention import Plan, attend, attend_in_blocks, attend_one_by_one, forgetful, in_blocks, see
from tmljax.ops.context import make_look
from tmljax.ops.keep import PRODUCT
from tmljax.ops.norm import rms_norm
from tmljax.ops.rope import rotation
from tmljax.ops.splash import through_splash
from tmljax.sharding import platform, spread

QUERY_TURNS = 16  # micro-turns in a block of queries

REMAT = {  # beside "none"
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


# Layers up to which nothing is scanned: XLA:CPU and XLA:GPU copy each layer's weights out of the stack, in training
# its activations into another. A longer training program takes a CPU too long to compile.
UNROLLED_IN_TICK, UNROLLED_IN_TRAINING = 16, {"cpu": 8, "tpu": 8, "gpu": 16}


def unrolled(model: config.Model) -> bool:
    """Whether the tick takes the layers one by one."""
    return model.layers <= UNROLLED_IN_TICK


def choose_attention(model: config.Model, mesh: Mesh | None) -> Plan:
    """How training attends. Of blocks, what is fast on a CPU costs an accelerator its parallelism."""
    if model.attention == "splash":
        return through_splash()
    if platform(mesh) == "cpu":
        return in_blocks(QUERY_TURNS, attend_one_by_one)
    return in_blocks(QUERY_TURNS, partial(attend_in_blocks, attend=attend if model.remat == "none" else forgetful))


class Trunk(nnx.Module):
    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        self.model = model

        @nnx.split_rngs(splits=model.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(model, rngs)

        self.blocks = stack(rngs)
        self.norm = constant((model.d_model,), ("embed",), 1.0)

    def __call__(
        self,
        x_BPD: jax.Array,
        start_B: jax.Array,
        place_P2: np.ndarray,
        present_BP: jax.Array,
        mesh: Mesh | None,
        counts_BP: jax.Array | None = None,
    ) -> tuple[jax.Array, MoeReport]:
        """The training forward over whole examples that begin with micro-turn `start_B`; reports stacked over layers.

        `place_P2` has the micro-turn from there and the slot of each position, in this order; `present_BP` are those
        that others may see, `counts_BP` those that something comes of (all, by default).
        """
        turn_P, slot_P = place_P2.T
        rotate = rotation(start_B[:, None] + turn_P[None], self.model.head_dim, platform(mesh))
        plan = choose_attention(self.model, mesh)
        look = make_look(turn_P, slot_P, present_BP, self.model.window, plan, mesh)
        graph, stacked = nnx.split(self.blocks)

        def step(x_BPD, layer):
            return nnx.merge(graph, layer)(spread(x_BPD, mesh), rotate, look, mesh, tick=False, counts_BP=counts_BP)

        if self.model.remat != "none":
            step = jax.checkpoint(step, policy=REMAT[self.model.remat], prevent_cse=False)
        x_BPD, report = jax.lax.scan(
            step, x_BPD, stacked, unroll=self.model.layers <= UNROLLED_IN_TRAINING[platform(mesh)]
        )
        return rms_norm(x_BPD, self.norm[...]), report

    def extend(
        self, x_NnD: jax.Array, time_Nn: jax.Array, slot_n: jax.Array, present_Nn: jax.Array, ring: cache.Ring
    ) -> tuple[jax.Array, cache.Ring]:
        """The streaming forward: new positions against the ring, which they join."""
        ring = cache.announce(ring, time_Nn, slot_n, present_Nn)
        visible_NnQ = see(time_Nn, slot_n, *cache.keys(ring), self.model.window)
        graph, stacked = nnx.split(self.blocks)
        rotate = rotation(time_Nn, self.model.head_dim, platform(None))

        def step(carry, layer_and_index):
            (x_NnD, ring), (layer, index) = carry, layer_and_index
            rings = [ring]

            def look(q_NnHh, k_NnKh, v_NnKh, sink_H):
                k_NQKh, v_NQKh, rings[0] = cache.write(ring, index, k_NnKh, v_NnKh, time_Nn, slot_n)
                return attend(q_NnHh, k_NQKh, v_NQKh, visible_NnQ, sink_H)

            x_NnD, _ = nnx.merge(graph, layer)(x_NnD, rotate, look, None, tick=True)
            return (x_NnD, rings[0]), None

        indices = jnp.arange(self.model.layers)
        (x_NnD, ring), _ = jax.lax.scan(step, (x_NnD, ring), (stacked, indices), unroll=unrolled(self.model))
        return rms_norm(x_NnD, self.norm[...]), ring
