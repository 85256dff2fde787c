"""The report: one page that asks nothing of a network, and numbers that programs can read."""

import base64
import html.parser
import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import soundfile

from tests.evals.hand import item, perform, reply, say, session
from tmljax.config import UserError
from tmljax.evals import charts, report, suite
from tmljax.evals.baselines import always_silent
from tmljax.evals.gallery import Gallery
from tmljax.evals.suite import Tally
from tmljax.evals.timeline import seat, timeline_svg

MADE = session(reply(2.0, 10.0, "nine <b>"), user=say("what is nine & <i>", 0.5), name="turn & <taking>")
TALK = say("the answer is <nine>", 2.4)
TRAINING = [
    {"step": s, "loss/total": 9 / s, "loss/text": 3.0 - s / 100, "val/loss/text": 3.1 - s / 100, "rate": 1.0}
    for s in range(1, 60)
]


def write(tmp_path, training=TRAINING, gallery=None):
    model, silent, gallery = Tally("model"), Tally("always silent"), gallery or Gallery()
    told = item(MADE, TALK)
    ticked = type(told)(MADE, perform(TALK, tick_ms=(4.0, 5.0, 30.0)))
    suite.run(model, "turn_taking", [ticked], suite.measures(), gallery.consider)
    suite.run(silent, "turn_taking", [type(told)(MADE, always_silent(MADE))], suite.measures())
    made = report.make(
        "a <title>", [model, silent], facts={"steps": "7"}, config={"a": {"b": 1}}, sessions={"turn_taking": 1},
        training=training, examples=gallery.examples, notes=["a note"],
    )  # fmt: skip
    return [p.read_text(encoding="utf-8") for p in report.write(made, tmp_path)]


class Page(html.parser.HTMLParser):
    """Tags that must be closed are, in order; collects links."""

    VOID = frozenset(("meta", "br", "img", "input", "link"))

    def __init__(self):
        super().__init__()
        self.stack, self.links, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag


def test_page_parses_and_is_self_contained(tmp_path):
    _, page = write(tmp_path)
    parsed = Page()
    parsed.feed(page)
    assert not parsed.stack
    assert parsed.links
    assert all(link.startswith("data:") for link in parsed.links)
    assert not re.search(r"https?://|@import|//cdn|url\(", page)
    assert {"audio", "svg", "table", "script"} <= set(parsed.tags)
    assert "&lt;title&gt;" in page
    assert "<title>a <title>" not in page
    assert "prefers-color-scheme:dark" in page
    assert "a note" in page


def test_sound_plays_in_both_ears(tmp_path):
    _, page = write(tmp_path)
    flac = base64.b64decode(re.search(r"data:audio/flac;base64,([^\"]+)", page)[1])
    samples, rate = soundfile.read(io.BytesIO(flac))
    assert rate == 16_000
    assert samples.shape == (160_000, 2)
    model, user = (np.abs(samples[round(a * 16_000) : round(b * 16_000)]).mean(0) for a, b in ((2.4, 4.0), (0.5, 2.0)))
    assert model[0] > 1.5 * model[1] > 0
    assert user[1] > 1.5 * user[0] > 0


def test_page_keeps_its_size(tmp_path):
    _, page = write(tmp_path, gallery=Gallery(room={"first": 1000, "wrong": 1000}))
    assert "data:audio" not in page


def test_gallery_shows_the_first_and_the_first_that_went_wrong():
    gallery = Gallery()
    for name, words in (("a", TALK), ("b", TALK), ("c", []), ("d", [])):
        made = item(session(reply(2.0, 10.0, "nine"), name=name), words)
        gallery.consider(made, [m for measure in suite.measures() for m in measure([made])])
    assert [e.session for e in gallery.examples] == ["a", "c"]
    states = {c.label: c.state for c in gallery.examples[1].chips}
    assert states["takes the turn: no"] == states["content right: no"] == "bad"


def test_numbers_for_programs(tmp_path):
    tree = json.loads(write(tmp_path)[0])
    row = next(r for r in tree["headline"] if r["name"] == "latency")
    assert row["systems"]["model"]["estimate"]["value"] == pytest.approx(0.4)
    assert row["systems"]["always silent"]["estimate"] is None
    assert row["systems"]["always silent"]["not_applicable"] == 1
    assert tree["values"]["model"]["turn_taking"]["latency"] == [["turn & <taking>", pytest.approx(0.4)]]
    tick = next(m for m in tree["measurements"]["model"] if m["name"] == "tick")
    assert tick["median"]["value"] == 5.0
    assert tree["config"] == {"a": {"b": 1}}


def test_no_training_no_curves(tmp_path):
    _, page = write(tmp_path, training=[])
    assert "How it was trained" not in page


def test_curves_pair_held_out_with_training():
    panels = charts.curves(TRAINING)
    assert len(panels) == 2
    total, text = panels
    assert "(log)" in total  # spans a factor of 59
    assert "(log)" not in text
    assert text.count("<circle") == 59
    assert total.count("<circle") == 0
    for panel in panels:
        ET.fromstring(panel)
    assert not charts.curves([{"step": 1, "loss/total": float("nan")}])


def test_a_flat_or_single_point_curve_draws():
    ET.fromstring(charts.curves([{"step": 1, "loss/text": 2.0}])[0])
    ET.fromstring(charts.curves([{"step": s, "loss/text": 0.0} for s in range(3)])[0])


def test_timeline_is_xml_with_everything_in_place():
    drawn = timeline_svg(MADE, perform(TALK))
    tree = ET.fromstring(drawn)
    texts = {t.text: float(t.get("x")) for t in tree.iter("{http://www.w3.org/2000/svg}text")}
    assert texts["<nine>"] > texts["is"] > texts["answer"] > texts["the"]
    assert (texts["<nine>"] - texts["the"]) / 1.2 == pytest.approx((texts["10"] - texts["9"]), abs=0.5)
    assert "reply: nine <b>" in texts
    assert "prefers-color-scheme" in drawn


def test_words_find_room():
    assert seat([(0, 10), (5, 12), (11, 20), (11, 14)]) == [0, 1, 0, 2]
    assert seat([]) == []


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    made = report.make("t", [Tally("model")], facts={}, config={}, sessions={})
    with pytest.raises(UserError, match="cannot write"):
        report.write(made, tmp_path / "file")
