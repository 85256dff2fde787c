"""Training batches: shuffled, mixed by weight, cut into windows, sharded by process, exactly resumable.

Every source is shuffled anew each epoch and repeated for ever; the sources are mixed by weight into one
endless stream of examples, which depends on nothing but the data and the seed. Global batch n is the
examples [n B, (n+1) B) of that stream, and a process reads those of its rows that its devices hold. So the
rows of all processes, put together, are the batch of a single process; and the position in the stream is
all the state there is: a checkpoint resumes on any number of processes, workers or rows a batch.

An epoch takes one window of each session: the whole of a session that fits, padded with valid=False, else a
cut at a random multiple of `video_every`. No length has to be known before a session is decoded, so
opening costs the same for ten minutes of data and for a thousand hours.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from data_pipelines import builder, manifest, recordings
from tmljax.config import Experiment, UserError
from tmljax.stream import weave
from tmljax.stream.microturn import ABSENT, FRAMES, Layout
from tmljax.stream.record import Session
from tmljax.stream.text import Tokenizer

Streams = dict[str, np.ndarray]  # of a session or window, see tmljax/stream/weave.py

THREADS = 2  # that weave batches beside the training thread
AHEAD = 4  # batches kept ready
ENDLESS = 1 << 50  # examples; grain counts batches in floating point
VALIDATION_SEED = 0  # the same windows for every run, whatever its seed


class Source(NamedTuple):
    """`sessions` is any random-access sequence of Session; weights are relative; `content` tells it from others."""

    name: str
    weight: float
    sessions: Sequence[Session]
    content: str = ""


class Window(NamedTuple):
    """Weaves `length` micro-turns of a session, from a random one on."""

    layout: Layout
    tokenizer: Tokenizer
    length: int

    def __call__(self, session: Session, rng: np.random.Generator) -> Streams:
        start = draw_start(session.frames // FRAMES, self.length, self.layout.stream.video_every, rng)
        streams = weave.weave(session, self.layout, self.tokenizer, start, self.length)
        if session.family == recordings.UNHEARD:
            streams["heard"][:] = ABSENT  # no target, which is not the same as nobody speaking
        return streams


def draw_start(micro_turns: int, window: int, every: int, rng: np.random.Generator) -> int:
    """First micro-turn of a window, a multiple of `every`; 0 where the session fits the window.

    The window slides from where it holds only the first `every` micro-turns to where it holds only the last,
    and is then pushed inside. So beginnings and endings, where replies stand, are drawn as often as the middle:
    each micro-turn is seen with probability at least window / (micro_turns + window).
    """
    n, w = -(-micro_turns // every), window // every
    if n <= w:
        return 0
    return every * int(np.clip(rng.integers(1 - w, n), 0, n - w))


class ProcessRows(grain.MapDataset):
    """Of an endless stream of examples, from number `first` on, some rows of each batch."""

    def __init__(self, stream: grain.MapDataset, first: int, batch: int, rows: Sequence[int]):
        super().__init__(stream)
        self._first, self._batch, self._rows = first, batch, rows

    def __len__(self) -> int:
        return (ENDLESS - self._first) // self._batch * len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[self._first + batch * self._batch + self._rows[row]]


def stack(examples: Sequence[Streams]) -> Streams:
    """[rows, ...] of each stream."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def mix_examples(
    sources: Sequence[Source], layout: Layout, tokenizer: Tokenizer, window: int, seed: int
) -> grain.MapDataset:
    """The endless stream of examples. Raises UserError where a source is empty."""
    streams = []
    for number, source in enumerate(sources):
        if not len(source.sessions):
            raise UserError(f"{source.name} holds no session to train on")
        source_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        stream = grain.MapDataset.source(source.sessions).seed(source_seed).shuffle().repeat()
        streams.append(stream.random_map(Window(layout, tokenizer, window)))
    return grain.MapDataset.mix(streams, [source.weight for source in sources])


