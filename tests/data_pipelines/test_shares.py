"""Data per host, from files: built and imported datasets through the loader of training, on any number of hosts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import builder, loader, plan, recordings
from tests.data_pipelines.test_loader import STREAM, TOKENIZER, assert_same, make_session, rows_of, take
from tmljax.config import Data, Experiment, UserError
from tmljax.stream.record import Session

HOSTS = (1, 2, 4)
BATCH = 8


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two sources on disk: a built dataset of speech, and records as an import leaves them, mixed 1 to 2."""
    root = tmp_path_factory.mktemp("data")
    calls = root / "calls.jsonl"
    calls.write_text(json.dumps({"path": "call.wav"}) + "\n")
    data = Data(
        name="synthetic", root=str(root), train_hours=0.02, test_per_family=1, window=8, batch=BATCH,
        mixture={"turn_taking": 1.0, "pause": 1.0}, recordings=f"{calls}:2",
    )  # fmt: skip
    experiment = Experiment(stream=STREAM, data=data)
    builder.build(experiment, progress=False, workers=1)
    store(experiment, [make_session(i, 3 + i) for i in range(1, 12)])
    return experiment


def store(experiment: Experiment, sessions: list[Session]) -> Path:
    """`sessions` in the place where the manifest's import would have put its records."""
    home = recordings.folder(experiment.data.recordings.rpartition(":")[0], experiment)
    shutil.rmtree(home, ignore_errors=True)
    recordings.store(home, experiment.stream, iter(sessions))
    return home


def open_loader(experiment: Experiment, index: int = 0, count: int = 1) -> loader.Loader:
    return loader.train_loader(experiment, TOKENIZER, rows=rows_of(index, count, BATCH))


def put_together(parts: list[list[loader.Streams]]) -> list[loader.Streams]:
    """The batches of all hosts, row upon row."""
    return [{name: np.concatenate([b[name] for b in batches]) for name in batches[0]} for batches in zip(*parts)]


@pytest.mark.parametrize("hosts", HOSTS)
def test_the_shares_of_all_hosts_are_exactly_the_data_of_one(experiment, hosts):
    whole = take(open_loader(experiment), 6)
    shares = [take(open_loader(experiment, h, hosts), 6) for h in range(hosts)]
    assert shares[0][0]["valid"].shape[0] == BATCH // hosts
    assert_same(put_together(shares), whole)
    imported = sum(int((batch["model_mel"][:, 0, 0, 0] >= 1).sum()) for batch in whole)  # made mel has its number there
    assert imported == 6 * BATCH * 2 // 3


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_a_run_goes_on_with_the_same_data_on_another_number_of_hosts(experiment, before, after):
    whole = take(open_loader(experiment), 7)
    states = []
    for host in range(before):
        share = open_loader(experiment, host, before)
        for _ in range(3):
            next(share)
        states.append(json.loads(json.dumps(share.get_state())))
        share.close()
    assert states == states[:1] * before  # it does not matter whose is saved
    shares = [open_loader(experiment, host, after) for host in range(after)]
    for share in shares:
        share.set_state(states[0])
    assert_same(put_together([take(share, 4) for share in shares]), whole[3:])


def test_a_dataset_built_anew_with_other_content_of_equal_size_is_refused(experiment, tmp_path, monkeypatch):
    state = open_loader(experiment).get_state()
    again = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, root=str(tmp_path)))
    builder.build(again, progress=False, workers=1)
    store(again, [make_session(i, 3 + i) for i in range(1, 12)])
    open_loader(again).set_state(state)  # the same bytes elsewhere are the same data

    shutil.rmtree(builder.folder(again))
    render = plan.render_session
    monkeypatch.setattr(plan, "render_session", lambda e, split, index, v: render(e, split, index + 1000, v))
    builder.build(again, progress=False, workers=1)
    assert open_loader(again).get_state()["sources"] == state["sources"]
    with pytest.raises(UserError, match=r"trained on other data: its content was .* bring the data.* back"):
        open_loader(again).set_state(state)


def test_records_imported_anew_with_other_content_are_refused(experiment):
    state = open_loader(experiment).get_state()
    try:
        store(experiment, [make_session(i + 20, 3 + i) for i in range(1, 12)])
        assert open_loader(experiment).get_state()["sources"] == state["sources"]
        with pytest.raises(UserError, match="content"):
            open_loader(experiment).set_state(state)
    finally:
        store(experiment, [make_session(i, 3 + i) for i in range(1, 12)])
    open_loader(experiment).set_state(state)
