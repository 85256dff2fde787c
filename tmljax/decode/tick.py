"""The tick: one micro-turn of input in, one of output out. The one function evaluated, exported and served.

In one call: the model's own last word and speech, with what it noted then and what that brings back, and the new input
enter the ring together, text is written token by token, the flow head paints the mel. With one slot each of text and
speech that is one pass through the trunk. Each session of the batch has its own clock, ring row, text, and random
stream.

Legend: N sessions, F mel frames, M mel channels, S slots, K notes, n positions of one pass, D d_model, V vocab,
X values of a slot of mel, or text slots of the window.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tmljax import config
from tmljax.decode.sampling import choose
from tmljax.model import cache
from tmljax.model.interaction import Definition, InteractionModel, Params
from tmljax.model.recall import recall_last
from tmljax.ops.flow import denormalise
from tmljax.stream.dmel import SILENCE_MEL
from tmljax.stream.microturn import ABSENT, FRAMES, IDLE, MEL, NOTES, SEEN_WORDS, is_word

SURE = 0.25  # probability of a note that counts; one of two words for a frame is due half of it all


class TickInput(NamedTuple):
    user_dmel: jax.Array  # uint8 [N, 8, 80]
    user_present: jax.Array  # bool [N]
    video: jax.Array  # uint8 [N, P, 4800]
    video_present: jax.Array  # bool [N]; looked at where the session's clock is a multiple of video_every
    user_text: jax.Array  # int32 [N, user_text_slots]
    reset: jax.Array  # bool [N], a new session begins with this micro-turn
    seed: jax.Array  # uint32 [N], read on reset


class TickState(NamedTuple):
    ring: cache.Ring
    time_N: jax.Array  # int32, the micro-turn to come
    said_NX: jax.Array  # int32, the text of the last `window` micro-turns, the last one's at the end
    mel_NFM: jax.Array  # the model's speech of the last tick, whose last slot is yet to enter the ring
    note_NK: jax.Array  # int32, what it noted then
    seed_N: jax.Array  # uint32


class TickOutput(NamedTuple):
    model_text: jax.Array  # int32 [N, model_text_slots]
    model_mel: jax.Array  # float32 [N, 8, 80], log10 mel
    notes: jax.Array  # int32 [N, K], what it heard, then what it saw; ABSENT where it is not sure
    text_logits: jax.Array  # float32 [N, model_text_slots, V]
    audio_condition: jax.Array  # [N, model_audio slots, D]


class Forced(NamedTuple):
    """What replaces the model's own output: teacher forcing, for tests and for scoring recordings."""

    model_text: jax.Array | None = None  # int32 [N, S]
    model_mel: jax.Array | None = None  # [N, 8, 80]
    notes: jax.Array | None = None  # int32 [N, K]


FREE = Forced()


def init_state(definition: Definition, sessions: int) -> TickState:
    """A state whose sessions are all to be reset by their first tick."""
    model, layout = definition.model, definition.layout
    ring = cache.empty_ring(
        model.layers, sessions, model.window, layout.slots, model.kv_heads, model.head_dim, model.dtype
    )
    mel_NFM = jnp.tile(jnp.asarray(SILENCE_MEL)[None, None], (sessions, FRAMES, 1))
    note_NK = jnp.full((sessions, NOTES), ABSENT, jnp.int32)
    said_NX = jnp.full((sessions, model.window * layout.model_text), IDLE, jnp.int32)
    clock_N = jnp.zeros(sessions, jnp.int32)
    return TickState(ring, clock_N, said_NX, mel_NFM, note_NK, jnp.zeros(sessions, jnp.uint32))


def tick(
    definition: Definition,
    params: Params,
    state: TickState,
    inputs: TickInput,
    sampling: config.Sampling,
    forced: Forced = FREE,
) -> tuple[TickState, TickOutput]:
    """Pure; jit it with `definition` and `sampling` static and `state` donated."""
    model = definition.bind(params)
    state = start_over(state, inputs)
    ring, z_NnD = listen(model, state, inputs)
    note_NK = take_notes(model, z_NnD, inputs.user_present, shows_frame(model, inputs, state.time_N))
    keys_N = jax.vmap(lambda seed, t: jax.random.fold_in(jax.random.key(seed), t))(state.seed_N, state.time_N)

    ring, z_ND, text_NS, logit_NSV = write_text(
        model, ring, z_NnD[:, -1], state.time_N, keys_N, sampling, forced.model_text
    )
    mel_NFM, condition_NSD, ring = speak(model, ring, z_ND, text_NS, state.time_N, keys_N, forced.model_mel)
    fed_back_NK = note_NK if forced.notes is None else forced.notes
    said_NX = jnp.concatenate([state.said_NX[:, text_NS.shape[1] :], text_NS], axis=1)
    state = TickState(ring, state.time_N + 1, said_NX, mel_NFM, fed_back_NK, state.seed_N)
    return state, TickOutput(text_NS, mel_NFM, note_NK, logit_NSV.astype(jnp.float32), condition_NSD)


