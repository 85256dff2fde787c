"""The verb `evaluate`, from a checkpoint with random weights to its report; and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from data_pipelines import builder
from launch import evaluate, verb
from tmljax import checkpoint, config, lineage
from tmljax.model.interaction import Definition


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """As training leaves it, with random weights, and the dataset that it names."""
    root = tmp_path_factory.mktemp("evaluated")
    experiment = config.Experiment(
        stream=config.Stream(vocab_size=512),
        model=config.Model(
            d_model=16, layers=1, heads=2, kv_heads=1, head_dim=8, window=4,
            moe=config.Moe(experts=2, top_k=1, expert_width=8, shared_width=8),
            flow=config.Flow(width=8, depth=1, steps=2),
        ),
        data=config.Data(
            root=str(root), train_hours=0.01, test_per_family=2, mixture={"turn_taking": 1.0, "interruption": 1.0}
        ),
        sampling=config.Sampling(temperature=1.0),
    )  # fmt: skip
    builder.build(experiment, progress=False, workers=1)
    folder, rng = root / "tiny", np.random.default_rng(1)
    shapes = Definition(experiment.stream, experiment.model).abstract()
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.normal(0.3, 0.3, leaf.shape), leaf.dtype), shapes)
    checkpoints = checkpoint.Checkpoints(folder, keep=1)
    lineage.keep_config(folder, experiment)
    (folder / checkpoint.TOKENIZER).write_bytes(Path(builder.tokenizer_path(experiment)).read_bytes())
    checkpoints.save(30, params, {"count": jax.numpy.zeros(())}, {"position": 0}, experiment)
    checkpoints.wait()
    checkpoints.close()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.0}\n{"step": 2, "loss/total": 1.0}\n')
    return folder


def run(**given) -> int:
    """The verb as the shell would run it, its flags gone afterwards."""
    before = set(flags.FLAGS)
    evaluate.define_flags()
    own = set(flags.FLAGS) - before
    try:
        named = {name.replace("__", "."): value for name, value in given.items()}
        return verb.run(evaluate.main, ["evaluate", *(f"--{name}={value}" for name, value in named.items())])
    finally:
        for name in own:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


def test_evaluates_everything(workdir, capsys):
    assert run(workdir=workdir, sessions=4) == 0
    tree = json.loads((workdir / "report.json").read_text())
    assert tree["sessions"] == {"turn_taking": 2, "interruption": 2}
    assert list(tree["measurements"]) == ["model", "always silent", "always talking", "VAD timer", "oracle"]
    turn = next(r for r in tree["headline"] if (r["name"], r["family"]) == ("take_over", "turn_taking"))
    assert turn["systems"]["oracle"]["estimate"]["value"] == 1.0
    assert turn["systems"]["always silent"]["estimate"]["value"] == 0.0
    assert 0 < (workdir / "report.html").stat().st_size < 15_000_000
    assert "How it was trained" in (workdir / "report.html").read_text()
    assert len(list((workdir / "fdb").rglob("clean_output.wav"))) == 2
    assert "Smooth turn-taking" in capsys.readouterr().out


def test_same_weights_same_values(workdir, tmp_path):
    found = []
    for name, sessions in (("a", 1), ("b", 3)):
        assert run(workdir=workdir, suite="interruption", output=tmp_path / name, sessions=sessions, fdb=0) == 0
        tree = json.loads((tmp_path / name / "report.json").read_text())
        found.append(tree["values"])
    assert found[0] == found[1]
    assert list(found[0]["model"]) == ["interruption"]


def test_limit(workdir, tmp_path):
    assert run(workdir=workdir, output=tmp_path, limit=1, fdb=0, pictures=tmp_path / "svg") == 0
    assert json.loads((tmp_path / "report.json").read_text())["sessions"] == {"turn_taking": 1, "interruption": 1}
    assert not list((tmp_path / "fdb").rglob("*.wav"))
    assert len(list((tmp_path / "svg").glob("*.svg"))) == 2


def test_a_part_does_not_replace_the_whole(workdir):
    """The whole is what has all sessions, however it was asked for."""
    whole, part = workdir / "report.json", workdir / evaluate.PART / "report.json"
    assert run(workdir=workdir, suite="interruption,turn_taking", limit=2, fdb=0) == 0
    before = whole.read_text()
    assert json.loads(before)["sessions"] == {"interruption": 2, "turn_taking": 2}
    assert not part.exists()
    assert run(workdir=workdir, suite="interruption", limit=1, fdb=0) == 0
    assert whole.read_text() == before
    assert json.loads(part.read_text())["sessions"] == {"interruption": 1}


def test_the_test_of_another_dataset_has_its_own_place(workdir, capsys):
    trained = config.from_json((workdir / lineage.CONFIG).read_text())
    other = {"name": "other", "seed": 7, "test_per_family": 3}
    builder.build(replace(trained, data=replace(trained.data, **other)), progress=False, workers=1)
    own = (workdir / "report.json").read_text() if (workdir / "report.json").exists() else None
    given = {f"config__data__{name}": value for name, value in other.items()}
    assert run(workdir=workdir, fdb=0, **given) == 0
    tree = json.loads((workdir / "datasets/other/report.json").read_text())
    assert tree["sessions"] == {"turn_taking": 3, "interruption": 3}
    assert tree["config"]["data"]["seed"] == trained.data.seed
    assert tree["facts"]["test of"] == "dataset other, seed 7"
    assert own is None or own == (workdir / "report.json").read_text()
    assert run(workdir=workdir, **given | {"config__data__seed": 8}) == 2
    assert "was built with config.data.seed=7 (now 8)" in capsys.readouterr().err


def test_refuses(workdir, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "icc.json"
    broken.write_text("{")
    flat, odd = tmp_path / "flat.json", tmp_path / "odd.json"
    flat.write_text('{"0": [1, 2], "1": []}')
    odd.write_text('{"0": [0.5, NaN]}')
    for given, message in (
        ({"workdir": workdir, "icc": flat}, "flat.json: 1 is no distribution"),
        ({"workdir": workdir, "icc": odd}, "odd.json: 0 is no distribution"),
        ({"workdir": empty}, "no checkpoint"),
        ({"workdir": tmp_path / "nowhere"}, "no such folder"),
        ({"workdir": workdir, "suite": "turn_takin"}, "turn_takin is not one; did you mean turn_taking?"),
        ({"workdir": workdir, "suite": "nothing"}, "families of the test split are turn_taking, interruption"),
        ({"workdir": workdir, "icc": broken}, "icc_gt_distribution"),
        ({"workdir": workdir, "step": 7}, "step 7"),
        ({"workdir": workdir, "limit": 0}, "limit"),
        ({"workdir": workdir, "pictures": broken / "svg"}, "icc.json/svg cannot be made: Not a directory"),
        ({"workdir": workdir, "pictures": ""}, "--pictures names no folder"),
        ({}, "--workdir is missing"),
    ):
        assert run(**given) == 2, given
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
