"""Attention on TPUs through JAX's splash attention (Pallas; arXiv 2205.14135): scores never reach memory.

Which positions come before a query in its window is known when the program is written, and goes into the kernel's
static mask; which of them are present is not, and goes into its segment ids. There a query could not see itself where
its stream is absent, as `attention.see` wants it. So its own key stands a second time behind all others, for it alone.
In bfloat16 it differs from `attend` in two places: queries are scaled before they are rounded, and the kernel adds up
the sinks' gradient in bfloat16.

Legend: B batch, P query positions, Q key positions, H heads, K kv heads, h head dim, R padded keys, twice.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tmljax.ops.attention import Plan, Sight, see
from tmljax.ops.keep import PRODUCT

BLOCK = 256  # queries and keys that the kernel works on at once
LANES = 128  # of which its blocks are multiples


def through_splash(interpret: bool = False) -> Plan:
    """`interpret` runs it on any platform, slowly."""
    return functools.partial(plan_kernel, interpret=interpret)


def plan_kernel(turn_Q: np.ndarray, slot_Q: np.ndarray, own: int, window: int, interpret: bool) -> Sight:
    mask_PR, past = make_mask(turn_Q, slot_Q, own, window), len(turn_Q) - own
    queries, keys = mask_PR.shape[0], mask_PR.shape[1] - mask_PR.shape[0]

    @functools.cache
    def kernel(heads: int):
        return make_kernel(mask_PR, heads, interpret)

    def attend(q_BPHh, k_BQKh, v_BQKh, segment_BR, sink_H):
        q_BHPh = jnp.swapaxes(pad(q_BPHh * q_BPHh.shape[3] ** -0.5, queries), 1, 2)
        k_BKRh, v_BKRh = (
            jnp.swapaxes(jnp.concatenate([pad(x, keys), pad(x[:, past:], queries)], axis=1), 1, 2)
            for x in (k_BQKh, v_BQKh)
        )
        out_BHPh = run_kernel(kernel(q_BHPh.shape[1]), q_BHPh, k_BKRh, v_BKRh, segment_BR, sink_H)
        return jnp.swapaxes(out_BHPh, 1, 2)[:, :own]

    def mask(present_BQ):
        """Segments of the keys; queries are of segment 0."""
        return jnp.pad(pad(jnp.where(present_BQ, 0, 1), keys), ((0, 0), (0, queries)))

    return Sight(mask, attend)


def make_mask(turn_Q: np.ndarray, slot_Q: np.ndarray, own: int, window: int) -> np.ndarray:
    """bool [P, R], lengths padded: the keys before each query, and behind them each query's own."""
    past = len(turn_Q) - own
    queries, keys = (
        -(-n // unit) * unit for n, unit in ((n, LANES if n <= BLOCK else BLOCK) for n in (own, len(turn_Q)))
    )
    mask_PR = np.zeros((queries, keys + queries), bool)
    everybody_1Q = np.ones((1, len(turn_Q)), bool)
    sight_PQ = see(turn_Q[None, past:], slot_Q[past:], turn_Q[None], slot_Q, everybody_1Q, window)[0]
    mask_PR[:own, : len(turn_Q)] = sight_PQ & ~np.eye(own, len(turn_Q), past, dtype=bool)
    mask_PR[:, keys:] = np.eye(queries, dtype=bool)
    return mask_PR


def block_sizes(mask_PR: np.ndarray) -> tuple[int, int]:
    """Of queries and of keys: the largest that divide them."""
    query, key = (max(b for b in range(LANES, BLOCK + 1, LANES) if n % b == 0) for n in mask_PR.shape)
    return query, key


def count_worked(mask_PR: np.ndarray) -> int:
    """Pairs in the blocks that the kernel does not leave out."""
    (P, R), (query, key) = mask_PR.shape, block_sizes(mask_PR)
    return int(mask_PR.reshape(P // query, query, R // key, key).any(axis=(1, 3)).sum()) * query * key


def make_kernel(mask_PR: np.ndarray, heads: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # half a second that only TPUs need

    query, key = block_sizes(mask_PR)
    sizes = splash.BlockSizes(
        block_q=query, block_kv=key, block_q_dkv=query, block_kv_dkv=key, block_q_dq=query, block_kv_dq=key
    )
    with jax.ensure_compile_time_eval():  # its tables are constants, not part of the trace that asks first
        masks = splash.MultiHeadMask([splash.NumpyMask(mask_PR)] * heads)
        return splash.make_splash_mha(
            masks,
            block_sizes=sizes,
            residual_checkpoint_name=PRODUCT,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )


def run_kernel(kernel, q_BHPh, k_BKRh, v_BKRh, segment_BR, sink_H) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    def one(q_HPh, k_KRh, v_KRh, segment_R):
        segments = SegmentIds(jnp.zeros(q_HPh.shape[1], segment_R.dtype), segment_R)
        return kernel(q_HPh, k_KRh, v_KRh, segments, sink_H)

    return jax.vmap(one)(q_BHPh, k_BKRh, v_BKRh, segment_BR)


def pad(x_BP: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x_BP, ((0, 0), (0, length - x_BP.shape[1]), *((0, 0),) * (x_BP.ndim - 2)))
