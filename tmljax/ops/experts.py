"""The experts' mathematics: SwiGLU (arXiv 2002.05202) for many small experts at once, in several ways.

`every_expert` is the plain version: all experts on all tokens, then the chosen are picked. `blocked` sorts tokens
by expert into blocks of equal size and takes one after another, as many as there are: dropless, static shapes, fast
where `jax.lax.ragged_dot` is not (XLA:CPU). `ragged` is `jax.lax.ragged_dot`, for accelerators; `grouped` and `hopper`
are JAX's Pallas kernels for TPUs and for NVIDIA Hopper, where XLA would multiply every row with every expert: on TPUs
to get the gradient of `ragged`'s weights, on GPUs always.
`gathered` fetches each token's own experts (gather + GEMV), for the few tokens of a tick when there are many experts.

Legend: N tokens, A assignments (rows that carry an expert id; -1 marks an empty row), D d_model, E experts,
W expert width, V = 2 W, k chosen experts, R rows laid for the experts, n blocks, b rows of a block, F rows that fill
a tile, X and Y any dims.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tmljax.ops.hopper import multiply as multiply_on_hopper
from tmljax.ops.keep import keep
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
    """Where each assignment's row lies among the blocks, and which blocks are each expert's, in their order."""

    row_A: jax.Array  # int32, index of the assignment's row among n*b, or n*b for an empty one
    source_R: jax.Array  # int32 [n*b], the assignment that fills this row, or A for padding
    end_E: jax.Array  # int32, the block after the last of each expert


def lay_blocks(expert_A: jax.Array, experts: int, room: int, rows: int) -> Blocks:
    """Groups the first `room` assignments, in the order of their experts, into blocks of `rows`; the others, and empty
    ones (-1), get no row."""
    A, n = expert_A.shape[0], -(-room // rows) + experts
    one_hot_AE = expert_A[:, None] == jnp.arange(experts)[None]
    rank_AE = jnp.cumsum(one_hot_AE.astype(jnp.int32), axis=0)
    fit_E = fit(jnp.cumsum(rank_AE[-1]), room)
    blocks_E = -(-fit_E // rows)
    first_E = jnp.cumsum(blocks_E) - blocks_E
    place_AE = jnp.where(rank_AE <= fit_E[None], first_E[None] * rows + rank_AE - 1, n * rows)
    row_A = jnp.where(expert_A >= 0, jnp.sum(jnp.where(one_hot_AE, place_AE, 0), axis=1), n * rows)
    source_R = jnp.full((n * rows,), A, jnp.int32).at[row_A].set(jnp.arange(A, dtype=jnp.int32), mode="drop")
    return Blocks(row_A.astype(jnp.int32), source_R, jnp.cumsum(blocks_E).astype(jnp.int32))


class Sorted(NamedTuple):
    """As `Blocks`, rows in the order of their experts, each of whom begins a tile."""

    row_A: jax.Array
    source_R: jax.Array
    rows_E: jax.Array  # int32, how many are each expert's, those that fill its last tile among them


def sort_rows(expert_A: jax.Array, experts: int, room: int, tile: int = 1) -> Sorted:
    """As `lay_blocks`, by sorting twice: accelerators scatter slowly. There are rows for any `room` assignments and for
    what fills the experts' last tiles: empty rows that are sorted with the others."""
    A, R, there_A = expert_A.shape[0], laid_rows(room, experts, tile), expert_A >= 0
    ids_E = jnp.arange(experts, dtype=jnp.int32)
    count_E = jnp.sum(expert_A[:, None] == ids_E[None], axis=0, dtype=jnp.int32)
    end_E = jnp.cumsum(-(-count_E // tile) * tile)
    fill_EF = jnp.where(jnp.arange(tile - 1)[None] < -count_E[:, None] % tile, ids_E[:, None], experts)
    key = jnp.concatenate([jnp.where(there_A, expert_A, experts), fill_EF.reshape(-1)])
    number = jnp.arange(key.size, dtype=jnp.int32)
    _, source = jax.lax.sort((key, number), num_keys=1)
    _, row = jax.lax.sort((source, number), num_keys=1)
    source_R = jnp.where(number[:R] < end_E[-1], jnp.minimum(source[:R], A), A)
    return Sorted(jnp.where(there_A, jnp.minimum(row[:A], R), R), source_R, fit(end_E, R))


def laid_rows(room: int, experts: int, tile: int) -> int:
    """Rows, in whole tiles, that `room` assignments take at most."""
    return (room + experts * (tile - 1)) // tile * tile


def fit(end_E: jax.Array, room: int) -> jax.Array:
    """How many assignments or rows of each expert there is room for, given where those of each end."""
    return jnp.diff(jnp.minimum(end_E, room), prepend=0)


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


@jax.custom_vjp
def add_rows(y_RD: jax.Array, row_kN: jax.Array, source_R: jax.Array) -> jax.Array:
    """The transpose of `take_rows`: [N, D], the sum of the k rows that each token went to (none past the end)."""
    padded = jnp.concatenate([y_RD, jnp.zeros((1, y_RD.shape[1]), y_RD.dtype)])
    return sum(padded[row_kN[i]] for i in range(row_kN.shape[0]))


def _add_rows_forward(y_RD, row_kN, source_R):
    return add_rows(y_RD, row_kN, source_R), (row_kN, source_R)


def _add_rows_backward(saved, d_ND):
    row_kN, source_R = saved
    no_grad = lambda i: np.zeros(i.shape, jax.dtypes.float0)  # noqa: E731
    return take_rows(d_ND, source_R, row_kN), no_grad(row_kN), no_grad(source_R)


add_rows.defvjp(_add_rows_forward, _add_rows_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked(x_RD: jax.Array, end_E: jax.Array, experts: Experts, rows: int) -> jax.Array:
    """Rows laid in blocks of `rows`, each block through its expert; rows of blocks that are nobody's stay zero.

    One block after another: the number of blocks in use is read from the data, weights are copied once an expert and
    not for each block, and what lies between two products stays in the cache.
    """
    return _blocked_forward(x_RD, end_E, experts, rows)[0]


def _blocked_forward(x_RD, end_E, experts, rows):
    x_nbD = x_RD.reshape(-1, rows, x_RD.shape[1])
    both_nbV = jnp.zeros((*x_nbD.shape[:2], 2 * experts.gate_EDW.shape[2]), x_RD.dtype)

    def one_expert(done, own):
        begin, end, gate_DW, up_DW, down_WD = own
        both_DV = jnp.concatenate([gate_DW, up_DW], axis=1)  # one product reads x once

        def one_block(i, done):
            both_nbV, y_nbD = done
            both_bV = jnp.dot(x_nbD[i], both_DV)
            return both_nbV.at[i].set(both_bV), y_nbD.at[i].set(jnp.dot(gate_halves(both_bV), down_WD))

        return jax.lax.fori_loop(begin, end, one_block, done), None

    own = (begins(end_E), end_E, *experts)
    (both_nbV, y_nbD), _ = jax.lax.scan(one_expert, (both_nbV, jnp.zeros_like(x_nbD)), own)
    return y_nbD.reshape(x_RD.shape), (x_nbD, both_nbV, end_E, experts)


def _blocked_backward(rows, saved, d_RD):
    x_nbD, both_nbV, end_E, experts = saved
    d_nbD = d_RD.reshape(x_nbD.shape)

    def one_expert(dx_nbD, own):
        begin, end, gate_DW, up_DW, down_WD = own
        both_VD, down_DW = (laid(w) for w in (jnp.concatenate([gate_DW.T, up_DW.T]), down_WD.T))

        def one_block(i, done):
            dx_nbD, dboth_DV, ddown_WD = done
            h_bW, gate_back = jax.vjp(gate_halves, both_nbV[i])
            (dboth_bV,) = gate_back(jnp.dot(d_nbD[i], down_DW))
            dx_nbD = dx_nbD.at[i].set(jnp.dot(dboth_bV, both_VD))
            return dx_nbD, dboth_DV + add_up(x_nbD[i], dboth_bV), ddown_WD + add_up(h_bW, d_nbD[i])

        nothing = [jnp.zeros(w.T.shape, jnp.float32) for w in (both_VD, down_DW)]
        dx_nbD, *sums = jax.lax.fori_loop(begin, end, one_block, (dx_nbD, *nothing))
        return dx_nbD, [w.astype(gate_DW.dtype) for w in sums]

    own = (begins(end_E), end_E, *experts)
    dx_nbD, (dboth_EDV, ddown_EWD) = jax.lax.scan(one_expert, jnp.zeros_like(x_nbD), own)
    no_grad = np.zeros(end_E.shape, jax.dtypes.float0)
    return dx_nbD.reshape(d_RD.shape), no_grad, Experts(*jnp.split(dboth_EDV, 2, axis=2), ddown_EWD)


blocked.defvjp(_blocked_forward, _blocked_backward)


def begins(end_E: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros(1, end_E.dtype), end_E[:-1]])


laid = jax.lax.optimization_barrier  # as it is written: else XLA:CPU's products turn it over, block by block


def gate_halves(both_bV: jax.Array) -> jax.Array:
    a_bW, u_bW = jnp.split(both_bV, 2, axis=1)
    return jax.nn.silu(a_bW) * u_bW


def add_up(x_bX: jax.Array, d_bY: jax.Array) -> jax.Array:
    """What these rows add to a weight's gradient, float32 [X, Y]."""
    return jnp.einsum("bX,bY->XY", x_bX, d_bY, preferred_element_type=jnp.float32)


def share(rows_RX: jax.Array, share_R: jax.Array | None) -> jax.Array:
    """Rows by their gates. Before the experts' last product, which is linear, it spares a full remat that product: the
    gradient of a gate asks for what it multiplies."""
    return rows_RX if share_R is None else rows_RX * share_R[:, None].astype(rows_RX.dtype)


def ragged(x_RD: jax.Array, rows_E: jax.Array, experts: Experts, share_R: jax.Array | None = None) -> jax.Array:
    """Rows sorted by expert, `rows_E` of them each, through `jax.lax.ragged_dot`; the results by their shares."""
    a_RW = keep(jax.lax.ragged_dot(x_RD, experts.gate_EDW, rows_E))
    u_RW = keep(jax.lax.ragged_dot(x_RD, experts.up_EDW, rows_E))
    return keep(jax.lax.ragged_dot(share(jax.nn.silu(a_RW) * u_RW, share_R), experts.down_EWD, rows_E))


def hopper(x_RD: jax.Array, rows_E: jax.Array, experts: Experts, share_R: jax.Array | None = None) -> jax.Array:
    """As `ragged`, through JAX's kernels for NVIDIA Hopper; rows beyond the experts' are zero."""
    both_EDV = jnp.concatenate([experts.gate_EDW, experts.up_EDW], axis=2)  # one product reads x once
    h_RW = gate_halves(keep(multiply_on_hopper(x_RD, both_EDV, rows_E)))
    return keep(multiply_on_hopper(share(h_RW, share_R), experts.down_EWD, rows_E))


TILE_ROWS = 256  # that `grouped` works on at once; a tile that lay across experts would be worked on for each of them
TILE_WEIGHTS = 2**20  # numbers of an expert's weights that are in VMEM at once, at most


def tile(rows: int, depth: int, columns: int) -> tuple[int, int, int]:
    """What a grouped product [rows, depth] x [depth, columns] works on at once. The whole depth, so that weights are
    read once an expert; columns by a divisor, since a part of a tile costs as much as a whole one."""
    widths = (w for w in range(128, columns + 1, 128) if columns % w == 0 and depth * w <= TILE_WEIGHTS)
    return TILE_ROWS, depth, max(widths, default=min(columns, 128))


def grouped(
    x_RD: jax.Array, rows_E: jax.Array, experts: Experts, share_R: jax.Array | None = None, interpret: bool = False
) -> jax.Array:
    """As `ragged`, through Megablox (arXiv 2211.15841); rows beyond the experts' are anything."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # half a second that only TPUs need

    R, padded = x_RD.shape[0], -(-x_RD.shape[0] // TILE_ROWS) * TILE_ROWS

    def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
        return keep(gmm(x, weight, rows_E, x.dtype, tile, interpret=interpret))

    x_RD = jnp.pad(x_RD, ((0, padded - R), (0, 0)))
    share_R = None if share_R is None else jnp.pad(share_R, (0, padded - R))
    h_RW = jax.nn.silu(multiply(x_RD, experts.gate_EDW)) * multiply(x_RD, experts.up_EDW)
    return multiply(share(h_RW, share_R), experts.down_EWD)[:R]
