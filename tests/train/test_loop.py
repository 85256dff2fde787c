import io
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from tests.train import toy
from tmljax import checkpoint, cluster, config
from tmljax.config import UserError
from tmljax.train import feed, loop, speed
from tmljax.train.metrics import FILE, TIME, read_rows

ROOT = Path(__file__).parents[2]


def rows(workdir) -> list[dict]:
    """All that must not depend on interruptions."""
    return [{k: v for k, v in row.items() if not k.startswith(TIME)} for row in read_rows(workdir / FILE)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The workdir of a run of 16 steps that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("straight")
    assert toy.run(workdir, toy.experiment(16)) == (16, None)
    return workdir


def start(workdir, delay=0.0, steps=16) -> subprocess.Popen:
    command = [sys.executable, "tests/train/toy.py", str(workdir), str(steps), str(delay)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )


def wait_for(process, holds) -> None:
    while not holds():
        assert process.poll() is None, f"ended before it could be stopped: {process.stderr.read()}"
        time.sleep(0.01)


def test_a_row_per_logged_step_and_values_of_that_step(straight):
    assert [row["step"] for row in rows(straight)] == [1, 2, 4, 6, 8, 10, 12, 14, 16]
    for row in rows(straight):
        held_out = {name for name in row if name.startswith("val/")}
        assert held_out == ({"val/loss/total", "val/guess", "val/experts/dropped"} if row["step"] % 4 == 0 else set())
        assert {
            "loss/total",
            "learning_rate",
            "grad_norm",
            "experts/load_max",
            "experts/load_min",
            "skipped",
        } < row.keys()
    times = {name for name in read_rows(straight / FILE)[-1] if name.startswith(TIME)}
    assert {"time/positions_per_second", "time/conversation_seconds_per_second", "time/data_wait"} <= times


def test_rows_do_not_depend_on_how_often_they_are_written(straight, tmp_path):
    toy.run(tmp_path, toy.experiment(16, train={"log_every": 1, "save_every": 5}))
    often = {row["step"]: row for row in rows(tmp_path)}
    assert len(often) == 16
    for row in rows(straight):
        assert often[row["step"]] == row


@pytest.mark.parametrize("log_every", [1, 2, 3])
def test_a_second_and_a_half_of_waiting_are_a_step_in_every_row(tmp_path, monkeypatch, log_every):
    """By a clock that moves only where a step ends and where its batch comes: beside evaluations, saves, steps that ran
    ahead, a compilation and a resumption."""
    hand, report, take, compiles = [0.0], loop.report, feed.Feed.next, cluster.compile_together
    monkeypatch.setattr(speed.time, "perf_counter", lambda: hand[0])

    def end_step(*arguments, **more):
        hand[0] += 1
        report(*arguments, **more)

    def wait(*arguments):
        fed = take(*arguments)
        hand[0] += 0.5
        return fed._replace(waited=0.5)

    def compile_slowly(*arguments):
        hand[0] += 7
        compiles(*arguments)

    monkeypatch.setattr(loop, "report", end_step)
    monkeypatch.setattr(feed.Feed, "next", wait)
    monkeypatch.setattr(cluster, "compile_together", compile_slowly)
    for steps in (10, 16):
        toy.run(tmp_path, toy.experiment(steps, train={"log_every": log_every, "save_every": 5}))
    first, *others = read_rows(tmp_path / FILE)
    assert first["time/step_seconds"] == 1  # it waited for its batch while it compiled
    resumed = next(row for row in others if row["step"] > 10)
    steps = resumed["step"] - 10
    assert resumed["time/step_seconds"] == pytest.approx((1.5 * steps - 0.5) / steps)
    assert {(row["time/step_seconds"], row["time/data_wait"]) for row in others if row is not resumed} == {(1.5, 1 / 3)}


def test_no_second_of_a_step_that_returns_when_it_is_done_is_lost(tmp_path, monkeypatch):
    """As on simulated devices that share a host; the rows have the run's time between them."""
    hand, make = [0.0], loop.make_program
    monkeypatch.setattr(speed.time, "perf_counter", lambda: hand[0])

    class Slow(NamedTuple):
        step: Any

        def __call__(self, *arguments):
            hand[0] += 1
            return self.step(*arguments)

        def lower(self, *arguments):
            hand[0] += 7
            return self.step.lower(*arguments)

    def make_slow(*arguments):
        program = make(*arguments)
        return program._replace(step=Slow(program.step))

    monkeypatch.setattr(loop, "make_program", make_slow)
    toy.run(tmp_path, toy.experiment(3, train={"log_every": 1}))
    assert sum(row["time/step_seconds"] for row in read_rows(tmp_path / FILE)) == pytest.approx(3)


def test_two_batches_are_on_the_devices_at_most(tmp_path, monkeypatch):
    """That of the step and the next, or one that is held out."""
    placed, most, place = [], [], feed.to_devices

    def watched(batch, sharding):
        arrays = place(batch, sharding)
        placed.append(weakref.ref(arrays["x"]))
        most.append(sum(one() is not None for one in placed))
        return arrays

    monkeypatch.setattr(feed, "to_devices", watched)
    monkeypatch.setattr(loop, "to_devices", watched)
    toy.run(tmp_path, toy.experiment(16))
    assert len(most) == 16 + 1 + 4  # steps, the compilation of the evaluation, evaluations
    assert max(most) == 2


def test_a_trace_of_some_steps_changes_no_value(straight, tmp_path):
    toy.run(tmp_path, toy.experiment(16), profile=2)
    assert rows(tmp_path) == rows(straight)
    assert list((tmp_path / "profile").glob("**/*.xplane.pb"))


@pytest.mark.parametrize("stopped", [2, 4], ids=["before", "within"])
def test_a_run_that_ends_early_ends_its_trace(tmp_path, stopped):
    toy.run(tmp_path, toy.experiment(stopped), profile=8)
    assert bool(list((tmp_path / "profile").glob("**/*.xplane.pb"))) == (stopped == 4)


def test_training_learns(tmp_path):
    toy.run(tmp_path, toy.experiment(200, train={"eval_every": 50, "save_every": 200}))
    losses = [row["val/loss/total"] for row in rows(tmp_path) if "val/loss/total" in row]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kill_when", ["written past a checkpoint", "saving"])
def test_sigkill_changes_no_value(straight, tmp_path, kill_when):
    def past_a_checkpoint():
        return checkpoint.steps(tmp_path) and len(read_rows(tmp_path / FILE)) >= 4  # step 6 is logged

    def saving():
        return any((tmp_path / checkpoint.FOLDER).glob("8.*tmp*"))

    process = start(tmp_path, delay=0.1)
    wait_for(process, past_a_checkpoint if kill_when != "saving" else saving)
    process.kill()
    process.communicate()
    assert max(checkpoint.steps(tmp_path), default=0) < 16
    finished = start(tmp_path)
    _, said = finished.communicate(timeout=300)
    assert finished.returncode == 0, said
    assert rows(tmp_path) == rows(straight)
    same_parameters(tmp_path, straight)


def same_parameters(a, b):
    jax.tree.map(np.testing.assert_array_equal, checkpoint.read_params(a, 16)[0], checkpoint.read_params(b, 16)[0])


class Signalling(toy.Source):
    """Sends this process a signal while the loop waits for the sixth batch."""

    def __init__(self, number: signal.Signals, workdir: Path):
        super().__init__(8)
        self.number, self.workdir = number, workdir

    def __next__(self):
        if self.taken == 5:
            while not checkpoint.steps(self.workdir):
                time.sleep(0.01)
            time.sleep(0.1)
            os.kill(os.getpid(), self.number)
        return super().__next__()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_loses_nothing(straight, tmp_path, number):
    outcome = toy.run(tmp_path, toy.experiment(16), Signalling(number, tmp_path))
    assert outcome.signal is number
    assert outcome.step in (5, 6), "between two checkpoints"
    assert checkpoint.read_newest(tmp_path)[0] == outcome.step
    assert toy.run(tmp_path, toy.experiment(16)) == (16, None)
    assert rows(tmp_path) == rows(straight)


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    toy.run(tmp_path, toy.experiment(1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_exit_codes_of_a_stopped_process(tmp_path, number, code):
    process = start(tmp_path, delay=0.1)
    wait_for(process, lambda: rows(tmp_path))
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert checkpoint.steps(tmp_path)


def test_a_finished_run_does_nothing_more(straight):
    before = (straight / FILE).read_bytes()
    assert toy.run(straight, toy.experiment(16)) == (16, None)
    assert (straight / FILE).read_bytes() == before


@pytest.mark.parametrize("damage", ["half-written", "truncated", "a wrong bit"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_said_so(straight, tmp_path, capfd, damage):
    toy.run(tmp_path, toy.experiment(16, train={"keep": 5}), out=io.StringIO())
    newest = tmp_path / checkpoint.FOLDER / "16"
    if damage == "half-written":
        newest.rename(newest.with_name("16.orbax-checkpoint-tmp"))
    else:
        biggest = max((newest / "params").rglob("*"), key=lambda p: p.stat().st_size if "/d/" in str(p) else 0)
        data = bytearray(biggest.read_bytes())
        if damage == "truncated":
            del data[len(data) // 2 :]
        else:
            data[len(data) // 2] ^= 1
        biggest.write_bytes(data)
    capfd.readouterr()
    assert toy.run(tmp_path, toy.experiment(16, train={"keep": 5}), out=io.StringIO()) == (16, None)
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert "checkpoint 16" in said[0]
    assert rows(tmp_path) == rows(straight)
    same_parameters(tmp_path, straight)


def test_another_config_is_refused_by_name(straight):
    before = (straight / "config.json").read_bytes()
    other = toy.experiment(16, optimizer={"learning_rate": 0.5}, data={"seed": 3})
    with pytest.raises(
        UserError, match=r"config\.data\.seed was 0, now 3; config\.optimizer\.learning_rate was 0\.01"
    ) as e:
        toy.run(straight, other)
    assert "\n" not in str(e.value)
    assert (straight / "config.json").read_bytes() == before


def test_more_steps_and_another_mesh_are_allowed(straight, tmp_path):
    toy.run(tmp_path, toy.experiment(8))
    longer = toy.experiment(16, mesh={"data": 2, "fsdp": 2, "expert": 2}, train={"log_every": 4, "eval_every": 8})
    assert toy.run(tmp_path, longer, devices=8) == (16, None)
    assert config.from_json((tmp_path / "config.json").read_text()) == longer
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 4, 6, 8, 12, 16]


class Filling(toy.Source):
    """Fills the disk while batch 6 is made."""

    def __init__(self, folder: Path):
        super().__init__(8)
        self.ballast = folder / "ballast"

    def __next__(self):
        if self.taken == 6:
            while not checkpoint.steps(self.ballast.parent):
                time.sleep(0.01)
            with open(self.ballast, "wb") as file:
                try:
                    while True:
                        file.write(b"\0" * 4096)
                        file.flush()
                except OSError:
                    pass
        return super().__next__()


@pytest.fixture
def small_disk(tmp_path):
    """2 MiB of their own."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("only root can mount the small disk that this test fills")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_full_disk_is_one_clear_line_and_costs_no_older_checkpoint(straight, small_disk, capfd):
    source = Filling(small_disk)
    with pytest.raises((UserError, OSError), match=r"(No|no) space left") as e:
        toy.run(small_disk, toy.experiment(16), source)
    assert "\n" not in str(e.value)
    assert "Event loop" not in capfd.readouterr().err
    assert checkpoint.read_newest(small_disk)[0] == 4
    source.ballast.unlink()
    assert toy.run(small_disk, toy.experiment(16)) == (16, None)
    assert rows(small_disk) == rows(straight)


def test_a_checkpoint_that_finds_no_space_is_a_users_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 13 bytes: No space left on device [os_error_code='28']")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", full)
    with pytest.raises(UserError, match=r"no space left.*free some space"):
        toy.run(tmp_path, toy.experiment(16))


def test_another_error_of_the_writer_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("INTERNAL: something else")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", broken)
    with pytest.raises(ValueError, match="something else") as e:
        toy.run(tmp_path, toy.experiment(16))
    assert not isinstance(e.value, UserError)
