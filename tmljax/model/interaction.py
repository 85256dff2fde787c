"""The interaction model: all streams of a micro-turn in one causal sequence.

A position predicts the next one's content. So the last input slot predicts the first text token, that token's slot
the next. The mel that follows the text is painted from what predicted its last token and from that token itself, so
that a tick need not pass it through the trunk first. What the model notes of its input on the way, the user's words and
what a frame shows, it reads back in the micro-turn's last slot, with what its notes bring back (`recall.py`).

Legend: B batch, T micro-turns, S slots, R slots that are not video, or words read back, N frames, P positions,
D d_model, V vocab, K notes of a micro-turn, W words for a frame, X values of a slot of mel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tmljax import config
from tmljax.model.block import MoeReport
from tmljax.model.embed import DmelEmbed, PatchEmbed
from tmljax.model.heads import FlowHead, TextHead
from tmljax.model.params import constant, dense
from tmljax.model.recall import recall_sequence
from tmljax.model.trunk import Trunk
from tmljax.sharding import look_up, spread
from tmljax.stream.dmel import BIN_WIDTH, LOG_LOW
from tmljax.stream.microturn import ABSENT, BINS, SEEN_WORDS, Layout, is_word

HEARD, SEEN, RECALLED_HEARD, RECALLED_SEEN = range(SENSES := 4)  # rows of `senses`

Params = dict[str, Any]
Batch = dict[str, jax.Array]


class Outputs(NamedTuple):
    text_BTSV: jax.Array  # logits of model_text
    condition_BTSD: jax.Array  # of the flow head, per model_audio slot
    heard_BTV: jax.Array  # logits of the notes: the user's words
    seen_BNV: jax.Array  # and the words for what each frame shows
    moe: MoeReport  # stacked over layers


class InteractionModel(nnx.Module):
    def __init__(self, stream: config.Stream, model: config.Model, rngs: nnx.Rngs):
        self.layout, self.model = Layout(stream), model
        D = model.d_model
        self.tokens = dense(rngs, (stream.vocab_size, D), ("vocab", "embed"), fan_in=4)
        self.slots = dense(rngs, (self.layout.slots, D), ("small", "embed"), fan_in=4)
        # These tell apart how a word came: heard, seen, or brought back by either; at first it is the same word, to
        # which weight decay draws it back: scales are 1 + sense_scales.
        self.senses = dense(rngs, (SENSES, D), ("small", "embed"), fan_in=4)
        self.sense_scales = constant((SENSES, D), ("small", "embed"))
        self.user_dmel = DmelEmbed(self.layout, D, rngs)
        self.model_dmel = DmelEmbed(self.layout, D, rngs)
        self.patches = PatchEmbed(self.layout, model, rngs)
        self.trunk = Trunk(model, rngs)
        self.text_head = TextHead(D, stream.vocab_size, rngs)
        self.notes_head = TextHead(D, stream.vocab_size, rngs)
        self.flow_head = FlowHead(self.layout, model, rngs)

    # Embeddings of each stream, [B, T, slots of the stream, D], slot identity included.

    def embed_user_audio(self, dmel_BTFM: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        return self._place(self.user_dmel(dmel_BTFM, mesh), 0)

    def embed_video(self, patch_BNPX: jax.Array) -> jax.Array:
        return self._place(self.patches(patch_BNPX), self.layout.user_audio)

    def embed_user_text(self, token_BTS: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        return self._place(look_up(self.tokens[...], token_BTS, mesh), self.layout.user_audio + self.layout.user_video)

    def embed_model_text(self, token_BTS: jax.Array, slot: int = 0, mesh: Mesh | None = None) -> jax.Array:
        return self._place(look_up(self.tokens[...], token_BTS, mesh), self.layout.inputs + slot)

    def embed_model_audio(
        self, mel_BTFM: jax.Array, note_BTK: jax.Array, recalled_BTK: jax.Array, mesh: Mesh | None = None
    ) -> jax.Array:
        """The notes (`notes_of`), and what they bring back, are read with the last slot."""
        x_BTSD = self.model_dmel(quantise(mel_BTFM), mesh)
        last_BT1D = x_BTSD[:, :, -1:] + self.embed_notes(note_BTK, recalled_BTK, mesh)[:, :, None]
        x_BTSD = jnp.concatenate([x_BTSD[:, :, :-1], last_BT1D], axis=2)
        return self._place(x_BTSD, self.layout.inputs + self.layout.model_text)

    def embed_notes(self, note_BTK: jax.Array, recalled_BTK: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        word_BTR = jnp.concatenate([note_BTK, recalled_BTK], axis=2)
        sense_R = np.array([HEARD] + [SEEN] * SEEN_WORDS + [RECALLED_HEARD] + [RECALLED_SEEN] * SEEN_WORDS)
        sense_RD, scale_RD = self.senses[...][sense_R], 1 + self.sense_scales[...][sense_R]
        x_BTRD = look_up(self.tokens[...], word_BTR, mesh) * scale_RD[None, None] + sense_RD[None, None]
        return jnp.sum(jnp.where(is_word(word_BTR)[..., None], x_BTRD, 0), axis=2)

    def embed_slot_of_speech(self, mel_NfM: jax.Array, slot: int) -> jax.Array:
        """One model_audio slot alone, not the last, [N, 1, D]; `mel_NfM` has the frames of that slot."""
        x_NSD = self.model_dmel(quantise(mel_NfM[:, None]))[:, 0]
        first = self.layout.inputs + self.layout.model_text + slot
        return (x_NSD + self.slots[first][None, None]).astype(self.model.dtype)

    def condition(self, z_D: jax.Array, token: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """Of the flow head for a micro-turn's first speech slot: the state that predicted the last text token, and
        that token."""
        return z_D + look_up(self.tokens[...], token, mesh).astype(z_D.dtype)

    def _place(self, x_BTSD: jax.Array, first: int) -> jax.Array:
        slot_SD = self.slots[first : first + x_BTSD.shape[2]]
        return (x_BTSD + slot_SD[None, None]).astype(self.model.dtype)

    @jax.named_scope("embed")
    def weave(self, batch: Batch, mesh: Mesh | None = None) -> tuple[jax.Array, jax.Array]:
        """All streams in the order of `Layout.positions`: ([B, P, D], present bool [B, P])."""
        recalled_BTK = spread(recalled_of(batch, self.model.window), mesh)  # it looks over all that a mesh may split
        batch = spread(batch, mesh)
        B, T = batch["user_present"].shape
        streams = (
            self.embed_user_audio(batch["user_dmel"], mesh),
            self.embed_user_text(batch["user_text"], mesh),
            self.embed_model_text(batch["model_text"], mesh=mesh),
            self.embed_model_audio(batch["model_mel"], notes_of(batch), recalled_BTK, mesh),
        )
        present = (
            jnp.repeat(batch["user_present"][..., None], self.layout.user_audio, axis=2),
            batch["user_text"] != ABSENT,
            jnp.ones((B, T, self.layout.outputs), bool),
        )
        seen_BNS = jnp.repeat(batch["video_present"][..., None], self.layout.user_video, axis=2)
        x_BPD = self._put_frames(jnp.concatenate(streams, axis=2), self.embed_video(batch["video"]))
        return x_BPD, self._put_frames(jnp.concatenate(present, axis=2), seen_BNS)

    # Frames come every few micro-turns: F of them to a frame, R slots beside those of video.

    def _put_frames(self, rest_BTR: jax.Array, frame_BNS: jax.Array) -> jax.Array:
        """Streams without video [B, T, R, ...] and frames [B, N, S, ...] as one sequence [B, P, ...]."""
        (B, N), F = frame_BNS.shape[:2], self.layout.stream.video_every
        rest_BNX = rest_BTR.reshape(B, N, F * rest_BTR.shape[2], *rest_BTR.shape[3:])
        audio = self.layout.user_audio
        whole_BNX = jnp.concatenate([rest_BNX[:, :, :audio], frame_BNS, rest_BNX[:, :, audio:]], axis=2)
        return whole_BNX.reshape(B, N * whole_BNX.shape[2], *whole_BNX.shape[3:])

    def _take_frames(self, x_BPD: jax.Array, turns: int) -> tuple[jax.Array, jax.Array]:
        """[B, P, D] -> [B, T, R, D] without the positions of video, and [B, N, S, D] of them alone."""
        (B, _, D), N, audio = x_BPD.shape, turns // self.layout.stream.video_every, self.layout.user_audio
        x_BNXD = x_BPD.reshape(B, N, -1, D)
        end = audio + self.layout.user_video
        rest_BNXD = jnp.concatenate([x_BNXD[:, :, :audio], x_BNXD[:, :, end:]], axis=2)
        return rest_BNXD.reshape(B, turns, -1, D), x_BNXD[:, :, audio:end]

    def __call__(self, batch: Batch, mesh: Mesh | None = None) -> Outputs:
        """The training forward; `batch` as the loader makes it (tmljax/stream/weave.py)."""
        turns = batch["user_present"].shape[1]
        x_BPD, present_BP = self.weave(batch, mesh)
        place_P2 = self.layout.positions(turns)
        turn_P, slot_P = place_P2.T
        counts_BP = (present_BP | (slot_P == self.layout.inputs - 1)[None]) & batch["valid"][:, turn_P]
        z_BPD, moe = self.trunk(x_BPD, batch["start"], place_P2, present_BP, mesh, counts_BP)
        z_BTRD, z_BNSD = self._take_frames(z_BPD, turns)
        first, texts = self.layout.inputs - self.layout.user_video, self.layout.model_text
        text_BTSV = self.text_head(z_BTRD[:, :, first - 1 : first + texts - 1])
        token_BT = batch["model_text"][:, :, -1]
        condition_BT1D = self.condition(z_BTRD[:, :, first + texts - 2], token_BT, mesh)[:, :, None]
        condition_BTSD = jnp.concatenate([condition_BT1D, z_BTRD[:, :, first + texts : -1]], axis=2)
        heard_BTV, seen_BNV = self.notes_head(z_BTRD[:, :, first - 1]), self.notes_head(z_BNSD[:, :, -1])
        return Outputs(text_BTSV, condition_BTSD, heard_BTV, seen_BNV, moe)


def notes_of(batch: Batch) -> jax.Array:
    """int32 [B, T, K]: what there was to note in each micro-turn; of a frame, in the micro-turn that it came with."""
    heard_BT = jnp.where(batch["user_present"], batch["heard"], ABSENT)
    seen_BNW = jnp.where(batch["video_present"][..., None], batch["seen"], ABSENT)
    (B, T), N = heard_BT.shape, seen_BNW.shape[1]
    between = ((0, 0), (0, 0), (0, T // N - 1), (0, 0))
    seen_BTW = jnp.pad(seen_BNW[:, :, None], between, constant_values=ABSENT).reshape(B, T, SEEN_WORDS)
    return jnp.concatenate([heard_BT[..., None], seen_BTW], axis=2)


def recalled_of(batch: Batch, window: int) -> jax.Array:
    """int32 [B, T, K]: what the notes of each micro-turn bring back."""
    return recall_sequence(notes_of(batch), batch["model_text"], window)


def quantise(mel: jax.Array) -> jax.Array:
    """dMel bins of a log10 mel, as tmljax/stream/dmel.py has them."""
    return jnp.clip(jnp.round((mel.astype(jnp.float32) - LOG_LOW) / BIN_WIDTH), 0, BINS - 1).astype(jnp.uint8)


@dataclass(frozen=True)
class Definition:
    """The model without its parameters: what crosses `jit` is a plain tree of arrays."""

    stream: config.Stream
    model: config.Model

    @property
    def layout(self) -> Layout:
        return Layout(self.stream)

    def _build(self, key: jax.Array) -> InteractionModel:
        return InteractionModel(self.stream, self.model, nnx.Rngs(params=key))

    def _abstract_model(self) -> tuple[Any, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: self._build(jax.random.key(0))))

    def init(self, key: jax.Array) -> Params:
        """Nested dict of float32 arrays; blocks are stacked over layers."""
        return nnx.to_pure_dict(nnx.state(self._build(key)))

    def abstract(self) -> Params:
        return jax.eval_shape(self.init, jax.random.key(0))

    def held(self) -> Params:
        """`abstract` as a tick holds it: matrices (`params.matrix`) in the dtype of the activations."""

        def shape(variable: nnx.Variable) -> jax.ShapeDtypeStruct:
            leaf = variable.get_value()
            dtype = self.model.dtype if "in_activations_dtype" in variable.get_metadata() else leaf.dtype
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))

        return self._map_variables(shape)

    def axes(self) -> Params:
        """The same tree, of tuples that name each dim (`tmljax.sharding.PLACEMENT`)."""

        def names(variable: nnx.Variable) -> tuple[str, ...]:
            own, ndim = variable.get_metadata()["axes"], len(variable.get_value().shape)
            return ("layers",) * (ndim - len(own)) + own

        return self._map_variables(names)

    def _map_variables(self, describe: Callable[[nnx.Variable], Any]) -> Params:
        _, state = self._abstract_model()
        return nnx.traversals.unflatten_mapping({path: describe(v) for path, v in nnx.to_flat_state(state)})

    def bind(self, params: Params) -> InteractionModel:
        graph, state = self._abstract_model()
        return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params)))


def count(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
