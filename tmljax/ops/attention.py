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


class Sight(NamedTuple):
    """How positions attend to the Q keys at hand, of which the last are their own."""

    mask: Callable[[jax.Array], Any]  # present [B, Q] -> what `attend` needs of it, the same for all layers
    attend: Callable[..., jax.Array]  # (q [B, P, H, h], k and v [B, Q, K, h], masks, sinks [H]) -> [B, P, H, h]


Plan = Callable[[np.ndarray, np.ndarray, int, int], Sight]  # (micro-turns [Q], slots [Q], how many are own, window)

Blocks = Sequence[tuple[slice, slice]]  # queries, and the keys that they could see
AttendInBlocks = Callable[..., jax.Array]  # (q, k, v, blocks, masks, sinks), as `attend_in_blocks` below

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


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend_one_by_one(
    q_BPHh: jax.Array,
    k_BQKh: jax.Array,
    v_BQKh: jax.Array,
    blocks: Blocks,
    masks: Sequence[jax.Array],
    sink_H: jax.Array,
) -> jax.Array:
    """`attend_in_blocks` for training on a CPU: example by example, so that a block's scores stay in the cache, and the
    backward pass makes them again (arXiv 2205.14135).

    Whatever is as large as the scores is laid so that no matrix product turns it over: XLA:CPU takes four times as
    long for one that does.
    """
    return _attend_forward(q_BPHh, k_BQKh, v_BQKh, blocks, masks, sink_H)[0]


def _attend_forward(q_BPHh, k_BQKh, v_BQKh, blocks, masks, sink_H):
    H, K = q_BPHh.shape[2], k_BQKh.shape[2]
    sink_KG1 = sink_H.astype(jnp.float32).reshape(K, H // K, 1)

    def one_example(own):
        q_PHh, k_QKh, v_QKh, masks = own
        q_KGPh, (k_KQh, v_KQh) = scaled_by_kv_head(q_PHh, K), (x.transpose(1, 0, 2) for x in (k_QKh, v_QKh))
        parts = [
            mix_block(q_KGPh[:, :, queries], k_KQh[:, keys], v_KQh[:, keys], visible_PQ, sink_KG1)
            for (queries, keys), visible_PQ in zip(blocks, masks, strict=True)
        ]
        out_KGPh, lse_KGP = (jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))
        return by_position(out_KGPh), lse_KGP

    out_BPHh, lse_BKGP = jax.lax.map(one_example, (q_BPHh, k_BQKh, v_BQKh, masks))
    out_BPHh, lse_BKGP = keep(out_BPHh), keep(lse_BKGP)
    return out_BPHh, (q_BPHh, k_BQKh, v_BQKh, masks, sink_H, out_BPHh, lse_BKGP)


def mix_block(q_KGPh, k_KQh, v_KQh, visible_PQ, sink_KG1):
    """Values mixed, and the logarithm of what the softmax divides by, sink included [K, G, P]; q is scaled."""
    K, G, P, h = q_KGPh.shape
    logit_KRQ = jnp.einsum("KRh,KQh->KRQ", q_KGPh.reshape(K, -1, h), k_KQh, preferred_element_type=jnp.float32)
    logit_KGPQ = jnp.where(visible_PQ, logit_KRQ.reshape(K, G, P, -1), HIDDEN)
    top_KGP = jnp.maximum(jnp.max(logit_KGPQ, axis=-1), sink_KG1)
    weight_KGPQ = jnp.exp(logit_KGPQ - top_KGP[..., None])
    total_KGP = jnp.sum(weight_KGPQ, axis=-1) + jnp.exp(sink_KG1 - top_KGP)
    out_KRh = jnp.einsum("KRQ,KQh->KRh", weight_KGPQ.astype(v_KQh.dtype).reshape(logit_KRQ.shape), v_KQh)
    return out_KRh.reshape(q_KGPh.shape) / total_KGP[..., None].astype(v_KQh.dtype), top_KGP + jnp.log(total_KGP)


def _attend_backward(blocks, saved, d_BPHh):
    q_BPHh, k_BQKh, v_BQKh, masks, sink_H, out_BPHh, lse_BKGP = saved
    K = k_BQKh.shape[2]

    def one_example(own):
        q_PHh, k_QKh, v_QKh, masks, out_PHh, lse_KGP, d_PHh = own
        q_KGPh, d_KGPh = scaled_by_kv_head(q_PHh, K), by_kv_head(d_PHh, K)
        k_KQh, v_KQh = (x.transpose(1, 0, 2) for x in (k_QKh, v_QKh))
        mean_PH = jnp.sum(d_PHh.astype(jnp.float32) * out_PHh.astype(jnp.float32), axis=-1)
        mean_KGP = mean_PH.T.reshape(lse_KGP.shape)
        dq_parts, dk_KQh, dv_KQh = [], *(jnp.zeros(x.shape, jnp.float32) for x in (k_KQh, v_KQh))
        for (queries, keys), visible_PQ in zip(blocks, masks, strict=True):
            rows = [x[:, :, queries] for x in (q_KGPh, d_KGPh, mean_KGP, lse_KGP)]
            dq_KhGP, to_k_KQh, to_v_KQh = unmix_block(*rows, k_KQh[:, keys], v_KQh[:, keys], visible_PQ)
            dq_parts.append(dq_KhGP)
            dk_KQh = dk_KQh.at[:, keys].add(to_k_KQh)
            dv_KQh = dv_KQh.at[:, keys].add(to_v_KQh)
        dq_KhGP = jnp.concatenate(dq_parts, axis=3) * q_PHh.shape[2] ** -0.5
        dq_PHh = dq_KhGP.transpose(3, 0, 2, 1).reshape(q_PHh.shape)
        dk_QKh, dv_QKh = dk_KQh.transpose(1, 0, 2), dv_KQh.transpose(1, 0, 2)
        return *(x.astype(d_PHh.dtype) for x in (dq_PHh, dk_QKh, dv_QKh)), mean_KGP

    dq_BPHh, dk_BQKh, dv_BQKh, mean_BKGP = jax.lax.map(
        one_example, (q_BPHh, k_BQKh, v_BQKh, masks, out_BPHh, lse_BKGP, d_BPHh)
    )
    sink_1KG1 = sink_H.astype(jnp.float32).reshape(1, *lse_BKGP.shape[1:3], 1)
    sunk_BKGP = jnp.exp(sink_1KG1 - lse_BKGP) * mean_BKGP
    dsink_H = -jnp.sum(sunk_BKGP, axis=(0, 3)).reshape(-1).astype(sink_H.dtype)
    no_grad = jax.tree.map(lambda mask: np.zeros(mask.shape, jax.dtypes.float0), masks)
    return dq_BPHh, dk_BQKh, dv_BQKh, no_grad, dsink_H