def start_over(state: TickState, inputs: TickInput) -> TickState:
    reset_N = inputs.reset
    silence_NFM = jnp.broadcast_to(jnp.asarray(SILENCE_MEL)[None, None], state.mel_NFM.shape)
    return TickState(
        cache.forget(state.ring, reset_N),
        jnp.where(reset_N, 0, state.time_N),
        jnp.where(reset_N[:, None], IDLE, state.said_NX),
        jnp.where(reset_N[:, None, None], silence_NFM, state.mel_NFM),
        jnp.where(reset_N[:, None], ABSENT, state.note_NK),
        jnp.where(reset_N, inputs.seed, state.seed_N),
    )


def listen(model: InteractionModel, state: TickState, inputs: TickInput) -> tuple[cache.Ring, jax.Array]:
    """Enters what the tick before left over and all input slots of this one; hidden states [N, n, D], the input's last.

    Left over is the last speech slot and, where no other speech slot took it along, the last text token.
    """
    layout, time_N = model.layout, state.time_N
    left = 1 if layout.model_audio > 1 else 2
    token_N1D = model.embed_model_text(state.said_NX[:, None, -1:], slot=layout.model_text - 1)[:, 0]
    recalled_NK = recall_last(state.note_NK, state.said_NX)
    speech_N1SD = model.embed_model_audio(state.mel_NFM[:, None], state.note_NK[:, None], recalled_NK[:, None])
    speech_N1D = speech_N1SD[:, 0, -1:]
    x_NnD = jnp.concatenate(
        [
            *(token_N1D, speech_N1D)[-left:],
            model.embed_user_audio(inputs.user_dmel[:, None])[:, 0],
            embed_frame(model, inputs, time_N),
            model.embed_user_text(inputs.user_text[:, None])[:, 0],
        ],
        axis=1,
    )
    slot_n = jnp.concatenate([jnp.arange(layout.slots - left, layout.slots), jnp.arange(layout.inputs)])
    time_Nn = time_N[:, None] - jnp.array([1] * left + [0] * layout.inputs)[None]
    present_Nn = jnp.concatenate(
        [
            jnp.repeat((time_N > 0)[:, None], left, axis=1),
            jnp.repeat(inputs.user_present[:, None], layout.user_audio, axis=1),
            jnp.repeat(shows_frame(model, inputs, time_N)[:, None], layout.user_video, axis=1),
            inputs.user_text != ABSENT,
        ],
        axis=1,
    )
    z_NnD, ring = model.trunk.extend(x_NnD, time_Nn, slot_n, present_Nn, state.ring)
    return ring, z_NnD


def embed_frame(model: InteractionModel, inputs: TickInput, time_N: jax.Array) -> jax.Array:
    """[N, S, D]; slots of micro-turns between frames hold nothing, as in training."""
    due_N = time_N % model.layout.stream.video_every == 0
    frame_NSD = model.embed_video(inputs.video[:, None])[:, 0]
    return jnp.where(due_N[:, None, None], frame_NSD, 0)


def shows_frame(model: InteractionModel, inputs: TickInput, time_N: jax.Array) -> jax.Array:
    return inputs.video_present & (time_N % model.layout.stream.video_every == 0)


def take_notes(model: InteractionModel, z_NnD: jax.Array, listens_N: jax.Array, looks_N: jax.Array) -> jax.Array:
    """int32 [N, K] of the hidden states of `listen`: the likeliest word heard, and the likeliest for the frame.

    A head that was never taught is sure of nothing, and notes nothing.
    """
    frame = -1 - model.layout.user_text  # its last slot
    logit_N2V = model.notes_head(z_NnD[:, jnp.array([frame, -1])]).astype(jnp.float32)
    words_NV = jnp.where(is_word(jnp.arange(logit_N2V.shape[2]))[None], jax.nn.softmax(logit_N2V[:, 0]), 0)
    notes = [sure(jax.nn.softmax(logit_N2V[:, 1]), listens_N)]
    for _ in range(SEEN_WORDS):
        notes.append(sure(words_NV, looks_N))
        words_NV = jnp.where(jnp.arange(words_NV.shape[1])[None] == notes[-1][:, None], 0, words_NV)
    return jnp.stack(notes, axis=1)


