"""Text as token ids: a small byte-level BPE, or anybody's tokenizer.json behind three control tokens.

Ids 0, 1, 2 are ABSENT, IDLE, HOLD (microturn.py). A tokenizer trained here has them in its vocabulary; in
front of a foreign one they are prepended, and its ids move up by three. Either way the file itself is
plain `tokenizers` JSON.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tmljax import files
from tmljax.config import UserError
from tmljax.stream.microturn import CONTROL_TOKENS

# A word with its leading space and its apostrophes is one piece, so that a frequent word becomes one token.
PIECES = r" ?[\p{L}\p{M}']+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}']+|\s+"
CACHED = 65_536  # texts whose ids are remembered
_SPACE_MARKS = ("Ġ", "Ċ", "ĉ", "▁", " ")  # how byte-level and sentencepiece vocabularies write a leading space
_NOT_SPOKEN = re.compile(r"[^\w']|_")


def spoken_form(text: str) -> str:
    """Lower case without punctuation, apostrophes kept: how spoken words are written everywhere."""
    words = _NOT_SPOKEN.sub(" ", text.lower().replace("’", "'")).split()
    return " ".join(stripped for word in words if (stripped := word.strip("'")))


class Tokenizer:
    """Immutable; encoding is cached by word, because conversations repeat themselves."""

    def __init__(self, inner: tokenizers.Tokenizer):
        self._inner = inner
        ids = [inner.token_to_id(token) for token in CONTROL_TOKENS]
        if ids == [0, 1, 2]:
            self._offset = 0
        elif ids == [None] * 3:
            self._offset = len(CONTROL_TOKENS)
        else:
            names = ", ".join(CONTROL_TOKENS)
            raise UserError(f"the tokenizer has {names} at ids {ids}; they must be 0, 1, 2, or all be absent")
        self._texts: dict[str, list[int]] = {}
        self._words: dict[str, list[int]] = {}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE with at most `vocab_size` ids. Same texts in the same order, same tokenizer."""
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(CONTROL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator((" " + text for text in texts), trainer)  # a text's first word is a word like any
        return cls(inner)

    @classmethod
    def of_words(cls, counts: Mapping[str, int], vocab_size: int) -> Tokenizer:
        """Trained on words, each as often as it was counted."""
        return cls.train((" ".join([word] * count) for word, count in sorted(counts.items())), vocab_size)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Raises UserError when `path` is missing or no tokenizer.json."""
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read the tokenizer {os.fspath(path)}: {e}") from None
        try:
            return cls.from_json(text)
        except UserError as e:
            raise UserError(f"{os.fspath(path)} is {e}; put a whole copy of it there") from None

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as e:  # the binding raises bare Exception
            raise UserError(f"not a tokenizer.json of the `tokenizers` library ({e})") from None
        return cls(inner)

    def to_json(self) -> str:
        return self._inner.to_str(pretty=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        files.write_text(path, self.to_json())

    def __reduce__(self):
        return Tokenizer.from_json, (self.to_json(),)

    @cached_property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size), the control tokens included."""
        vocab = self._inner.get_vocab(with_added_tokens=True)
        return max(vocab.values(), default=-1) + 1 + self._offset

    @cached_property
    def starts_word(self) -> np.ndarray:
        """bool [vocab_size]: does this token begin a new word (carry the space before it)?"""
        vocab = self._inner.get_vocab(with_added_tokens=True)
        starts = np.zeros(self.vocab_size, bool)
        pieces = any(token.startswith("##") for token in vocab)  # WordPiece marks continuations instead
        for token, i in vocab.items():
            starts[i + self._offset] = not token.startswith("##") if pieces else token.startswith(_SPACE_MARKS)
        starts[: len(CONTROL_TOKENS)] = False
        return starts

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as it stands, without control tokens."""
        ids = self._texts.get(text)
        if ids is None:
            ids = [i + self._offset for i in self._inner.encode(text, add_special_tokens=False).ids]
            # Text that spells a control token is text all the same, and may not idle the model.
            ids = [i for i in ids if i >= len(CONTROL_TOKENS)]
            if len(self._texts) < CACHED:
                self._texts[text] = ids
        return list(ids)

    def encode_word(self, word: str) -> list[int]:
        """Ids of one spoken word, with or without its leading space; [] for bare punctuation."""
        ids = self._words.get(word)
        if ids is None:
            spoken = spoken_form(word)
            ids = self.encode(" " + spoken) if spoken else []
            if len(self._words) < CACHED:
                self._words[word] = ids
        return list(ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; control tokens and ids out of range are passed over, broken UTF-8 becomes U+FFFD."""
        known = [int(i) - self._offset for i in ids if len(CONTROL_TOKENS) <= i < self.vocab_size]
        return self._inner.decode(known, skip_special_tokens=True) if known else ""
