"""Grouped-query attention over a window of micro-turns, with a learned sink per head.

The sink is a logit that takes part in the softmax and carries no value (gpt-oss; arXiv 2309.17453 for why a
head needs somewhere to look). It has no position, so it serves a session's hour as it served its first minute.

Legend: B batch, P query positions, Q key positions, K kv heads, G queries per kv head, R rows = G x P, h head dim.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tmljax.ops.keep import keep

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]  # as `attend` below


class Sight(NamedTuple):
    """How positions attend to the Q keys at hand, of which the last are their own."""

    mask: Callable[[jax.Array], Any]  # present [B, Q] -> what `attend` needs of it, the same for all layers
    attend: Callable[..., jax.Array]  # (q [B, P, H, h], k and v [B, Q, K, h], masks, sinks [H]) -> [B, P, H, h]


Plan = Callable[[np.ndarray, np.ndarray, int, int], Sight]  # (micro-turns [Q], slots [Q], how many are own, window)

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


forgetful = jax.checkpoint(attend)  # scores are made again in the backward pass


def attend_one_by_one(
    q_BPHh: jax.Array, k_BQKh: jax.Array, v_BQKh: jax.Array, visible_BPQ: jax.Array, sink_H: jax.Array
) -> jax.Array:
    """`attend` for training on a CPU: example by example, so that scores stay in the cache."""
    return jax.lax.map(lambda own: attend_example(*own, sink_H), (q_BPHh, k_BQKh, v_BQKh, visible_BPQ))


@jax.custom_vjp
def attend_example(
    q_PHh: jax.Array, k_QKh: jax.Array, v_QKh: jax.Array, visible_PQ: jax.Array, sink_H: jax.Array
) -> jax.Array:
    """`attend` of one example, whose backward pass makes the scores again (arXiv 2205.14135).

    Whatever is as large as the scores is laid so that no matrix product turns it over: XLA:CPU takes four times as
    long for one that does.
    """
    return _attend_forward(q_PHh, k_QKh, v_QKh, visible_PQ, sink_H)[0]


def _attend_forward(q_PHh, k_QKh, v_QKh, visible_PQ, sink_H):
    (P, H, h), (Q, K, _) = q_PHh.shape, k_QKh.shape
    q_KRh, k_KQh, v_KQh = by_kv_head(q_PHh * h**-0.5, K), by_kv_head(k_QKh, K), by_kv_head(v_QKh, K)
    logit_KRQ = jnp.einsum("KRh,KQh->KRQ", q_KRh, k_KQh, preferred_element_type=jnp.float32)
    logit_KGPQ = jnp.where(visible_PQ, logit_KRQ.reshape(K, H // K, P, Q), HIDDEN)
    sink_KG1 = sink_H.astype(jnp.float32).reshape(K, H // K, 1)
    top_KGP = jnp.maximum(jnp.max(logit_KGPQ, axis=-1), sink_KG1)
    weight_KGPQ = jnp.exp(logit_KGPQ - top_KGP[..., None])
    total_KGP = jnp.sum(weight_KGPQ, axis=-1) + jnp.exp(sink_KG1 - top_KGP)
    out_KRh = jnp.einsum("KRQ,KQh->KRh", weight_KGPQ.astype(v_KQh.dtype).reshape(logit_KRQ.shape), v_KQh)
    out_KGPh = out_KRh.reshape(K, H // K, P, h) / total_KGP[..., None].astype(v_KQh.dtype)
    out_PHh = out_KGPh.transpose(2, 0, 1, 3).reshape(P, H, h)
    return out_PHh, (q_PHh, k_QKh, v_QKh, visible_PQ, sink_H, out_PHh, top_KGP + jnp.log(total_KGP))


def _attend_backward(saved, d_PHh):
    q_PHh, k_QKh, v_QKh, visible_PQ, sink_H, out_PHh, lse_KGP = saved
    (P, H, h), (Q, K, _) = q_PHh.shape, k_QKh.shape
    q_KRh, d_KRh, k_KQh, v_KQh = (by_kv_head(x, K) for x in (q_PHh * h**-0.5, d_PHh, k_QKh, v_QKh))
    mean_PH = jnp.sum(d_PHh.astype(jnp.float32) * out_PHh.astype(jnp.float32), axis=-1)
    mean_KGP = mean_PH.T.reshape(lse_KGP.shape)
    keys_by_rows = partial(jnp.einsum, "KQh,KRh->KQR", preferred_element_type=jnp.float32)
    logit_KQGP, slope_KQGP = (keys_by_rows(*x).reshape(K, Q, H // K, P) for x in ((k_KQh, q_KRh), (v_KQh, d_KRh)))
    weight_KQGP = jnp.exp(jnp.where(visible_PQ.T[:, None], logit_KQGP, HIDDEN) - lse_KGP[:, None])
    slope_KQGP = weight_KQGP * (slope_KQGP - mean_KGP[:, None])
    weight_KQR, slope_KQR = (x.astype(d_PHh.dtype).reshape(K, Q, -1) for x in (weight_KQGP, slope_KQGP))
    dq_KhR = jnp.einsum("KhQ,KQR->KhR", k_KQh.transpose(0, 2, 1), slope_KQR) * h**-0.5
    dk_KQh = jnp.einsum("KQR,KRh->KQh", slope_KQR, q_KRh)
    dv_KQh = jnp.einsum("KQR,KRh->KQh", weight_KQR, d_KRh)
    sunk_KGP = jnp.exp(sink_H.astype(jnp.float32).reshape(K, H // K, 1) - lse_KGP) * mean_KGP
    dq_PHh = dq_KhR.reshape(K, h, H // K, P).transpose(3, 0, 2, 1).reshape(P, H, h)
    dsink_H = -jnp.sum(sunk_KGP, axis=-1).reshape(H).astype(sink_H.dtype)
    no_grad = np.zeros(visible_PQ.shape, jax.dtypes.float0)
    return dq_PHh, dk_KQh.transpose(1, 0, 2), dv_KQh.transpose(1, 0, 2), no_grad, dsink_H


attend_example.defvjp(_attend_forward, _attend_backward)


def by_kv_head(x_PHh: jax.Array, kv_heads: int) -> jax.Array:
    """[K, R, h], the rows being those of the kv head's queries, one query head after another."""
    P, _, h = x_PHh.shape
    return x_PHh.reshape(P, kv_heads, -1, h).transpose(1, 2, 0, 3).reshape(kv_heads, -1, h)


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


