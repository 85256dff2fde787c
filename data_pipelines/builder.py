"""The prepared dataset: built by all cores, resumable, read at random.

Worker processes render shards (a fixed number of sessions each) straight into ArrayRecord files in
`root/name/.staging`, each renamed into place when whole, so a build that was killed goes on with the shards
that are missing. In the end TFDS takes the files over as its own (`root/name/duplex/1.0.0`). On Apache
Beam the worker processes are on other machines, and all else is the same (data_pipelines/beam.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipelines import beam, records
from data_pipelines.plan import SPLITS, Shard, count_sessions, shards
from data_pipelines.staging import is_whole, read_summary, render_all
from tmljax import files, pulse
from tmljax.config import Experiment, UserError
from tmljax.stream.record import Session
from tmljax.stream.text import Tokenizer

GENERATOR = 14  # raise it when the same config gives other sessions
STAGING = ".staging"


@dataclass(frozen=True)
class Summary:
    """What a dataset holds, and what building it took (0 where nothing had to be rendered)."""

    path: Path
    sessions: dict[str, dict[str, int]]  # split -> family -> sessions
    seconds: dict[str, dict[str, float]]  # split -> family -> seconds of conversation
    rendered_seconds: float
    wall_seconds: float


def folder(experiment: Experiment) -> Path:
    return Path(experiment.data.root) / experiment.data.name


def tokenizer_path(experiment: Experiment) -> Path:
    return folder(experiment) / "tokenizer.json"


def identity(experiment: Experiment) -> dict[str, Any]:
    """Everything that decides the bytes of the dataset."""
    data, stream = experiment.data, experiment.stream
    return {
        "generator": GENERATOR,
        "data.seed": data.seed,
        "data.train_hours": data.train_hours,
        "data.test_per_family": data.test_per_family,
        "data.mixture": dict(sorted(data.mixture.items())),
        "stream.video_height": stream.video_height,
        "stream.video_width": stream.video_width,
        "stream.video_every": stream.video_every,
        "stream.vocab_size": stream.vocab_size,
    }


class Duplex(records.Dataset):
    """Sessions of synthetic duplex conversation; see data_pipelines/records.py for the features."""


def dataset(experiment: Experiment) -> Duplex:
    """Of the staged shards, or of what they became."""
    planned, home = shards(experiment), folder(experiment)
    staged = {
        split: [(home / STAGING / f"{s.name}.array_record", s.sessions) for s in planned if s.split == split]
        for split in SPLITS
    }
    return Duplex(home, experiment.stream, staged)


def build(
    experiment: Experiment, progress: bool = True, workers: int | None = None, beam_options: Sequence[str] | None = None
) -> Summary:
    """Prepares root/name where it is absent, and goes on where it was interrupted.

    On this machine's cores, `workers` of them, or with `beam_options` wherever Apache Beam has its workers. Raises
    UserError when root/name was built with another config, or the disk is full.
    """
    began, home = time.monotonic(), folder(experiment)
    shards(experiment)  # an impossible plan fails before anything is touched
    try:
        _claim(home, experiment)
        rendered = 0.0
        if not _is_done(home):
            with _alone(home / STAGING):
                rendered = _prepare(experiment, progress, workers, beam_options)
        refuse_damaged(experiment)
        shutil.rmtree(home / STAGING, ignore_errors=True)
    except OSError as e:
        if files.is_full(e):
            raise UserError(f"the disk is full: free space for {home} and run again, what is there is kept") from None
        raise UserError(
            f"cannot write {home}: {e.strerror or e}; name another folder with --config.data.root"
        ) from None
    counts = read_counts(experiment)
    return Summary(home, counts["sessions"], counts["seconds"], rendered, time.monotonic() - began)


def _prepare(experiment: Experiment, progress: bool, workers: int | None, beam_options: Sequence[str] | None) -> float:
    """Renders what is missing and finishes; returns the seconds of conversation rendered."""
    home, planned = folder(experiment), shards(experiment)
    if _is_done(home):  # by the process that we waited for
        return 0.0
    staging = home / STAGING
    missing = [shard for shard in planned if not is_whole(shard, staging)]
    if beam_options is None:
        rendering = render_all(experiment, missing, staging, min(workers or cores(), len(missing)))
    else:
        rendering = beam.render_all(experiment, missing, staging, beam_options)
    rendered = _follow(rendering, experiment, missing, progress)
    _finish(experiment, planned, staging)
    return rendered


@contextlib.contextmanager
def _alone(staging: Path) -> Iterator[None]:
    """One process builds at a time; another one waits for it here."""
    staging.mkdir(exist_ok=True)
    with open(staging / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        staging.mkdir(exist_ok=True)
        yield


def _is_done(home: Path) -> bool:
    return (home / "summary.json").exists()


def _claim(home: Path, experiment: Experiment) -> None:
    """Marks the folder as this config's, or raises UserError naming the fields in which it differs."""
    if refuse_another(experiment):
        return
    if home.exists() and any(not file.name.startswith("build.json.") for file in home.iterdir()):
        raise UserError(f"{home} is no dataset of ours and not empty; choose another config.data.name")
    home.mkdir(parents=True, exist_ok=True)
    files.write_text(home / "build.json", json.dumps(identity(experiment), indent=2) + "\n")


