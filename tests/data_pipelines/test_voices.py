"""Speech is a function of text and speaker, and its word times are where the sound is."""

from itertools import pairwise

import numpy as np
import pytest

from data_pipelines.voices import MODEL, Speaker, Voices, cast, draw_speaker, split_of, utter
from tmljax.stream.microturn import MICROTURN_SAMPLES, SAMPLE_RATE

SENTENCES = ("what is three plus five", "my favourite colour is purple", "wait, repeat after me tiger window")


@pytest.fixture(scope="module")
def voices():
    return Voices()


def crowd(count: int) -> list[Speaker]:
    rng = np.random.default_rng(0)
    return [draw_speaker(rng, split) for split in ("train", "validation", "test") for _ in range(count)]


def test_splits_share_no_voice():
    casts = {split: set(cast(split)) for split in ("train", "validation", "test")}
    assert min(len(people) for people in casts.values()) >= 15
    assert sum(len(people) for people in casts.values()) == len(set.union(*casts.values()))
    tracts = {split: {tract for _, tract in people} for split, people in casts.items()}
    assert sum(map(len, tracts.values())) == len(set.union(*tracts.values()))
    assert MODEL.tract not in set.union(*tracts.values())


def test_a_sentence_belongs_to_one_split_in_every_process():
    assert [split_of(f"sentence {i}") for i in (6, 7, 17)] == ["train", "validation", "test"]
    share = np.mean([split_of(f"sentence {i}") == "train" for i in range(2000)])
    assert 0.76 < share < 0.84


@pytest.mark.parametrize("text", SENTENCES)
def test_words_are_where_the_sound_is(voices, text):
    for speaker in [MODEL, *crowd(4)]:
        said = utter(voices, text, speaker)
        assert [w.text for w in said.words] == text.replace(",", "").split()
        inside = np.zeros(len(said.samples), bool)
        for a, b in pairwise(said.words):
            assert a.end <= b.start + 1e-6
        for word in said.words:
            assert word.end - word.start > 0.03
            inside[round(word.start * SAMPLE_RATE) : round(word.end * SAMPLE_RATE)] = True
        energy = said.samples.astype(np.float64) ** 2
        assert energy[inside].sum() > 0.93 * energy.sum()
        assert said.words[0].start < 0.03
        assert said.words[-1].end > said.seconds - 0.03


def test_nothing_the_model_says_depends_on_what_it_will_say(voices):
    """Bit for bit until the word that differs, which starts on the grid: else it could hear itself say it before."""
    said = [utter(voices, f"the answer is {number}", MODEL) for number in ("twelve", "two", "three plus four")]
    border = round(said[0].words[3].start * SAMPLE_RATE)
    assert border % MICROTURN_SAMPLES == 0
    for other in said[1:]:
        assert other.words[:3] == said[0].words[:3]
        np.testing.assert_array_equal(other.samples[:border], said[0].samples[:border])
        assert not np.array_equal(other.samples[border:][:1600], said[0].samples[border:][:1600])


def test_nothing_is_said_between_the_words_of_a_list(voices):
    said = voices.say("one, two, three", crowd(1)[0])
    for a, b in pairwise(said.words):
        assert b.start - a.end > 0.08
        gap = said.samples[round((a.end + 0.01) * SAMPLE_RATE) : round((b.start - 0.01) * SAMPLE_RATE)]
        assert np.abs(gap).max() < 0.05 * np.abs(said.samples).max()


def test_a_word_sounds_the_same_at_its_time_in_another_sentence(voices):
    """The word times can be trusted to cut by: "tiger" cut out of one sentence resembles itself in another."""
    speaker = Speaker("us", "m1", 190, 50, 0)
    spectra = {}
    for text in ("say tiger and window", "give me tiger and banana", "give me pencil and window"):
        said = voices.say(text, speaker)
        word = said.words[-3]
        cut = said.samples[round(word.start * SAMPLE_RATE) :][: round(0.25 * SAMPLE_RATE)]
        power = np.abs(np.fft.rfft(cut * np.hanning(len(cut)))) ** 2
        spectra[text] = np.log(np.add.reduceat(power[:800], np.arange(0, 800, 25)) + 1e-9)
    tiger, again, pencil = spectra.values()
    assert np.corrcoef(tiger, again)[0, 1] > np.corrcoef(tiger, pencil)[0, 1] + 0.05


def test_history_has_no_influence():
    """espeak-ng keeps state between utterances; our voice files switch off what depends on it."""
    people = crowd(6)
    alone = [Voices().say(SENTENCES[0], speaker).samples for speaker in people]
    for history in ("no no", "a b c d e f g", "thursday"):
        voices = Voices()  # remembers nothing; the library under it is the same
        voices.say(history, draw_speaker(np.random.default_rng(len(history)), "train"))
        for speaker, samples in zip(people[::-1], alone[::-1]):
            np.testing.assert_array_equal(voices.say(SENTENCES[0], speaker).samples, samples)


def test_speakers_differ_and_rate_is_obeyed(voices):
    slow, fast = (voices.say(SENTENCES[0], Speaker("us", "m1", rate, 50, 50)) for rate in (140, 240))
    assert slow.seconds > 1.3 * fast.seconds
    lengths = {voices.say(SENTENCES[0], speaker).seconds for speaker in crowd(3)}
    assert len(lengths) > 5


def test_letters_are_named(voices):
    """As a letter "a" is longer than the article, and is told from it by who says it."""
    letter = utter(voices, "c a t", MODEL).words[1]
    assert letter.text == "a"
    assert letter.end - letter.start > 0.1
