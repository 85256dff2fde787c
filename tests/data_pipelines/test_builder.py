"""The same config gives the same bytes: on any number of processes, killed and resumed."""

import contextlib
import dataclasses
import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipelines import builder, loader, plan, records
from data_pipelines.scenarios import FAMILIES
from data_pipelines.voices import Voices
from tmljax.config import Data, Experiment, Stream, UserError
from tmljax.stream.microturn import Layout
from tmljax.stream.text import Tokenizer
from tmljax.stream.weave import weave

SMALL = Data(name="small", train_hours=0.03, test_per_family=1)
SHARD = 3  # sessions, so that a small dataset has many


def experiment(root: Path, **changes) -> Experiment:
    return Experiment(data=dataclasses.replace(SMALL, root=str(root), **changes))


def fingerprint(home: Path) -> dict[str, str]:
    files = (p for p in home.rglob("*") if p.is_file())
    return {str(p.relative_to(home)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    before, plan.SHARD = plan.SHARD, SHARD
    yield
    plan.SHARD = before


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    wanted = experiment(tmp_path_factory.mktemp("data"))
    return wanted, builder.build(wanted, progress=False, workers=1)


def test_every_family_is_in_every_measured_split(built):
    wanted, summary = built
    assert summary.sessions["test"] == dict.fromkeys(FAMILIES, 1)
    assert summary.sessions["validation"] == dict.fromkeys(FAMILIES, plan.LEAST_VALIDATION)
    assert sum(summary.seconds["train"].values()) == pytest.approx(0.03 * 3600, rel=0.25)
    for split, sessions in summary.sessions.items():
        assert len(builder.open_split(wanted, split)) == sum(sessions.values())


def test_sessions_come_back_as_they_were_rendered(built):
    wanted, _ = built
    stored = builder.open_split(wanted, "test")
    voices = Voices()
    for index in range(len(FAMILIES)):
        rendered, found = plan.render_session(wanted, "test", index, voices), stored[index]
        for field in dataclasses.fields(rendered):
            a, b = getattr(rendered, field.name), getattr(found, field.name)
            if isinstance(a, np.ndarray):
                np.testing.assert_array_equal(a, b)
                assert a.dtype == b.dtype
            else:
                assert a == b, field.name


def test_only_the_test_split_keeps_audio(built):
    wanted, _ = built
    assert builder.open_split(wanted, "test")[0].audio.shape[1] == 2
    assert builder.open_split(wanted, "train")[0].audio is None
    assert builder.open_split(wanted, "validation")[-1].audio is None


def test_a_split_is_a_sequence_that_travels(built):
    wanted, _ = built
    sessions = builder.open_split(wanted, "validation")
    again = pickle.loads(pickle.dumps(sessions))
    assert [s.id for s in again] == [f"validation-{i:06d}" for i in range(len(sessions))]
    assert again[-1].id == sessions[len(sessions) - 1].id
    with pytest.raises(IndexError):
        sessions[len(sessions)]


def test_others_can_read_it_with_tfds(built):
    wanted, _ = built
    folder = builder.folder(wanted) / "duplex" / "1.0.0"
    source = tfds.builder_from_directory(str(folder)).as_data_source("test")
    assert source[0]["user_dmel"].shape == (source[0]["frames"], 80)


def test_it_weaves(built):
    wanted, _ = built
    tokenizer = Tokenizer.load(builder.tokenizer_path(wanted))
    assert tokenizer.vocab_size <= wanted.stream.vocab_size
    for session in builder.open_split(wanted, "test"):
        streams = weave(session, Layout(wanted.stream), tokenizer)
        assert streams["valid"].sum() == session.frames // 8


def test_the_same_bytes_on_two_processes(built, tmp_path):
    """Spawned workers do not see this process's shard size: they are told which sessions a shard has."""
    wanted, _ = built
    again = experiment(tmp_path)
    builder.build(again, progress=False, workers=2)
    assert fingerprint(builder.folder(again)) == fingerprint(builder.folder(wanted))


def test_another_seed_is_other_data(built, tmp_path):
    wanted, _ = built
    voices = Voices()
    other = experiment(tmp_path, seed=1)
    assert plan.render_session(other, "test", 0, voices).truth != plan.render_session(wanted, "test", 0, voices).truth


BUILD = """
    import sys
    from data_pipelines import builder, plan
    from tmljax.config import Data, Experiment
    if __name__ == "__main__":
        plan.SHARD = int(sys.argv[2])
        builder.build(Experiment(data=Data(**{data!r}, root=sys.argv[1])), progress=False, workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_resumed_gives_the_same_bytes(built, tmp_path, workers):
    wanted, _ = built
    data = {"name": SMALL.name, "train_hours": SMALL.train_hours, "test_per_family": SMALL.test_per_family}
    program = textwrap.dedent(BUILD).format(data=data)
    (tmp_path / "program.py").write_text(program)
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path), str(SHARD), str(workers)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
    )
    stage = tmp_path / SMALL.name / builder.STAGING
    deadline = time.monotonic() + 120
    while len(list(stage.glob("*.json")) if stage.exists() else []) < 2:
        assert time.monotonic() < deadline
        assert child.poll() is None, "it finished before it could be killed"
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=60)  # returns once all who hold the pipe have ended, the workers too
    kept = {p: p.stat().st_mtime_ns for p in stage.glob("*.json")}
    resumed = experiment(tmp_path)
    assert len(kept) < len(plan.shards(resumed))
    assert not (builder.folder(resumed) / "summary.json").exists()
    with pytest.raises(UserError, match=r"launch\.data"):
        builder.open_split(resumed, "train")
    summary = builder.build(resumed, progress=False, workers=1)
    assert summary.rendered_seconds < sum(sum(s.values()) for s in summary.seconds.values()) - 20  # kept ones too
    assert fingerprint(builder.folder(resumed)) == fingerprint(builder.folder(wanted))


def test_building_again_does_nothing(built):
    wanted, _ = built
    before = fingerprint(builder.folder(wanted))
    assert builder.build(wanted, progress=False).rendered_seconds == 0
    assert fingerprint(builder.folder(wanted)) == before


def test_another_config_in_the_same_place_is_an_error(built):
    wanted, _ = built
    other = dataclasses.replace(
        wanted,
        data=dataclasses.replace(wanted.data, seed=7),
        stream=Stream(video_every=Stream().video_every + 1, video_height=80),
    )
    for use in (lambda: builder.build(other, progress=False), lambda: builder.open_split(other, "train")):
        with pytest.raises(UserError) as error:
            use()
        for field in ("config.data.seed=0 (now 7)", "config.stream.video_every=", "video_height", "data.name"):
            assert field in str(error.value)
        assert "train_hours" not in str(error.value)


@pytest.mark.parametrize("content", ['{"a', "3", "[1]"])
def test_a_damaged_note_of_what_was_built_is_one_line(tmp_path, content):
    experiment = Experiment(data=Data(root=str(tmp_path), name="d"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "build.json").write_text(content)
    with pytest.raises(UserError, match=r"/d is damaged: its build\.json cannot be read; delete it"):
        builder.refuse_another(experiment)


def cut(path):
    os.truncate(path, path.stat().st_size - 1000)


@pytest.mark.parametrize(
    ("lost", "lose"),
    [
        ("dataset_info.json", Path.unlink),
        ("duplex-validation.array_record-*", Path.unlink),
        ("duplex-validation.array_record-*", cut),
    ],
)
def test_a_dataset_that_lost_a_file_or_a_part_is_one_line(built, tmp_path, lost, lose):
    shutil.copytree(built[1].path, tmp_path / built[0].data.name)
    wanted = dataclasses.replace(built[0], data=dataclasses.replace(built[0].data, root=str(tmp_path)))
    builder.build(wanted, progress=False)
    gone, *_ = (tmp_path / built[0].data.name).rglob(lost)
    lose(gone)
    for use in (lambda: builder.open_split(wanted, "train"), lambda: builder.build(wanted, progress=False)):
        with pytest.raises(UserError, match=r"has lost files of its splits .*validation.*; delete it"):
            use()


@pytest.mark.parametrize(
    ("file", "share"), [("summary.json", 1.0), ("dataset_info.json", 1.0), ("duplex-train.array_record-*", 0.5)]
)
def test_a_dataset_with_wrong_bytes_is_one_line(built, tmp_path, file, share):
    """Where this share of a file is over."""
    shutil.copytree(built[1].path, tmp_path / built[0].data.name)
    wanted = dataclasses.replace(built[0], data=dataclasses.replace(built[0].data, root=str(tmp_path)))
    home = tmp_path / built[0].data.name
    for path in home.rglob(file):
        whole = path.read_bytes()
        end = int(share * len(whole))
        path.write_bytes(whole[: end - 30] + b"?" * 30 + whole[end:])

    def use():
        builder.build(wanted, progress=False)
        batches = loader.train_loader(wanted, Tokenizer.load(builder.tokenizer_path(wanted)))
        with contextlib.closing(batches):
            for _ in range(50):
                next(batches)

    with pytest.raises(UserError, match=rf"{home} is damaged: .*; delete it and run the same command again") as error:
        use()
    assert "\n" not in str(error.value)


def test_a_disk_that_fails_to_read_is_no_damage():
    class Failing:
        def __getitem__(self, index):
            raise RuntimeError("Input/output error")

    with pytest.raises(RuntimeError, match="Input/output"):
        records.read(Failing(), 0, "home")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        builder.build(experiment(tmp_path), progress=False)
    assert [p.name for p in (tmp_path / "small").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"turntaking": 1.0}, "did you mean turn_taking"),
        ({"xyz": 1.0}, "the families are turn_taking"),
        ({"pause": -1.0}, "0 or more"),
        ({"pause": 0.0}, "positive"),
        ({"pause": 1e308, "no_answer": 1e308}, "make them smaller"),
    ],
)
def test_an_impossible_mixture_is_an_error(tmp_path, mixture, message):
    with pytest.raises(UserError, match=message):
        builder.build(experiment(tmp_path, mixture=mixture), progress=False)
    assert not any(tmp_path.iterdir())


def test_the_mixture_decides_the_families(tmp_path):
    wanted = experiment(tmp_path, mixture={"no_answer": 1.0, "pause": 3.0, "typed_text": 0.0})
    assert plan.mixture(wanted) == {"pause": 0.75, "no_answer": 0.25}
    counts = plan.count_sessions(wanted)
    assert counts == {"train": counts["train"], "validation": 8, "test": 2}
    voices = Voices()
    families = [plan.render_session(wanted, "train", i, voices).family for i in range(40)]
    assert set(families) == {"pause", "no_answer"}
    assert 20 <= families.count("pause") <= 38


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    wanted = experiment(tmp_path)
    monkeypatch.setattr(records, "_writer", _full_after(4, records._writer))
    with pytest.raises(UserError, match="disk is full"):
        builder.build(wanted, progress=False, workers=1)
    kept = builder.folder(wanted) / builder.STAGING
    assert len(list(kept.glob("*.json"))) == 4
    monkeypatch.undo()
    builder.build(wanted, progress=False, workers=1)
    assert not kept.exists()


def _full_after(count, make):
    """A writer that fails as ArrayRecord's does."""
    written = []

    class Limited:
        def __init__(self, stream):
            self._writer = make(stream)

        def write(self, examples, path):
            if len(written) == count:
                raise RuntimeError(f"UNKNOWN: Failed to write to {path}: No space left on device; writing {path}")
            written.append(path)
            self._writer.write(examples, path)

    return Limited


def test_shards_cover_each_session_once():
    for hours in (0.01, 3.0, 500.0):
        wanted = Experiment(data=Data(train_hours=hours))
        counts = plan.count_sessions(wanted)
        for split, count in counts.items():
            mine = [s for s in plan.shards(wanted) if s.split == split]
            covered = [i for s in mine for i in (s.first, s.first + s.sessions)]
            assert covered[0] == 0
            assert covered[-1] == count
            assert covered[1:-1:2] == covered[2::2]
            assert len(mine) <= plan.MOST_SHARDS
