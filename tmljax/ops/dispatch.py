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

Multiply = Callable[[jax.Array, jax.Array, Experts], jax.Array]  # sorted rows [R, D], rows of each expert -> [R, D]
LocalExperts = Callable[[jax.Array, jax.Array, Experts], jax.Array]  # rows [A, D], expert ids [A] -> [A, D]


def in_blocks(x_ND: jax.Array, expert_A: jax.Array, experts: Experts, rows: int) -> jax.Array:
    """Each assignment's row of x (row A // (A / N)) through its expert: [A, D]; zeros where the id is -1."""
    k = expert_A.shape[0] // x_ND.shape[0]
    laid = ops.lay_blocks(expert_A, experts.gate_EDW.shape[0], rows)
    x_RD = ops.take_rows(x_ND, laid.source_R // k, laid.row_A.reshape(-1, k).T)
    y_RD = ops.blocked(x_RD, laid.expert_n, experts)
    return ops.take_rows(y_RD, laid.row_A, laid.source_R[None])


def in_rows(x_ND: jax.Array, expert_A: jax.Array, experts: Experts, multiply: Multiply) -> jax.Array:
    """As `in_blocks`, rows sorted by expert without gaps, for `ops.ragged` or `ops.grouped`."""
    k, E = expert_A.shape[0] // x_ND.shape[0], experts.gate_EDW.shape[0]
    laid = ops.lay_blocks(expert_A, E, rows=1)
    x_RD = ops.take_rows(x_ND, laid.source_R // k, laid.row_A.reshape(-1, k).T)
    rows_E = jnp.sum(expert_A[:, None] == jnp.arange(E)[None], axis=0, dtype=jnp.int32)
    y_RD = multiply(x_RD, rows_E, experts)
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


def gather_and_scatter(
    x_ND: jax.Array,
    routing: Routing,
    experts: Experts,
    axis: str,
    capacity_factor: float | None,
    multiply: Multiply,
) -> tuple[jax.Array, jax.Array]:
    """The other exchange, inside `shard_map`: each device gets all tokens of the expert axis, works on those that chose
    its own experts, and its sums go home in a reduction. Returns ([N, D], dropped count).

    (members - 1) x N rows move each way, where the all-to-all moves k x capacity x N: less on a short axis, on links
    that a gather uses twice as well, and rows have room by device, not by pair of devices.
    """
    members, (N, k), mine = jax.lax.axis_size(axis), routing.expert_Nk.shape, experts.gate_EDW.shape[0]
    gather = partial(jax.lax.all_gather, axis_name=axis, tiled=True)
    x_GD, expert_A, gate_A = gather(x_ND), gather(routing.expert_Nk).reshape(-1), gather(routing.gate_Nk).reshape(-1)
    own_A = expert_A - mine * jax.lax.axis_index(axis)
    own_A = jnp.where((own_A >= 0) & (own_A < mine), own_A, -1)

    worst = members * N * min(k, mine)
    room = worst if capacity_factor is None else min(worst, int(N * k * capacity_factor))
    laid = ops.lay_blocks(own_A, mine, rows=1)
    source_R, row_A = laid.source_R[:room], jnp.minimum(laid.row_A, room)
    ends_E = jnp.cumsum(jnp.sum(own_A[:, None] == jnp.arange(mine)[None], axis=0, dtype=jnp.int32))
    rows_E = jnp.diff(jnp.minimum(ends_E, room), prepend=0)

    row_kG, token_R = row_A.reshape(-1, k).T, source_R // k
    y_RD = multiply(ops.take_rows(x_GD, token_R, row_kG), rows_E, experts)
    gate_R = jnp.concatenate([gate_A, jnp.zeros((1,), gate_A.dtype)])[source_R]
    y_RD = jnp.where(source_R[:, None] < expert_A.shape[0], y_RD * gate_R[:, None].astype(y_RD.dtype), 0)
    y_ND = jax.lax.psum_scatter(ops.add_rows(y_RD, row_kG, token_R), axis, tiled=True)
    return y_ND, jnp.maximum(ends_E[-1] - room, 0)


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
    gathers: Multiply | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Routed experts on all tokens. Returns ([N, D], dropped assignments as a float32 scalar).

    With a mesh, tokens are sharded over (data, fsdp, expert), experts over `expert`, their width over `tensor`.
    `gathers` exchanges them by `gather_and_scatter` and is what multiplies there.
    """
    if mesh is None or mesh.size == 1:
        y_AD = local(x_ND, routing.expert_Nk.reshape(-1), experts)
        return combine(y_AD, routing.gate_Nk), jnp.zeros((), jnp.float32)

    batch, members = ("data", "fsdp", "expert"), mesh.shape["expert"]

    def on_device(x_ND, expert_Nk, gate_Nk, experts):
        (N, k), E = expert_Nk.shape, experts.gate_EDW.shape[0] * members
        if members == 1:
            y_AD, dropped = local(x_ND, expert_Nk.reshape(-1), experts), jnp.zeros((), jnp.int32)
            y_ND = combine(y_AD, gate_Nk)
        elif gathers is not None:
            own = routing._replace(expert_Nk=expert_Nk, gate_Nk=gate_Nk)
            y_ND, dropped = gather_and_scatter(x_ND, own, experts, "expert", capacity_factor, gathers)
        else:
            room = room_per_member(N, k, E, members, capacity_factor)
            y_AD, dropped = send_and_return(x_ND, expert_Nk.reshape(-1), experts, "expert", room, local)
            y_ND = combine(y_AD, gate_Nk)
        y_ND = jax.lax.psum(y_ND, "tensor")
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
