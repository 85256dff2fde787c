"""The whole pipeline in small, from an empty environment, under the newest Python of this machine."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def newest_python() -> str | None:
    """The path of the newest interpreter, python3.12 or later, that PATH or pyenv has and that runs."""
    folders = [*os.environ["PATH"].split(os.pathsep), *map(str, Path.home().glob(".pyenv/versions/*/bin"))]
    found = {}
    for folder in folders:
        for path in Path(folder).glob("python3.*"):
            match = re.fullmatch(r"python3\.(\d+)", path.name)
            works = match and subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0
            if works and int(match[1]) >= 12:
                found[int(match[1])] = str(path)
    return found[max(found)] if found else None


@pytest.mark.slow
def test_smoke_under_the_newest_python(tmp_path):
    python = newest_python()
    if python is None:
        pytest.skip("no Python newer than 3.11 on this machine")
    assert shutil.which("make")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    done = subprocess.run(["make", "smoke", f"PYTHON={python}"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (clone / "runs/smoke/report.html").stat().st_size > 10_000
    assert (clone / "runs/smoke/export/manifest.json").exists()
