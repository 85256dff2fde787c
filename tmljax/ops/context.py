"""Attention of whole examples to themselves, on one device or with their micro-turns split over the axis `context`.

Every member holds as many micro-turns as the others, and gets from those before it the keys that its queries can see:
no more of them than `window` spans, whatever the length of the example.

Legend: B batch, P positions, Q key positions, H heads, K kv heads, h head dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from tmljax.ops.attention import attend_in_blocks, query_blocks, see
from tmljax.sharding import BATCH_AXES

AXIS = "context"


def make_look(
    turn_P: np.ndarray, slot_P: np.ndarray, present_BP: jax.Array, window: int, block: int, mesh: Mesh | None
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Attention (q, k, v, sinks) -> [B, P, H, h] of positions whose micro-turns, from 0, and slots these are.

    The positions of each member's micro-turns must be those of the first's, later. `block` is as in `query_blocks`.
    """
    members = 1 if mesh is None else mesh.shape[AXIS]
    own, turns = len(turn_P) // members, (int(turn_P[-1]) + 1) // members
    shards = min(members - 1, -(-(window - 1) // turns))
    turn_Q = np.concatenate([turn_P[:own] - n * turns for n in range(shards, -1, -1)])
    slot_Q = np.tile(slot_P[:own], shards + 1)
    sights = query_blocks(turn_Q, block, window)
    blocks = [(slice(q.start - shards * own, q.stop - shards * own), k) for q, k in sights]

    def see_in_blocks(present_BP: jax.Array) -> list[jax.Array]:
        present_BQ = with_past(present_BP, shards)
        turn_1Q = turn_Q[None]
        return [see(turn_1Q[:, q], slot_Q[q], turn_1Q[:, k], slot_Q[k], present_BQ[:, k], window) for q, k in sights]

    def attend(q_BPHh, k_BPKh, v_BPKh, sink_H, masks):
        k_BQKh, v_BQKh = with_past(k_BPKh, shards), with_past(v_BPKh, shards)
        return attend_in_blocks(q_BPHh, k_BQKh, v_BQKh, blocks, masks, sink_H)

    if mesh is not None and mesh.size > 1:
        heads = PartitionSpec(BATCH_AXES, AXIS, "tensor", None)
        rows = PartitionSpec(BATCH_AXES, AXIS)
        sharded = {"mesh": mesh, "check_vma": False}
        see_in_blocks = jax.shard_map(see_in_blocks, in_specs=rows, out_specs=rows, **sharded)
        each = (heads, heads, heads, PartitionSpec("tensor"), rows)
        attend = jax.shard_map(attend, in_specs=each, out_specs=heads, **sharded)
    masks = see_in_blocks(present_BP)

    def look(q_BPHh, k_BPKh, v_BPKh, sink_H):
        copies = 1 if mesh is None else max(1, mesh.shape["tensor"] // k_BPKh.shape[2])  # no member without a kv head
        k_BPKh, v_BPKh = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k_BPKh, v_BPKh))
        return attend(q_BPHh, k_BPKh, v_BPKh, sink_H, masks)

    return look


def with_past(x_BP: jax.Array, shards: int) -> jax.Array:
    """x [B, P, ...] of as many members before this one, then its own, along P; zeros where there is no such member."""
    if not shards:
        return x_BP
    members = jax.lax.axis_size(AXIS)
    past = [jax.lax.ppermute(x_BP, AXIS, [(i, i + n) for i in range(members - n)]) for n in range(shards, 0, -1)]
    return jnp.concatenate([*past, x_BP], axis=1)
