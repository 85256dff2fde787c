"""Which experts a token goes to.

Sigmoid scores in float32, top-k chosen with a bias that only selects (loss-free balancing, arXiv 2408.15664, as in
DeepSeek-V3, arXiv 2412.19437), gates normalised over the chosen, router z-loss (arXiv 2202.08906).

Legend: N tokens, D d_model, E experts, k chosen experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    expert_Nk: jax.Array  # int32
    gate_Nk: jax.Array  # float32, sums to 1 over k
    load_E: jax.Array  # float32, share of the assignments, sums to 1
    z_loss: jax.Array  # float32 scalar, unweighted


def route(x_ND: jax.Array, router_DE: jax.Array, balance_bias_E: jax.Array, top_k: int) -> Routing:
    logit_NE = jnp.dot(x_ND.astype(jnp.float32), router_DE.astype(jnp.float32))
    score_NE = jax.nn.sigmoid(logit_NE)
    chooser_NE = jax.lax.stop_gradient(score_NE + balance_bias_E[None].astype(jnp.float32))
    _, expert_Nk = jax.lax.top_k(chooser_NE, top_k)
    chosen_Nk = jnp.take_along_axis(score_NE, expert_Nk, axis=1)
    gate_Nk = chosen_Nk / (jnp.sum(chosen_Nk, axis=1, keepdims=True) + 1e-20)
    experts = router_DE.shape[1]
    load_E = jnp.mean(jax.nn.one_hot(expert_Nk, experts, dtype=jnp.float32), axis=(0, 1))
    z_loss = jnp.mean(jax.scipy.special.logsumexp(logit_NE, axis=1) ** 2)
    return Routing(expert_Nk.astype(jnp.int32), gate_Nk, load_E, z_loss)
