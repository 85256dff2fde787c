"""Exact content: numbers, order, windows."""

import dataclasses

import pytest

from tests.evals.hand import item, reply, say, session, values
from tmljax.evals import content
from tmljax.evals.content import contains, normalise


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Forty-two!", ["42"]),
        ("forty two", ["42"]),
        ("42", ["42"]),
        ("007", ["7"]),
        ("one two three", ["1", "2", "3"]),
        ("twenty one", ["21"]),
        ("twenty ten", ["20", "10"]),
        ("nineteen", ["19"]),
        ("a hundred and five", ["105"]),
        ("one hundred and five", ["105"]),
        ("two hundred", ["200"]),
        ("a hundred and cats", ["100", "and", "cats"]),
        ("three thousand four hundred and twelve", ["3412"]),
        ("a cat and a dog", ["a", "cat", "and", "a", "dog"]),
        ("C, A, T.", ["c", "a", "t"]),
        ("zero", ["0"]),
        ("", []),
    ],
)
def test_normalise(text, tokens):
    assert normalise([text]) == tokens


def test_contains_in_order():
    said = ["okay", "here", "goes", "seven", "eight", "nine"]
    assert contains(said, ["seven", "eight", "nine"])
    assert contains(said, ["7", "9"])
    assert not contains(said, ["nine", "seven"])
    assert not contains(["seven"], ["seven", "seven"])
    assert contains(["forty", "two"], ["42"])
    assert not contains(["forty", "two"], ["2"])  # forty-two is not two
    assert contains([], [])


def test_only_the_window_counts():
    made = session(reply(2.0, 5.0, "nine"), reply(6.0, 10.0, "two"))
    good = [*say("the answer is nine", 2.4), *say("it is two", 6.4)]
    swapped = [*say("the answer is two", 2.4), *say("it is nine", 6.4)]
    assert values(content.measure([item(made, good)]))["content"] == [1.0, 1.0]
    assert values(content.measure([item(made, swapped)]))["content"] == [0.0, 0.0]
    assert values(content.measure([item(made, say("nine", 5.2))]))["content"] == [0.0, 0.0]  # too late


def test_words_noted():
    made = session(user=say("what is two plus two", 0.5))
    noting = lambda words: dataclasses.replace(item(made, []).performance, heard=tuple(words))  # noqa: E731
    share = lambda p: content.heard_share(dataclasses.replace(item(made, []), performance=p))  # noqa: E731
    assert share(noting(say("what is 2 plus two", 1.0))) == 1.0
    assert share(noting(say("what two plus", 1.0))) == pytest.approx(3 / 5)
    assert share(noting([])) == 0.0
    assert share(item(made, []).performance) is None  # a system that notes nothing by construction
