"""Vocal tracts made for training differ as people do, and are nobody else's."""

from itertools import cycle
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest

from data_pipelines import tracts
from data_pipelines.voices import Speaker, Voices, draw_speaker

SENTENCE = "wait, repeat after me tiger window"
AROUND = dict(zip(tracts.MADE, cycle(tract for tract in tracts.SPLITS["train"] if tract not in tracts.MADE)))


@pytest.fixture(scope="module")
def files():
    return tracts.voice_files(Path(espeakng_loader.get_data_path()) / "voices" / "!v")


def formants(text: str) -> np.ndarray:
    """Frequency, height and width [9, 3] in % of the accent's."""
    given = np.full((tracts.FORMANTS, 3), 100.0)
    for line in text.splitlines():
        name, *values = line.partition("//")[0].split() or [""]
        if name == "formant":
            given[int(values[0]), : len(values[1:4])] = [float(value) for value in values[1:4]]
    return given


def size(text: str) -> float:
    """By the formants that carry vowels."""
    return float(np.mean(formants(text)[1:4, 0]))


def test_a_varied_file_moves_formants_and_keeps_the_rest():
    lines = ["name somebody", "pitch 100 200 // low", "formant 1 90 80 120 40", "formant 2 110", "tone 400 255"]
    varied = tracts.vary(lines, np.random.default_rng(0))
    assert [line for line in varied if not line.startswith(("pitch", "formant"))] == ["name somebody", "tone 400 255"]
    rows = {line.split()[1]: line.split()[2:] for line in varied if line.startswith("formant")}
    assert sorted(rows) == [str(number) for number in range(tracts.FORMANTS)]
    assert rows["1"][3] == "40"
    (pitch,) = (line.split()[1:] for line in varied if line.startswith("pitch"))
    assert float(pitch[1]) == pytest.approx(2 * float(pitch[0]), abs=1)
    shorter = np.mean([float(row[0]) / given for row, given in zip(rows.values(), [100, 90, 110, *[100] * 6])])
    assert float(pitch[0]) / 100 == pytest.approx(shorter**2, rel=0.25)


def test_made_tracts_are_like_nobody_whom_training_must_not_hear(files):
    others = [tract for split in ("validation", "test") for tract in tracts.SPLITS[split]]
    assert not set(AROUND.values()) & {*others, tracts.MODEL}
    for tract in (*others, tracts.MODEL):
        apart = [
            np.abs(np.log(formants(files[made])[1:4, 0] / formants(files[tract])[1:4, 0])).max() for made in AROUND
        ]
        assert min(apart) > 0


def test_made_tracts_reach_from_a_long_one_to_a_childs(files):
    """Compared with whom they are drawn around; and nobody in the test is smaller or larger than all of them."""
    ratios = [size(files[made]) / size(files[around]) for made, around in AROUND.items()]
    assert min(ratios) < 0.9
    assert max(ratios) > 1.3
    assert 0.2 < np.mean(np.array(ratios) < 1) < 0.5  # log-uniform from .85 to 1.4: a third
    made = [size(files[tract]) for tract in tracts.MADE]
    for tract in (*tracts.SPLITS["test"], *tracts.SPLITS["validation"]):
        assert min(made) < size(files[tract]) < max(made)


def envelope(samples: np.ndarray, hz_K: np.ndarray) -> np.ndarray:
    """Log power [K] in bands a fourth wide around frequencies that are spaced by ratio."""
    power, hz = np.abs(np.fft.rfft(samples)) ** 2, np.fft.rfftfreq(len(samples), 1 / 16000)
    return np.log([power[(hz > centre / 1.12) & (hz < centre * 1.12)].mean() for centre in hz_K])


def test_a_shorter_tract_sounds_higher(files):
    """Of two that are drawn around the same one, and so share its timbre, the spectrum of one is that of the other
    moved by the ratio of their formants, as far as the rest of what was drawn lets it."""
    voices, hz_K, most = Voices(), np.geomspace(200, 6000, 200), 25
    spoken = {made: voices.say(SENTENCE, Speaker("us", made, 190, 50, 50)).samples for made in AROUND}
    envelopes = {made: envelope(samples, hz_K) for made, samples in spoken.items()}
    shorter, moved, last = [], [], {}
    for made, around in AROUND.items():
        if around in last:
            one, other = envelopes[last[around]], envelopes[made]
            alike = [
                np.corrcoef(one[most:-most], other[most + lag : len(hz_K) - most + lag])[0, 1]
                for lag in range(-most, most + 1)
            ]
            shorter.append(np.log(size(files[made]) / size(files[last[around]])))
            moved.append((np.argmax(alike) - most) * np.log(hz_K[1] / hz_K[0]))
        last[around] = made
    assert len(moved) > 50
    assert np.corrcoef(shorter, moved)[0, 1] > 0.5
    assert 0.5 < np.polyfit(shorter, moved, 1)[0] < 1.2


def test_made_tracts_neither_clip_nor_lose_words():
    """What clips, at 2 here, changes the library's gain, and with it what is said next."""
    voices, rng = Voices(), np.random.default_rng(0)
    heard = set()
    while len(heard) < len(tracts.MADE):
        speaker = draw_speaker(rng, "train")
        if speaker.tract not in tracts.MADE:
            continue
        heard.add(speaker.tract)
        for text in (SENTENCE, "what is eight minus three", "alexander where is the yellow garden"):
            said = voices.say(text, speaker)
            assert len(said.words) == len(text.split())
            assert 0.01 < np.abs(said.samples).max() < 1.95
