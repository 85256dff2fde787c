"""The experts' mathematics: SwiGLU (arXiv 2002.05202) for many small experts at once, in three ways.

`every_expert` is the plain version: all experts on all tokens, then the chosen are picked. `blocks` sorts tokens
by expert into blocks of equal size and multiplies block by block: dropless, static shapes, fast where
`jax.lax.ragged_dot` is not (XLA:CPU). `ragged` is `jax.lax.ragged_dot`, for accelerators. `gathered` fetches each
token's own experts (gather + GEMV), for the few tokens of a tick when there are many experts.

Legend: N tokens, A assignments (rows that carry an expert id; -1 marks an empty row), D d_model, E experts,
W expert width, k chosen experts, n blocks, b rows of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tmljax.ops.project import project


class Experts(NamedTuple):
    gate_EDW: jax.Array
    up_EDW: jax.Array
    down_EWD: jax.Array


def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """x [..., D] through one expert of matrices [D, W], [D, W], [W, D]."""
    a, u = project(x, gate, up)
    return jnp.dot(jax.nn.silu(a) * u, down)


def every_expert(x_ND: jax.Array, expert_Nk: jax.Array, gate_Nk: jax.Array, experts: Experts) -> jax.Array:
    """Returns [N, D]: the gated sum of the chosen experts' outputs."""
    E = experts.gate_EDW.shape[0]
    share_NE = jnp.sum(jax.nn.one_hot(expert_Nk, E, dtype=jnp.float32) * gate_Nk[..., None], axis=1)
    x_END = jnp.broadcast_to(x_ND[None], (E, *x_ND.shape))  # else XLA:CPU transposes all weights to free E
    a_ENW = jnp.einsum("END,EDW->ENW", x_END, experts.gate_EDW)
    u_ENW = jnp.einsum("END,EDW->ENW", x_END, experts.up_EDW)
    y_END = jnp.einsum("ENW,EWD->END", jax.nn.silu(a_ENW) * u_ENW, experts.down_EWD)
    return jnp.einsum("END,NE->ND", y_END, share_NE.astype(y_END.dtype))


def gathered(x_ND: jax.Array, expert_Nk: jax.Array, gate_Nk: jax.Array, experts: Experts) -> jax.Array:
    """As `every_expert`, reading only the chosen experts' weights: one by one, for a gather would copy them.

    With as many assignments as experts there is nothing left out to gain from, and it is `every_expert`.
    """
    N, k = expert_Nk.shape
    if N * k >= experts.gate_EDW.shape[0]:
        return every_expert(x_ND, expert_Nk, gate_Nk, experts)

    def one(n: int, i: int) -> jax.Array:
        own = (jax.lax.dynamic_index_in_dim(w, expert_Nk[n, i], keepdims=False) for w in experts)
        return swiglu(x_ND[n : n + 1], *own) * gate_Nk[n, i].astype(x_ND.dtype)

    return jnp.concatenate([sum(one(n, i) for i in range(k)) for n in range(N)])


class Blocks(NamedTuple):
    """Where each assignment's row lies among the blocks, and which expert owns each block."""

    row_A: jax.Array  # int32, index of the assignment's row among n*b, or n*b for an empty one
    source_R: jax.Array  # int32 [n*b], the assignment that fills this row, or A for padding
    expert_n: jax.Array  # int32


