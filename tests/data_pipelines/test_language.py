"""The closed domain: answers are right, sentences are prefix-free, replies survive the take-over rule."""

import re
from collections import defaultdict
from itertools import permutations

import numpy as np
import pytest

from data_pipelines.scenarios import language
from data_pipelines.scenarios.language import FACTS, NUMBERS, Request
from tmljax.evals.content import contains

VALUE = {word: value for value, word in enumerate(NUMBERS)}


def many(make, count=1500, seed=0) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [language.opened(rng, make(rng)) for _ in range(count)]


def everything() -> list[Request]:
    makes = [make for make, _ in language.KINDS] + [language.statement, language.recital]
    said = [request for make in makes for request in many(make)]
    for key, values in FACTS.items():
        said += many(lambda rng, key=key, values=values: language.question(rng, key, values[0]), 600)
    return said


@pytest.fixture(scope="module")
def requests():
    return everything()


def numbers_in(text: str) -> list[int]:
    return [VALUE[word] for word in text.split() if word in VALUE]


def test_arithmetic_is_right():
    for said in many(language.arithmetic):
        a, b = numbers_in(said.text)
        wanted = a + b if "plus" in said.words or "add" in said.words else b - a if "take" in said.words else a - b
        first, sign, second, equals, answer = said.content
        assert (equals, answer) == ("is", NUMBERS[wanted])
        assert wanted == VALUE[first] + VALUE[second] * {"plus": 1, "minus": -1}[sign]
        assert sorted((VALUE[first], VALUE[second])) == sorted((a, b))
        assert 0 <= wanted <= 10


def test_neighbours_and_counting_are_right():
    for said in many(language.neighbour):
        (n,) = numbers_in(said.text)
        assert VALUE[said.content[-1]] == (n + 1 if "after" in said.words else n - 1)
    for said in many(language.counting):
        a, b = numbers_in(said.text)
        assert [VALUE[word] for word in said.content[1:]] == list(range(a, b + 1))


def test_spelling_and_repetition_say_what_was_asked():
    for said in many(language.spelling):
        assert "".join(said.content[1:]) in said.words
    for said in many(language.repetition):
        assert [w for w in said.words if w in language.WORDS][-2:] == list(said.content[1::2])


def test_no_sentence_is_the_beginning_of_another(requests):
    sentences = {said.words for said in requests}
    beginnings = defaultdict(set)
    for words in sentences:
        for length in range(1, len(words)):
            beginnings[words[:length]].add(words)
    complete = [(words, beginnings[words]) for words in sentences if words in beginnings]
    assert not complete, complete[:3]


def test_every_reply_is_a_turn_and_ends_with_its_content(requests):
    for said in requests:
        words = said.reply.replace(",", "").split()
        assert len(words) >= 4
        assert words[-len(said.content) :] == list(said.content)


def test_no_reply_has_the_content_of_another_kind():
    makes = [make for make, _ in language.KINDS] + [language.statement, language.recital]
    kinds = [many(make, 60) for make in makes]
    kinds.append([r for key in FACTS for r in many(lambda g, k=key: language.question(g, k, FACTS[k][0]), 20)])
    for kind, others in permutations(kinds, 2):
        assert not any(contains(a.reply.split(), b.content) for a in kind for b in others)


def test_content_cannot_be_guessed_from_the_question_kind():
    for make, _ in language.KINDS:
        answers = [said.content[-1:] if "is" in said.content else said.content for said in many(make, 600)]
        commonest = max(answers.count(answer) for answer in set(answers))
        assert commonest < 0.2 * len(answers)


def test_a_correction_never_follows_a_complete_sentence(requests):
    rng = np.random.default_rng(1)
    complete = {said.words for said in requests}
    corrected = 0
    for said in requests:
        words = language.corrected(rng, said)
        if words is None:
            continue
        corrected += 1
        plain = tuple(word.strip(",") for word in words)
        assert plain[-1] == said.words[-1]
        for length in range(1, len(plain)):
            assert plain[:length] not in complete
        removed = len(plain) - len(said.words)
        assert removed >= 2  # the wrong word and a marker
        assert any(plain[:i] + plain[i + removed :] == said.words for i in range(len(said.words)))
    assert corrected > len(requests) / 3


def test_splits_share_no_sentence_but_share_contents():
    seen = {split: set() for split in ("train", "validation", "test")}
    contents, ends = ({split: set() for split in seen} for _ in range(2))
    for split in seen:
        rng = np.random.default_rng(3)
        for _ in range(8000 if split == "train" else 1500):
            said = language.draw(rng, split)
            seen[split].add(said.text)
            contents[split].add(said.content)
            ends[split].add(said.content[-1])
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    sums = {content for content in contents["test"] if content[-2] == "is"}
    assert sums <= contents["train"]  # what has to be said is learnt from other sentences
    assert ends["test"] <= ends["train"]
    assert len(seen["test"]) > 150


def test_every_kind_exists_in_every_split():
    for split in ("train", "validation", "test"):
        rng = np.random.default_rng(0)
        for key, values in FACTS.items():
            asked = {
                language.draw(rng, split, lambda r, k=key, v=values[0]: language.question(r, k, v)).text
                for _ in range(300)
            }
            assert len(asked) >= 3, (split, key, asked)
        assert len({language.draw(rng, split, language.recital).text for _ in range(300)}) >= 10


def test_the_vocabulary_is_small(requests):
    words = {word for said in requests for word in said.words}
    assert 100 < len(words) < 200
    assert all(re.fullmatch(r"[a-z]+", word) for word in words)
