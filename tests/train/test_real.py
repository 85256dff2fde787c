"""The real model on real data through the verb, at the smallest size: not how well it learns, but that it does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines import loader
from tmljax import checkpoint, config
from tmljax.model.interaction import Definition
from tmljax.serve.bundle import FORMAT
from tmljax.sharding import batch_sharding, make_mesh
from tmljax.train.feed import to_devices
from tmljax.train.metrics import FILE, TIME, read_rows
from tmljax.train.objective import objective
from tmljax.train.step import make_program

ROOT = Path(__file__).parents[2]
SIZES = {
    "model.d_model": 32,
    "model.layers": 2,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.head_dim": 16,
    "model.moe.experts": 4,
    "model.moe.expert_width": 32,
    "model.moe.shared_width": 32,
    "model.flow.width": 32,
    "model.flow.depth": 1,
    "data.train_hours": 0.1,
    "data.test_per_family": 1,
    "data.window": 12,
    "data.batch": 4,
    "train.steps": 24,
    "train.log_every": 2,
    "train.save_every": 8,
    "train.eval_every": 8,
    "train.eval_batches": 1,
}


class Verb:
    """`python -m launch.train` with a data folder of its own, on one device."""

    def __init__(self, folder: Path, devices: int = 1):
        self.folder = folder
        self.environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}

    def start(self, workdir: Path, *more: str) -> subprocess.Popen:
        overrides = [f"--config.{name}={value}" for name, value in SIZES.items()]
        where = [f"--workdir={workdir}", f"--config.data.root={self.folder / 'data'}"]
        command = [sys.executable, "-m", "launch.train", "--config=configs/smoke.py", *where, *overrides, *more]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, **streams)

    def run(self, workdir: Path, *more: str) -> tuple[int, str]:
        process = self.start(workdir, *more)
        out, err = process.communicate(timeout=600)
        return process.returncode, out + err

    def start_and_wait(self, workdir: Path, holds) -> subprocess.Popen:
        process = self.start(workdir)
        while not holds():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        return process


@pytest.fixture(scope="module")
def verb(tmp_path_factory):
    return Verb(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def straight(verb):
    code, said = verb.run(verb.folder / "straight")
    assert code == 0, said
    return verb.folder / "straight"


def rows(workdir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(TIME)} for row in read_rows(workdir / FILE)]


def test_the_workdir_holds_what_it_should(straight):
    assert {"config.json", "tokenizer.json", "checkpoints", "metrics.jsonl"} <= {p.name for p in straight.iterdir()}
    assert list(straight.glob("events.out.tfevents.*"))
    assert [row["step"] for row in rows(straight)] == [1, *range(2, 25, 2)]
    expected = {"loss/total", "loss/text", "loss/flow", "loss/heard", "learning_rate", "grad_norm", "skipped"}
    assert expected | {"experts/load_max", "experts/load_min", "experts/dropped"} <= rows(straight)[-1].keys()
    assert "val/loss/total" in rows(straight)[-1]


def test_the_loss_falls(straight):
    """In training, and held out; there as a whole: six minutes are too little for the words of other voices."""
    trained = [row["loss/total"] for row in rows(straight)]
    held_out = [row["val/loss/total"] for row in rows(straight) if "val/loss/total" in row]
    assert np.mean(trained[-4:]) < 0.6 * np.mean(trained[:4])
    assert held_out[-1] < 0.9 * held_out[0]


def test_serving_finds_it(straight):
    _, experiment, tokenizer, params = checkpoint.load_for_serving(straight)
    assert experiment.model.d_model == 32
    assert tokenizer.vocab_size <= experiment.stream.vocab_size
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 2}, {"fsdp": 2, "tensor": 2}])
def test_restored_on_another_mesh_the_loss_is_the_same(straight, sizes):
    _, experiment, tokenizer, _ = checkpoint.load_for_serving(straight)
    (batch,) = loader.validation_batches(experiment, tokenizer, 1)
    losses = []
    for mesh in (make_mesh(config.Mesh(), jax.devices()[:1]), make_mesh(config.Mesh(**sizes), jax.devices()[:4])):
        program = make_program(experiment, Definition(experiment.stream, experiment.model), objective, mesh)
        abstract = program.abstract
        restored = checkpoint.resume(straight, abstract.params, (abstract.optimizer, abstract.step, abstract.skipped))
        metrics = program.evaluate(restored.params, to_devices(batch, batch_sharding(mesh)))
        losses.append({name: float(value) for name, value in metrics.items() if name.startswith("loss/")})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    held_out = {name.removeprefix("val/"): value for name, value in rows(straight)[-1].items()}
    assert losses[0] == pytest.approx({name: held_out[name] for name in losses[0]}, rel=1e-5)


def test_sigkill_changes_no_value(verb, straight):
    workdir = verb.folder / "killed"
    process = verb.start_and_wait(workdir, lambda: checkpoint.steps(workdir) and len(read_rows(workdir / FILE)) > 5)
    process.kill()
    process.communicate()
    assert max(checkpoint.steps(workdir)) < 24
    code, said = verb.run(workdir)
    assert code == 0, said
    assert rows(workdir) == rows(straight)
    ours, theirs = (checkpoint.read_params(folder, 24)[0] for folder in (workdir, straight))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_130(verb, straight):
    workdir = verb.folder / "stopped"
    process = verb.start_and_wait(workdir, lambda: read_rows(workdir / FILE))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert "stopped by SIGINT after step" in out
    assert checkpoint.steps(workdir)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.optimizer.learning_rate=0.5", "config.optimizer.learning_rate was 0.024, now 0.5"),
        ("--config.mesh.fsdp=3", "places for 1 devices"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(verb, straight, override, said):
    code, heard = verb.run(straight, override)
    assert code == 2
    assert len(heard.strip().splitlines()) == 1, heard
    assert said in heard


def test_what_is_refused_leaves_no_trace(verb, tmp_path):
    code, heard = verb.run(tmp_path / "new", "--config.data.recordings=nowhere.jsonl")
    assert (code, "cannot read the recordings manifest nowhere.jsonl" in heard) == (2, True), heard
    code, heard = verb.run(tmp_path / "new", "--config.data.mixture={'turn_takng': 1}")
    assert (code, "did you mean turn_taking" in heard) == (2, True), heard
    code, heard = verb.run(tmp_path / "new", "--config.data.seed=77")
    assert (code, "was built with config.data.seed=" in heard) == (2, True), heard
    (tmp_path / "export").mkdir()
    (tmp_path / "export/manifest.json").write_text(json.dumps({"format": FORMAT}))
    code, heard = verb.run(tmp_path / "export")
    assert (code, "is an export, which training would destroy" in heard) == (2, True), heard
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "manifest.json"]


def test_a_mesh_that_a_derived_size_does_not_divide_is_refused_before_data_is_built(tmp_path):
    sizes = [f"--config.{size}" for size in ("model.d_model=96", "mesh.fsdp=8", "mesh.data=1", "data.batch=8")]
    code, heard = Verb(tmp_path / "there", devices=8).run(tmp_path / "new", *sizes)
    assert code == 2
    assert "config.mesh.fsdp=8 does not divide the model's frame dimension of 36" in heard
    assert not list(tmp_path.iterdir())
