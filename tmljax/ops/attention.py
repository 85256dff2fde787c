"""Grouped-query attention over a window of micro-turns, with a learned sink per head.

The sink is a logit that takes part in the softmax and carries no value (gpt-oss; arXiv 2309.17453 for why a
head needs somewhere to look). It has no position, so it serves a session's hour as it served its first minute.

Legend: B batch, P query positions, Q key positions, K kv heads, G queries per kv head, h head dim.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

HIDDEN = -1e30  # a masked logit; finite, so that a row without keys stays finite


def attend(
    q_BPHh: jax.Array, k_BQKh: jax.Array, v_BQKh: jax.Array, visible_BPQ: jax.Array, sink_H: jax.Array
) -> jax.Array:
    """Softmax attention in float32; `visible_BPQ` is bool. Returns [B, P, H, h] in the dtype of q."""
    B, P, H, h = q_BPHh.shape
    K = k_BQKh.shape[2]
    q_BPKGh = q_BPHh.reshape(B, P, K, H // K, h)
    logit_BKGPQ = jnp.einsum("BPKGh,BQKh->BKGPQ", q_BPKGh, k_BQKh, preferred_element_type=jnp.float32)
    logit_BKGPQ = jnp.where(visible_BPQ[:, None, None], logit_BKGPQ * h**-0.5, HIDDEN)
    sink_KG = sink_H.astype(jnp.float32).reshape(1, K, H // K, 1)
    top_BKGP = jnp.maximum(jnp.max(logit_BKGPQ, axis=-1), sink_KG)
    weight_BKGPQ = jnp.exp(logit_BKGPQ - jax.lax.stop_gradient(top_BKGP)[..., None])
    total_BKGP = jnp.sum(weight_BKGPQ, axis=-1) + jnp.exp(sink_KG - jax.lax.stop_gradient(top_BKGP))
    out_BKGPh = jnp.einsum("BKGPQ,BQKh->BKGPh", weight_BKGPQ.astype(v_BQKh.dtype), v_BQKh)
    out_BKGPh = out_BKGPh / total_BKGP[..., None].astype(v_BQKh.dtype)
    return out_BKGPh.transpose(0, 3, 1, 2, 4).reshape(B, P, H, h)


def query_blocks(turn_P: np.ndarray, block: int, window: int) -> list[tuple[slice, slice]]:
    """Splits a sequence into blocks of queries, each with the keys it could see.

    `turn_P` has the micro-turn of each position, ascending from 0. A block has the queries of `block` micro-turns; it
    sees nothing later, and `window` micro-turns at most.
    """
    blocks = []
    for first in range(0, int(turn_P[-1]) + 1, block):
        bounds = np.searchsorted(turn_P, [first - window + 1, first, first + block]).tolist()
        blocks.append((slice(bounds[1], bounds[2]), slice(bounds[0], bounds[2])))
    return blocks


def attend_in_blocks(
    q_BPHh: jax.Array,
    k_BPKh: jax.Array,
    v_BPKh: jax.Array,
    blocks: Sequence[tuple[slice, slice]],
    masks: Sequence[jax.Array],
    sink_H: jax.Array,
) -> jax.Array:
    """`attend` of a sequence to itself, block by block of `query_blocks`: equal, and unseen keys cost nothing.

    `masks` holds each block's visibility, bool [B, queries, keys].
    """
    parts = [
        attend(q_BPHh[:, queries], k_BPKh[:, keys], v_BPKh[:, keys], mask, sink_H)
        for (queries, keys), mask in zip(blocks, masks, strict=True)
    ]
    return jnp.concatenate(parts, axis=1)


def see(
    time_BP: jax.Array, slot_P: jax.Array, time_BQ: jax.Array, slot_Q: jax.Array, present_BQ: jax.Array, window: int
) -> jax.Array:
    """Which keys a query sees: not later than itself, at most `window` micro-turns back, present.

    A position always sees itself, even where its stream is absent: something is predicted from it.
    """
    age_BPQ = time_BP[:, :, None] - time_BQ[:, None, :]
    earlier_PQ = slot_Q[None, :] < slot_P[:, None]
    itself_BPQ = (age_BPQ == 0) & (slot_Q[None, :] == slot_P[:, None])[None]
    before_BPQ = (age_BPQ > 0) & (age_BPQ < window) | (age_BPQ == 0) & earlier_PQ[None]
    return itself_BPQ | before_BPQ & present_BQ[:, None, :]
