"""Tokens to their experts and back: all of expert parallelism.

Without an expert axis, tokens are laid in blocks by expert where they are. With one, each device sends every
assignment to the owner of its expert in an `all_to_all` of fixed room per destination, the owner does the same
local work, and a second `all_to_all` brings the results home. Room is `capacity_factor` times a balanced load, and
what does not fit is counted; `None` makes room for the worst case, so that nothing is dropped.

Legend: N tokens (of this device inside `shard_map`), A assignments = N x k, D d_model, E experts, W expert width,
k chosen experts, C room per destination, R rows.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tmljax.ops import experts as ops
from tmljax.ops.experts import Experts
from tmljax.ops.route import Routing

LocalExperts = Callable[[jax.Array, jax.Array, Experts], jax.Array]  # rows [A, D], expert ids [A] -> [A, D]


def in_blocks(x_ND: jax.Array, expert_A: jax.Array, experts: Experts, rows: int) -> jax.Array:
    """Each assignment's row of x (row A // (A / N)) through its expert: [A, D]; zeros where the id is -1."""
    k = expert_A.shape[0] // x_ND.shape[0]
    laid = ops.lay_blocks(expert_A, experts.gate_EDW.shape[0], rows)
    x_RD = ops.take_rows(x_ND, laid.source_R // k, laid.row_A.reshape(-1, k).T)
    y_RD = ops.blocked(x_RD, laid.expert_n, experts)
    return ops.take_rows(y_RD, laid.row_A, laid.source_R[None])


def in_ragged_rows(x_ND: jax.Array, expert_A: jax.Array, experts: Experts) -> jax.Array:
    """As `in_blocks`, through `jax.lax.ragged_dot`."""
    k, E = expert_A.shape[0] // x_ND.shape[0], experts.gate_EDW.shape[0]
    laid = ops.lay_blocks(expert_A, E, rows=1)
    x_RD = ops.take_rows(x_ND, laid.source_R // k, laid.row_A.reshape(-1, k).T)
    rows_E = jnp.sum(expert_A[:, None] == jnp.arange(E)[None], axis=0, dtype=jnp.int32)
    y_RD = ops.ragged(x_RD, rows_E, experts)
    return ops.take_rows(y_RD, laid.row_A, laid.source_R[None])


def combine(y_AD: jax.Array, gate_Nk: jax.Array) -> jax.Array:
    N, k = gate_Nk.shape
    return jnp.einsum("NkD,Nk->ND", y_AD.reshape(N, k, -1), gate_Nk.astype(y_AD.dtype))


def send_and_return(
    x_ND: jax.Array, expert_A: jax.Array, experts: Experts, axis: str, room: int, local: LocalExperts
) -> tuple[jax.Array, jax.Array]:
    """The exchange, inside `shard_map`: `experts` are this device's share. Returns ([A, D], dropped count)."""
    members, A = jax.lax.axis_size(axis), expert_A.shape[0]
    k, mine = A // x_ND.shape[0], experts.gate_EDW.shape[0]
    owner_A = expert_A // mine
    rank_A = jnp.cumsum(owner_A[:, None] == jnp.arange(members)[None], axis=0, dtype=jnp.int32)
    rank_A = jnp.take_along_axis(rank_A, owner_A[:, None], axis=1)[:, 0] - 1
    fits_A = rank_A < room
    row_A = jnp.where(fits_A, owner_A * room + rank_A, members * room)
    source_R = jnp.full((members * room,), A, jnp.int32).at[row_A].set(jnp.arange(A, dtype=jnp.int32), mode="drop")
    ids_R = jnp.concatenate([expert_A % mine, jnp.full((1,), -1, jnp.int32)])[source_R]

    exchange = partial(jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True)
    x_RD = exchange(ops.take_rows(x_ND, source_R // k, row_A.reshape(-1, k).T))
    y_RD = exchange(local(x_RD, exchange(ids_R), experts))
    return ops.take_rows(y_RD, row_A, source_R[None]), jnp.sum(~fits_A)


def room_per_member(tokens: int, top_k: int, experts: int, members: int, capacity_factor: float | None) -> int:
    """Rows that one device may send to another."""
    worst = tokens * min(top_k, experts // members)
    return worst if capacity_factor is None else min(worst, -(-int(tokens * top_k * capacity_factor) // members))


def apply_experts(
    x_ND: jax.Array,
    routing: Routing,
    experts: Experts,
    local: LocalExperts,
    capacity_factor: float | None,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Routed experts on all tokens. Returns ([N, D], dropped assignments as a float32 scalar).

    With a mesh, tokens are sharded over (data, fsdp, expert), experts over `expert`, their width over `tensor`.
    """
    if mesh is None or mesh.size == 1:
        y_AD = local(x_ND, routing.expert_Nk.reshape(-1), experts)
        return combine(y_AD, routing.gate_Nk), jnp.zeros((), jnp.float32)

    batch, members = ("data", "fsdp", "expert"), mesh.shape["expert"]

    def on_device(x_ND, expert_Nk, gate_Nk, experts):
        (N, k), E = expert_Nk.shape, experts.gate_EDW.shape[0] * members
        if members == 1:
            y_AD, dropped = local(x_ND, expert_Nk.reshape(-1), experts), jnp.zeros((), jnp.int32)
        else:
            room = room_per_member(N, k, E, members, capacity_factor)
            y_AD, dropped = send_and_return(x_ND, expert_Nk.reshape(-1), experts, "expert", room, local)
        y_ND = jax.lax.psum(combine(y_AD, gate_Nk), "tensor")
        return y_ND, jax.lax.psum(dropped.astype(jnp.float32), batch)

    rows = PartitionSpec(batch, None)
    columns, lines = PartitionSpec("expert", None, "tensor"), PartitionSpec("expert", "tensor", None)
    sharded = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(rows, rows, rows, Experts(columns, columns, lines)),
        out_specs=(rows, PartitionSpec()),
        check_vma=False,
    )
    return sharded(x_ND, routing.expert_Nk, routing.gate_Nk, experts)
