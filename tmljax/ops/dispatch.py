"""Positions to their experts and back: all of expert parallelism.

Without an expert axis, positions are laid by expert where they are. With one, an exchange brings them to the owners of
their experts, who do the same local work, and brings the results home. Three exchanges of one signature:

`ragged`: rows sorted by expert, exactly those there are, through `jax.lax.ragged_all_to_all` (TPU and GPU; XLA:CPU
has none). What a device receives from all others shares one buffer, so that it overflows only where the load of a
whole device exceeds the room.
`padded`: an `all_to_all` of fixed room for each pair of devices, everywhere.
`gathered`: every device gets all positions of the expert axis, works on those that chose its own experts, and a
reduction brings their sums home. M - 1 rows move for each position, each way, where the others move k x capacity: less
on a short axis, on links that a gather uses twice as well. A device's rows share one buffer here too.

Room is `capacity_factor` times a balanced load, and what fills experts' last tiles beside it; what does not fit is
counted. `None` makes room for the worst case, so that nothing is dropped.

Legend: B batch, P positions, N = B x P (of this device inside `shard_map`), A assignments = N x k, D d_model,
E experts, W expert width, k chosen experts, M members of the expert axis, G = M x N, R rows of a buffer, f members of
fsdp, X and Y any dims.
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
from tmljax.ops.experts import Blocks, Experts, Sorted
from tmljax.ops.route import NOBODY, Routing
from tmljax.sharding import BATCH_AXES, TOKEN_AXES, spec

AXIS = "expert"


# (rows [R, D], the last field of what lays them, experts, what each result is multiplied with [R] or None) -> [R, D]
Multiply = Callable[[jax.Array, jax.Array, Experts, jax.Array | None], jax.Array]


class Local(NamedTuple):
    """The work of a device's own experts: how rows are laid for it, and what multiplies them as they lie."""

    lay: Callable[[jax.Array, int, int], Blocks | Sorted]  # (expert ids [A], experts, room)
    multiply: Multiply


# (rows [N, D], expert ids [N, k], gates [N, k], this device's experts, local work, capacity factor)
# -> (gated sums [N, D], dropped)
Exchange = Callable[[jax.Array, jax.Array, jax.Array, Experts, Local, float | None], tuple[jax.Array, jax.Array]]


def in_blocks(rows: int) -> Local:
    """Blocks of so many rows; with what XLA:CPU is fast at."""

    def multiply(x_RD, end_E, experts, share_R):
        return ops.share(ops.blocked(x_RD, end_E, experts, rows), share_R)

    return Local(partial(ops.lay_blocks, rows=rows), multiply)


def in_rows(multiply: Multiply, tile: int = 1) -> Local:
    """Rows sorted by expert, each of whom begins a tile of so many, for `ops.ragged`, `ops.grouped` or `ops.hopper`."""
    return Local(partial(ops.sort_rows, tile=tile), multiply)


