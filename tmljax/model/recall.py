"""Recall: a word that is noted brings back what the model said next when it last said that word.

"Okay at tiger green", and with the next tiger that is heard there is green to read beside it. A word seen brings back
what followed it only if the same frame shows that too: after "looking for the red circle" a red circle brings back
circle, and a red square nothing. It is an induction head of order one whose match is exact and not learnt (an n-gram
head, arXiv 2401.12973): what to make of a word that came back, the trunk learns. Only the model's own words count,
since those it knows for sure, and of them those that attention sees: two that follow one another in one stretch of
speech, among the last `window` micro-turns.

It goes by tokens. A word of several, when its first is heard, brings back its own second; and since notes of a frame
hold each word's first, what is seen brings nothing back where its first word has several.

Legend: B batch, N sessions, T micro-turns, K notes of a micro-turn (a word heard, then W words seen), S text slots,
X text slots of several micro-turns, in order, Y some of them.
"""

import jax
import jax.numpy as jnp

from tmljax.stream.microturn import ABSENT, HOLD, is_word


def recall_sequence(note_BTK: jax.Array, text_BTS: jax.Array, window: int) -> jax.Array:
    """int32 [B, T, K]: what each micro-turn's notes bring back, by the text up to and with it; ABSENT for nothing."""
    (B, T, S), turn_T = text_BTS.shape, jnp.arange(text_BTS.shape[1])
    text_BX = text_BTS.reshape(B, T * S)
    before_BX = find_before(text_BX)
    spoken_TX = jnp.arange(T * S)[None] // S <= turn_T[:, None]
    read_BTX = spoken_TX[None] & (before_BX[:, None] // S > turn_T[None, :, None] - window)
    return recall_notes(note_BTK, text_BX, before_BX, read_BTX)


def recall_last(note_NK: jax.Array, text_NX: jax.Array) -> jax.Array:
    """int32 [N, K]: what the notes of now bring back from the text of the last `window` micro-turns."""
    return recall_notes(note_NK[:, None], text_NX, find_before(text_NX), jnp.ones((1, 1, 1), bool))[:, 0]


def find_before(text_BX: jax.Array) -> jax.Array:
    """int32 [B, X]: the slot of the word or of the silence that each slot follows; -1 for what follows nothing."""
    slot_X = jnp.arange(text_BX.shape[1])
    written_BX = jax.lax.cummax(jnp.where(text_BX == HOLD, -1, slot_X[None]), axis=1)
    return jnp.pad(written_BX[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def recall_notes(note_BTK: jax.Array, text_BX: jax.Array, before_BX: jax.Array, read_BTX: jax.Array) -> jax.Array:
    """int32 [B, T, K], by the slots of text that each micro-turn reads: of the words that follow a note, the latest."""
    first_BX = jnp.where(before_BX < 0, ABSENT, take(text_BX, before_BX))
    pair_BTX = read_BTX & (is_word(first_BX) & is_word(text_BX))[:, None]
    heard_BT, *seen = jnp.unstack(note_BTK, axis=2)
    shown_BTX = jnp.any(jnp.stack([text_BX[:, None] == word_BT[..., None] for word_BT in seen]), axis=0)

    def take_latest(word_BT: jax.Array, pair_BTX: jax.Array) -> jax.Array:
        follows_BTX = pair_BTX & (first_BX[:, None] == word_BT[..., None])
        slot_BT = jnp.max(jnp.where(follows_BTX, jnp.arange(text_BX.shape[1])[None, None], -1), axis=2)
        return jnp.where(slot_BT < 0, ABSENT, take(text_BX, slot_BT))

    from_seen = [take_latest(word_BT, pair_BTX & shown_BTX) for word_BT in seen]
    return jnp.stack([take_latest(heard_BT, pair_BTX), *from_seen], axis=2)


def take(text_BX: jax.Array, slot_BY: jax.Array) -> jax.Array:
    return jnp.take_along_axis(text_BX, jnp.maximum(slot_BY, 0), axis=1)
