"""The training objective: cross-entropy on text and on notes of what is heard and seen, flow matching on speech.

Legend: B batch, T micro-turns, t those picked, N video frames, S slots of a stream or words of a frame, V vocab,
X values of a slot of mel, F mel frames, M mel channels, D d_model, L layers, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tmljax import config
from tmljax.model.interaction import Batch, Definition, InteractionModel, Params
from tmljax.ops.flow import denormalise, matching_loss, normalise
from tmljax.ops.losses import cross_entropy
from tmljax.stream.microturn import ABSENT, HOLD, IDLE

MISHEARD = 0.1  # share of micro-turns in which training reads another example's note, mostly none


class Routing(NamedTuple):
    """For the balance update, which no gradient drives."""

    load_LE: jax.Array
    dropped: jax.Array  # assignments without room in this batch


class Counts(NamedTuple):
    """What each target counts: the terms of the loss are means by these."""

    text_BTS: jax.Array
    heard_BT: jax.Array
    seen_BNS: jax.Array
    flow_BT: jax.Array


def objective(
    definition: Definition,
    params: Params,
    batch: Batch,
    key: jax.Array | None,
    weights: config.Loss,
    mesh: Mesh | None = None,
    whole: Batch | None = None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Routing]]:
    """Returns the loss and (metrics, routing). Every metric is a float32 scalar; `loss/*` terms are unweighted.

    Without a key it is that of held-out data: the model hears its own speech unblurred, as when it is used, and the
    noise of the flow is the same each time. But it reads true notes, where it will have its own. Of a micro-batch of
    the `whole`, terms with targets and accuracies are such that their mean over micro-batches is that of the whole,
    wherever its targets lie; routing is the micro-batch's own. An accuracy is NaN where there is nothing to judge.
    """
    model = definition.bind(params)
    k_feedback, k_words, k_flow = jax.random.split(jax.random.key(0) if key is None else key, 3)
    target_BTS = batch["model_text"]
    counts = count_targets(definition, batch, weights)
    everything = counts if whole is None else count_targets(definition, whole, weights)
    totals = sum_counts(definition.model.flow, everything, len(batch["valid"]))
    fed_back = {name: batch[name] for name in ("model_mel", "heard")}
    if key is not None:
        fed_back = {
            "model_mel": blur(batch["model_mel"], counts.flow_BT > 0, definition.model.flow.feedback_noise, k_feedback),
            "heard": mishear(batch["heard"], MISHEARD, k_words),
        }
    out = model(batch | fed_back, mesh)

    heard_BT, seen_BNS = batch["heard"], batch["seen"]
    seen_BNSV = jnp.broadcast_to(out.seen_BNV[:, :, None], (*seen_BNS.shape, out.seen_BNV.shape[-1]))
    text = average(text_loss(out.text_BTSV, target_BTS, weights), counts.text_BTS, totals["text"])
    heard = average(cross_entropy(out.heard_BTV, heard_BT), counts.heard_BT, totals["heard"])
    seen = average(cross_entropy(seen_BNSV, seen_BNS), counts.seen_BNS, totals["seen"])
    flow = flow_loss(model, out.condition_BTSD, batch["model_mel"], counts.flow_BT, totals["flow"], k_flow)

    router_z = jnp.sum(out.moe.z_loss)
    total = text + weights.flow * flow + weights.notes * (heard + seen)
    total += definition.model.moe.z_loss * router_z
    likeliest_BTS = right(out.text_BTSV, target_BTS)
    hits = {
        "text/word_accuracy": likeliest_BTS,
        "text/idle_accuracy": likeliest_BTS,
        "heard/word_accuracy": right(out.heard_BTV, heard_BT),
        "seen/word_accuracy": among_likeliest(seen_BNSV, seen_BNS),
    }
    where, everywhere = find_judged(batch, counts), find_judged(batch if whole is None else whole, everything)
    metrics = {
        "loss/total": total,
        "loss/text": text,
        "loss/flow": flow,
        "loss/heard": heard,
        "loss/seen": seen,
        "loss/router_z": router_z,
        **{name: share(hit, where[name], everywhere[name]) for name, hit in hits.items()},
    }
    return total, (metrics, Routing(out.moe.load_E, jnp.sum(out.moe.dropped)))


def count_targets(definition: Definition, batch: Batch, weights: config.Loss) -> Counts:
    valid_BT, every = batch["valid"].astype(jnp.float32), definition.stream.video_every
    text_BTS = text_weights(definition.stream.vocab_size, weights)[batch["model_text"]] * valid_BT[..., None]
    heard_BT = batch["heard"]  # ABSENT where nobody wrote down what the user said
    listens_BT = valid_BT * batch["user_present"] * (heard_BT != ABSENT)
    seen_BNS = batch["seen"]  # ABSENT where nobody wrote down what the frame shows
    looks_BNS = (seen_BNS != ABSENT) * (valid_BT[:, ::every] * batch["video_present"])[..., None]
    speaks_BT = jnp.any(batch["model_text"] != IDLE, axis=2)
    return Counts(
        text_BTS, jnp.where(heard_BT == IDLE, weights.idle, 1.0) * listens_BT, looks_BNS, speaks_BT * valid_BT
    )


def sum_counts(flow: config.Flow, counts: Counts, examples: int) -> dict[str, jax.Array]:
    """What all targets of each term count together, as many `examples` on average of all of them."""
    flow_B = jnp.minimum(jnp.sum(counts.flow_BT, axis=1), count_picks(flow, counts.flow_BT.shape[1]))
    totals = {"text": counts.text_BTS, "heard": counts.heard_BT, "seen": counts.seen_BNS, "flow": flow_B}
    return {name: jnp.sum(count) * examples / len(flow_B) for name, count in totals.items()}


def average(value: jax.Array, count: jax.Array, total: jax.Array) -> jax.Array:
    """The mean by `count`, which adds up to `total` over micro-batches as many as there are; 0 where nothing counts."""
    return jnp.sum(value * count) / jnp.maximum(total, 1e-6)


def text_weights(vocab_size: int, weights: config.Loss) -> jax.Array:
    """float32 [V]: silence and "still speaking" weigh less than words."""
    return jnp.ones(vocab_size).at[IDLE].set(weights.idle).at[HOLD].set(weights.hold)


def text_loss(logit_BTSV: jax.Array, target_BTS: jax.Array, weights: config.Loss) -> jax.Array:
    """Cross-entropy of each token. What weighs less in its mean is learnt as if rarer: shifting the logits by as much
    leaves the head the true odds to serve from (logit adjustment, arXiv 2007.07314).
    """
    shift_V = jnp.log(text_weights(logit_BTSV.shape[-1], weights))
    return cross_entropy(logit_BTSV + shift_V[None, None, None], target_BTS)


def blur(mel_BTFM: jax.Array, speaks_BT: jax.Array, most: float, key: jax.Array) -> jax.Array:
    """The model's own speech as training feeds it back: x -> sqrt(k) noise + sqrt(1 - k) x, k ~ U(0, most) for each
    example (CALM, arXiv 2509.06926). What it will hear of itself is never quite what it was taught, so that it must not
    lean on it. Silence stays silence, as in the decoder.
    """
    k_share, k_noise = jax.random.split(key)
    share_B111 = most * jax.random.uniform(k_share, (len(mel_BTFM), 1, 1, 1))
    noise_BTFM = jax.random.normal(k_noise, mel_BTFM.shape)
    blurred_BTFM = jnp.sqrt(share_B111) * noise_BTFM + jnp.sqrt(1 - share_B111) * normalise(mel_BTFM)
    return jnp.where(speaks_BT[..., None, None], denormalise(blurred_BTFM), mel_BTFM.astype(jnp.float32))


def mishear(heard_BT: jax.Array, share: float, key: jax.Array) -> jax.Array:
    """The user's words as training feeds them back: in a `share` of the micro-turns what the example before it in the
    batch hears then, mostly nothing, now and then another word. The model's own notes will err too. What nobody wrote
    down is neither replaced nor put in place of anything; a batch of one example has nothing to take.
    """
    other_BT = jnp.roll(heard_BT, 1, axis=0)
    wrong_BT = jax.random.bernoulli(key, share, heard_BT.shape) & (heard_BT != ABSENT) & (other_BT != ABSENT)
    return jnp.where(wrong_BT, other_BT, heard_BT)


@jax.named_scope("flow")
def flow_loss(
    model: InteractionModel,
    condition_BTSD: jax.Array,
    mel_BTFM: jax.Array,
    speaks_BT: jax.Array,
    total: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Flow matching where the model speaks (`speaks_BT` is 1 or 0); where it is silent the decoder needs no head.

    A step takes a random `share` of each example's micro-turns, speaking ones first, and several (noise, time) draws
    of each (MAR, arXiv 2406.11838: the head is small against the trunk). `total` of those taken speak.
    """
    k_pick, k_noise, k_time = jax.random.split(key, 3)
    flow, (B, T, S, _) = model.model.flow, condition_BTSD.shape
    picks = count_picks(flow, T)
    score_BT = speaks_BT + 0.5 * jax.random.uniform(k_pick, (B, T))
    _, pick_Bt = jax.lax.top_k(score_BT, picks)
    take = lambda x: jnp.take_along_axis(x, pick_Bt.reshape(B, picks, *(1,) * (x.ndim - 2)), axis=1)  # noqa: E731

    condition_BtSD = take(condition_BTSD)
    target_BtSX = normalise(take(mel_BTFM)).reshape(B, picks, S, -1)
    noise = jax.random.normal(k_noise, (flow.draws, *target_BtSX.shape))
    time = jax.random.uniform(k_time, (flow.draws, B, picks, S))
    error = matching_loss(
        lambda x, t: model.flow_head.endpoint(condition_BtSD[None], x, t),
        jnp.broadcast_to(target_BtSX, noise.shape),
        noise,
        time,
    )
    return average(jnp.mean(error, axis=(0, 3)), take(speaks_BT), total)


