"""What hosts that die, freeze or are asked to leave do to a run: nothing that its metrics or its checkpoints show.

The whole matrix, two and four hosts, every fault, is slow: 63 tests of two or three starts, 11 s of CPU for a start of
two hosts and twice that for four. One more has no fault, and experts of the real model on two hosts.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.train import toy
from tests.train.test_real import SIZES
from tmljax import checkpoint
from tmljax.train import ledger
from tmljax.train.metrics import FILE, TIME, read_rows

ROOT = Path(__file__).parents[1]
STEPS = 12  # a checkpoint every 4
MESHES = {2: "data=2,fsdp=2", 4: "fsdp=2,expert=2"}  # four devices, over two hosts or four
HANG = 40.0  # seconds; a host of a busy machine may be away for long


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    while STARTED:
        STARTED.pop().kill()


def start(
    workdir: Path, hosts: int, harm: str = "", restarts: int = 0, mesh: str = "", hang: float = 600.0
) -> subprocess.Popen:
    flags = [f"--hosts={hosts}", f"--devices-per-host={4 // hosts}", f"--max-restarts={restarts}"]
    run = [sys.executable, "-m", "tests.train.host", str(workdir), str(STEPS), mesh or MESHES[hosts]]
    return supervise([*flags, f"--hang-seconds={hang}"], run, {"HARM": harm} if harm else {})


def supervise(flags: list[str], command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    words = [sys.executable, "-m", "launch.local", *flags, "--", *command]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    STARTED.append(subprocess.Popen(words, cwd=ROOT, env=os.environ | environment, **streams))
    return STARTED[-1]


def run(*where, code: int = 0, **options) -> str:
    process = start(*where, **options)
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == code, said
    return said


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Number of hosts -> workdir of a run that nothing disturbed."""
    made = {}

    def get(hosts: int) -> Path:
        if hosts not in made:
            made[hosts] = tmp_path_factory.mktemp(f"straight{hosts}") / "run"
            run(made[hosts], hosts)
        return made[hosts]

    return get


def rows(workdir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(TIME)} for row in read_rows(workdir / FILE)]


def same(workdir: Path, straight: Path) -> None:
    """Bit for bit."""
    assert rows(workdir) == rows(straight)
    ours, theirs = (checkpoint.read_params(folder, STEPS)[0] for folder in (workdir, straight))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def close(workdir: Path, straight: Path) -> None:
    """On another mesh."""
    assert len(rows(workdir)) == len(rows(straight))
    for row, other in zip(rows(workdir), rows(straight), strict=True):
        assert row == pytest.approx(other, rel=1e-5)


def adds_up(workdir: Path) -> dict[str, float]:
    """The seconds lost by cause, from the last row."""
    row = {name.removeprefix(TIME): value for name, value in read_rows(workdir / FILE)[-1].items()}
    lost = {name.removeprefix("lost/"): value for name, value in row.items() if name.startswith("lost/")}
    assert set(lost) == set(ledger.CAUSES)
    assert row["useful"] + sum(lost.values()) == pytest.approx(row["wall"])
    assert row["goodput"] == pytest.approx(row["useful"] / row["wall"])
    lines = [json.loads(line) for line in (workdir / ledger.FILE).read_text().splitlines()]
    at = next(line["at"] for line in lines if line["began"] == lines[-1]["began"] and line["step"] == STEPS)
    assert row["wall"] == pytest.approx(at - lines[0]["began"], abs=0.01)
    return lost


def test_a_host_killed_in_a_step_costs_time_and_nothing_else(straight, tmp_path):
    workdir = tmp_path / "run"
    said = run(workdir, 2, harm="0:step 8:SIGKILL", restarts=1)  # which keeps the account, to step 6 by then
    assert re.search(r"host 0 was ended by SIGKILL, last heard of at .*; all hosts start again \(1 of 1\)", said)
    assert "Traceback" not in said
    same(workdir, straight(2))
    lost = adds_up(workdir)
    assert lost["redone"] > 0
    assert lost["down"] > 0
    assert lost["start"] > 0


