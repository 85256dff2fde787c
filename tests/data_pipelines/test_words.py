"""The tokenizer knows the words of the data, and pace is measured as the weave writes."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from data_pipelines import builder
from data_pipelines.words import Pace, choose_tokenizer, count_unwritable, measure_pace
from launch.data import import_recordings
from tests.data_pipelines.test_recordings import write_manifest, write_recording
from tmljax import config
from tmljax.config import UserError
from tmljax.stream.microturn import CONTROL_TOKENS, Layout, output_seconds
from tmljax.stream.record import Session, Word
from tmljax.stream.text import Tokenizer
from tmljax.stream.weave import weave

RARE = [["Quixotic", [1.0, 1.4], "SPEAKER_MAIN"], ["zeppelins!", [0.2, 0.5], "SPEAKER_OTHER"]]


def experiment(tmp_path, **data) -> config.Experiment:
    """With a prepared dataset of one word."""
    made = config.Experiment(
        stream=config.Stream(video_every=2, vocab_size=400), data=config.Data(root=str(tmp_path), **data)
    )
    home = builder.folder(made)
    home.mkdir(exist_ok=True)
    (home / "summary.json").write_text(json.dumps({"words": {"twelve": 9}}))
    Tokenizer.of_words({"twelve": 9}, 400).save(builder.tokenizer_path(made))
    return made


def test_words_of_recordings_are_whole_tokens(tmp_path):
    path = write_manifest(tmp_path, *(write_recording(tmp_path, f"talk{i}", alignments=RARE) for i in range(3)))
    lengths = {}
    for name, recorded in (("without", ""), ("with", str(path)), ("unused", f"{path}:0")):
        tokenizer = choose_tokenizer(experiment(tmp_path, recordings=recorded))
        lengths[name] = [len(tokenizer.encode_word(w)) for w in ("twelve", "quixotic", "zeppelins")]
    assert lengths["with"] == [1, 1, 1]
    assert lengths["without"] == lengths["unused"]
    assert min(lengths["without"][1:]) > 2


def test_a_tokenizer_of_ones_own(tmp_path):
    own = tmp_path / "own.json"
    Tokenizer.of_words({"quixotic": 5}, 400).save(own)
    assert len(choose_tokenizer(experiment(tmp_path, tokenizer=str(own))).encode_word("quixotic")) == 1
    with pytest.raises(UserError, match=r"nowhere\.json"):
        choose_tokenizer(experiment(tmp_path, tokenizer=str(tmp_path / "nowhere.json")))


def test_an_import_says_when_the_words_come_too_fast(tmp_path):
    fast = [[f"supercalifragilistic{i}", [1 + 0.1 * i, 1.1 + 0.1 * i], "SPEAKER_MAIN"] for i in range(10)]
    said = {}
    for name, words in (("slow", RARE), ("fast", fast)):
        path = write_manifest(tmp_path, write_recording(tmp_path, name, alignments=words))
        made = experiment(tmp_path, recordings=str(path), window=10)
        said[name] = import_recordings(str(path), made, choose_tokenizer(made))
    assert "; 1 words of the model, 1.00 tokens each, 0.0% written late" in said["slow"]
    assert "keep pace" not in said["slow"]
    assert "model_text_slots (now 1) lets it keep pace" in said["fast"]


def test_pace_is_that_of_the_weave():
    tokenizer = Tokenizer.of_words({"one": 5, "two": 5, "twelve": 5}, 400)
    rng = np.random.default_rng(0)
    starts = np.sort(np.round(rng.uniform(1, 20, 40), 2))
    texts = rng.choice(["one", "two", "twelve", "quixotic"], 40)
    words = tuple(Word(str(text), float(start), float(start) + 0.1) for text, start in zip(texts, starts))
    for slots in (1, 2, 4):
        layout = Layout(config.Stream(model_text_slots=slots))
        session = Session("s", "f", 200 * 8, None, np.zeros((0, 80), np.float16), model_words=words)
        text_TS = weave(session, layout, tokenizer)["model_text"]
        written = [
            output_seconds(t)
            for t, row in enumerate(text_TS)
            for token in row
            if token >= len(CONTROL_TOKENS) and tokenizer.starts_word[token]
        ]
        late = sum(moment > start + 1e-6 for moment, start in zip(written, starts, strict=True))
        pace = measure_pace(words, layout, tokenizer)
        assert pace == Pace(40, sum(len(tokenizer.encode_word(w.text)) for w in words), late)
    assert pace.late < 40


def test_words_that_a_tokenizer_cannot_write_are_counted():
    vocabulary = {"[UNK]": 0, "Ġ": 1, "Ġh": 2, "h": 3, "i": 4, "Ġhi": 5}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("Ġ", "h"), ("Ġh", "i")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    assert count_unwritable(["hi", "Hi!", "hello"], Tokenizer(inner)) == 1
    assert count_unwritable(["hi", "Hi!", "hello", "don't"], Tokenizer.of_words({"hi": 3}, 400)) == 0