def count_picks(flow: config.Flow, microturns: int) -> int:
    """Micro-turns of an example that a step takes for the flow head."""
    return max(1, round(flow.share * microturns))


def find_judged(batch: Batch, counts: Counts) -> dict[str, jax.Array]:
    """The targets of each accuracy, as bools."""
    text_BTS, valid_BT1 = batch["model_text"], batch["valid"][..., None]
    return {
        "text/word_accuracy": (text_BTS != IDLE) & (text_BTS != HOLD) & valid_BT1,
        "text/idle_accuracy": (text_BTS == IDLE) & valid_BT1,
        "heard/word_accuracy": (batch["heard"] != IDLE) & (counts.heard_BT > 0),
        "seen/word_accuracy": (batch["seen"] != IDLE) & (counts.seen_BNS > 0),
    }


def share(hit: jax.Array, judged: jax.Array, everywhere: jax.Array) -> jax.Array:
    """Of those `judged` in a micro-batch, by how many are on average `everywhere`; NaN where there are none."""
    total = jnp.sum(everywhere) * (len(judged) / len(everywhere))
    return jnp.where(total > 0, jnp.sum(hit & judged) / jnp.maximum(total, 1e-6), jnp.nan)


def right(logit_V: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.argmax(logit_V, axis=-1) == target


def among_likeliest(logit_SV: jax.Array, target_S: jax.Array) -> jax.Array:
    """Whether each of the S words, with the same logits, is among the S likeliest."""
    own_S = jnp.take_along_axis(logit_SV, target_S[..., None], axis=-1)
    likelier_S = jnp.sum(logit_SV > own_S, axis=-1)  # not top_k: XLA:CPU would sort the vocabulary
    return likelier_S < target_S.shape[-1]