def test_one_host_asked_to_leave_stops_all_at_one_step_and_another_mesh_goes_on(straight, tmp_path):
    workdir = tmp_path / "run"
    said = run(workdir, 2, harm="1:step 6:SIGTERM")
    stopped = checkpoint.read_newest(workdir)[0]
    assert f"ended at {stopped} SIGTERM" in said
    assert stopped in (6, 7, 8)
    experiment = toy.experiment(STEPS, mesh={"data": 1, "fsdp": 1, "expert": 2, "tensor": 2})
    assert toy.run(workdir, experiment, devices=4) == (STEPS, None)
    close(workdir, straight(2))


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("lead", [True, False])
@pytest.mark.parametrize("place", ["starting", "compiling", "step 7", "evaluation", "checkpoint", "writing"])
def test_sigkill(straight, tmp_path, hosts, lead, place):
    harmed = 0 if lead else hosts - 1
    said = run(tmp_path / "run", hosts, harm=f"{harmed}:{place}:SIGKILL", restarts=1)
    assert f"host {harmed} was ended by SIGKILL" in said
    same(tmp_path / "run", straight(hosts))
    adds_up(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("lead", [True, False])
def test_sigkill_while_restoring(straight, tmp_path, hosts, lead):
    workdir, harmed = tmp_path / "run", 0 if lead else hosts - 1
    run(workdir, hosts, harm="0:step 6:SIGTERM")
    said = run(workdir, hosts, harm=f"{harmed}:restoring:SIGKILL", restarts=1)
    assert f"host {harmed} was ended by SIGKILL" in said
    same(workdir, straight(hosts))


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("lead", [True, False])
@pytest.mark.parametrize("place", ["step 7", "writing"])
def test_a_host_that_freezes_is_named_and_all_start_again(straight, tmp_path, hosts, lead, place):
    harmed = 0 if lead else hosts - 1
    said = run(tmp_path / "run", hosts, harm=f"{harmed}:{place}:SIGSTOP", restarts=1, hang=HANG)
    assert f"host {harmed} hangs" in said
    assert "has given no sign of life since" in said
    same(tmp_path / "run", straight(hosts))


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("lead", [True, False])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_notice_to_one_host(straight, tmp_path, hosts, lead, name):
    workdir, harmed = tmp_path / "run", 0 if lead else hosts - 1
    run(workdir, hosts, harm=f"{harmed}:step 6:{name}", code=130 if name == "SIGINT" else 0)
    assert checkpoint.read_newest(workdir)[0] in (6, 7, 8)
    run(workdir, hosts)
    same(workdir, straight(hosts))


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("place", ["restoring", "compiling", "leaving"])
def test_a_notice_to_all_outside_the_steps(straight, tmp_path, hosts, place):
    workdir = tmp_path / "run"
    run(workdir, hosts, harm="0:step 6:SIGTERM")
    process = start(workdir, hosts, harm=f"0:{place}:SIGCONT")  # which does no harm, and leaves a mark
    while not workdir.with_name(f"run.{place}.SIGCONT").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    run(workdir, hosts)
    same(workdir, straight(hosts))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_notice_to_the_supervisor(straight, tmp_path, number, code):
    workdir = tmp_path / "run"
    process = start(workdir, 2)
    while not rows(workdir):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said
    assert checkpoint.steps(workdir)
    run(workdir, 2)
    same(workdir, straight(2))


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("how", ["truncated", "a wrong bit"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(straight, tmp_path, hosts, how):
    workdir = tmp_path / "run"
    run(workdir, hosts, harm="0:step 10:SIGTERM")
    newest = max(checkpoint.steps(workdir))
    parts = (workdir / checkpoint.FOLDER / str(newest) / "params" / "d").iterdir()
    path = max(parts, key=lambda part: part.stat().st_size)  # what the hosts wrote, merged
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said = run(workdir, hosts)
    assert said.count(f"checkpoint {newest} is damaged") == 1
    assert "using checkpoint 8" in said
    same(workdir, straight(hosts))


@pytest.mark.slow
@pytest.mark.parametrize(("hosts", "mesh"), [(1, "data=4"), (4, "fsdp=4"), (2, "expert=2,tensor=2")])
def test_another_number_of_hosts_and_another_mesh_go_on(straight, tmp_path, hosts, mesh):
    workdir = tmp_path / "run"
    run(workdir, 2, harm="0:step 7:SIGTERM")
    run(workdir, hosts, mesh=mesh)
    close(workdir, straight(2))


def train_for_real(folder: Path, hosts: int = 2, **changes: object) -> subprocess.Popen:
    """The real model through its verb on hosts of two devices, its dataset built on the way."""
    overrides = [f"--config.{name}={value}" for name, value in (SIZES | changes).items()]
    where = [f"--workdir={folder / 'run'}", f"--config.data.root={folder / 'data'}"]
    verb = [sys.executable, "-m", "launch.train", "--config=configs/smoke.py", *where, *overrides]
    return supervise([f"--hosts={hosts}", "--devices-per-host=2", "--max-restarts=1"], verb, {})


def until_data_is_built(process: subprocess.Popen, folder: Path) -> subprocess.Popen:
    while not list(folder.glob("data/*/.staging/*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    return process


def host_of(supervisor: subprocess.Popen, index: int) -> int:
    """Its process."""
    (children,) = Path(f"/proc/{supervisor.pid}/task").glob(f"{supervisor.pid}/children")
    for pid in map(int, children.read_text().split()):
        if f"JAX_PROCESS_ID={index}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise LookupError(index)


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2, 4])
def test_the_real_model_and_the_end_of_a_host_while_its_dataset_is_built(tmp_path, hosts):
    train = partial(train_for_real, hosts=hosts, **{"data.batch": 2 * hosts})
    undisturbed = train(tmp_path / "straight")
    said, _ = undisturbed.communicate(timeout=1200)
    assert undisturbed.returncode == 0, said
    for index in (0, hosts - 1):
        folder = tmp_path / str(index)
        process = until_data_is_built(train(folder), folder)
        os.kill(host_of(process, index), signal.SIGKILL)
        said, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, said
        assert f"host {index} was ended by SIGKILL, last heard of at building the dataset" in said
        assert rows(folder / "run") == rows(tmp_path / "straight" / "run")

    asked = until_data_is_built(train(tmp_path / "asked"), tmp_path / "asked")
    asked.send_signal(signal.SIGTERM)
    said, _ = asked.communicate(timeout=60)
    assert asked.returncode == 0, said
    assert "asked to leave, with nothing to save" in said
    again = train(tmp_path / "asked")
    said, _ = again.communicate(timeout=1200)
    assert again.returncode == 0, said
    assert rows(tmp_path / "asked" / "run") == rows(tmp_path / "straight" / "run")


@pytest.mark.slow
def test_the_real_model_with_its_experts_on_two_hosts(tmp_path):
    """As on one, while the exchange crosses from process to process."""
    short = {"train.steps": 2, "train.log_every": 1}
    one, two = ({"mesh.expert": n, "mesh.data": 1} for n in (2, 4))
    for hosts, mesh in ((1, one), (2, two)):
        process = train_for_real(tmp_path / str(hosts), hosts, **short, **mesh)
        said, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, said
    first, second = (rows(tmp_path / str(hosts) / "run") for hosts in (1, 2))
    assert len(first) == 2
    assert second[0] == pytest.approx(first[0], rel=1e-5)
    losses = [{name: value for name, value in row.items() if name.startswith("loss/")} for row in (first[1], second[1])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # after a step of Muon


@pytest.fixture
def small_disk(tmp_path):
    """2 MiB of their own."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("only root can mount the small disk that this test fills")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2, 4])
def test_a_disk_that_fills_ends_all_in_one_line(straight, small_disk, hosts):
    workdir, ballast = small_disk / "run", small_disk / "ballast"
    process = start(workdir, hosts, restarts=3)
    while not checkpoint.steps(workdir):
        assert process.poll() is None
        time.sleep(0.01)
    with contextlib.suppress(OSError), open(ballast, "wb") as file:
        while True:
            file.write(b"\0" * 4096)
            file.flush()
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 2, said
    (line,) = [line for line in said.splitlines() if "error:" in line]
    assert "space left on device" in line
    ballast.unlink()
    run(workdir, hosts)
    same(workdir, straight(hosts))
