"""The verb `data`: builds, says what it built, does nothing the second time, and says in one line what is wrong."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = """
from configs import base

def get_config():
    config = base.get_config()
    config.data.root = {root!r}
    config.data.name = "tiny"
    config.data.train_hours = 0.01
    config.data.test_per_family = 1
    config.data.mixture = {{"turn_taking": 1.0, "visual_cue": 1.0}}
    return config
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.data", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_verb(tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG.format(root=str(tmp_path / "data")))
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
