"""The verb `data`: builds, says what it built, does nothing the second time, and says in one line what is wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = """
from configs import base

def get_config():
    config = base.get_config()
    config.data.root = {root!r}
    config.data.name = "tiny"
    config.data.train_hours = {hours}
    config.data.test_per_family = 1
    config.data.mixture = {{"turn_taking": 1.0, "visual_cue": 1.0}}
    return config
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.data", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_the_verb(tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG.format(root=str(tmp_path / "data"), hours=0.01))
    built = run(f"--config={config}")
    assert built.returncode == 0, built.stderr
    assert "turn_taking" in built.stdout
    assert "times real time" in built.stdout
    again = run(f"--config={config}")
    assert again.returncode == 0
    assert "times real time" not in again.stdout
    other = run(f"--config={config}", "--config.data.seed=5")
    assert other.returncode == 2
    assert "config.data.seed=0 (now 5)" in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1
    assert other.stdout == ""


def test_a_mistake_is_one_line_and_exit_2(tmp_path):
    for mistake, said in (
        (["config.data.train_hours=1"], "'config.data.train_hours=1' is not a flag"),
        (["--runner=beam", "--beam_options=--name='x"], "--beam_options=--name='x is no list of words"),
        (["--config.data.root=gs://bucket/data"], "config.data.root=gs://bucket/data is an address; mount the"),
        (["--beam_options=--streaming"], "--beam_options is for --runner=beam"),
    ):
        done = run("--config=configs/smoke.py", f"--config.data.root={tmp_path}", *mistake)
        assert done.returncode == 2
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_one_line_and_loses_nothing(tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG.format(root=str(tmp_path / "data"), hours=20.0))
    child = subprocess.Popen(
        [sys.executable, "-m", "launch.data", f"--config={config}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    staging = tmp_path / "data" / "tiny" / ".staging"
    deadline = time.monotonic() + 300
    while len(list(staging.glob("*.json")) if staging.exists() else []) < 3:
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1] == "interrupted"
    assert out == ""
    assert len(list(staging.glob("*.json"))) >= 3
