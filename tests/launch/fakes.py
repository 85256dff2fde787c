"""Programs of other machines, faked: each notes how it was called, and does or answers what the test tells it to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

PLACES = ["--workdir=/shared/my runs/it's $HOME", "--config.data.root=/shared/data"]
FLAGS = ["--config=configs/smoke.py", *PLACES, "--config.data.name=a b"]
TRAIN = ["python", "-m", "launch.train", *FLAGS]
FINISHED = ["-m", "launch.finished", *FLAGS]
STARTERS = {
    "slurm": ["--nodes=2"],
    "gke": ["--name=demo", "--image=registry/tmljax", "--hosts=2", "--claim=shared:/shared"],
    "tpu_vm": ["--name=demo", "--zone=us-x1", "--type=v5p-16", "--version=v2"],
    "ssh": ["--hosts=ada,me@alan", f"--folder={ROOT}"],
}

NOTE = """#!{python} -S
import json, os, sys
here = {folder!r}
name = os.path.basename(sys.argv[0])
told = {{k: v for k, v in os.environ.items() if k.startswith("JAX_") and k != "JAX_PLATFORMS"}}
with open(here + "/calls.jsonl", "a") as file:
    file.write(json.dumps({{"name": name, "argv": sys.argv[1:], "told": told, "cwd": os.getcwd()}}) + "\\n")

def answer(key, default=(0, "")):
    '''The next of the answers to this question; the last one stays.'''
    path = here + "/" + key + ".answers"
    if not os.path.exists(path):
        return default
    answers = json.load(open(path))
    with open(path, "w") as file:
        json.dump(answers[1:] or answers, file)
    return answers[0]

def size(name):
    return os.path.getsize(here + "/" + name) if os.path.exists(here + "/" + name) else 0

def give(code, text):
    sys.stdout.write(text)
    sys.stdout.flush()
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)
"""

ANSWER = "give(*answer(name))"

SRUN = """
if "MISTAKEN" in os.environ:
    import subprocess
    subprocess.run([sys.executable, "-m", "launch.finished", "--config=none.py", "--workdir=none"])
give(*answer(name))
"""

PYTHON = """
assert sys.argv[1] == "-m", sys.argv
if sys.argv[2] == "launch.train" and os.path.exists(here + "/train.waits"):
    import signal, time
    def stop(*_):
        open(here + "/train.stopped", "a").write("x")
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    open(here + "/train.started", "a").write("x")
    time.sleep(60)
give(*answer(sys.argv[2], (0, "")))
"""

SSH = """
import time
*options, host, command = sys.argv[1:]
code, text = answer(host.replace("@", "_"), (None, ""))
if code is not None:
    while size("train.started") == size("train.stopped") and os.path.exists(here + "/train.waits"):
        time.sleep(0.05)
    give(code, text)
os.execvp("bash", ["bash", "-c", command])
"""

GCLOUD = """
import shutil
verb, machine = sys.argv[4], here + "/machine"
flags = dict(a.lstrip("-").partition("=")[::2] for a in sys.argv[5:])
if verb == "scp":
    os.makedirs(machine, exist_ok=True)
    shutil.copy(sys.argv[5], machine)
elif verb == "delete":
    shutil.rmtree(machine)
elif verb == "ssh":
    question = "follow" if flags["command"].endswith("follow") else "ssh"
    code, text = answer(question, (None, ""))
    if code is not None:
        give(code, text)
    os.makedirs(machine, exist_ok=True)
    os.chdir(machine)
    os.execvp("bash", ["bash", "-c", flags["command"]])
give(*answer(verb))
"""

INSTALLER = """
if sys.argv[1] == "-c":
    sys.version_info = tuple(answer("version", (3, 12)))
    exec(sys.argv[2])
if sys.argv[1:3] == ["-m", "venv"]:
    os.makedirs(sys.argv[3] + "/bin", exist_ok=True)
    for program in ("pip", "python"):
        place = sys.argv[3] + "/bin/" + program
        os.path.exists(place) or os.symlink(here + "/bin/" + program, place)
"""


class Fakes:
    """A folder of fake programs, in front of the real ones on PATH."""

    def __init__(self, folder: Path, **programs: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, body in programs.items():
            path = folder / "bin" / name
            path.write_text(NOTE.format(python=sys.executable, folder=str(folder)) + body)
            path.chmod(0o755)
        self.environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def answers(self, question: str, *answers: tuple[int, str]) -> None:
        (self.folder / f"{question}.answers").write_text(json.dumps(answers))

    def calls(self, name: str | None = None) -> list[dict]:
        path = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if name in (None, call["name"])]

    def run(self, *words: str, **more) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=120, check=False, **more
        )

    def start(self, starter: str, *words: str) -> subprocess.CompletedProcess[str]:
        """python -m launch.STARTER."""
        return self.run(sys.executable, "-m", f"launch.{starter}", *words)


def train_calls(fakes):
    return [c for c in fakes.calls("python") if c["argv"][1] == "launch.train"]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def refuses(done, complaint):
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
