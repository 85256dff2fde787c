import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tmljax.config import UserError
from tmljax.stream.microturn import ABSENT, CONTROL_TOKENS, HOLD, IDLE
from tmljax.stream.text import Tokenizer, spoken_form

TEXTS = ["what is two plus three", "the answer is five", "don't stop", "is it two"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 400)


def test_control_tokens_come_first(tokenizer):
    inner = json.loads(tokenizer.to_json())
    assert [inner["model"]["vocab"][token] for token in CONTROL_TOKENS] == [ABSENT, IDLE, HOLD]


def test_frequent_words_are_one_token_and_any_text_comes_back(tokenizer):
    for word in ("answer", " answer", "Answer,", "don't"):
        assert len(tokenizer.encode_word(word)) == 1
    for text in ("zebra", "naïve 東京 🎈", "a  b\n\tc", "x=3.14;", "<idle>"):
        if "<" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert min(tokenizer.encode(text), default=3) >= 3, "text must not turn into control tokens"


def test_spoken_form():
    assert spoken_form(" It's—ROCK 'n' roll,  “Twenty-one”!") == "it's rock n roll twenty one"
    assert spoken_form("don’t") == "don't"
    assert spoken_form("...") == ""


def test_bare_punctuation_is_no_word(tokenizer):
    assert tokenizer.encode_word("--") == []


def test_starts_word_marks_the_leading_space(tokenizer):
    first, *rest = tokenizer.encode(" zqx")
    assert tokenizer.starts_word[first]
    assert not any(tokenizer.starts_word[i] for i in rest)
    assert not tokenizer.starts_word[: len(CONTROL_TOKENS)].any()


def test_decode_survives_what_a_model_may_write(tokenizer):
    broken = tokenizer.encode("é")[:1]
    assert "�" in tokenizer.decode(broken)
    assert tokenizer.decode([ABSENT, IDLE, HOLD, 10**6, -4]) == ""
    for ids in np.random.default_rng(0).integers(-5, tokenizer.vocab_size + 50, (50, 12)):
        assert isinstance(tokenizer.decode(ids), str)


def test_cached_ids_cannot_be_spoilt_by_a_caller(tokenizer):
    tokenizer.encode_word("answer").append(7)
    assert len(tokenizer.encode_word("answer")) == 1


def test_training_is_the_same_in_every_process(tokenizer):
    script = (
        "from tmljax.stream.text import Tokenizer; import hashlib\n"
        f"print(hashlib.md5(Tokenizer.train({TEXTS!r}, 400).to_json().encode()).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    }
    assert len(digests) == 1


def test_save_load_pickle(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    for copy in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.vocab_size == tokenizer.vocab_size
        assert copy.encode("what is a yak?") == tokenizer.encode("what is a yak?")


@pytest.mark.parametrize("mark", ["metaspace", "wordpiece"])
def test_a_foreign_tokenizer_moves_up_by_three(mark, tmp_path):
    if mark == "metaspace":
        inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = tokenizers.decoders.Metaspace()
        inner.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=["<unk>"], show_progress=False))
    else:
        inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.decoder = tokenizers.decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=24, special_tokens=["[UNK]"], show_progress=False)
        inner.train_from_iterator(TEXTS, trainer)
    inner.save(str(tmp_path / "theirs.json"))
    tokenizer = Tokenizer.load(tmp_path / "theirs.json")
    assert tokenizer.vocab_size == inner.get_vocab_size() + 3
    ids = tokenizer.encode_word("answer")
    assert ids == [i + 3 for i in inner.encode(" answer").ids]
    assert tokenizer.decode(ids).strip() == "answer"
    assert tokenizer.starts_word[ids].tolist() == [True] + [False] * (len(ids) - 1)
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode_word("answer") == ids


def test_control_tokens_in_other_places_are_refused(tmp_path):
    vocab = {"a": 0, "b": 1} | {token: i + 2 for i, token in enumerate(CONTROL_TOKENS)}
    tokenizers.Tokenizer(models.BPE(vocab, [])).save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"t\.json.*ids \[2, 3, 4\]"):
        Tokenizer.load(tmp_path / "t.json")


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": 3}', "\x00\xff"])
def test_what_is_no_tokenizer_is_refused(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(path)
