import json

import pytest

from tests.train import toy
from tmljax import checkpoint, lineage, storage
from tmljax.config import UserError, to_json

EXPERIMENT = toy.experiment()


def train(workdir, experiment=EXPERIMENT, **progress):
    """What matters here of what a run leaves: its config, and what a checkpoint says of itself."""
    lineage.keep_config(workdir, experiment)
    folder = workdir / checkpoint.FOLDER / "1" / checkpoint.PROGRESS
    folder.mkdir(parents=True)
    (folder / "metadata").write_text(json.dumps(storage.seal({"format": checkpoint.FORMAT} | progress)))


def kept(workdir):
    return (workdir / lineage.CONFIG).read_text()


def test_config_json_is_the_exact_config_and_may_change_until_there_is_a_checkpoint(tmp_path):
    other = toy.experiment(data={"seed": 9})
    lineage.keep_config(tmp_path, EXPERIMENT)
    lineage.keep_config(tmp_path, other)
    assert kept(tmp_path) == to_json(other)


@pytest.mark.parametrize(
    "fields",
    [
        {"train": {"steps": 99, "log_every": 1, "save_every": 1, "keep": 9, "eval_every": 1, "eval_batches": 9}},
        {"mesh": {"fsdp": 2}, "data": {"root": "elsewhere", "workers": 3}},
        {"model": {"attention": "splash", "remat": "dots", "moe": {"matmul": "grouped"}}},
    ],
)
def test_what_changes_no_number_may_change_on_resume(tmp_path, fields):
    train(tmp_path)
    changed = toy.experiment(**fields)
    lineage.keep_config(tmp_path, changed)
    assert kept(tmp_path) == to_json(changed)


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"train": {"seed": 1}}, "config.train.seed was 0, now 1"),
        ({"data": {"name": "other"}}, "config.data.name was 'duplex', now 'other'"),
        ({"model": {"moe": {"experts": 16}}}, "config.model.moe.experts was 8, now 16"),
        ({"data": {"mixture": {"pause": 1.0}}}, "config.data.mixture.pause was None, now 1.0"),
    ],
)
def test_what_changes_a_number_is_refused_by_name(tmp_path, fields, refused):
    train(tmp_path)
    with pytest.raises(UserError) as e:
        lineage.keep_config(tmp_path, toy.experiment(**fields))
    assert refused in str(e.value)
    assert kept(tmp_path) == to_json(EXPERIMENT)


def test_checkpoints_of_another_version_are_not_trained_on(tmp_path):
    train(tmp_path, format=checkpoint.FORMAT + 1)
    with pytest.raises(UserError, match=rf"has format {checkpoint.FORMAT + 1}, .* reads {checkpoint.FORMAT}"):
        lineage.keep_config(tmp_path, toy.experiment(999))
    assert kept(tmp_path) == to_json(EXPERIMENT)


def with_experts(**moe):
    return toy.experiment(model={"moe": moe})


@pytest.mark.parametrize(
    "moe", [{"exchange": "gathered"}, *({"exchange": e, "capacity_factor": 1.1} for e in ("padded", "ragged"))], ids=str
)
def test_the_matmul_may_change_where_it_decides_nothing(tmp_path, moe):
    train(tmp_path, with_experts(matmul="ragged", **moe))
    lineage.keep_config(tmp_path, with_experts(matmul="grouped", **moe))


def test_where_the_tiles_of_the_matmul_decide_what_is_dropped_it_stays(tmp_path):
    moe = {"exchange": "gathered", "capacity_factor": 1.1}
    train(tmp_path, with_experts(matmul="ragged", **moe))
    with pytest.raises(UserError, match=r"config\.model\.moe\.matmul was 'ragged', now 'grouped'"):
        lineage.keep_config(tmp_path, with_experts(matmul="grouped", **moe))


@pytest.mark.parametrize("matmul", ["ragged", "blocks"])
def test_a_matmul_of_the_same_tiles_drops_the_same(tmp_path, matmul):
    """So that what began on H100s goes on where there are none."""
    moe = {"exchange": "gathered", "capacity_factor": 1.1}
    train(tmp_path, with_experts(matmul="hopper", **moe))
    lineage.keep_config(tmp_path, with_experts(matmul=matmul, **moe))


def test_the_exchange_may_change_where_nothing_is_dropped(tmp_path):
    train(tmp_path, with_experts(exchange="padded"))
    lineage.keep_config(tmp_path, with_experts(exchange="gathered"))


def test_another_exchange_drops_others(tmp_path):
    train(tmp_path, with_experts(exchange="padded", capacity_factor=1.1))
    with pytest.raises(UserError, match=r"config\.model\.moe\.exchange was 'padded', now 'gathered'"):
        lineage.keep_config(tmp_path, with_experts(exchange="gathered", capacity_factor=1.1))


def test_checkpoints_that_may_not_be_written_are_no_place_to_train(tmp_path, monkeypatch):
    train(tmp_path)
    monkeypatch.setattr(lineage.os, "access", lambda path, mode: path != tmp_path / checkpoint.FOLDER)
    with pytest.raises(UserError, match="checkpoints may not be written by this user"):
        lineage.keep_config(tmp_path, EXPERIMENT)


@pytest.mark.parametrize("content", ["[]", "{", "\udcff"])
def test_a_config_that_is_none_is_named(tmp_path, content):
    train(tmp_path)
    (tmp_path / lineage.CONFIG).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="is no config; bring it back"):
        lineage.keep_config(tmp_path, EXPERIMENT)
