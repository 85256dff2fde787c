"""Full-Duplex-Bench folders: what its evaluators open is there, of equal length, on one clock."""

import json

import numpy as np
import pytest
import soundfile

from tests.evals.hand import item, perform, reply, say, session
from tmljax.config import UserError
from tmljax.evals.fdb import Writer
from tmljax.evals.item import Item


def load(path):
    return json.loads(path.read_text())


def wav(path):
    samples, rate = soundfile.read(path)
    assert rate == 16_000
    assert samples.ndim == 1
    return samples


@pytest.fixture
def root(tmp_path):
    """One item of each kind."""
    writer = Writer(tmp_path / "fdb")
    turns = session(
        reply(2.0, 5.0, "nine"), reply(6.5, 10.0, "two"), name="turns",
        user=[*say("what is nine", 0.8), *say("and what is two", 5.0, 0.375)],
    )  # fmt: skip
    writer.write(item(turns, [*say("the answer is nine", 2.4), *say("the answer is two", 7.0)]))
    pause = session(
        {"kind": "silence", "window": [1.5, 3.0]}, reply(3.9, 8.0, "four"), family="pause", name="pause",
        user=[*say("what is", 0.5, 0.5), *say("two plus two", 3.0, 0.3)],
    )  # fmt: skip
    writer.write(item(pause, [*say("mm hm", 2.0), *say("the answer is four", 4.4)]))
    broken = session(
        reply(2.0, 4.0, "monday"), {"kind": "yield", "at": 4.0, "end": 5.5}, reply(5.5, 10.0, "nine"),
        family="interruption", name="broken", user=[*say("list the days", 0.6), *say("wait what is nine", 4.0, 0.375)],
    )  # fmt: skip
    talk = [*say("monday tuesday", 2.4, 1.0), *say("the answer is nine", 6.0)]
    writer.write(item(broken, talk, say("monday tuesday wednesday", 2.4, 1.0)))
    story = session(
        {"kind": "backchannel", "windows": [[2.0, 3.2]], "span": [0.5, 8.0]}, reply(8.0, 10.0, "story"),
        family="model_backchannel", name="story", user=say("so there was a cat", 0.5),
    )  # fmt: skip
    writer.write(item(story, say("mhm", 2.4)))
    for name, user in (("aside", say("anna come here", 1.0)), ("noise", [])):
        chatter = session({"kind": "silence", "window": [0.5, 4.0]}, family="no_answer", name=name, user=user)
        writer.write(Item(chatter, perform([]), perform([])))
    writer.finish()
    return tmp_path / "fdb"


def test_every_item_is_whole(root):
    folders = {p.parent for p in root.rglob("input.wav")}
    assert sorted(f.relative_to(root).as_posix() for f in folders) == [
        "v1_0/synthetic_backchannel/0",
        "v1_0/synthetic_pause_handling/pause_0",
        "v1_0/synthetic_turn_taking/turns_0",
        "v1_0/synthetic_turn_taking/turns_1",
        "v1_0/synthetic_user_interruption/broken_0",
        "v1_5/background_speech/noise",
        "v1_5/talking_to_other/aside",
        "v1_5/user_interruption/broken",
    ]
    for folder in folders:
        assert len(wav(folder / "input.wav")) == len(wav(folder / "output.wav")), folder
        chunks = load(folder / "output.json")
        assert chunks["text"] == " ".join(c["text"] for c in chunks["chunks"])
        length = len(wav(folder / "output.wav")) / 16_000
        assert all(0 <= a <= b <= length for c in chunks["chunks"] for a, b in [c["timestamp"]])


def test_turns_are_cut_and_their_clocks_start_anew(root):
    second = root / "v1_0/synthetic_turn_taking/turns_1"
    (mark,) = load(second / "turn_taking.json")
    assert mark["text"] == "[TURN-TAKING]"
    assert mark["timestamp"][0] == pytest.approx(1.5)  # the user ends at 6.5, the cut begins at 5.0
    assert load(second / "output.json")["chunks"][0] == {"text": "the", "timestamp": [2.0, 2.4]}
    assert len(wav(second / "input.wav")) == 5 * 16_000
    sounding = np.flatnonzero(np.abs(wav(second / "output.wav")) > 0.01)
    assert sounding[0] / 16_000 == pytest.approx(2.0, abs=0.03)
    (side,) = load(second / "transcription.json")
    assert [w["text"] for w in side["item"]] == ["and", "what", "is", "two"]


def test_pause_holds_nothing_but_the_users_turn(root):
    folder = root / "v1_0/synthetic_pause_handling/pause_0"
    assert len(wav(folder / "output.wav")) / 16_000 == pytest.approx(3.9)
    assert load(folder / "output.json")["text"] == "mm hm"
    assert load(folder / "pause.json") == [{"text": "[PAUSE]", "timestamp": [1.5, 3.0]}]


def test_interruption(root):
    folder = root / "v1_0/synthetic_user_interruption/broken_0"
    assert load(folder / "interrupt.json") == [
        {"context": "list the days", "interrupt": "wait what is nine", "timestamp": [4.0, 5.5]}
    ]
    assert load(folder / "output.json")["text"] == "the answer is nine"  # cropped where the interruption ends
    assert len(wav(folder / "interrupt.wav")) == 1.5 * 16_000
    assert len(wav(folder / "context.wav")) == pytest.approx(1.8 * 16_000)


def test_pair(root):
    folder = root / "v1_5/user_interruption/broken"
    names = ("input", "clean_input", "output", "clean_output")
    assert len({len(wav(folder / f"{name}.wav")) for name in names}) == 1
    assert load(folder / "clean_input.json")["text"] == "list the days"
    assert load(folder / "input.json")["text"] == "list the days wait what is nine"
    assert load(folder / "clean_output.json")["text"] == "monday tuesday wednesday"
    assert load(folder / "metadata.json") == {
        "context_text": "list the days", "current_turn_text": "wait what is nine", "timestamps": [4.0, 5.5],
    }  # fmt: skip
    event = slice(round(4.1 * 16_000), round(5.4 * 16_000))
    assert np.abs(wav(folder / "input.wav")[event]).max() > 0.05
    assert np.abs(wav(folder / "clean_input.wav")[event]).max() < 1e-3


def test_backchannel_reference(root):
    reference = load(root / "v1_0/icc_gt_distribution.json")
    assert list(reference) == ["0"]
    assert sum(reference["0"]) == pytest.approx(1)
    assert len(wav(root / "v1_0/synthetic_backchannel/0/output.wav")) == 7.5 * 16_000


def test_replaces_its_own_when_it_is_whole_and_nobody_elses(root, tmp_path):
    before = sorted(root.rglob("*"))
    (Writer(root).root / "README.txt").unlink()  # and interrupted, while this very folder was removed
    assert len(before) > 30
    assert sorted(root.rglob("*")) == before
    Writer(root).finish()
    assert [p.name for p in root.iterdir()] == ["README.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["fdb"]
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="did not write"):
        Writer(foreign)
    assert (foreign / "notes.txt").exists()
