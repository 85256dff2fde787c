"""The verb, without a compiler; tests/plan/test_compile.py has the one that compiles."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tmljax import config
from tmljax.plan import compile as compiler
from tmljax.plan.hardware import find_slice
from tmljax.plan.setting import settle

ROOT = Path(__file__).parents[2]


def run(*flags):
    command = [sys.executable, "-m", "launch.plan", "--config=configs/smoke.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_plan_by_formula(tmp_path):
    done = run("--topology=h100:1x2", "--config.optimizer.name=adamw", "--price=3", f"--output={tmp_path}", "--search")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert plan["fits"]
    assert plan["conversation_seconds_per_dollar"] > 0
    assert "mesh.fsdp=" in (tmp_path / "best.flags").read_text()
    assert "MFU" in done.stdout
    total, active = (plan["parameters"]["total"][name] for name in ("total", "active"))
    assert f"{total / 1e6:.1f}M, {active / 1e6:.1f}M active" in done.stdout


def test_what_does_not_fit_is_no_best(tmp_path):
    large = ["--config.model.d_model=16384", "--config.model.layers=4096"]
    done = run("--topology=h100:1x2", "--config.optimizer.name=adamw", f"--output={tmp_path}", "--search", *large)
    assert done.returncode == 0, done.stderr
    assert "nothing fits" in done.stderr
    assert not (tmp_path / "best.flags").exists()
    assert not json.loads((tmp_path / "plan.json").read_text())["plan"]["fits"]


def test_a_plan_of_serving_takes_no_flag_of_training():
    done = run("--topology=h100:1x2", "--what=tick", "--method=formula")
    assert done.returncode == 0, done.stderr
    assert "live sessions" in done.stdout
    done = run("--topology=h100:1x2", "--what=tick", "--price=3")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: --price is for the training step; leave it out, or --what=tick"]


def test_an_unknown_topology_is_one_line():
    done = run("--topology=v5q:4x8x8")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --topology=v5q:4x8x8: did you mean v5p? known are v4:2x2x1")
    assert "Traceback" not in done.stderr


def test_a_number_that_is_none_is_refused():
    done = run("--topology=h100:1x2", "--tokens=nan")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: --tokens=nan must be a finite number"]


def test_hopper_is_planned_where_it_works():
    hopper = {"dtype": "bfloat16", "d_model": 256, "moe": {"matmul": "hopper", "expert_width": 384}}
    plan = lambda model, where: settle(config.from_tree(config.Experiment, {"model": model}), find_slice(where))  # noqa: E731
    assert plan(hopper, "h200:1x1").axes["expert"] == 1
    for changes, where, said in (
        ({}, "a100:1x1", r"kernel for NVIDIA H100 and H200; on a100 use config.model.moe.matmul='ragged'"),
        ({}, "v5p:2x2x1", r"on v5p use config.model.moe.matmul='grouped'"),
        ({"dtype": "float32"}, "h200:1x1", r"set config.model.dtype='bfloat16', or keep 'float32' and use"),
        ({"d_model": 320}, "h200:1x1", r"needs multiples of 128, and config.model.d_model=320; try .*=256 or 384"),
    ):
        with pytest.raises(config.UserError, match=said):
            plan(hopper | changes, where)


def test_gpus_are_not_planned_with_what_they_lack():
    for model, remedy in (
        ({"moe": {"matmul": "grouped"}}, r"on gpu use config.model.moe.matmul='hopper' \(H100, H200\) or 'ragged'"),
        ({"attention": "splash"}, r"on gpu use config.model.attention='blocks'"),
    ):
        experiment = config.from_tree(config.Experiment, {"model": model})
        assert settle(experiment, find_slice("v5p:2x2x1")).axes["data"] == 4
        with pytest.raises(config.UserError, match=f"kernel for TPUs; {remedy}"):
            settle(experiment, find_slice("h100:1x2"))


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(config.UserError, match=r"pip install 'tmljax\[tpu\]'; --method=formula"):
        compiler.devices_of(find_slice("v5p:2x2x1"))
