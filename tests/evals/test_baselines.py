"""The systems that need no model land where they must, on hand-made and on rendered conversations."""

import numpy as np
import pytest

from data_pipelines.plan import render_session
from data_pipelines.scenarios import FAMILIES
from data_pipelines.voices import Voices
from tests.evals.hand import reply, say, session
from tmljax.config import Experiment, Stream
from tmljax.evals import headline, suite
from tmljax.evals.baselines import always_silent, always_talking, baselines, oracle, vad_timer
from tmljax.evals.suite import Tally
from tmljax.stream.microturn import Layout
from tmljax.stream.text import Tokenizer

LAYOUT = Layout(Stream())


ASKED = session(
    reply(2.0, 10.0, "nine"), user=say("what is four plus five", 0.0), model=say("the answer is nine", 2.31)
)


@pytest.fixture(scope="module")
def sessions():
    """Two rendered conversations of each family."""
    voices, experiment = Voices(), Experiment()
    return [render_session(experiment, "test", i, voices) for i in range(2 * len(FAMILIES))]


@pytest.fixture(scope="module")
def tokenizer(sessions):
    """Every word one token, as in a dataset's own."""
    texts = [" " + " ".join(w.text for w in (*s.user_words, *s.model_words)) for s in (*sessions, ASKED)]
    return Tokenizer.train(texts, 1024)


def test_silent_and_talking():
    silent, talking = always_silent(ASKED), always_talking(ASKED)
    assert not silent.words
    assert not silent.audio.any()
    assert talking.words[0].start == 0.0
    assert talking.words[-1].end == 10.0
    assert len(silent.audio) == len(talking.audio) == 160_000


def test_vad_timer_waits_speaks_and_stops():
    """The user is silent from 2.0 on and speaks again at 4.0."""
    made = session(user=[*say("what is four plus five", 0.0), *say("wait wait", 4.0)])
    timer = vad_timer(made)
    first, second = timer.words[0], next(w for w in timer.words if w.start > 4.5)
    assert first.start == pytest.approx(2.6, abs=0.03)
    stopped = max(w.end for w in timer.words if w.start < 4.5)
    assert stopped == pytest.approx(4.1, abs=0.03)
    assert second.start == pytest.approx(5.4, abs=0.03)


def test_vad_timer_hears_through_noise():
    made = session(user=say("what is four plus five", 0.0))
    noise = np.random.default_rng(0).normal(0, 400, made.audio.shape).astype(np.int16)  # -38 dB
    noisy = session(user=say("what is four plus five", 0.0))
    noisy.audio[:] += noise
    assert vad_timer(noisy).words[0].start == pytest.approx(vad_timer(made).words[0].start, abs=0.1)


def test_vad_timer_without_a_user():
    assert not vad_timer(session()).words


def test_oracle_speaks_on_the_grid(tokenizer):
    told = oracle(ASKED, LAYOUT, tokenizer)
    assert [w.text for w in told.words] == ["the", "answer", "is", "nine"]
    assert told.words[0].start == pytest.approx(2.2)  # 2.31 s, heard from the cell it lies in
    assert all(abs(w.start / 0.2 - round(w.start / 0.2)) < 1e-6 for w in told.words)
    assert np.array_equal(np.rint(told.audio * 32768), ASKED.audio[:, 0])


@pytest.fixture(scope="module")
def measured(sessions, tokenizer):
    """system -> (measurement, family) -> summary."""
    metrics = suite.measures()
    found = {}
    for name, perform in baselines(LAYOUT, tokenizer):
        tally = Tally(name)
        for family in FAMILIES:
            items = suite.stage([s for s in sessions if s.family == family], lambda ss, p=perform: [p(s) for s in ss])
            suite.run(tally, family, items, metrics)
        found[name] = {(s.name, s.family): s for s in tally.summaries()}
    return found


def rate(summary):
    return summary.mean.value if summary.mean else None


@pytest.mark.parametrize(
    ("system", "turn", "pause", "unasked", "content"),
    [("always silent", 0, 0, 0, 0), ("always talking", 1, 1, 1, 0), ("oracle", 1, 0, 0, 1)],
)
def test_anchors(measured, system, turn, pause, unasked, content):
    found = measured[system]
    assert rate(found["take_over", "turn_taking"]) == turn
    assert rate(found["pause_take_over", "pause"]) == pause
    assert rate(found["false_take_over", "no_answer"]) == unasked
    assert rate(found["content", "all"]) == content


def test_timer_takes_every_turn_late(measured):
    found = measured["VAD timer"]
    assert rate(found["take_over", "turn_taking"]) == 1
    assert found["latency", "turn_taking"].median.value == pytest.approx(0.6, abs=0.15)
    assert rate(found["keeps_floor", "user_backchannel"]) in (0, None)


def test_oracle_reaches_the_ceiling(measured):
    found = measured["oracle"]
    for name, family in (
        ("takes_new_turn", "interruption"), ("keeps_floor", "user_backchannel"), ("verbal_cue", "verbal_cue"),
        ("visual_cue", "visual_cue"), ("backchannel_in_window", "model_backchannel"),
    ):  # fmt: skip
        assert rate(found[name, family]) == 1, name
    assert 0.2 <= found["latency", "turn_taking"].median.value <= 0.4
    assert found["stop_latency", "interruption"].median.value <= 0.6
    assert rate(found["audible_agreement", "all"]) > 0.98
    assert rate(found["audible_agreement_in_speech", "all"]) > 0.95
    assert rate(found["backchannel_take_over", "model_backchannel"]) == 0
    assert rate(found["behaviour_proxy_respond", "interruption"]) == 1
    assert rate(found["behaviour_proxy_resume", "user_backchannel"]) == 1


def test_a_silent_system_is_never_credited(measured):
    """What could not be tried does not apply, in place of passing."""
    found = measured["always silent"]
    for name, family in (("takes_new_turn", "interruption"), ("keeps_floor", "user_backchannel")):
        summary = found[name, family]
        assert summary.n == 0
        assert summary.not_applicable > 0


def test_every_headline_row_is_measured(measured):
    for row in headline.ROWS:
        summary, cell = headline.find(measured["oracle"].values(), row)
        assert summary is not None, row.label
        assert cell.estimate is not None, row.label
