"""The whole pipeline in small, from a fresh clone and an empty environment, interrupted once and run again."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLDEST = 11  # the minor version that the project asks for


def find_pythons() -> dict[int, str]:
    """Minor version -> path, of those that PATH or pyenv has, that run, and that are new enough."""
    folders = [*os.environ["PATH"].split(os.pathsep), *map(str, Path.home().glob(".pyenv/versions/*/bin"))]
    found = {sys.version_info.minor: sys.executable}
    for folder in folders:
        for path in Path(folder).glob("python3.*"):
            match = re.fullmatch(r"python3\.(\d+)", path.name)
            works = (
                match and subprocess.run([path, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0
            )
            if works and int(match[1]) >= OLDEST:
                found[int(match[1])] = str(path)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("which", [min, max], ids=["oldest", "newest"])
def test_smoke_goes_on_where_it_was_interrupted(tmp_path, which):
    pythons = find_pythons()
    if which is max and len(pythons) < 2:
        pytest.skip("this machine has one Python")
    assert shutil.which("make")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    command = ["make", "smoke", f"PYTHON={pythons[which(pythons)]}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "MAKEFLAGS", "MAKELEVEL")}
    options = {"cwd": clone, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, start_new_session=True, **options) as first:
        try:
            next(line for line in first.stdout if re.search(r"step [1-9]\d*/", line))  # of the training
            os.killpg(first.pid, signal.SIGINT)
            said, _ = first.communicate(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
    saved = re.search(r"stopped by SIGINT after step (\d+), which is saved", said)
    assert saved is not None, said[-3000:]
    assert "Traceback" not in said
    done = subprocess.run(command, timeout=1200, **options)
    assert done.returncode == 0, done.stdout[-3000:]
    steps = [int(step) for step in re.findall(r"step (\d+)/", done.stdout)]
    assert min(steps) > int(saved[1])
    assert "Done. Open the report: runs/smoke/report.html" in done.stdout
    assert (clone / "runs/smoke/report.html").stat().st_size > 10_000
    assert (clone / "runs/smoke/export/manifest.json").exists()