def work(x_ND: jax.Array, expert_A: jax.Array, experts: Experts, local: Local) -> jax.Array:
    """Each assignment's row of x (row A // (A / N)) through its expert: [A, D]; zeros where the id is -1."""
    k = expert_A.shape[0] // x_ND.shape[0]
    row_A, source_R, groups = local.lay(expert_A, experts.gate_EDW.shape[0], expert_A.shape[0])
    x_RD = ops.take_rows(x_ND, source_R // k, row_A.reshape(-1, k).T)
    return ops.take_rows(local.multiply(x_RD, groups, experts, None), row_A, source_R[None])


def combine(y_AD: jax.Array, gate_Nk: jax.Array) -> jax.Array:
    N, k = gate_Nk.shape
    return jnp.einsum("NkD,Nk->ND", y_AD.reshape(N, k, -1), gate_Nk.astype(y_AD.dtype))


def alone(
    x_ND: jax.Array,
    expert_Nk: jax.Array,
    gate_Nk: jax.Array,
    experts: Experts,
    local: Local,
    capacity_factor: float | None,
) -> tuple[jax.Array, jax.Array]:
    """No exchange, where each device has all experts."""
    return combine(work(x_ND, expert_Nk.reshape(-1), experts, local), gate_Nk), jnp.zeros((), jnp.int32)


def padded(
    x_ND: jax.Array,
    expert_Nk: jax.Array,
    gate_Nk: jax.Array,
    experts: Experts,
    local: Local,
    capacity_factor: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The exchange of fixed room for each pair of devices, inside `shard_map`."""
    (N, k), expert_A, A = expert_Nk.shape, expert_Nk.reshape(-1), expert_Nk.size
    members, mine = jax.lax.axis_size(AXIS), experts.gate_EDW.shape[0]
    room = room_per_pair(N, k, mine, members, capacity_factor)
    owner_A = jnp.where(expert_A >= 0, expert_A // mine, members)
    owned_AM = owner_A[:, None] == jnp.arange(members)[None]
    rank_A = jnp.sum(jnp.where(owned_AM, jnp.cumsum(owned_AM, axis=0, dtype=jnp.int32), 0), axis=1) - 1
    fits_A = (expert_A >= 0) & (rank_A < room)
    row_A = jnp.where(fits_A, owner_A * room + rank_A, members * room)
    source_R = jnp.full((members * room,), A, jnp.int32).at[row_A].set(jnp.arange(A, dtype=jnp.int32), mode="drop")
    ids_R = jnp.concatenate([expert_A % mine, jnp.full((1,), -1, jnp.int32)])[source_R]

    exchange = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
    x_RD = exchange(ops.take_rows(x_ND, source_R // k, row_A.reshape(-1, k).T))
    y_RD = exchange(work(x_RD, exchange(ids_R), experts, local))
    y_AD = ops.take_rows(y_RD, row_A, source_R[None])
    return combine(y_AD, gate_Nk), jnp.sum((expert_A >= 0) & ~fits_A)


def room_per_pair(tokens: int, top_k: int, mine: int, members: int, capacity_factor: float | None) -> int:
    """Rows that one device may send to another, which has `mine` experts."""
    worst = tokens * min(top_k, mine)
    return worst if capacity_factor is None else min(worst, math.ceil(tokens * top_k * capacity_factor / members))


def ragged(
    x_ND: jax.Array,
    expert_Nk: jax.Array,
    gate_Nk: jax.Array,
    experts: Experts,
    local: Local,
    capacity_factor: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The exchange of exactly the rows there are, inside `shard_map`."""
    (N, k), A = expert_Nk.shape, expert_Nk.size
    members, mine = jax.lax.axis_size(AXIS), experts.gate_EDW.shape[0]
    room = room_per_member(N, k, mine, members, capacity_factor)
    by_expert = ops.sort_rows(expert_Nk.reshape(-1), members * mine, A)
    rows_ME = jax.lax.all_gather(by_expert.rows_E, AXIS)
    there, back, ids_R = plan_exchange(rows_ME, jax.lax.axis_index(AXIS), room)

    x_AD = ops.take_rows(x_ND, by_expert.source_R // k, by_expert.row_A.reshape(-1, k).T)
    x_RD = move(x_AD, there, back, room)
    y_AD = move(work(x_RD, ids_R, experts, local), back, there, A)
    y_AD = ops.take_rows(y_AD, by_expert.row_A, by_expert.source_R[None])
    return combine(y_AD, gate_Nk), jnp.sum(by_expert.rows_E) - jnp.sum(there.send_M)


def room_per_member(tokens: int, top_k: int, mine: int, members: int, capacity_factor: float | None) -> int:
    """Rows that one device, with `mine` experts, may be given by all `members` together."""
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


def gathered(
    x_ND: jax.Array,
    expert_Nk: jax.Array,
    gate_Nk: jax.Array,
    experts: Experts,
    local: Local,
    capacity_factor: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The exchange of all positions, inside `shard_map`; what finds no room is the last experts'. Rows that are
    nobody's may be anything after the product: no position takes them, nor do gradients come from them."""
    (N, k), members, mine = expert_Nk.shape, jax.lax.axis_size(AXIS), experts.gate_EDW.shape[0]
    gather = partial(jax.lax.all_gather, axis_name=AXIS, tiled=True)
    x_GD, expert_A, gate_A = gather(x_ND), gather(expert_Nk).reshape(-1), gather(gate_Nk).reshape(-1)
    own_A = expert_A - mine * jax.lax.axis_index(AXIS)
    own_A = jnp.where((own_A >= 0) & (own_A < mine), own_A, NOBODY)

    row_A, source_R, groups = local.lay(own_A, mine, room_per_member(N, k, mine, members, capacity_factor))
    row_kG, token_R, there_R = row_A.reshape(-1, k).T, source_R // k, source_R < own_A.size
    gate_R = jnp.concatenate([gate_A, jnp.zeros((1,), gate_A.dtype)])[source_R]
    y_RD = local.multiply(ops.take_rows(x_GD, token_R, row_kG), groups, experts, gate_R)
    y_ND = jax.lax.psum_scatter(ops.add_rows(y_RD, row_kG, token_R), AXIS, tiled=True)
    return y_ND, jnp.sum(own_A != NOBODY) - jnp.sum(there_R)


def apply_experts(
    x_BPD: jax.Array,
    routing: Routing,
    experts: Experts,
    local: Local,
    exchange: Exchange,
    capacity_factor: float | None,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Routed experts on all positions. Returns ([B, P, D], dropped assignments as a float32 scalar).

    With a mesh, examples are split over (data, fsdp, expert), positions over `context`, experts over `expert`, their
    parameters over `fsdp` and `tensor`.
    """

    def on_device(x_BPD, expert_BPk, gate_BPk, experts):
        flat = [x.reshape(-1, x.shape[2]) for x in (x_BPD, expert_BPk, gate_BPk)]
        send = alone if mesh is None or mesh.shape[AXIS] == 1 else exchange
        y_ND, dropped = send(*flat, experts, local, capacity_factor)
        return y_ND.reshape(x_BPD.shape), dropped.astype(jnp.float32)

    if mesh is None or mesh.size == 1:
        return on_device(x_BPD, routing.expert_BPk, routing.gate_BPk, experts)

    def on_mesh(x_BPD, expert_BPk, gate_BPk, experts):
        y_BPD, dropped = on_device(x_BPD, expert_BPk, gate_BPk, Experts(*map(gather_parts, experts)))
        return jax.lax.psum(y_BPD, "tensor"), jax.lax.psum(dropped, TOKEN_AXES)

    rows = PartitionSpec(BATCH_AXES, "context", None)
    columns, lines = spec(("experts", "expert_embed", "width")), spec(("experts", "inner_width", "small"))
    sharded = jax.shard_map(
        on_mesh,
        mesh=mesh,
        in_specs=(rows, rows, rows, Experts(columns, columns, lines)),
        out_specs=(rows, PartitionSpec()),
        check_vma=False,
    )
    return sharded(x_BPD, routing.expert_BPk, routing.gate_BPk, experts)


def gather_parts(part_EXY: jax.Array) -> jax.Array:
    """[E, f X, Y], of the parts that the f members of `fsdp` hold; the transpose scatters the gradients' sum.

    Where X is an odd multiple of 8, XLA:TPU would sum all and cut, which takes twice as long and hides behind nothing.
    There the members are a dimension of their own, for which the gradients are copied once.
    """
    E, X, Y = part_EXY.shape
    if X % 16 != 8:
        return jax.lax.all_gather(part_EXY, "fsdp", axis=1, tiled=True)
    return jax.lax.all_gather(part_EXY, "fsdp", axis=1).reshape(E, -1, Y)