def refuse_another(experiment: Experiment) -> bool:
    """Whether root/name is this config's. Raises UserError naming the fields in which it differs where it is not."""
    home, wanted = folder(experiment), identity(experiment)
    path = home / "build.json"
    if not path.exists():
        return False
    try:
        found = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise records.damage(home, "its build.json cannot be read") from None
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        fields = ", ".join(
            "another version of the generator"
            if name == "generator"
            else f"config.{name}={found.get(name)!r} (now {wanted[name]!r})"
            for name in differing
        )
        remedy = "choose another config.data.name, or that of the dataset that is meant, or delete that folder"
        raise UserError(f"{home} was built with {fields}; {remedy}")
    return True


def cores() -> int:
    """Those this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _follow(
    rendering: Iterable[tuple[Shard, float]], experiment: Experiment, missing: Sequence[Shard], progress: bool
) -> float:
    """Shows a bar while shards are rendered; returns the seconds of conversation."""
    total, rendered = sum(count_sessions(experiment).values()), 0.0
    bar = tqdm(
        total=total,
        initial=total - sum(shard.sessions for shard in missing),
        unit="session",
        desc=f"rendering {experiment.data.name}",
        disable=not progress,
        smoothing=0.1,
    )
    with bar:
        for shard, seconds in rendering:
            rendered += seconds
            rate = rendered / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate:.0f} times real time", refresh=False)
            bar.update(shard.sessions)
            pulse.goes_on()
    return rendered


def _finish(experiment: Experiment, planned: Sequence[Shard], staging: Path) -> None:
    """Trains the tokenizer, hands the shards to TFDS, and says that all is done."""
    sessions: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    seconds: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    words: Counter[str] = Counter()
    for shard in planned:
        summary = read_summary(shard, staging)
        sessions[shard.split].update(summary["sessions"])
        seconds[shard.split].update(summary["seconds"])
        if shard.split == "train":
            words.update(summary["words"])
    Tokenizer.of_words(words, experiment.stream.vocab_size).save(tokenizer_path(experiment))
    if not dataset(experiment).whole:
        shutil.rmtree(Path(dataset(experiment).data_dir).parent, ignore_errors=True)
        dataset(experiment).take_over(staging)
    summary = {"sessions": sessions, "seconds": seconds, "words": dict(sorted(words.items()))}
    files.write_text(folder(experiment) / "summary.json", json.dumps(summary, indent=2) + "\n")


class Sessions(Sequence[Session]):
    """The sessions of one split, decoded when asked for. It can be pickled into worker processes."""

    def __init__(self, experiment: Experiment, split: str) -> None:
        self._experiment, self._split = experiment, split
        self._source: Any = None
        self._length = count_sessions(experiment)[split]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Session:
        if not -self._length <= index < self._length:
            raise IndexError(index)
        if self._source is None:
            self._source = Duplex(folder(self._experiment), self._experiment.stream).as_data_source(self._split)
        return records.read(self._source, index % self._length, folder(self._experiment))

    def fingerprint(self) -> str:
        """Of the records; see data_pipelines/records.py."""
        return records.fingerprint(Duplex(folder(self._experiment), self._experiment.stream).data_dir, self._split)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}


def open_split(experiment: Experiment, split: str) -> Sessions:
    """Random access to a split of the prepared dataset. Raises UserError where that is absent or another's."""
    home = folder(experiment)
    if split not in SPLITS:
        raise UserError(f"there is no split {split}; the splits are {', '.join(SPLITS)}")
    if not _is_done(home):
        raise UserError(f"{home} holds no prepared dataset; run python -m launch.data with this config first")
    _claim(home, experiment)
    refuse_damaged(experiment)
    return Sessions(experiment, split)


def refuse_damaged(experiment: Experiment) -> None:
    """Raises UserError where files of the prepared dataset are missing or have lost a part."""
    home = folder(experiment)
    damaged = Duplex(home, experiment.stream).damaged(SPLITS)
    if damaged:
        raise records.damage(home, f"it has lost files of its splits {', '.join(damaged)}, or parts of them")


def read_counts(experiment: Experiment) -> dict[str, Any]:
    """What summary.json holds: sessions and seconds of each split and family, and the words of training. Raises
    UserError where it is damaged."""
    home = folder(experiment)
    try:
        return dict(json.loads((home / "summary.json").read_text()))
    except (ValueError, TypeError):
        raise records.damage(home, "its summary.json cannot be read") from None
