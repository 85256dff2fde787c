"""Vocal tracts made for training differ as people do, and are nobody else's."""

from pathlib import Path

import espeakng_loader
import numpy as np
import pytest

from data_pipelines import tracts
from data_pipelines.voices import Speaker, Voices

SENTENCE = "wait, repeat after me tiger window"


@pytest.fixture(scope="module")
def files():
    return tracts.voice_files(Path(espeakng_loader.get_data_path()) / "voices" / "!v")


@pytest.fixture(scope="module")
def spoken():
    voices = Voices()
    return [voices.say(SENTENCE, Speaker("us", tract, 190, 50, 50)) for tract in tracts.MADE]


def formants(text: str) -> np.ndarray:
    rows = [line.split()[1:] for line in text.splitlines() if line.startswith("formant")]
    return np.array([[float(value) for value in row[1:4]] for row in sorted(rows, key=lambda row: int(row[0]))])


def test_a_varied_file_keeps_habits_and_moves_formants():
    lines = ["name somebody", "pitch 100 200 // low", "formant 1 90 80 120 40", "formant 2 110", "tone 400 255"]
    varied = tracts.vary(lines, np.random.default_rng(0))
    assert [line for line in varied if not line.startswith(("pitch", "formant"))] == ["name somebody", "tone 400 255"]
    rows = {line.split()[1]: line.split()[2:] for line in varied if line.startswith("formant")}
    assert sorted(rows) == [str(number) for number in range(tracts.FORMANTS)]
    assert rows["1"][3] == "40"
    (pitch,) = (line.split()[1:] for line in varied if line.startswith("pitch"))
    assert float(pitch[1]) == pytest.approx(2 * float(pitch[0]), abs=1)
    size = np.mean([float(row[0]) / given for row, given in zip(rows.values(), [100, 90, 110, *[100] * 6])])
    assert float(pitch[0]) / 100 == pytest.approx(size**2, rel=0.25)


def test_made_tracts_reach_from_a_long_one_to_a_childs(files):
    """And stand for those whom they will hear: nobody in the test is outside, in the formants that carry vowels."""
    made = np.array([formants(files[tract])[1:3, 0].mean() for tract in tracts.MADE])
    assert made.min() < 85
    assert made.max() > 150
    for tract in (*tracts.SPLITS["test"], *tracts.SPLITS["validation"]):
        if len(formants(files[tract])) == tracts.FORMANTS:
            assert made.min() < formants(files[tract])[1:3, 0].mean() < made.max()


def envelope(samples: np.ndarray, hz_K: np.ndarray) -> np.ndarray:
    """Log power [K] in bands a fourth wide around frequencies that are spaced by ratio."""
    power, hz = np.abs(np.fft.rfft(samples)) ** 2, np.fft.rfftfreq(len(samples), 1 / 16000)
    return np.log([power[(hz > centre / 1.12) & (hz < centre * 1.12)].mean() for centre in hz_K])


def test_a_shorter_tract_sounds_higher(files, spoken):
    """Of two that were drawn around the same one, and so share its timbre, the spectrum of one is that of the other
    moved by the ratio of their formants, as far as the rest of what was drawn lets it."""
    hz_K, most = np.geomspace(200, 6000, 200), 25
    sizes = np.log([formants(files[tract])[:4, 0].mean() for tract in tracts.MADE])
    envelopes = [envelope(utterance.samples, hz_K) for utterance in spoken]
    apart = len(tracts.SPLITS["train"]) - len(tracts.MADE)
    moved = []
    for one, other in zip(envelopes, envelopes[apart:]):
        alike = [
            np.corrcoef(one[most:-most], other[most + lag : len(hz_K) - most + lag])[0, 1]
            for lag in range(-most, most + 1)
        ]
        moved.append((np.argmax(alike) - most) * np.log(hz_K[1] / hz_K[0]))
    smaller = sizes[apart:] - sizes[:-apart]
    assert np.corrcoef(smaller, moved)[0, 1] > 0.5
    assert 0.5 < np.polyfit(smaller, moved, 1)[0] < 1.2


def test_made_tracts_neither_clip_nor_lose_words(spoken):
    """What clips changes the library's gain, and with it what is said next."""
    for utterance in spoken:
        assert len(utterance.words) == len(SENTENCE.split())
        assert 0.01 < np.abs(utterance.samples).max() < 1.9
