"""The ring cache of keys and values: constant memory for a session of any length.

A ring of window + 1 rows, one micro-turn each; the extra row keeps the oldest micro-turn that what the previous tick
wrote and said still sees while this tick's input is written.

Legend: L layers, N sessions, R ring rows, S slots, n new positions, K kv heads, h head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ring(NamedTuple):
    k_LNRSKh: jax.Array
    v_LNRSKh: jax.Array
    time_NR: jax.Array  # int32 micro-turn held by each row; FAR_PAST where empty
    present_NRS: jax.Array  # bool, keys that may be seen


FAR_PAST = -(2**30)


def empty_ring(layers: int, sessions: int, window: int, slots: int, kv_heads: int, head_dim: int, dtype: str) -> Ring:
    rows = window + 1
    kv = jnp.zeros((layers, sessions, rows, slots, kv_heads, head_dim), dtype)
    return Ring(
        kv,
        jnp.zeros_like(kv),
        jnp.full((sessions, rows), FAR_PAST, jnp.int32),
        jnp.zeros((sessions, rows, slots), bool),
    )


def forget(ring: Ring, reset_N: jax.Array) -> Ring:
    """Empties the rows of sessions that start anew; keys stay in memory, unseen."""
    return ring._replace(
        time_NR=jnp.where(reset_N[:, None], FAR_PAST, ring.time_NR),
        present_NRS=ring.present_NRS & ~reset_N[:, None, None],
    )


def announce(ring: Ring, time_Nn: jax.Array, slot_n: jax.Array, present_Nn: jax.Array) -> Ring:
    """Marks the positions about to be written. A row that changes its micro-turn loses what it held."""
    rows = ring.time_NR.shape[1]
    session_N1, row_Nn = jnp.arange(time_Nn.shape[0])[:, None], time_Nn % rows
    stale_Nn = ring.time_NR[session_N1, row_Nn] != time_Nn
    kept_NnS = ring.present_NRS[session_N1, row_Nn] & ~stale_Nn[..., None]
    present_NRS = ring.present_NRS.at[session_N1, row_Nn].set(kept_NnS)
    return ring._replace(
        time_NR=ring.time_NR.at[session_N1, row_Nn].set(time_Nn),
        present_NRS=present_NRS.at[session_N1, row_Nn, slot_n[None]].set(present_Nn),
    )


def write(
    ring: Ring, layer: jax.Array, k_NnKh: jax.Array, v_NnKh: jax.Array, time_Nn: jax.Array, slot_n: jax.Array
) -> tuple[jax.Array, jax.Array, Ring]:
    """Puts one layer's keys and values in place; returns all of that layer's, [N, R*S, K, h], and the ring."""
    _, N, R, S, K, h = ring.k_LNRSKh.shape
    at = (layer, jnp.arange(N)[:, None], time_Nn % R, slot_n[None])
    k_LNRSKh = ring.k_LNRSKh.at[at].set(k_NnKh.astype(ring.k_LNRSKh.dtype))
    v_LNRSKh = ring.v_LNRSKh.at[at].set(v_NnKh.astype(ring.v_LNRSKh.dtype))
    k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k_LNRSKh, v_LNRSKh))
    ring = ring._replace(k_LNRSKh=k_LNRSKh, v_LNRSKh=v_LNRSKh)
    return k.reshape(N, R * S, K, h), v.reshape(N, R * S, K, h), ring


def keys(ring: Ring) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(time [N, R*S], slot [R*S], present [N, R*S]) of every place in the ring."""
    N, R, S = ring.present_NRS.shape
    time_NQ = jnp.repeat(ring.time_NR, S, axis=1)
    return time_NQ, jnp.tile(jnp.arange(S), R), ring.present_NRS.reshape(N, R * S)
