"""Stereo recordings become the same record as synthetic sessions, and every mistake in them is named."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from data_pipelines import manifest, recordings
from tmljax import config
from tmljax.config import UserError
from tmljax.stream import dmel, weave
from tmljax.stream.microturn import HOLD, IDLE, MICROTURN_SAMPLES, Layout
from tmljax.stream.record import Session, Word
from tmljax.stream.text import Tokenizer

EXPERIMENT = config.Experiment(stream=config.Stream(video_every=2), data=config.Data(window=10))
ALIGNMENTS = [
    ["hello", [1.0, 1.4], "SPEAKER_MAIN"],
    ["there", [1.45, 1.9], "SPEAKER_MAIN"],
    ["hi", [0.2, 0.5], "SPEAKER_OTHER"],
]


def tone(hertz: float, seconds: float, rate: int) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write_recording(
    folder: Path,
    name: str = "talk",
    seconds: float = 3.0,
    rate: int = 44_100,
    subtype: str = "PCM_24",
    alignments: object = ALIGNMENTS,
    typed: object = (),
    **extras: object,
) -> str:
    """Left 500 Hz from one second on, right 2 kHz for the first half second; returns its manifest line."""
    sound = np.zeros((round(seconds * rate), 2))
    left, right = tone(500, seconds - 1, rate), tone(2000, 0.5, rate)
    sound[-len(left) :, 0], sound[: len(right), 1] = left, right
    soundfile.write(folder / f"{name}.wav", sound, rate, subtype=subtype)
    (folder / f"{name}.json").write_text(json.dumps({"alignments": alignments, "typed": typed}))
    return json.dumps({"path": f"{name}.wav", "duration": seconds, **extras})


def write_manifest(folder: Path, *lines: str) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def import_all(path: Path, experiment: config.Experiment = EXPERIMENT) -> list:
    return [s for one in manifest.read_manifest(path, experiment.stream) for s in recordings.convert(one, experiment)]


@pytest.mark.parametrize(
    ("rate", "subtype"),
    [(44_100, "PCM_24"), (16_000, "PCM_16"), (8_000, "FLOAT"), (48_000, "PCM_32"), (192_000, "PCM_U8")],
)
def test_left_is_the_model_and_right_the_user_at_any_rate(tmp_path: Path, rate: int, subtype: str) -> None:
    (session,) = import_all(write_manifest(tmp_path, write_recording(tmp_path, rate=rate, subtype=subtype)))
    assert session.frames == 120 == len(session.user_dmel) == len(session.model_mel)
    assert (session.user_dmel.dtype, session.model_mel.dtype) == (np.uint8, np.float16)
    assert session.family == recordings.FAMILY
    assert session.audio is None
    assert session.video is None
    centres = dmel.mel_to_hz(np.linspace(dmel.hz_to_mel(dmel.LOW_HZ), dmel.hz_to_mel(dmel.HIGH_HZ), 82))[1:-1]
    assert abs(centres[session.model_mel[60:].astype(np.float32).mean(0).argmax()] - 500) < 60
    assert abs(centres[session.user_dmel[4:18].astype(np.float32).mean(0).argmax()] - 2000) < 250
    quiet_model, quiet_user = session.model_mel[2:38], session.user_dmel[24:]
    assert quiet_model.max() < session.model_mel[60:].max() - 2
    assert quiet_user.max() < session.user_dmel[4:18].max() - 3


def test_features_are_those_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "BLOCK_SECONDS", 1)
    monkeypatch.setattr(recordings, "RECORD_MICROTURNS", 10)
    line = write_recording(tmp_path, seconds=7.13)
    sessions = import_all(write_manifest(tmp_path, line))
    assert len(sessions) > 3
    sound, rate = soundfile.read(tmp_path / "talk.wav", dtype="float32")
    whole = soxr.resample(sound, rate, 16_000)
    whole = np.pad(whole, ((0, -len(whole) % MICROTURN_SAMPLES), (0, 0)))
    for channel, field in enumerate(("model_mel", "user_dmel")):
        mel, _ = dmel.log_mel(np.ascontiguousarray(whole[:, channel]))
        expected = mel.astype(np.float16) if channel == 0 else dmel.quantise(mel)
        np.testing.assert_array_equal(np.concatenate([getattr(s, field) for s in sessions]), expected)


def test_words_go_to_their_side_with_their_times(tmp_path: Path) -> None:
    line = write_recording(tmp_path, typed=[["seven", 2.5]])
    (session,) = import_all(write_manifest(tmp_path, line))
    assert session.model_words == (Word("hello", 1.0, 1.4), Word("there", 1.45, 1.9))
    assert session.user_words == (Word("hi", 0.2, 0.5),)
    assert session.typed == (Word("seven", 2.5, 2.5),)
    tokenizer = Tokenizer.train(["hello there hi seven"] * 3, 400)
    streams = weave.weave(session, Layout(EXPERIMENT.stream), tokenizer)
    text = streams["model_text"][:, 0]
    assert (text[:4] == IDLE).all()
    assert text[4] == tokenizer.encode_word("hello")[0]
    assert (text[4:8] != IDLE).all()
    assert (text[4:8] == HOLD).any()
    assert (text[9:] == IDLE).all()
    assert streams["heard"][2] == tokenizer.encode_word("hi")[0]
    assert streams["user_text"][12, 0] == tokenizer.encode(" seven")[0]


def test_without_the_users_words_what_was_heard_is_unknown(tmp_path: Path) -> None:
    line = write_recording(tmp_path, alignments=ALIGNMENTS[:2])
    (session,) = import_all(write_manifest(tmp_path, line))
    assert session.family == recordings.UNHEARD
    assert session.user_words == ()


def test_video_frames_follow_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "RECORD_MICROTURNS", 10)
    frames = np.arange(18, dtype=np.uint8)[:, None, None, None] * np.ones((40, 40, 3), np.uint8)
    np.save(tmp_path / "seen.npy", frames[:13])
    np.savez(tmp_path / "seen.npz", frames)
    path = write_manifest(
        tmp_path,
        write_recording(tmp_path, "a", seconds=7.0, video="seen.npy"),
        write_recording(tmp_path, "b", seconds=7.0, video="seen.npz"),
    )
    sessions = import_all(path)
    for name, count in (("a", 13), ("b", 18)):
        own = [s for s in sessions if s.id.startswith(name)]
        first = 0
        for session in own:
            seen = [] if session.video is None else session.video[:, 0, 0, 0].tolist()
            assert seen == list(range(first, first + session.frames // 16 + (session.frames % 16 > 0)))[: len(seen)]
            assert len(seen) == min(-(-session.frames // 16), max(count - first, 0))
            first += session.frames // 16


def test_long_recordings_are_cut_in_silence_and_lose_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    starts = np.sort(rng.choice(np.arange(0.0, 330.0, 0.5), 500, replace=False))
    words = tuple(Word(f"w{i}", s, s + 0.45) for i, s in enumerate(starts.tolist()))
    recording = manifest.Recording("m:1", "x", tmp_path / "x.wav", 333.33, words[::2], words[1::2], (), None)
    borders = recordings.place_borders(recording, 2, 60)
    lengths = np.diff(borders)
    assert borders[0] == 0
    assert borders[-1] == recording.microturns == 1667
    assert lengths.max() <= 60
    assert lengths[:-1].min() >= 20
    assert not any(b % 2 for b in borders[:-1])
    cuts = [w for w in words for b in borders[1:-1] if w.start < b * 0.2 - 1e-6 and w.end > b * 0.2 + 1e-6]
    assert not cuts
    kept = [w for a, b in pairwise(borders) for w in recordings._words_within(words, a * 0.2, b * 0.2)]
    assert [w.text for w in kept] == [w.text for w in words]
    assert all(0 <= w.start <= w.end <= 12 + 1e-6 for w in kept)


def test_only_a_block_of_a_long_file_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = write_recording(tmp_path, seconds=200.0, rate=8000, subtype="PCM_16")
    largest = 0
    log_mel = dmel.log_mel

    def watch(samples: np.ndarray, state: dmel.MelState) -> tuple[np.ndarray, dmel.MelState]:
        nonlocal largest
        largest = max(largest, len(samples))
        return log_mel(samples, state)

    monkeypatch.setattr(dmel, "log_mel", watch)
    (recording,) = manifest.read_manifest(write_manifest(tmp_path, line), EXPERIMENT.stream)
    sessions = recordings.convert(recording, EXPERIMENT)
    first = next(sessions).frames
    assert largest <= (recordings.BLOCK_SECONDS + 1) * 16_000
    assert first <= recordings.RECORD_MICROTURNS * 8
    assert first + sum(session.frames for session in sessions) == 200 * 40


def break_sound(name: str, content: bytes | None):
    def apply(folder: Path) -> str:
        line = write_recording(folder)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        return line

    return apply


def truncate(folder: Path) -> str:
    line = write_recording(folder)
    whole = (folder / "talk.wav").read_bytes()
    (folder / "talk.wav").write_bytes(whole[: len(whole) // 2])
    return line


def make_mono(folder: Path) -> str:
    line = write_recording(folder)
    soundfile.write(folder / "talk.wav", np.zeros(48_000), 16_000)
    return line


def align(*entries: object):
    return lambda folder: write_recording(folder, alignments=list(entries))


def hollow(folder: Path) -> str:
    (folder / "v.npy").touch()
    return write_recording(folder, video="v.npy")


def scribble(folder: Path) -> str:
    (folder / "v.npy").write_text("frames follow by mail\n")
    return write_recording(folder, video="v.npy")


def pair(folder: Path) -> str:
    frames = np.zeros((3, 40, 40, 3), np.uint8)
    np.savez(folder / "v.npz", left=frames, right=frames)
    return write_recording(folder, video="v.npz")


def show(shape: tuple[int, ...], dtype: type = np.uint8):
    def apply(folder: Path) -> str:
        np.save(folder / "v.npy", np.zeros(shape, dtype))
        return write_recording(folder, video="v.npy")

    return apply


BAD = {
    "not json": (lambda folder: '{"path": "talk.wav", ', r":1: not JSON"),
    "not an object": (lambda folder: '["talk.wav"]', r":1: must be an object"),
    "no path": (lambda folder: '{"duration": 3}', r":1: must be an object"),
    "wrong duration": (lambda folder: write_recording(folder).replace("3.0", "30.0"), r":1: .* 30 s .* 3\.00 s"),
    "duration is no number": (lambda folder: write_recording(folder).replace("3.0", '"x"'), r":1: the duration .* 'x'"),
    "no sound": (break_sound("talk.wav", None), r":1: .*talk\.wav is missing"),
    "empty sound": (break_sound("talk.wav", b""), r":1: .*talk\.wav"),
    "no audio at all": (break_sound("talk.wav", b"hello" * 100), r":1: .*talk\.wav cannot be read as sound"),
    "truncated": (truncate, r":1: .*talk\.wav.*truncated"),
    "mono": (make_mono, r":1: .*talk\.wav has 1 channel;"),
    "no sidecar": (break_sound("talk.json", None), r":1: the word times .*talk\.json are missing"),
    "sidecar is no json": (break_sound("talk.json", b"{"), r":1: cannot read the word times .*talk\.json"),
    "sidecar is no text": (break_sound("talk.json", b"\xff\xfe\x00"), r":1: cannot read the word times .*talk\.json"),
    "no alignments": (break_sound("talk.json", b"{}"), r':1: .*talk\.json has no list "alignments"'),
    "beyond the end": (
        align(*ALIGNMENTS, ["bye", [2.9, 3.6], "SPEAKER_MAIN"]),
        r"talk\.json: alignments\[3\] 'bye': ends at 3\.6 s, beyond .* 3\.00 s",
    ),
    "backwards": (align(["hm", [2.0, 1.0], "SPEAKER_MAIN"]), r"alignments\[0\] 'hm': 2 to 1 s"),
    "before the start": (align(["hm", [-1, 1.0], "SPEAKER_MAIN"]), r"alignments\[0\] 'hm': -1 to 1 s"),
    "not a time": (align(["hm", [None, 1.0], "SPEAKER_MAIN"]), r"alignments\[0\] must be"),
    "nan": (align(["hm", [float("nan"), 1.0], "SPEAKER_MAIN"]), r"alignments\[0\] must be"),
    "no speaker": (align(["hm", [0.5, 1.0]]), r"alignments\[0\] must be"),
    "typed too late": (lambda folder: write_recording(folder, typed=[["x", 9]]), r"typed\[0\] must be"),
    "no video": (lambda folder: write_recording(folder, video="v.npy"), r":1: cannot read the video .*v\.npy"),
    "video without a byte": (hollow, r":1: cannot read the video .*v\.npy: "),
    "no video in a folder of pickles": (
        lambda folder: write_recording(folder, video="pickles/v.npy"),
        r":1: cannot read the video .*pickles/v\.npy: No such file",
    ),
    "video that is a text": (scribble, r":1: cannot read the video .*v\.npy: it is no \.npy"),
    "two videos in one file": (pair, r":1: .*v\.npz must hold one array, it has 2"),
    "video of another size": (show((3, 20, 20, 3)), r":1: .*v\.npy is uint8 \[3, 20, 20, 3\]"),
    "video of floats": (show((3, 40, 40, 3), np.float32), r":1: .*v\.npy is float32"),
    "video at another rate": (show((75, 40, 40, 3)), r":1: .*v\.npy has 75 frames; 3\.00 s take at most 8"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_each_mistake_is_one_line_that_names_it(tmp_path: Path, mistake: str) -> None:
    make, pattern = BAD[mistake]
    path = write_manifest(tmp_path, make(tmp_path))
    with pytest.raises(UserError, match=pattern) as error:
        import_all(path)
    assert "\n" not in str(error.value)


def test_a_mistake_in_the_last_line_is_told_before_any_work(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, write_recording(tmp_path, "a"), "", write_recording(tmp_path, "b"))
    (tmp_path / "b.wav").unlink()
    with pytest.raises(UserError, match=r"manifest\.jsonl:3"):
        manifest.read_manifest(path, EXPERIMENT.stream)


def test_a_manifest_that_is_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the recordings manifest .*No such file"):
        import_all(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="names no recording"):
        import_all(write_manifest(tmp_path, ""))


def test_an_aligner_may_overshoot_a_little(tmp_path: Path) -> None:
    line = write_recording(tmp_path, alignments=[["bye", [2.8, 3.1], "SPEAKER_MAIN"]])
    (session,) = import_all(write_manifest(tmp_path, line))
    assert session.model_words == (Word("bye", 2.8, 3.0),)


def test_lists_of_manifests_and_their_weights() -> None:
    assert manifest.parse_manifests("") == {}
    assert manifest.parse_manifests("a.jsonl:0.5, dir/b.jsonl") == {"a.jsonl": 0.5, "dir/b.jsonl": 1.0}
    assert manifest.parse_manifests("C:/a.jsonl:2,synthetic:0") == {"C:/a.jsonl": 2.0, "synthetic": 0.0}
    refused = (("a:-1", "weight of a"), ("a:nan", "weight of a"), ("a:1,a:2", "twice"), ("synthtic:0", "synthetic:0"))
    for text, pattern in refused:
        with pytest.raises(UserError, match=pattern):
            manifest.parse_manifests(text)


def prepare_talks(folder: Path, count: int = 3) -> tuple[Path, config.Experiment]:
    np.save(folder / "seen.npy", np.full((5, 40, 40, 3), 7, np.uint8))
    lines = [write_recording(folder, f"talk{i}", seconds=3.0 + i, typed=[["x", 2.0]]) for i in range(count)]
    lines[0] = lines[0].replace("}", ', "video": "seen.npy"}')
    experiment = dataclasses.replace(EXPERIMENT, data=config.Data(root=str(folder / "data"), window=10))
    return write_manifest(folder, *lines), experiment


def assert_same_sessions(first: Session, second: Session) -> None:
    for field in dataclasses.fields(Session):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name), err_msg=field.name)


def test_what_was_stored_is_what_was_imported(tmp_path: Path) -> None:
    path, experiment = prepare_talks(tmp_path)
    imported = import_all(path, experiment)
    train = recordings.open_manifest(str(path), experiment, "train")
    validation = pickle.loads(pickle.dumps(recordings.open_manifest(str(path), experiment, "validation")))
    assert (len(train), len(validation)) == (2, 1)
    for expected, stored in zip(imported, [train[0], train[1], validation[0]], strict=True):
        assert_same_sessions(expected, stored)
        assert type(stored.user_words[0]) is Word


def test_records_in_several_files_are_the_same_whatever_process_wrote_them(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(recordings, "RECORDS_A_FILE", 2)
    path, experiment = prepare_talks(tmp_path)
    imported, home = import_all(path, experiment), recordings.prepare(str(path), experiment)
    written = {file.name: file.read_bytes() for file in home.rglob("*.array_record-*")}
    assert len(written) == 2
    train, validation = (recordings.open_manifest(str(path), experiment, split) for split in ("train", "validation"))
    for expected, stored in zip(imported, [*train, *validation], strict=True):
        assert_same_sessions(expected, stored)
    shutil.rmtree(home)
    program = (
        "import pickle, sys; from data_pipelines import recordings; recordings.RECORDS_A_FILE = 2;"
        "recordings.prepare(*pickle.loads(bytes.fromhex(sys.argv[1])), False)"
    )
    subprocess.run(
        [sys.executable, "-c", program, pickle.dumps((str(path), experiment)).hex()],
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert {file.name: file.read_bytes() for file in home.rglob("*.array_record-*")} == written


def test_a_manifest_is_imported_once_and_again_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, experiment = prepare_talks(tmp_path)
    first = recordings.prepare(str(path), experiment)
    with monkeypatch.context() as patch:
        patch.setattr(recordings, "convert", lambda *_: pytest.fail("imported again"))
        assert recordings.prepare(str(path), experiment) == first
    write_recording(tmp_path, "talk1", seconds=4.0, alignments=ALIGNMENTS[:1])
    assert recordings.prepare(str(path), experiment) != first
    (session,) = (s for s in recordings.open_manifest(str(path), experiment, "train") if s.id.startswith("talk1"))
    assert [word.text for word in session.model_words] == ["hello"]


def test_an_interrupted_import_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, experiment = prepare_talks(tmp_path)
    convert, done = recordings.convert, []

    def interrupt(*args: object) -> object:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return convert(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recordings, "convert", interrupt)
        with pytest.raises(KeyboardInterrupt):
            recordings.prepare(str(path), experiment)
    assert len(recordings.open_manifest(str(path), experiment, "train")) == 2


def test_an_import_that_lost_a_part_is_one_line(tmp_path: Path) -> None:
    path, experiment = prepare_talks(tmp_path)
    file = next(recordings.prepare(str(path), experiment).rglob("*.array_record-*"))
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(UserError, match=r"is damaged: it has lost files, or parts of them; delete it"):
        recordings.open_manifest(str(path), experiment, "train")


def test_a_mistake_found_while_reading_the_sound_is_told_as_well(tmp_path: Path) -> None:
    path, experiment = prepare_talks(tmp_path)
    sound, rate = soundfile.read(tmp_path / "talk1.wav")
    sound[5000] = np.nan
    soundfile.write(tmp_path / "talk1.wav", sound, rate, subtype="FLOAT")
    with pytest.raises(UserError, match=r"manifest\.jsonl:2: .*talk1\.wav has samples that are not finite") as error:
        recordings.prepare(str(path), experiment)
    assert "\n" not in str(error.value)


def test_splits_share_no_record() -> None:
    for count in (1, 2, 19, 20, 45):
        train, validation = (recordings.split_records(count, split) for split in ("train", "validation"))
        assert sorted(train + validation) == list(range(count))
        assert len(validation) == (0 if count == 1 else max(count // 20, 1))
