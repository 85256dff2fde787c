"""Attention of whole examples to themselves, on one device or with their micro-turns split over the axis `context`.

Every member holds as many micro-turns as the others, and gets from those before it the keys that its queries can see:
no more of them than `window` spans, whatever the length of the example.

Legend: B batch, P positions, Q key positions, H heads, K kv heads, h head dim.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from tmljax.ops.attention import Plan
from tmljax.sharding import BATCH_AXES

AXIS = "context"


def make_look(
    turn_P: np.ndarray, slot_P: np.ndarray, present_BP: jax.Array, window: int, plan: Plan, mesh: Mesh | None
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Attention (q, k, v, sinks) -> [B, P, H, h] of positions whose micro-turns, from 0, and slots these are.

    The positions of each member's micro-turns must be those of the first's, later. `plan` is `attention.in_blocks` or
    `splash.through_splash`.
    """
    members = 1 if mesh is None else mesh.shape[AXIS]
    own, turns = len(turn_P) // members, (int(turn_P[-1]) + 1) // members
    shards = min(members - 1, -(-(window - 1) // turns))
    turn_Q = np.concatenate([turn_P[:own] - n * turns for n in range(shards, -1, -1)])
    sight = plan(turn_Q, np.tile(slot_P[:own], shards + 1), own, window)

    def mask(present_BP: jax.Array) -> Any:
        return sight.mask(with_past(present_BP, shards))

    def look_around(q_BPHh, k_BPKh, v_BPKh, sink_H, masks):
        return sight.attend(q_BPHh, with_past(k_BPKh, shards), with_past(v_BPKh, shards), masks, sink_H)

    if mesh is not None and mesh.size > 1:
        heads = PartitionSpec(BATCH_AXES, AXIS, "tensor", None)
        rows = PartitionSpec(BATCH_AXES, AXIS)
        sharded = {"mesh": mesh, "check_vma": False}
        mask = jax.shard_map(mask, in_specs=rows, out_specs=rows, **sharded)
        each = (heads, heads, heads, PartitionSpec("tensor"), rows)
        look_around = jax.shard_map(look_around, in_specs=each, out_specs=heads, **sharded)
    masks = mask(present_BP)

    def look(q_BPHh, k_BPKh, v_BPKh, sink_H):
        copies = 1 if mesh is None else max(1, mesh.shape["tensor"] // k_BPKh.shape[2])  # no member without a kv head
        k_BPKh, v_BPKh = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k_BPKh, v_BPKh))
        return look_around(q_BPHh, k_BPKh, v_BPKh, sink_H, masks)

    return look


def with_past(x_BP: jax.Array, shards: int) -> jax.Array:
    """x [B, P, ...] of as many members before this one, then its own, along P; zeros where there is no such member."""
    if not shards:
        return x_BP
    members = jax.lax.axis_size(AXIS)
    past = [jax.lax.ppermute(x_BP, AXIS, [(i, i + n) for i in range(members - n)]) for n in range(shards, 0, -1)]
    return jnp.concatenate([*past, x_BP], axis=1)
