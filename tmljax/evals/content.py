"""Did it say the right thing: the expected words, in order, among the words claimed in the reply window.

Exact, because the domain is closed. Both sides are normalised first: lower case, no punctuation, and number
words as digits, so that "Forty-two." and "42" agree. Other words may stand between the expected ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tmljax.evals import intervals
from tmljax.evals.item import Item, Measurement, Truth, gather
from tmljax.stream.text import spoken_form

UNITS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19,
}  # fmt: skip
TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip


def normalise(words: Iterable[str]) -> list[str]:
    """Tokens to compare: "a Hundred and forty-two!" -> ["142"], "one two" -> ["1", "2"]."""
    tokens = spoken_form(" ".join(words)).split()
    normal: list[str] = []
    while tokens:
        value, used = number(tokens)
        normal.append(str(value) if used else re.sub(r"^0+(?=\d)", "", tokens[0]))
        tokens = tokens[max(used, 1) :]
    return normal


def number(tokens: Sequence[str]) -> tuple[int, int]:
    """The value of the number words at the front, and how many tokens it takes (0: none)."""
    value, used = below_hundred(tokens)
    if tokens[0] == "a" and tokens[1:2] in (["hundred"], ["thousand"]):
        value, used = 1, 1
    if not used:
        return 0, 0
    for name, scale in (("hundred", 100), ("thousand", 1000)):
        if tokens[used : used + 1] == [name] and 0 < value < 1000:
            rest = used + 1 + (tokens[used + 1 : used + 2] == ["and"])
            more, taken = number(tokens[rest:]) if tokens[rest:] else (0, 0)
            fits = taken and more < scale
            return value * scale + (more if fits else 0), rest + taken if fits else used + 1
    return value, used


def below_hundred(tokens: Sequence[str]) -> tuple[int, int]:
    first = tokens[0]
    if first in UNITS:
        return UNITS[first], 1
    if first not in TENS:
        return 0, 0
    ones = UNITS.get(tokens[1], 0) if len(tokens) > 1 else 0
    return (TENS[first] + ones, 2) if 1 <= ones <= 9 else (TENS[first], 1)


def contains(said: Iterable[str], expected: Iterable[str]) -> bool:
    """Every expected word was said, in their order."""
    rest = iter(normalise(said))
    return all(word in rest for word in normalise(expected))


def answered(item: Item, truth: Truth) -> bool:
    begin, end = truth["window"]
    words = intervals.overlapping(item.performance.words, min(begin, truth["after"]), end)
    return contains((w.text for w in words), truth["content"])


def heard_share(item: Item) -> float | None:
    """Of the user's words, the share that the model noted (longest common subsequence); None if it notes nothing
    by construction."""
    if item.performance.heard is None or not item.session.user_words:
        return None
    wanted = normalise(w.text for w in item.session.user_words)
    noted = normalise(w.text for w in item.performance.heard)
    longest = [0] * (len(noted) + 1)
    for word in wanted:
        diagonal = 0
        for j, other in enumerate(noted, 1):
            above = longest[j]
            longest[j] = diagonal + 1 if word == other else max(above, longest[j - 1])
            diagonal = above
    return longest[-1] / len(wanted)


def measure(items: Sequence[Item]) -> list[Measurement]:
    """An empty content demands no word, so such a reply says nothing about content and is left out."""
    due = [(i, t) for i in items for t in i.truths("reply") if t["content"]]
    return [
        *gather("content", "rate", "higher", ((i, answered(i, t)) for i, t in due)),
        *gather("user_words_noted", "share", "higher", ((i, heard_share(i)) for i in items if i.session.user_words)),
    ]
