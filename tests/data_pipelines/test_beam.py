"""On Apache Beam the dataset is the same, byte for byte, and interrupted builds go on: `make test-beam`."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path

import pytest

from data_pipelines import builder, plan, staging
from tmljax.config import Data, Experiment, UserError

OPTIONS = ("--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing")
SMALL = Experiment(data=Data(name="small", train_hours=0.02, test_per_family=1))


def at(root: Path) -> Experiment:
    return dataclasses.replace(SMALL, data=dataclasses.replace(SMALL.data, root=str(root)))


def fingerprint(home: Path) -> dict[str, str]:
    files = (p for p in home.rglob("*") if p.is_file())
    return {str(p.relative_to(home)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    before, plan.SHARD = plan.SHARD, 5
    yield
    plan.SHARD = before


@pytest.fixture
def beam():
    return pytest.importorskip("apache_beam", reason="Apache Beam has an environment of its own: make test-beam")


@pytest.mark.usefixtures("beam")
@pytest.mark.parametrize("options", [OPTIONS, ("--direct_running_mode=multi_threading", "--direct_num_workers=3")])
def test_beam_builds_the_same_bytes_as_one_machine(tmp_path, options):
    alone, beamed = at(tmp_path / "alone"), at(tmp_path / "beam")
    builder.build(alone, progress=False, workers=1)
    summary = builder.build(beamed, progress=False, beam_options=options)
    assert summary.rendered_seconds == pytest.approx(sum(sum(s.values()) for s in summary.seconds.values()))
    assert fingerprint(builder.folder(beamed)) == fingerprint(builder.folder(alone))


@pytest.mark.usefixtures("beam")
def test_beam_goes_on_where_one_machine_was_interrupted(tmp_path, monkeypatch):
    experiment = at(tmp_path)
    rendered = []

    def interrupted(*args):
        if len(rendered) == 3:
            raise KeyboardInterrupt
        rendered.append(args[1].name)
        return render(*args)

    render = staging.render_to_file
    monkeypatch.setattr(staging, "render_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builder.build(experiment, progress=False, workers=1)
    monkeypatch.undo()
    times = {n: (builder.folder(experiment) / builder.STAGING / f"{n}.json").stat().st_mtime_ns for n in rendered}
    summary = builder.build(experiment, progress=False, beam_options=("--direct_running_mode=in_memory",))
    assert len(times) == 3
    assert 0 < summary.rendered_seconds < sum(sum(s.values()) for s in summary.seconds.values()) - 10
    whole = at(tmp_path / "whole")
    builder.build(whole, progress=False, workers=1)
    assert fingerprint(builder.folder(experiment)) == fingerprint(builder.folder(whole))


@pytest.mark.usefixtures("beam")
def test_workers_that_fail_are_the_reason_given(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging, "render_to_file", fail)
    with pytest.raises(UserError, match=r"Apache Beam did not render .* No space left"):
        builder.build(at(tmp_path), progress=False, beam_options=("--direct_running_mode=in_memory",))


def test_without_beam_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[beam\]'"):
        builder.build(at(tmp_path), progress=False, beam_options=())
