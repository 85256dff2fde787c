"""The words of the data: the tokenizer made of them, and how well it keeps pace with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from data_pipelines import builder, manifest
from tmljax.config import Experiment, UserError
from tmljax.stream.microturn import OUTPUT_LAG, Layout, input_microturn
from tmljax.stream.record import Word
from tmljax.stream.text import Tokenizer, spoken_form
from tmljax.stream.weave import place_tokens


def choose_tokenizer(experiment: Experiment) -> Tokenizer:
    """config.data.tokenizer, or one of the words of all data that is mixed in, held-out recordings included.

    Raises UserError for what is wrong in any of the files.
    """
    own, recorded = own_tokenizer(experiment), manifest.recorded(experiment.data.recordings)
    if own is not None:
        return own
    if not recorded:
        return Tokenizer.load(builder.tokenizer_path(experiment))
    counts: Counter[str] = Counter()
    if manifest.parse_manifests(experiment.data.recordings).get(manifest.SYNTHETIC, 1.0):
        counts.update(builder.read_counts(experiment)["words"])
    for path in recorded:
        for one in manifest.read_manifest(path, experiment.stream):
            spoken = (*one.model_words, *(one.user_words or ()))
            counts.update(word for w in spoken for word in spoken_form(w.text).split())
            counts.update(word for w in one.typed for word in w.text.split())
    return Tokenizer.of_words(counts, experiment.stream.vocab_size)


def own_tokenizer(experiment: Experiment) -> Tokenizer | None:
    """That of config.data.tokenizer, None where it names none. Raises UserError where it cannot be used."""
    path = experiment.data.tokenizer
    if not path:
        return None
    tokenizer, most = Tokenizer.load(path), experiment.stream.vocab_size
    if tokenizer.vocab_size > most:
        raise UserError(
            f"config.data.tokenizer={path} has {tokenizer.vocab_size} tokens with the control tokens, more than "
            f"config.stream.vocab_size={most}"
        )
    return tokenizer


class Pace(NamedTuple):
    """Of words to be spoken: how many, their tokens, and how many are written a micro-turn or more after their time."""

    words: int
    tokens: int
    late: int


def measure_pace(words: Iterable[Word], layout: Layout, tokenizer: Tokenizer) -> Pace:
    timed = sorted((w.start, tokenizer.encode_word(w.text)) for w in words)
    timed = [(start, ids) for start, ids in timed if ids]
    _, positions = place_tokens(timed, layout.model_text, OUTPUT_LAG)
    lengths = np.array([len(ids) for _, ids in timed], np.int64)
    ends = np.cumsum(lengths)
    due = np.array([max(input_microturn(start) - OUTPUT_LAG, 0) for start, _ in timed], np.int64)
    late = positions[ends - lengths] // layout.model_text > due
    return Pace(len(timed), len(positions), int(late.sum()))


def count_unwritable(texts: Iterable[str], tokenizer: Tokenizer) -> int:
    """Words that do not come back from their tokens."""
    return sum(tokenizer.decode(tokenizer.encode_word(text)).strip() != spoken_form(text) for text in texts)