def lay_blocks(expert_A: jax.Array, experts: int, rows: int) -> Blocks:
    """Groups assignments by expert into blocks of `rows`; empty assignments (-1) get no row."""
    A = expert_A.shape[0]
    n = -(-A // rows) + experts
    one_hot_AE = expert_A[:, None] == jnp.arange(experts)[None]
    rank_AE = jnp.cumsum(one_hot_AE.astype(jnp.int32), axis=0)
    blocks_E = -(-rank_AE[-1] // rows)
    first_E = jnp.cumsum(blocks_E) - blocks_E
    place_AE = first_E[None] * rows + rank_AE - 1
    row_A = jnp.where(expert_A >= 0, jnp.sum(jnp.where(one_hot_AE, place_AE, 0), axis=1), n * rows)
    source_R = jnp.full((n * rows,), A, jnp.int32).at[row_A].set(jnp.arange(A, dtype=jnp.int32), mode="drop")
    expert_n = jnp.clip(jnp.searchsorted(jnp.cumsum(blocks_E), jnp.arange(n), side="right"), 0, experts - 1)
    return Blocks(row_A.astype(jnp.int32), source_R, expert_n.astype(jnp.int32))


@jax.custom_vjp
def take_rows(x_AD: jax.Array, source_R: jax.Array, row_kN: jax.Array) -> jax.Array:
    """Rows of x (zero where the index is past its end). `row_kN` lists, k times, where each row of x went:
    with it the gradient is a gather too, instead of a scatter that XLA:CPU runs row by row."""
    padded = jnp.concatenate([x_AD, jnp.zeros((1, x_AD.shape[1]), x_AD.dtype)])
    return padded[source_R]


def _take_rows_forward(x_AD, source_R, row_kN):
    return take_rows(x_AD, source_R, row_kN), (source_R, row_kN)


def _take_rows_backward(saved, d_RD):
    source_R, row_kN = saved
    padded = jnp.concatenate([d_RD, jnp.zeros((1, d_RD.shape[1]), d_RD.dtype)])
    d_AD = sum(padded[row_kN[i]] for i in range(row_kN.shape[0]))
    no_grad = lambda i: np.zeros(i.shape, jax.dtypes.float0)  # noqa: E731
    return d_AD, no_grad(source_R), no_grad(row_kN)


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def blocked(x_RD: jax.Array, expert_n: jax.Array, experts: Experts) -> jax.Array:
    """Rows already laid in blocks [n*b, D] through the expert of their block."""
    n = expert_n.shape[0]
    x_nbD = x_RD.reshape(n, -1, x_RD.shape[1])
    E, D, W = experts.gate_EDW.shape
    both_EDV = jnp.stack([experts.gate_EDW, experts.up_EDW], axis=2).reshape(E, D, 2 * W)
    both_nbV = jnp.einsum("nbD,nDV->nbV", x_nbD, pick_experts(both_EDV, expert_n))  # one product reads x once
    a_nbW, u_nbW = jnp.split(both_nbV, 2, axis=-1)
    y_nbD = jnp.einsum("nbW,nWD->nbD", jax.nn.silu(a_nbW) * u_nbW, pick_experts(experts.down_EWD, expert_n))
    return y_nbD.reshape(x_RD.shape)


@jax.custom_vjp
def pick_experts(weight_EXY: jax.Array, expert_n: jax.Array) -> jax.Array:
    """weight[expert_n]; the gradient sums blocks by a one-hot matmul, faster than a scatter-add on CPU."""
    return weight_EXY[expert_n]


def _pick_forward(weight_EXY, expert_n):
    return weight_EXY[expert_n], (expert_n, weight_EXY[:, :0, :0])


def _pick_backward(saved, d_nXY):
    expert_n, empty_E00 = saved
    one_hot_En = jax.nn.one_hot(expert_n, empty_E00.shape[0], dtype=d_nXY.dtype, axis=0)
    d_EXY = jnp.tensordot(one_hot_En, d_nXY, axes=1)
    return d_EXY, np.zeros(expert_n.shape, jax.dtypes.float0)


pick_experts.defvjp(_pick_forward, _pick_backward)


def ragged(x_RD: jax.Array, rows_E: jax.Array, experts: Experts) -> jax.Array:
    """Rows sorted by expert, `rows_E` of them each, through `jax.lax.ragged_dot`."""
    a_RW = jax.lax.ragged_dot(x_RD, experts.gate_EDW, rows_E)
    u_RW = jax.lax.ragged_dot(x_RD, experts.up_EDW, rows_E)
    return jax.lax.ragged_dot(jax.nn.silu(a_RW) * u_RW, experts.down_EWD, rows_E)