class Loader(Iterator[Streams]):
    """Endless batches of one process, with the position in the stream as json-able state."""

    def __init__(
        self,
        stream: grain.MapDataset,
        batch: int,
        identity: dict[str, Any],
        *,
        rows: Sequence[int] | None = None,
        workers: int = 0,
    ):
        self._stream, self._batch, self._identity = stream, batch, identity
        self._rows = tuple(range(batch)) if rows is None else tuple(map(int, rows))
        self._workers = workers
        self._examples = 0
        self._iterator: grain.DatasetIterator | None = None

    def __next__(self) -> Streams:
        if self._iterator is None:
            self._iterator = self._open()
        batch = next(self._iterator)
        self._examples += self._batch
        return batch

    def _open(self) -> grain.DatasetIterator:
        rows = ProcessRows(self._stream, self._examples, self._batch, self._rows)
        batches = rows.batch(len(self._rows), batch_fn=stack)
        if not self._workers:
            return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)))
        if not flags.FLAGS.is_parsed():  # grain asks absl for its settings; outside a verb they are the defaults
            flags.FLAGS.mark_as_parsed()
        read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        workers = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
        return iter(batches.to_iter_dataset(read).mp_prefetch(workers, prepare_worker))

    def start(self) -> None:
        """Begins to prepare batches, while the caller compiles say."""
        if self._iterator is None:
            self._iterator = self._open()
        self._iterator.start_prefetch()

    def get_state(self) -> dict[str, Any]:
        return {"examples": self._examples, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues with the batch that would have come. Raises UserError where the data is not the same."""
        for name, value in self._identity.items():
            if state.get(name, value if name == "content" else None) != value:  # older checkpoints have no content
                damaged = ", which launch.data builds the same again if it was damaged," if name == "content" else ""
                raise UserError(
                    f"the checkpoint was trained on other data: its {name} was {state.get(name)}, "
                    f"now it is {value}; bring the data{damaged} and the seed back or train in a new workdir"
                )
        self.close()
        self._examples = int(state["examples"])

    def close(self) -> None:
        """Ends threads and worker processes; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


def prepare_worker(index: int, count: int) -> None:
    """Ctrl-C is the parent's to handle; and a worker whose parent was killed ends, which grain leaves undone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def train_loader(
    experiment: Experiment,
    tokenizer: Tokenizer,
    *,
    rows: Sequence[int] | None = None,
    seed: int | None = None,
) -> Loader:
    """These `rows` of each batch, all by default, for ever; `seed` is config.train.seed unless given."""
    return load_sources(
        open_sources(experiment, "train"),
        experiment,
        tokenizer,
        seed=experiment.train.seed if seed is None else seed,
        rows=rows,
        workers=experiment.data.workers,
    )


def load_sources(
    sources: Sequence[Source],
    experiment: Experiment,
    tokenizer: Tokenizer,
    *,
    seed: int,
    rows: Sequence[int] | None = None,
    workers: int = 0,
) -> Loader:
    """As `train_loader`, from sources at hand."""
    layout, data = Layout(experiment.stream), experiment.data
    if tokenizer.vocab_size > experiment.stream.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than "
            f"config.stream.vocab_size={experiment.stream.vocab_size}"
        )
    stream = mix_examples(sources, layout, tokenizer, data.window, seed)
    identity = {
        "seed": seed,
        "sources": [[Path(s.name).stem, len(s.sessions), s.weight] for s in sources],
        "content": [s.content for s in sources],
    }
    return Loader(stream, data.batch, identity, rows=rows, workers=workers)


def validation_batches(
    experiment: Experiment, tokenizer: Tokenizer, count: int, *, rows: Sequence[int] | None = None
) -> list[Streams]:
    """The same `count` batches for every run of this data; they go round again where the split is smaller."""
    loader = load_sources(
        open_sources(experiment, "validation"),
        experiment,
        tokenizer,
        seed=VALIDATION_SEED,
        rows=rows,
    )
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def open_sources(experiment: Experiment, split: str) -> list[Source]:
    """The prepared dataset (weight 1 unless the recordings name `synthetic:w`) and each recordings manifest."""
    weights = manifest.parse_manifests(experiment.data.recordings)
    weights = {manifest.SYNTHETIC: weights.pop(manifest.SYNTHETIC, 1.0)} | weights
    sources = []
    for name, weight in weights.items():
        if weight == 0:
            continue
        if name == manifest.SYNTHETIC:
            sessions = builder.open_split(experiment, split)
        else:
            sessions = recordings.open_manifest(name, experiment, split)
        if split == "train" or len(sessions):
            sources.append(Source(name, weight, sessions, sessions.fingerprint() if split == "train" else ""))
    if not sources:
        raise UserError(f"config.data.recordings={experiment.data.recordings!r} leaves no {split} data at all")
    return sources
