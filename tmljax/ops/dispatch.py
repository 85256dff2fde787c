"""Positions to their experts and back: all of expert parallelism.

Without an expert axis, positions are laid by expert where they are. With one, each device sends every assignment to
the owner of its expert, the owner does the same local work, and a second exchange brings the results home. Two
exchanges of one signature:

`ragged`: rows sorted by expert, exactly those there are, through `jax.lax.ragged_all_to_all` (TPU and GPU; XLA:CPU
has none). What a device receives from all others shares one buffer, so that it overflows only where the load of a
whole device exceeds the room.
`padded`: an `all_to_all` of fixed room for each pair of devices, everywhere.

Room is `capacity_factor` times a balanced load, and what does not fit is counted; `None` makes room for the worst
case, so that nothing is dropped.

Legend: B batch, P positions, N = B x P (of this device inside `shard_map`), A assignments = N x k, D d_model,
E experts, W expert width, k chosen experts, M members of the expert axis, R rows of a buffer.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from tmljax.ops import experts as ops
from tmljax.ops.experts import Experts
from tmljax.ops.route import Routing
from tmljax.sharding import BATCH_AXES, TOKEN_AXES, spec

AXIS = "expert"

LocalExperts = Callable[[jax.Array, jax.Array, Experts], jax.Array]  # rows [N, D], expert ids [A] -> [A, D]
# (rows [N, D], expert ids [A], this device's experts, local work, capacity factor) -> ([A, D], dropped)
Exchange = Callable[[jax.Array, jax.Array, Experts, LocalExperts, float | None], tuple[jax.Array, jax.Array]]


def in_blocks(x_ND: jax.Array, expert_A: jax.Array, experts: Experts, rows: int) -> jax.Array:
    """Each assignment's row of x (row A // (A / N)) through its expert: [A, D]; zeros where the id is -1."""
    k = expert_A.shape[0] // x_ND.shape[0]
    laid = ops.lay_blocks(expert_A, experts.gate_EDW.shape[0], rows)
    x_RD = ops.take_rows(x_ND, laid.source_R // k, laid.row_A.reshape(-1, k).T)
    y_RD = ops.blocked(x_RD, laid.expert_n, experts)
    return ops.take_rows(y_RD, laid.row_A, laid.source_R[None])


def in_ragged_rows(x_ND: jax.Array, expert_A: jax.Array, experts: Experts) -> jax.Array:
    """As `in_blocks`, through `jax.lax.ragged_dot`."""
    k = expert_A.shape[0] // x_ND.shape[0]
    by_expert = sort_rows(expert_A, experts.gate_EDW.shape[0])
    x_AD = ops.take_rows(x_ND, by_expert.source_A // k, by_expert.row_A.reshape(-1, k).T)
    y_AD = ops.ragged(x_AD, by_expert.rows_E, experts)
    return ops.take_rows(y_AD, by_expert.row_A, by_expert.source_A[None])


class Sorted(NamedTuple):
    """Assignments in the order of their experts, and where each went; A where there is nothing."""

    source_A: jax.Array
    row_A: jax.Array
    rows_E: jax.Array


def sort_rows(expert_A: jax.Array, experts: int) -> Sorted:
    """By sorting twice: accelerators scatter slowly."""
    A, there_A = expert_A.shape[0], expert_A >= 0
    number_A = jnp.arange(A, dtype=jnp.int32)
    key_A, source_A = jax.lax.sort((jnp.where(there_A, expert_A, experts), number_A), num_keys=1)
    _, row_A = jax.lax.sort((source_A, number_A), num_keys=1)
    end_E = jnp.searchsorted(key_A, jnp.arange(experts, dtype=key_A.dtype), side="right").astype(jnp.int32)
    rows_E = jnp.diff(end_E, prepend=0)
    return Sorted(jnp.where(number_A < end_E[-1], source_A, A), jnp.where(there_A, row_A, A), rows_E)


def combine(y_AD: jax.Array, gate_Nk: jax.Array) -> jax.Array:
    N, k = gate_Nk.shape
    return jnp.einsum("NkD,Nk->ND", y_AD.reshape(N, k, -1), gate_Nk.astype(y_AD.dtype))


def padded(
    x_ND: jax.Array, expert_A: jax.Array, experts: Experts, local: LocalExperts, capacity_factor: float | None
) -> tuple[jax.Array, jax.Array]:
    """The exchange of fixed room for each pair of devices, inside `shard_map`."""
    members, A = jax.lax.axis_size(AXIS), expert_A.shape[0]
    N, mine = x_ND.shape[0], experts.gate_EDW.shape[0]
    k, room = A // N, room_per_pair(N, A // N, mine, members, capacity_factor)
    owner_A = jnp.where(expert_A >= 0, expert_A // mine, members)
    owned_AM = owner_A[:, None] == jnp.arange(members)[None]
    rank_A = jnp.sum(jnp.where(owned_AM, jnp.cumsum(owned_AM, axis=0, dtype=jnp.int32), 0), axis=1) - 1
    fits_A = (expert_A >= 0) & (rank_A < room)
    row_A = jnp.where(fits_A, owner_A * room + rank_A, members * room)
    source_R = jnp.full((members * room,), A, jnp.int32).at[row_A].set(jnp.arange(A, dtype=jnp.int32), mode="drop")
    ids_R = jnp.concatenate([expert_A % mine, jnp.full((1,), -1, jnp.int32)])[source_R]

    exchange = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
    x_RD = exchange(ops.take_rows(x_ND, source_R // k, row_A.reshape(-1, k).T))
    y_RD = exchange(local(x_RD, exchange(ids_R), experts))
    return ops.take_rows(y_RD, row_A, source_R[None]), jnp.sum((expert_A >= 0) & ~fits_A)


def room_per_pair(tokens: int, top_k: int, mine: int, members: int, capacity_factor: float | None) -> int:
    """Rows that one device may send to another, which has `mine` experts."""
    worst = tokens * min(top_k, mine)
    return worst if capacity_factor is None else min(worst, math.ceil(tokens * top_k * capacity_factor / members))


def ragged(
    x_ND: jax.Array, expert_A: jax.Array, experts: Experts, local: LocalExperts, capacity_factor: float | None
) -> tuple[jax.Array, jax.Array]:
    """The exchange of exactly the rows there are, inside `shard_map`."""
    members, A = jax.lax.axis_size(AXIS), expert_A.shape[0]
    N, mine = x_ND.shape[0], experts.gate_EDW.shape[0]
    k, room = A // N, room_per_member(N, A // N, mine, members, capacity_factor)
    by_expert = sort_rows(expert_A, members * mine)
    rows_ME = jax.lax.all_gather(by_expert.rows_E, AXIS)
    there, back, ids_R = plan_exchange(rows_ME, jax.lax.axis_index(AXIS), room)

    x_AD = ops.take_rows(x_ND, by_expert.source_A // k, by_expert.row_A.reshape(-1, k).T)
    x_RD = move(x_AD, there, back, room)
    y_AD = move(local(x_RD, ids_R, experts), back, there, A)
    dropped = jnp.sum(by_expert.rows_E) - jnp.sum(there.send_M)
    return ops.take_rows(y_AD, by_expert.row_A, by_expert.source_A[None]), dropped


def room_per_member(tokens: int, top_k: int, mine: int, members: int, capacity_factor: float | None) -> int:
    """Rows that one device, with `mine` experts, may receive from all `members` together."""
    worst = members * tokens * min(top_k, mine)
    return worst if capacity_factor is None else min(worst, math.ceil(tokens * top_k * capacity_factor))


class Offsets(NamedTuple):
    """What a member tells `jax.lax.ragged_all_to_all`, in its order; int32, per other member."""

    input_M: jax.Array  # where the rows for it begin among those sent
    send_M: jax.Array  # how many they are
    output_M: jax.Array  # where they begin in its buffer
    recv_M: jax.Array  # how many come from it


def plan_exchange(rows_ME: jax.Array, me: jax.Array, room: int) -> tuple[Offsets, Offsets, jax.Array]:
    """Of member `me`: its offsets on the way there, on the way back, and the expert of each row it receives [room].

    `rows_ME` has the assignments of each member to each expert. A member sends them in the order of their experts; a
    buffer is filled in the order of the senders and takes what fits. Experts are numbered as their owner does, -1
    where there is no row.
    """
    members = rows_ME.shape[0]
    rows_MMe = rows_ME.reshape(members, members, -1)  # sender, owner, its experts
    rows_MM = jnp.sum(rows_MMe, axis=2)
    begin_MM = jnp.cumsum(rows_MM, axis=1) - rows_MM  # among the sender's rows
    land_MM = jnp.minimum(jnp.cumsum(rows_MM, axis=0) - rows_MM, room)  # in the owner's buffer
    taken_MM = jnp.minimum(rows_MM, room - land_MM)
    there = Offsets(begin_MM[me], taken_MM[me], land_MM[me], taken_MM[:, me])
    back = Offsets(land_MM[:, me], taken_MM[:, me], begin_MM[:, me], taken_MM[me])

    mine_Me = rows_MMe[:, me]
    ids_Me = jnp.broadcast_to(jnp.arange(mine_Me.shape[1], dtype=jnp.int32)[None], mine_Me.shape)
    ids_R = jnp.repeat(ids_Me.reshape(-1), mine_Me.reshape(-1), total_repeat_length=room)
    return there, back, jnp.where(jnp.arange(room) < jnp.sum(mine_Me), ids_R, -1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def move(x_RD: jax.Array, there: Offsets, back: Offsets, rows: int) -> jax.Array:
    """The rows of x where the exchange brings them, in a buffer of `rows`, zeros elsewhere. Its gradient is the way
    back, whose offsets are known: the transpose that JAX has exchanges them first."""
    return jax.lax.ragged_all_to_all(x_RD, jnp.zeros((rows, x_RD.shape[1]), x_RD.dtype), *there, axis_name=AXIS)


def _move_forward(x_RD, there, back, rows):
    return move(x_RD, there, back, rows), (there, back, x_RD[:, :0])


def _move_backward(rows, saved, d_RD):
    there, back, empty_R0 = saved
    no_grad = jax.tree.map(lambda i: np.zeros(i.shape, jax.dtypes.float0), (there, back))
    return move(d_RD, back, there, empty_R0.shape[0]), *no_grad


move.defvjp(_move_forward, _move_backward)


def apply_experts(
    x_BPD: jax.Array,
    routing: Routing,
    experts: Experts,
    local: LocalExperts,
    exchange: Exchange,
    capacity_factor: float | None,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Routed experts on all positions. Returns ([B, P, D], dropped assignments as a float32 scalar).

    With a mesh, examples are split over (data, fsdp, expert), positions over `context`, experts over `expert`, their
    parameters over `fsdp` and `tensor`.
    """

    def on_device(x_BPD, expert_BPk, gate_BPk, experts):
        (B, P, k), D = expert_BPk.shape, x_BPD.shape[2]
        x_ND, expert_A = x_BPD.reshape(B * P, D), expert_BPk.reshape(-1)
        if mesh is None or mesh.shape[AXIS] == 1:
            y_AD, dropped = local(x_ND, expert_A, experts), jnp.zeros((), jnp.int32)
        else:
            y_AD, dropped = exchange(x_ND, expert_A, experts, local, capacity_factor)
        return combine(y_AD, gate_BPk.reshape(B * P, k)).reshape(B, P, D), dropped.astype(jnp.float32)

    if mesh is None or mesh.size == 1:
        return on_device(x_BPD, routing.expert_BPk, routing.gate_BPk, experts)

    def on_mesh(x_BPD, expert_BPk, gate_BPk, experts):
        gate, up, down = experts
        whole = partial(jax.lax.all_gather, axis_name="fsdp", tiled=True)  # its transpose scatters the gradients' sum
        experts = Experts(whole(gate, axis=1), whole(up, axis=1), whole(down, axis=2))
        y_BPD, dropped = on_device(x_BPD, expert_BPk, gate_BPk, experts)
        return jax.lax.psum(y_BPD, "tensor"), jax.lax.psum(dropped, TOKEN_AXES)

    rows = PartitionSpec(BATCH_AXES, "context", None)
    columns, lines = spec(("experts", "embed", "width")), spec(("experts", "width", "embed"))
    sharded = jax.shard_map(
        on_mesh,
        mesh=mesh,
        in_specs=(rows, rows, rows, Experts(columns, columns, lines)),
        out_specs=(rows, PartitionSpec()),
        check_vma=False,
    )
    return sharded(x_BPD, routing.expert_BPk, routing.gate_BPk, experts)
