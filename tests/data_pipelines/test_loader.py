"""The loader is a pure function of data, seed and position: whatever is interrupted, sharded or threaded."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import loader, recordings
from tmljax import config
from tmljax.config import UserError
from tmljax.plan.setting import batch_shapes
from tmljax.stream import weave
from tmljax.stream.microturn import ABSENT, FRAMES, HOLD, IDLE, MEL, Layout
from tmljax.stream.record import Session, Word
from tmljax.stream.text import Tokenizer

TOKENIZER = Tokenizer.train(["one two three four five"], 400)
WINDOW, EVERY = 8, 2
STREAM = config.Stream(video_every=EVERY, vocab_size=400)
LAYOUT = Layout(STREAM)


def make_session(number: int, microturns: int, family: str = "turn_taking") -> Session:
    """Frame f of session n holds the number n in channel 0 of the model's mel and f in channel 1."""
    frames = microturns * FRAMES
    mel = np.zeros((frames, MEL), np.float16)
    mel[:, 0], mel[:, 1] = number, np.arange(frames)
    dmel = np.random.default_rng(number).integers(0, 16, (frames, MEL)).astype(np.uint8)
    video = np.full((-(-microturns // EVERY), 40, 40, 3), number, np.uint8)
    video[:, 0, 0, 0] = np.arange(len(video))
    user = (Word("one", 0.1, 0.3), Word("two", 0.4, 0.5))
    throughout = (Word("one", 0.1, 0.3), Word("two", 0.4, frames / 40 + 1))  # the mel of a silent model is not its own
    return Session(str(number), family, frames, dmel, mel, user_words=user, model_words=throughout, video=video)


def make_sessions(count: int = 10, first: int = 0) -> list[Session]:
    return [make_session(first + i, 3 + 2 * i) for i in range(count)]


def make_experiment(batch: int = 4, **data: object) -> config.Experiment:
    return config.Experiment(stream=STREAM, data=config.Data(window=WINDOW, batch=batch, **data))


def rows_of(process: int, count: int, batch: int = 12) -> range:
    return range(batch // count * process, batch // count * (process + 1))


def load(sessions: list[Session] | None = None, *, seed: int = 3, batch: int = 4, **how: Any) -> loader.Loader:
    sources = [loader.Source("some", 1.0, make_sessions() if sessions is None else sessions)]
    return loader.load_sources(sources, make_experiment(batch), TOKENIZER, seed=seed, **how)


def take(batches: loader.Loader, count: int) -> list[loader.Streams]:
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def assert_same(first: list[loader.Streams], second: list[loader.Streams]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def numbers(batches: list[loader.Streams]) -> list[int]:
    """Which session each row comes from."""
    return [int(n) for batch in batches for n in batch["model_mel"][:, 0, 0, 0]]


def test_batches_have_the_contracts_shapes_and_types() -> None:
    (batch,) = take(load(), 1)
    T, TV = WINDOW, WINDOW // EVERY
    expected = {
        "user_dmel": ((4, T, 8, 80), np.uint8),
        "user_present": ((4, T), np.bool_),
        "video": ((4, TV, 1, 4800), np.uint8),
        "video_present": ((4, TV), np.bool_),
        "user_text": ((4, T, 1), np.int32),
        "model_text": ((4, T, 1), np.int32),
        "model_mel": ((4, T, 8, 80), np.float16),
        "heard": ((4, T), np.int32),
        "seen": ((4, TV, 2), np.int32),
        "valid": ((4, T), np.bool_),
        "start": ((4,), np.int32),
    }
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == expected
    assert batch_shapes(make_experiment(), 4) == expected  # what is planned for


@pytest.mark.parametrize("stop", [0, 1, 5, 11])
def test_resume_continues_with_the_batch_that_would_have_come(stop: int) -> None:
    whole = take(load(), 14)
    first = load()
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    second = load()
    next(second)  # a loader already in use is moved too
    second.set_state(state)
    assert second.get_state() == state
    assert_same(take(second, 14 - stop), whole[stop:])


def test_prefetching_ahead_is_not_in_the_state() -> None:
    batches = load()
    batches.start()
    assert batches.get_state()["examples"] == 0
    next(batches)
    assert batches.get_state()["examples"] == 4
    batches.close()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_rows_of_all_processes_are_the_batch_of_one(count: int) -> None:
    whole = take(load(batch=12), 5)
    parts = [take(load(batch=12, rows=rows_of(p, count)), 5) for p in range(count)]
    assert parts[0][0]["valid"].shape[0] == 12 // count
    joined = [{name: np.concatenate([part[i][name] for part in parts]) for name in whole[i]} for i in range(5)]
    assert_same(joined, whole)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_an_epoch_holds_each_session_once_over_all_processes(count: int) -> None:
    """12 sessions are an epoch of one batch; 24 processes-times-batches hold two."""
    sessions = make_sessions(24)
    parts = [numbers(take(load(sessions, batch=12, rows=rows_of(p, count)), 4)) for p in range(count)]
    rows = 12 // count
    for epoch in (0, 2 * rows):
        seen = [n for part in parts for n in part[epoch : epoch + 2 * rows]]
        assert sorted(seen) == list(range(24))


def test_resume_on_other_processes_and_rows_goes_on_in_the_same_stream() -> None:
    whole = numbers(take(load(batch=4), 9))
    one = load(batch=4)
    for _ in range(3):
        next(one)
    state = one.get_state()
    one.close()
    parts = []
    for p in range(2):
        part = load(batch=12, rows=rows_of(p, 2))
        part.set_state(state)
        parts.append(numbers(take(part, 2)))
    after = [n for i in range(2) for part in parts for n in part[6 * i : 6 * i + 6]]
    assert after == whole[12:]


def test_rows_may_lie_apart_and_be_read_twice() -> None:
    """As where the devices of a process are not neighbours, and where two processes hold parts of one example."""
    whole = take(load(batch=12), 3)
    for rows in ([1, 4, 11], [4, 5]):
        part = take(load(batch=12, rows=rows), 3)
        assert_same(part, [{name: array[rows] for name, array in batch.items()} for batch in whole])


def test_epochs_and_seeds_shuffle_differently_but_again_the_same() -> None:
    sessions = make_sessions(20)
    order = numbers(take(load(sessions), 10))
    first, second = order[:20], order[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second != list(range(20)) != first
    assert numbers(take(load(sessions), 10)) == order
    assert numbers(take(load(sessions, seed=4), 5)) != first
    assert numbers(take(load(sessions, seed=4), 5)) != second  # no seed is another's next epoch


def test_mixture_follows_the_weights_and_each_source_its_own_epochs() -> None:
    sources = [
        loader.Source("a", 0.5, make_sessions(10)),
        loader.Source("b", 1.5, make_sessions(6, first=100)),
        loader.Source("c", 2.0, make_sessions(3, first=200)),
    ]
    drawn = numbers(take(loader.load_sources(sources, make_experiment(8), TOKENIZER, seed=0), 30))
    counts = [sum(low <= n < low + 100 for n in drawn) for low in (0, 100, 200)]
    np.testing.assert_allclose(counts, [30, 90, 120], atol=2)
    own = [n for n in drawn if n < 100]
    assert sorted(own[:10]) == sorted(own[10:20]) == list(range(10))
    assert max(np.diff([i for i, n in enumerate(drawn) if n < 100])) <= 12  # evenly spread


def test_windows_start_on_a_frame_and_carry_their_clock() -> None:
    long = make_session(7, 41)
    streams = weave.weave(long, LAYOUT, TOKENIZER)
    starts = set()
    for batch in take(load([long], batch=16), 12):
        for row, start in enumerate(batch["start"]):
            starts.add(int(start))
            assert start % EVERY == 0
            for name in ("user_dmel", "model_mel", "model_text", "heard", "valid"):
                np.testing.assert_array_equal(batch[name][row], streams[name][start : start + WINDOW])
            assert batch["video"][row, :, 0, 0].tolist() == list(range(start // EVERY, (start + WINDOW) // EVERY))
    assert starts == set(range(0, 42 - WINDOW + 1, EVERY))


def test_all_of_a_long_session_is_seen_about_equally_often() -> None:
    T, rng = 60, np.random.default_rng(0)
    seen = np.zeros(T)
    for _ in range(4000):
        start = loader.draw_start(T, 20, EVERY, rng)
        seen[start : start + 20] += 1
    seen /= 4000
    assert seen.min() > 20 / 80 - 0.03
    assert seen.max() < 2 * 20 / 80 + 0.03


def test_short_sessions_are_padded_at_their_end() -> None:
    (batch,) = take(load([make_session(5, 3)], batch=1), 1)
    np.testing.assert_array_equal(batch["valid"][0], [True] * 3 + [False] * 5)
    assert batch["start"][0] == 0
    assert not batch["user_present"][0, 3:].any()
    assert not batch["video_present"][0, 2:].any()
    assert (batch["model_text"][0, 4:] == IDLE).all()
    assert (batch["user_text"][0] == ABSENT).all()
    assert (batch["model_text"][0, :2] > HOLD).all()


def test_unknown_user_words_are_no_target_but_silence_is() -> None:
    known, unknown = (
        dataclasses.replace(make_session(0, 6), user_words=(), family=family)
        for family in (recordings.FAMILY, recordings.UNHEARD)
    )
    assert (take(load([known], batch=1), 1)[0]["heard"] == IDLE).all()
    assert (take(load([unknown], batch=1), 1)[0]["heard"][0, :6] == ABSENT).all()


def test_worker_processes_make_the_same_batches_and_start_no_device() -> None:
    class Watch(list):
        def __getitem__(self, index: int) -> Session:
            from jax._src import xla_bridge

            assert not xla_bridge._backends, "jax has started a backend where data is read"
            return super().__getitem__(index)

    expected = take(load(), 5)
    workers = load(Watch(make_sessions()), workers=2)
    assert_same([next(workers) for _ in range(3)], expected[:3])
    state = workers.get_state()
    workers.close()
    threads = load()
    threads.set_state(state)
    assert_same(take(threads, 2), expected[3:])


ORPHAN = """
import multiprocessing, os, pickle, signal, sys
from data_pipelines import loader
if __name__ == "__main__":
    batches = loader.load_sources(*pickle.load(open(sys.argv[1], "rb")), seed=0, workers=1)
    next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "orphan.py").write_text(ORPHAN)
    what = ([loader.Source("some", 1.0, make_sessions())], make_experiment(), TOKENIZER)
    (tmp_path / "what.pkl").write_bytes(pickle.dumps(what))
    command = [sys.executable, tmp_path / "orphan.py", tmp_path / "what.pkl"]
    environment = os.environ | {"PYTHONPATH": str(Path(loader.__file__).parents[1])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120)
    worker = int(done.stdout)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(worker)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_state_of_other_data_is_refused() -> None:
    state = load().get_state()
    with pytest.raises(UserError, match="sources"):
        load(make_sessions(9)).set_state(state)
    with pytest.raises(UserError, match="seed"):
        load(seed=9).set_state(state)


def test_errors_in_the_data_reach_the_caller() -> None:
    class Broken(list):
        def __getitem__(self, index: int) -> Session:
            raise UserError("the shard is damaged")

    with pytest.raises(UserError, match="damaged"):
        next(load(Broken(range(3))))


def test_empty_sources_and_foreign_tokenizers_are_refused() -> None:
    with pytest.raises(UserError, match="no session"):
        load([])
    tight = config.Stream(video_every=EVERY, vocab_size=TOKENIZER.vocab_size - 1)
    small = dataclasses.replace(make_experiment(), stream=tight)
    with pytest.raises(UserError, match="vocab_size"):
        loader.load_sources([loader.Source("some", 1.0, make_sessions())], small, TOKENIZER, seed=0)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared data: 10 and 6 synthetic sessions (train, validation), 5 and 0 recorded."""

    class Prepared(list):
        def fingerprint(self) -> str:
            return str(len(self))

    def sessions(first: int, counts: dict[str, int]):
        return lambda *args: Prepared(make_sessions(counts[args[-1]], first + 50 * (args[-1] == "validation")))

    monkeypatch.setattr(loader.builder, "open_split", sessions(0, {"train": 10, "validation": 6}))
    monkeypatch.setattr(loader.recordings, "open_manifest", sessions(100, {"train": 5, "validation": 0}))


@pytest.mark.usefixtures("opened")
def test_recordings_join_the_synthetic_sessions_by_weight() -> None:
    experiment = make_experiment(8, recordings="calls.jsonl:3")
    drawn = numbers(take(loader.train_loader(experiment, TOKENIZER, seed=1), 10))
    assert sum(n >= 100 for n in drawn) == 60
    only = make_experiment(8, recordings="calls.jsonl:3,synthetic:0")
    assert set(numbers(take(loader.train_loader(only, TOKENIZER), 4))) == set(range(100, 105))
    with pytest.raises(UserError, match="leaves no train data"):
        loader.train_loader(make_experiment(recordings="synthetic:0"), TOKENIZER)


@pytest.mark.usefixtures("opened")
def test_validation_is_the_same_for_every_seed_and_process_count() -> None:
    experiment = make_experiment(4, recordings="calls.jsonl:3")
    batches = loader.validation_batches(experiment, TOKENIZER, 3)
    other = dataclasses.replace(experiment, train=config.Train(seed=77))
    assert_same(loader.validation_batches(other, TOKENIZER, 3), batches)
    assert sorted(numbers(batches)[:6]) == list(range(50, 56))  # and none of the training sessions
    parts = [loader.validation_batches(experiment, TOKENIZER, 3, rows=rows_of(p, 2, 4)) for p in range(2)]
    joined = [{name: np.concatenate([part[i][name] for part in parts]) for name in batches[i]} for i in range(3)]
    assert_same(joined, batches)