def in_blocks(block: int, attend: Attend = attend) -> Plan:
    """Queries of `block` micro-turns at a time, by `attend_in_blocks`."""

    def plan(turn_Q: np.ndarray, slot_Q: np.ndarray, own: int, window: int) -> Sight:
        sights = query_blocks(turn_Q, block, window)
        past = len(turn_Q) - own
        blocks = [(slice(q.start - past, q.stop - past), k) for q, k in sights]
        turn_1Q = turn_Q[None]

        def mask(present_BQ: jax.Array) -> list[jax.Array]:
            return [
                see(turn_1Q[:, q], slot_Q[q], turn_1Q[:, k], slot_Q[k], present_BQ[:, k], window) for q, k in sights
            ]

        return Sight(
            mask, lambda q, k, v, masks, sink_H: keep(attend_in_blocks(q, k, v, blocks, masks, sink_H, attend))
        )

    return plan


def attend_in_blocks(
    q_BPHh: jax.Array,
    k_BPKh: jax.Array,
    v_BPKh: jax.Array,
    blocks: Sequence[tuple[slice, slice]],
    masks: Sequence[jax.Array],
    sink_H: jax.Array,
    attend: Attend = attend,
) -> jax.Array:
    """`attend` of a sequence to itself, block by block of `query_blocks`: equal, and unseen keys cost nothing.

    `masks` holds each block's visibility, bool [B, queries, keys]. With `forgetful` as `attend`, no more than one
    block's scores are in memory at a time, in the backward pass either.
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