def sure(probability_NV: jax.Array, counts_N: jax.Array) -> jax.Array:
    """int32 [N], the likeliest token where it is likely enough."""
    likely_N = counts_N & (jnp.max(probability_NV, axis=-1) >= SURE)
    return jnp.where(likely_N, jnp.argmax(probability_NV, axis=-1), ABSENT).astype(jnp.int32)


def write_text(
    model: InteractionModel,
    ring: cache.Ring,
    z_ND: jax.Array,
    time_N: jax.Array,
    keys_N: jax.Array,
    sampling: config.Sampling,
    forced_NS: jax.Array | None,
) -> tuple[cache.Ring, jax.Array, jax.Array, jax.Array]:
    """Token by token: (ring, hidden state that wrote the last one [N, D], tokens [N, S], logits [N, S, V])."""
    tokens, logits = [], []
    for s in range(model.layout.model_text):
        if s:
            x_NSD = model.embed_model_text(tokens[-1][:, None, None], slot=s - 1)[:, 0]
            z_ND, ring = go_on(model, ring, x_NSD, time_N, model.layout.inputs + s - 1)
        logit_NV = model.text_head(z_ND)
        keys = jax.vmap(partial(jax.random.fold_in, data=s))(keys_N)
        token_N = choose(logit_NV, keys, sampling) if forced_NS is None else forced_NS[:, s]
        tokens.append(token_N)
        logits.append(logit_NV)
    return ring, z_ND, jnp.stack(tokens, axis=1), jnp.stack(logits, axis=1)


def speak(
    model: InteractionModel,
    ring: cache.Ring,
    z_ND: jax.Array,
    text_NS: jax.Array,
    time_N: jax.Array,
    keys_N: jax.Array,
    forced_NFM: jax.Array | None,
) -> tuple[jax.Array, jax.Array, cache.Ring]:
    """Mel slot by slot: (mel [N, 8, 80], conditions [N, S, D], ring). Where the text is idle, the mel is silence."""
    layout, flow = model.layout, model.model.flow
    N, frames, first = z_ND.shape[0], layout.stream.frames_per_slot, layout.inputs + layout.model_text
    silent_N = jnp.all(text_NS == IDLE, axis=1)
    token_N = text_NS[:, -1]
    z_ND = model.condition(z_ND, token_N)
    mels, conditions = [], []
    for s in range(layout.model_audio):
        draw = jax.vmap(lambda key, s=s: jax.random.normal(jax.random.fold_in(key, 1000 + s), (frames * MEL,)))
        noise_NX = draw(keys_N) * flow.temperature**0.5
        mel_NFM = denormalise(model.flow_head.sample(z_ND, noise_NX, flow.steps)).reshape(N, frames, MEL)
        mel_NFM = jnp.where(silent_N[:, None, None], jnp.asarray(SILENCE_MEL)[None, None], mel_NFM)
        if forced_NFM is not None:
            mel_NFM = forced_NFM[:, s * frames : (s + 1) * frames].astype(jnp.float32)
        mels.append(mel_NFM)
        conditions.append(z_ND)
        if s + 1 < layout.model_audio:  # the last slot enters with the next tick's input, in one pass
            x_NSD = model.embed_slot_of_speech(mel_NFM, s)
            if s == 0:
                token_N1D = model.embed_model_text(token_N[:, None, None], slot=layout.model_text - 1)[:, 0]
                x_NSD = jnp.concatenate([token_N1D, x_NSD], axis=1)
            z_ND, ring = go_on(model, ring, x_NSD, time_N, first + s + 1 - x_NSD.shape[1])
    return jnp.concatenate(mels, axis=1), jnp.stack(conditions, axis=1), ring


def go_on(
    model: InteractionModel, ring: cache.Ring, x_NSD: jax.Array, time_N: jax.Array, slot: int
) -> tuple[jax.Array, cache.Ring]:
    """Positions of every session, from `slot` on, through the trunk: (hidden state of the last [N, D], ring)."""
    N, S, _ = x_NSD.shape
    time_NS, there_NS = jnp.repeat(time_N[:, None], S, axis=1), jnp.ones((N, S), bool)
    z_NSD, ring = model.trunk.extend(x_NSD, time_NS, slot + jnp.arange(S), there_NS, ring)
    return z_NSD[:, -1], ring
