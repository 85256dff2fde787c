"""Cues: the right words in time, else nothing."""

from tests.evals.hand import item, say, session, values
from tmljax.evals import cues


def cue(modality, window, content):
    return {"kind": "cue", "modality": modality, "window": window, "content": content.split()}


def test_verbal_cue():
    made = session(cue("verbal", [4.0, 5.2], "green"), family="verbal_cue")
    met = lambda words: values(cues.measure([item(made, words)]))["verbal_cue"]  # noqa: E731
    assert met(say("green", 4.4)) == [1.0]
    assert met(say("okay green", 4.0)) == [1.0]
    assert met(say("blue", 4.4)) == [0.0]
    assert met(say("green", 5.4)) == [0.0]
    assert met(say("green", 3.6)) == [0.0]
    assert met([]) == [0.0]


def test_visual_cue_must_begin_inside_and_may_finish():
    made = session(cue("visual", [4.0, 6.0], "red circle"), family="visual_cue")
    met = lambda words: values(cues.measure([item(made, words)]))["visual_cue"]  # noqa: E731
    assert met(say("i see the red circle now", 5.0)) == [1.0]
    assert met(say("i see the red circle now", 6.4)) == [0.0]  # begins too late
    assert met(say("i see the red circle now", 2.9)) == [0.0]  # began before, though its words fall inside
    assert met([*say("i see", 5.5), *say("red circle", 7.0)]) == [0.0]  # finished in a second utterance
    assert met(say("i see the circle red", 5.0)) == [0.0]


def test_delay_and_luck():
    made = session(cue("verbal", [4.0, 5.2], "green"), cue("verbal", [7.0, 8.2], "green"), family="verbal_cue")
    found = values(cues.measure([item(made, [*say("green", 3.0), *say("green", 4.4)])]))
    assert found["verbal_cue"] == [1.0, 0.0]
    assert [v if v is None else round(v, 3) for v in found["verbal_cue_delay"]] == [0.4, None]
    assert found["verbal_cue_stray"] == [1.0, 0.0]


def test_what_began_in_a_window_does_not_stray_what_begins_between_two_does():
    windows = [4.0, 6.0], [9.0, 11.0]
    made = session(*(cue("visual", w, "red circle") for w in windows), family="visual_cue")
    early = lambda words: values(cues.measure([item(made, words)]))["visual_cue_stray"]  # noqa: E731
    assert early(say("the red circle came", 5.9)) == [0.0, 0.0]
    assert early(say("the red circle came", 6.4)) == [0.0, 1.0]


def test_what_is_said_in_reply_to_the_order_is_no_early_answer():
    reply = {"kind": "reply", "after": 1.0, "window": [1.0, 3.0], "content": []}
    made = session(reply, cue("verbal", [4.0, 5.2], "green"), family="verbal_cue")
    early = lambda words: values(cues.measure([item(made, words)]))["verbal_cue_stray"]  # noqa: E731
    assert early(say("okay at tiger green", 1.4)) == [0.0]
    assert early(say("green", 3.4)) == [1.0]
