"""Which experts a position goes to.

Sigmoid scores in float32, top-k chosen with a bias that only selects (loss-free balancing, arXiv 2408.15664, as in
DeepSeek-V3, arXiv 2412.19437), gates normalised over the chosen, router z-loss (arXiv 2202.08906). The product before
them is as precise as the platform makes float32 by default: TPUs round the router to bfloat16, as positions are.

Legend: B batch, P positions, D d_model, E experts, k chosen experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NOBODY = -1  # the expert of a position that nothing comes of


class Routing(NamedTuple):
    expert_BPk: jax.Array  # int32, or NOBODY
    gate_BPk: jax.Array  # float32, sums to 1 over k
    load_E: jax.Array  # float32, share of the assignments, sums to 1
    z_loss: jax.Array  # float32 scalar, unweighted


def route(
    x_BPD: jax.Array, router_DE: jax.Array, balance_bias_E: jax.Array, top_k: int, counts_BP: jax.Array | None = None
) -> Routing:
    """Positions where `counts_BP` is False go to no expert, and neither load nor loss knows of them."""
    logit_BPE = jnp.dot(x_BPD.astype(jnp.float32), router_DE.astype(jnp.float32))
    score_BPE = jax.nn.sigmoid(logit_BPE)
    chooser_BPE = jax.lax.stop_gradient(score_BPE + balance_bias_E[None, None].astype(jnp.float32))
    _, expert_BPk = jax.lax.top_k(chooser_BPE, top_k)
    chosen_BPk = jnp.take_along_axis(score_BPE, expert_BPk, axis=-1)
    gate_BPk = chosen_BPk / (jnp.sum(chosen_BPk, axis=-1, keepdims=True) + 1e-20)

    counts_BP = jnp.ones(x_BPD.shape[:2], bool) if counts_BP is None else counts_BP
    expert_BPk = jnp.where(counts_BP[..., None], expert_BPk.astype(jnp.int32), NOBODY)
    number = jnp.maximum(jnp.sum(counts_BP, dtype=jnp.float32), 1.0)
    load_E = jnp.sum(jax.nn.one_hot(expert_BPk, router_DE.shape[1], dtype=jnp.float32), axis=(0, 1, 2))
    z_BP = jax.scipy.special.logsumexp(logit_BPE, axis=-1) ** 2
    return Routing(expert_BPk, gate_BPk, load_E / (number * top_k), jnp.sum(z_BP * counts_BP) / number)
