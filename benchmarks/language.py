"""A plain language model on the trunk, for comparison with trainers that know nothing else.

Tokens in, the next tokens out: embedding, `tmljax.model.trunk`, text head, trained by `tmljax.train.step`. Sixteen
positions count as one micro-turn, so that the trunk's window and blocks of queries are of the usual size.

Legend: B batch, P positions, D d_model, V vocab.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tmljax import config
from tmljax.model.heads import TextHead
from tmljax.model.interaction import Definition
from tmljax.model.params import dense
from tmljax.model.trunk import Trunk
from tmljax.ops.losses import cross_entropy
from tmljax.train.objective import Routing

SLOTS = 16


class LanguageModel(nnx.Module):
    def __init__(self, stream: config.Stream, model: config.Model, rngs: nnx.Rngs):
        self.model = model
        self.tokens = dense(rngs, (stream.vocab_size, model.d_model), ("vocab", "embed"), fan_in=4)
        self.trunk = Trunk(model, rngs)
        self.text_head = TextHead(model.d_model, stream.vocab_size, rngs)

    def __call__(self, token_BP: jax.Array, mesh: Mesh | None) -> tuple[jax.Array, Any]:
        """Logits [B, P, V] and the experts' report."""
        B, P = token_BP.shape
        place_P2 = np.stack(np.divmod(np.arange(P, dtype=np.int32), SLOTS), axis=1)
        x_BPD = self.tokens[...][token_BP].astype(self.model.dtype)
        every_BP = jnp.ones((B, P), bool)
        z_BPD, moe = self.trunk(x_BPD, jnp.zeros(B, jnp.int32), place_P2, every_BP, mesh)
        return self.text_head(z_BPD), moe


class LanguageDefinition(Definition):
    def _build(self, key: jax.Array) -> LanguageModel:
        return LanguageModel(self.stream, self.model, nnx.Rngs(params=key))


def objective(
    definition: Definition,
    params: Any,
    batch: Any,
    key: jax.Array,
    weights: config.Loss,
    mesh: Mesh | None,
    whole: Any = None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Routing]]:
    """`batch` is {"tokens": int32 [B, P + 1]}."""
    logit_BPV, moe = definition.bind(params)(batch["tokens"][:, :-1], mesh)
    text = jnp.mean(cross_entropy(logit_BPV, batch["tokens"][:, 1:]))
    total = text + definition.model.moe.z_loss * jnp.sum(moe.z_loss)
    return total, ({"loss/total": total, "loss/text": text}, Routing(moe.load_E, jnp.sum(moe.dropped)))
