"""Vocal tracts: which there are, who of them speaks in which split, and the voice file that espeak-ng reads for each.

Of espeak-ng's hundred voice files 45 are used. A test and a validation need their own; training has 96 more
beside what is left for it, drawn at random around those: people of any size, from a long adult tract to a child's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

NAMED = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5", "croak", "grandpa", "aunty"),
    *("Alex", "Andrea", "Annie", "Gene", "Hugo", "Jacky", "Lee", "Mario", "Michael", "Mike", "Alicia", "anika"),
    *("belinda", "benjamin", "boris", "david", "ed", "ian", "john", "linda", "paul", "pedro", "quincy", "rob"),
    *("sandro", "steph", "travis", "victor", "zac"),
)
MODEL = "m3"  # the model's own; no user has it
_USERS = [tract for tract in NAMED if tract != MODEL]
_TEST, _VALIDATION = _USERS[3::8], _USERS[7::8]
_TRAIN = [tract for tract in _USERS if tract not in _TEST + _VALIDATION]
MADE = tuple(f"made{i}" for i in range(96))
SPLITS = {"train": (*_TRAIN, *MADE), "validation": tuple(_VALIDATION), "test": tuple(_TEST)}

UNSTEADY = ("flutter", "echo", "roughness")  # which make speech depend on what was said before
FORMANTS = 9
# What espeak-ng takes where a file says nothing: the range of pitch in Hz, and of a formant its frequency, height and
# width in % of the accent's own.
PITCH, FORMANT = (82.0, 118.0), (100.0, 100.0, 100.0)
# A made tract, by factors of the one it is drawn around:
ALL_FORMANTS = (0.85, 1.4)  # frequency of all together, by the length of the tract: from a tall adult to a child
PITCH_BESIDE = (0.85, 1.2)  # pitch, beside what the length asks for
ONE_FORMANT = (0.92, 1.08)  # frequency of each
HEIGHT = (0.4, 0.9)  # below 1, since formants that come to lie together add up, and espeak-ng clips
WIDTH = (0.75, 1.5)


def voice_files(source: Path) -> dict[str, str]:
    """tract -> voice file, from espeak-ng's own in the folder `source`."""
    files = {tract: steady((source / tract).read_text().splitlines()) for tract in NAMED}
    for i, (tract, around) in enumerate(zip(MADE, itertools.cycle(_TRAIN))):
        files[tract] = vary(files[around], np.random.default_rng(i))
    return {tract: "\n".join([*lines, ""]) for tract, lines in files.items()}


def steady(lines: Sequence[str]) -> list[str]:
    """A voice file whose speech follows from the text alone."""
    return [*(line for line in lines if not line.startswith(UNSTEADY)), "flutter 0", "echo 0 0", "roughness 0"]


def vary(lines: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The file of somebody else who speaks like this one: vocal tract length perturbation (Jaitly & Hinton 2013), and
    more than of length, before the speech is made rather than after. Offsets in Hz that a file gives its formants stay.
    """
    pitch, formants, kept = list(PITCH), [list(FORMANT) for _ in range(FORMANTS)], []
    for line in lines:
        name, *values = line.partition("//")[0].split() or [""]
        if name == "pitch":
            pitch = [float(value) for value in values[:2]]
        elif name == "formant":
            given = [float(value) for value in values[1:]]
            formants[int(values[0])] = given + formants[int(values[0])][len(given) :]
        else:
            kept.append(line)
    shorter = float(np.exp(rng.uniform(*np.log(ALL_FORMANTS))))
    higher = shorter**2 * rng.uniform(*PITCH_BESIDE)  # a child is higher by more than its tract is shorter
    made = [f"pitch {round(higher * pitch[0])} {round(higher * pitch[1])}"]
    for number, (hz, height, width, *offset) in enumerate(formants):
        factors = shorter * rng.uniform(*ONE_FORMANT), rng.uniform(*HEIGHT), rng.uniform(*WIDTH)
        values = [round(value * factor) for value, factor in zip((hz, height, width), factors)]
        made.append(" ".join(map(str, ("formant", number, *values, *map(round, offset)))))
    return [*made, *kept]
