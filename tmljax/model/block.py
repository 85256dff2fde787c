"""One transformer block, the same for training and for the tick: attention, then experts.

Where the keys come from is the caller's: the sequence itself in training, the ring in a tick (`Look`).

Legend: B batch, P positions, D d_model, H heads, K kv heads, h head dim, E experts, W expert width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from tmljax import config
from tmljax.model.params import constant, dense, matrix
from tmljax.ops import dispatch
from tmljax.ops import experts as expert_ops
from tmljax.ops.experts import Experts
from tmljax.ops.norm import rms_norm
from tmljax.ops.project import project
from tmljax.ops.rope import Rotate
from tmljax.ops.route import route

Look = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]  # (q, own k, own v, sinks) -> mixed values


class MoeReport(NamedTuple):
    """What the experts' layer says of itself; returned, never sown."""

    load_E: jax.Array  # share of the assignments
    dropped: jax.Array  # assignments that found no room
    z_loss: jax.Array


class Attention(nnx.Module):
    """Grouped-query attention with QK-norm (arXiv 2010.04245) and rotary time."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        D, H, K, h = model.d_model, model.heads, model.kv_heads, model.head_dim
        self.shape = (H, K, h)
        self.norm = constant((D,), ("embed",), 1.0)
        self.q = matrix(rngs, (D, H * h), ("embed", "heads"), fan_in=D)
        self.k = matrix(rngs, (D, K * h), ("embed", "kv_heads"), fan_in=D)
        self.q[...] = resemble(self.q[...], self.k[...], self.shape)
        self.v = matrix(rngs, (D, K * h), ("embed", "kv_heads"), fan_in=D)
        self.out = matrix(rngs, (H * h, D), ("heads", "embed"), fan_in=H * h, gain=(2 * model.layers) ** -0.5)
        self.q_norm = constant((h,), ("small",), 1.0)
        self.k_norm = constant((h,), ("small",), 1.0)
        self.sink = constant((H,), ("small",))

    @jax.named_scope("attention")
    def __call__(self, x_BPD: jax.Array, rotate: Rotate, look: Look) -> jax.Array:
        (H, K, h), (B, P, _) = self.shape, x_BPD.shape
        y_BPD = rms_norm(x_BPD, self.norm[...])
        weight = lambda w: w[...].astype(x_BPD.dtype)  # noqa: E731
        q_BPHh = jnp.dot(y_BPD, weight(self.q)).reshape(B, P, H, h)
        k_BPKh, v_BPKh = (x.reshape(B, P, K, h) for x in project(y_BPD, weight(self.k), weight(self.v)))
        q_BPHh = rotate(rms_norm(q_BPHh, self.q_norm[...]))
        k_BPKh = rotate(rms_norm(k_BPKh, self.k_norm[...]))
        out_BPHh = look(q_BPHh, k_BPKh, v_BPKh, self.sink[...])
        return jnp.dot(out_BPHh.reshape(B, P, H * h), weight(self.out))


def resemble(q_DX: jax.Array, k_DY: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Queries whose variance comes half from their keys: at first a position attends to what is like it, and looking
    things up starts from there (after mimetic initialisation, arXiv 2305.09828)."""
    H, K, h = shape
    q_DKGh, k_DK1h = q_DX.reshape(-1, K, H // K, h), k_DY.reshape(-1, K, 1, h)
    return (0.5**0.5 * (q_DKGh + k_DK1h)).reshape(q_DX.shape)


PRODUCTS = {"ragged": expert_ops.ragged, "grouped": expert_ops.grouped, "hopper": expert_ops.hopper}
EXCHANGES = {"padded": dispatch.padded, "ragged": dispatch.ragged, "gathered": dispatch.gathered}


def local_work(moe: config.Moe) -> dispatch.Local:
    if moe.matmul == "blocks":
        return dispatch.in_blocks(moe.block_rows)
    return dispatch.in_rows(PRODUCTS[moe.matmul], tile_rows(moe))


def tile_rows(moe: config.Moe) -> int:
    """Up to a multiple of which an expert's sorted rows are filled: Hopper's tiles of 128 are few against its rows."""
    return expert_ops.TILE_ROWS if moe.matmul == "grouped" else 1


ROUTED = ("gate", "up", "down")  # those of an ExpertLayer's parameters that a position uses a share of


class ExpertLayer(nnx.Module):
    """Routed experts, beside a shared one unless its width is 0 (DeepSeekMoE, arXiv 2401.06066)."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        D, E, W, S = model.d_model, model.moe.experts, model.moe.expert_width, model.moe.shared_width
        gain = (2 * model.layers) ** -0.5
        self.moe = model.moe
        self.norm = constant((D,), ("embed",), 1.0)
        self.router = dense(rngs, (D, E), ("embed", "small"), fan_in=D)
        self.balance_bias = constant((E,), ("small",))
        self.gate = matrix(rngs, (E, D, W), ("experts", "expert_embed", "width"), fan_in=D)
        self.up = matrix(rngs, (E, D, W), ("experts", "expert_embed", "width"), fan_in=D)
        self.down = matrix(rngs, (E, W, D), ("experts", "inner_width", "small"), fan_in=W, gain=gain)
        if S:
            self.shared_gate = matrix(rngs, (D, S), ("embed", "shared_width"), fan_in=D)
            self.shared_up = matrix(rngs, (D, S), ("embed", "shared_width"), fan_in=D)
            self.shared_down = matrix(rngs, (S, D), ("inner_shared_width", "small"), fan_in=S, gain=gain)

    @jax.named_scope("experts")
    def __call__(
        self, x_BPD: jax.Array, mesh: Mesh | None, tick: bool, counts_BP: jax.Array | None = None
    ) -> tuple[jax.Array, MoeReport]:
        B, P, D = x_BPD.shape
        y_BPD = rms_norm(x_BPD, self.norm[...])
        routing = route(y_BPD, self.router[...], self.balance_bias[...], self.moe.top_k, counts_BP)
        weight = lambda w: w[...].astype(x_BPD.dtype)  # noqa: E731
        experts = Experts(weight(self.gate), weight(self.up), weight(self.down))
        if tick:
            few = expert_ops.gathered if self.moe.tick_matmul == "gathered" else expert_ops.every_expert
            flat = [x.reshape(B * P, -1) for x in (y_BPD, routing.expert_BPk, routing.gate_BPk)]
            routed_BPD, dropped = few(*flat, experts).reshape(B, P, D), jnp.zeros((), jnp.float32)
        else:
            local, exchange = local_work(self.moe), EXCHANGES[self.moe.exchange]
            routed_BPD, dropped = dispatch.apply_experts(
                y_BPD, routing, experts, local, exchange, self.moe.capacity_factor, mesh
            )
        if self.moe.shared_width:
            shared = (weight(w) for w in (self.shared_gate, self.shared_up, self.shared_down))
            routed_BPD = routed_BPD + expert_ops.swiglu(y_BPD, *shared)
        return routed_BPD, MoeReport(routing.load_E, dropped, routing.z_loss)


class Block(nnx.Module):
    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        self.attention = Attention(model, rngs)
        self.experts = ExpertLayer(model, rngs)

    def __call__(
        self,
        x_BPD: jax.Array,
        rotate: Rotate,
        look: Look,
        mesh: Mesh | None,
        tick: bool,
        counts_BP: jax.Array | None = None,
    ) -> tuple[jax.Array, MoeReport]:
        """Positions where `counts_BP` is False, all do by default, go to no routed expert."""
        x_BPD = x_BPD + self.attention(x_BPD, rotate, look)
        y_BPD, report = self.experts(x_BPD, mesh, tick, counts_BP)
        return x_BPD + y_BPD, report
