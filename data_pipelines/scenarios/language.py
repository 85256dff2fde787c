"""The closed domain that everybody talks about: about two hundred words, answers that can be checked exactly.

Every sentence is *prefix-free*: no sentence continues another, so that whether somebody has finished can be
heard from the words alone, and a pause inside a sentence is never mistaken for its end by a listener who
understands. Replies have at least four words, with the ones that matter last; none has the content of another kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from data_pipelines.voices import split_of

Rng = np.random.Generator
T = TypeVar("T")

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
ANIMALS = ("tiger", "monkey", "rabbit", "elephant", "horse", "camel", "dolphin", "chicken")
THINGS = ("window", "guitar", "banana", "pencil", "river", "mountain", "coffee", "garden")
WORDS = COLOURS + ANIMALS + THINGS
SPELLED = ("lion", "zebra", "lemon", "robot", "piano", "music", "sugar", "milk", "bird", "fish", "moon", "queen")
NAMES = ("alexander", "barbara", "jessica", "dominic")
FACTS = {"colour": COLOURS, "animal": ANIMALS, "number": NUMBERS[1:11]}
OPENINGS = ("please", "okay", "now", "hey", "so", "well")
FILLERS = ("um", "uh")
CORRECTIONS = ("no", "sorry", "i mean", "no wait")
BACKCHANNELS = ("mhm", "yeah", "okay", "right", "uhhuh", "i see")

LISTS = {
    "the days of the week": "monday tuesday wednesday thursday friday saturday sunday",
    "the months of the year": "january february march april may june july august september october november december",
    "the numbers up to ten": "one two three four five six seven eight nine ten",
    "the numbers up to twelve": "one two three four five six seven eight nine ten eleven twelve",
    "the letters up to j": "a b c d e f g h i j",
}


@dataclass(frozen=True)
class Request:
    """Something said to the model and what it should answer.

    `slots` are (position, alternatives) of words that somebody could get wrong first and correct.
    """

    words: tuple[str, ...]
    reply: str
    content: tuple[str, ...]
    slots: tuple[tuple[int, tuple[str, ...]], ...] = ()
    fact: tuple[str, str] | None = None  # (attribute, value) that this states or asks for

    @property
    def text(self) -> str:
        return " ".join(self.words)


def choose(rng: Rng, options: Sequence):
    return options[int(rng.integers(len(options)))]


def request(template: str, reply: str, content: Sequence[str], **values: tuple[str, Sequence[str]]) -> Request:
    """`template` with {names} filled in; values[name] = (word, its alternatives)."""
    words, slots = [], []
    for part in template.split():
        if part.startswith("{"):
            word, alternatives = values[part[1:-1]]
            slots.append((len(words), tuple(a for a in alternatives if a != word)))
            words.append(word)
        else:
            words.append(part)
    return Request(tuple(words), reply, tuple(content), tuple(slots))


def opened(rng: Rng, said: Request) -> Request:
    """Half of the time with a word in front."""
    if rng.random() < 0.5:
        return said
    slots = tuple((position + 1, alternatives) for position, alternatives in said.slots)
    return replace(said, words=(choose(rng, OPENINGS), *said.words), slots=slots)


PLUS = (
    "what is {a} plus {b}",
    "how much is {a} plus {b}",
    "can you add {a} and {b}",
    "work out {a} plus {b}",
    "give me {a} plus {b}",
    "what do you get from {a} plus {b}",
)
MINUS = (
    "what is {a} minus {b}",
    "how much is {a} minus {b}",
    "can you take {b} from {a}",
    "work out {a} minus {b}",
    "give me {a} minus {b}",
    "what do you get from {a} minus {b}",
)


def arithmetic(rng: Rng) -> Request:
    """The reply says the sum first: what is then worked out is a moment old and always in the same place."""
    low, high = sorted(int(n) for n in rng.integers(0, 11, 2))
    if rng.random() < 0.5:
        a, b, result, sign, templates = high - low, low, high, "plus", PLUS
        if rng.random() < 0.5:
            a, b = b, a
    else:
        a, b, result, sign, templates = high, low, high - low, "minus", MINUS
    digits = NUMBERS[:11]
    values = {"a": (NUMBERS[a], digits), "b": (NUMBERS[b], digits)}
    said = (NUMBERS[a], sign, NUMBERS[b], "is", NUMBERS[result])
    return request(choose(rng, templates), f"so {' '.join(said)}", said, **values)


AFTER = (
    "what comes after {n}",
    "what is the number after {n}",
    "which number comes after {n}",
    "tell me the number after {n}",
    "do you know the number after {n}",
)


def neighbour(rng: Rng) -> Request:
    n = int(rng.integers(1, 12))
    step, word = (1, "after") if rng.random() < 0.5 else (-1, "before")
    template = choose(rng, AFTER).replace("after", "{way}")
    answer = NUMBERS[n + step]
    values = {"n": (NUMBERS[n], NUMBERS[1:12]), "way": (word, ("after", "before"))}
    return request(template, f"the number is {answer}", ["the", "number", "is", answer], **values)


COUNT = (
    "count from {a} to {b}",
    "can you count from {a} to {b}",
    "i want you to count from {a} to {b}",
    "count for me from {a} to {b}",
    "would you count from {a} to {b}",
)


def counting(rng: Rng) -> Request:
    a = int(rng.integers(1, 10))
    b = a + int(rng.integers(2, 4))
    numbers = NUMBERS[a : b + 1]
    values = {"a": (NUMBERS[a], NUMBERS[1:b]), "b": (NUMBERS[b], NUMBERS[a + 1 :])}
    return request(choose(rng, COUNT), "okay here goes " + " ".join(numbers), ["goes", *numbers], **values)


REPEAT = (
    "repeat after me {x} {y}",
    "say the words {x} and {y}",
    "can you say {x} {y}",
    "say after me {x} {y}",
    "repeat the words {x} and {y}",
    "i want to hear {x} and {y}",
)


def repetition(rng: Rng) -> Request:
    x, y = (WORDS[i] for i in rng.choice(len(WORDS), 2, replace=False))
    others = tuple(w for w in WORDS if w not in (x, y))
    values = {"x": (x, others), "y": (y, others)}
    return request(choose(rng, REPEAT), f"you said {x} and {y}", ["said", x, "and", y], **values)


SPELL = (
    "how do you spell {w}",
    "spell the word {w}",
    "can you spell {w}",
    "tell me how to spell {w}",
    "i want you to spell {w}",
)


def spelling(rng: Rng) -> Request:
    word = choose(rng, SPELLED)
    return request(choose(rng, SPELL), f"you spell it {' '.join(word)}", ["it", *word], w=(word, SPELLED))


BELIEVE = ("", "i think ", "remember that ", "you should know ", "i want you to know ")
STATE = tuple(lead + said for lead in BELIEVE for said in ("my favourite {k} is {v}", "the {k} i like best is {v}"))
RECALL = (
    *("what is", "which is", "say", "name", "give me", "i want to hear", "do you know", "do you see"),
    *("can you say", "can you name", "can you remember", "do you remember", "what did i say is"),
    *("tell me", "can you tell me", "would you tell me", "i want you to tell me"),
)
ASK = tuple(f"{lead} {asked}" for lead in RECALL for asked in ("my favourite {k}", "the {k} i like best"))


def statement(rng: Rng) -> Request:
    key = choose(rng, tuple(FACTS))
    value = choose(rng, FACTS[key])
    reply, content = f"okay i will remember {value}", ("remember", value)
    said = request(choose(rng, STATE), reply, content, k=(key, tuple(FACTS)), v=(value, FACTS[key]))
    return replace(said, fact=(key, value))


def question(rng: Rng, key: str, value: str) -> Request:
    content = ("favourite", key, "is", value)
    said = request(choose(rng, ASK), f"your {' '.join(content)}", content, k=(key, tuple(FACTS)))
    return replace(said, fact=(key, value))


RECITE = ("tell me", "can you say", "say", "list", "give me", "i want to hear", "can you tell me", "name")


def recital(rng: Rng) -> Request:
    name = choose(rng, tuple(LISTS))
    items = LISTS[name].split()
    return Request((*choose(rng, RECITE).split(), *name.split()), " ".join(items), tuple(items))


KINDS: tuple[tuple[Callable[[Rng], Request], float], ...] = (
    (arithmetic, 0.28),
    (neighbour, 0.18),
    (counting, 0.12),
    (repetition, 0.30),
    (spelling, 0.12),
)


def any_kind(rng: Rng) -> Request:
    """One of the requests that need no memory."""
    return KINDS[int(rng.choice(len(KINDS), p=[weight for _, weight in KINDS]))][0](rng)


def of_split(split: str, make: Callable[[], tuple[str, T]]) -> T:
    """The first thing made whose sentence belongs to the split."""
    for _ in range(10_000):
        text, thing = make()
        if split_of(text) == split:
            return thing
    raise AssertionError(f"no sentence like {text!r} belongs to {split}")


def draw(rng: Rng, split: str, make: Callable[[Rng], Request] = any_kind) -> Request:
    """A request whose sentence, without the word that may open it, belongs to this split."""

    def attempt() -> tuple[str, Request]:
        said = make(rng)
        return said.text, said

    return opened(rng, of_split(split, attempt))


def draw_filled(rng: Rng, split: str, templates: Sequence[str], **choices: Sequence[str]) -> tuple[str, dict[str, str]]:
    """One of the templates filled with different words from `choices`, and those words."""

    def attempt() -> tuple[str, tuple[str, dict[str, str]]]:
        values: dict[str, str] = {}
        for name, options in choices.items():
            values[name] = choose(rng, [o for o in options if o not in values.values()])
        text = choose(rng, templates).format(**values)
        return text, (text, values)

    return of_split(split, attempt)


def hesitant(rng: Rng, words: Sequence[str], share: float = 0.12) -> str:
    """The words, sometimes with a filler inside."""
    if len(words) > 2 and rng.random() < share:
        position = int(rng.integers(1, len(words)))
        words = [*words[:position], choose(rng, FILLERS), *words[position:]]
    return " ".join(words)


def corrected(rng: Rng, said: Request) -> tuple[str, ...] | None:
    """The words with one got wrong first and put right: "seven no nine". None where nothing can be.

    The last word is never the wrong one: after it the sentence would be complete.
    """
    slots = [slot for slot in said.slots if slot[0] < len(said.words) - 1 and slot[1]]
    if not slots:
        return None
    position, alternatives = choose(rng, slots)
    wrong, marker = choose(rng, alternatives), choose(rng, CORRECTIONS)
    if rng.random() < 0.5:
        wrong, marker = f"{wrong},", f"{marker},"
    return (*said.words[:position], wrong, *marker.split(), *said.words[position:])