attend_one_by_one.defvjp(_attend_forward, _attend_backward)


def unmix_block(q_KGPh, d_KGPh, mean_KGP, lse_KGP, k_KQh, v_KQh, visible_PQ):
    """The backward pass of `mix_block`, float32: what comes to q, before its scale, as [K, h, G, P], to k and to v."""
    (K, G, P, h), Q = q_KGPh.shape, k_KQh.shape[1]
    q_KRh, d_KRh = q_KGPh.reshape(K, -1, h), d_KGPh.reshape(K, -1, h)
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    logit_KQR, slope_KQR = dot("KQh,KRh->KQR", k_KQh, q_KRh), dot("KQh,KRh->KQR", v_KQh, d_KRh)
    logit_KQGP, slope_KQGP = (x.reshape(K, Q, G, P) for x in (logit_KQR, slope_KQR))
    weight_KQGP = jnp.exp(jnp.where(visible_PQ.T[:, None], logit_KQGP, HIDDEN) - lse_KGP[:, None])
    slope_KQGP = weight_KQGP * (slope_KQGP - mean_KGP[:, None])
    weight_KQR, slope_KQR = (x.astype(d_KGPh.dtype).reshape(K, Q, -1) for x in (weight_KQGP, slope_KQGP))
    dq_KhR = dot("KhQ,KQR->KhR", k_KQh.transpose(0, 2, 1), slope_KQR)
    return dq_KhR.reshape(K, h, G, P), dot("KQR,KRh->KQh", slope_KQR, q_KRh), dot("KQR,KRh->KQh", weight_KQR, d_KRh)


def by_kv_head(x_PHh: jax.Array, kv_heads: int) -> jax.Array:
    """[K, G, P, h]: the kv head's query heads one after another."""
    P, _, h = x_PHh.shape
    return x_PHh.reshape(P, kv_heads, -1, h).transpose(1, 2, 0, 3)


def scaled_by_kv_head(q_PHh: jax.Array, kv_heads: int) -> jax.Array:
    return by_kv_head(q_PHh * q_PHh.shape[2] ** -0.5, kv_heads)


def by_position(x_KGPh: jax.Array) -> jax.Array:
    K, G, P, h = x_KGPh.shape
    return x_KGPh.transpose(2, 0, 1, 3).reshape(P, K * G, h)


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
    k_BQKh: jax.Array,
    v_BQKh: jax.Array,
    blocks: Blocks,
    masks: Sequence[jax.Array],
    sink_H: jax.Array,
    attend: Callable[..., jax.Array] = attend,
) -> jax.Array:
    """`attend` of a sequence to itself, block by block of `query_blocks`: equal, and unseen keys cost nothing.

    `masks` holds each block's visibility, bool [B, queries, keys]. With `forgetful` as `attend`, no more than one
    block's scores are in memory at a time, in the backward pass either.
    """
    parts = [
        attend(q_BPHh[:, queries], k_BQKh[:, keys], v_BQKh[:, keys], mask, sink_H)
        for (queries, keys), mask in zip(blocks, masks, strict=True)
    ]
    return jnp.concatenate(parts, axis=1)


def in_blocks(block: int, attend_blocks: AttendInBlocks = attend_in_blocks) -> Plan:
    """Queries of `block` micro-turns at a time."""

    def plan(turn_Q: np.ndarray, slot_Q: np.ndarray, own: int, window: int) -> Sight:
        sights = query_blocks(turn_Q, block, window)
        past = len(turn_Q) - own
        blocks = [(slice(q.start - past, q.stop - past), k) for q, k in sights]
        turn_1Q = turn_Q[None]

        def mask(present_BQ: jax.Array) -> list[jax.Array]:
            return [
                see(turn_1Q[:, q], slot_Q[q], turn_1Q[:, k], slot_Q[k], present_BQ[:, k], window) for q, k in sights
            ]

        return Sight(mask, lambda q, k, v, masks, sink_H: keep(attend_blocks(q, k, v, blocks, masks, sink_H)))

    return plan


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
