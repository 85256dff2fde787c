"""Measures a checkpoint on the test split: unseen voices, unseen requests.

    python -m launch.evaluate --workdir=DIR [--suite=turn_taking,pause] [--limit=8]

Writes report.json, report.html (one file, opens anywhere) and fdb/, the same conversations in the folder layouts of
Full-Duplex-Bench; those of a part of the test go to DIR/part, and do not replace those of the whole. Beside the model
stand four systems that need none: always silent, always talking, a VAD timer, and an oracle.

The report on another dataset of the same mixture, which `launch.data` has built, goes to DIR/datasets/NAME. It takes
the flags that the dataset was built with, of root, name, seed, train_hours and test_per_family:

    python -m launch.evaluate --workdir=DIR --config.data.name=NAME --config.data.seed=7
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

from data_pipelines.builder import open_split
from data_pipelines.manifest import SYNTHETIC, parse_manifests, recorded
from launch import verb
from tmljax import cluster
from tmljax.config import Data, UserError, nearest, to_json
from tmljax.decode.engine import Engine
from tmljax.decode.program import engine_from_workdir
from tmljax.decode.session import SessionInput, converse
from tmljax.evals import report, suite
from tmljax.evals.baselines import baselines
from tmljax.evals.fdb import Writer
from tmljax.evals.gallery import Gallery
from tmljax.evals.item import Item, Performance, user_audio
from tmljax.evals.report import Report
from tmljax.evals.suite import PerformMany, Tally
from tmljax.evals.timing import events_of
from tmljax.model.interaction import Definition
from tmljax.stream.microturn import FRAME_SAMPLES, FRAMES, MICROTURN_SECONDS, SAMPLE_RATE
from tmljax.stream.record import Session
from tmljax.train import metrics

ALL = "all"
PART = "part"  # of the workdir, for the report on a part of the test
DATASETS = "datasets"  # of the workdir, for those on other datasets than the model's own
DATA = tuple(f"data.{field}" for field in ("root", "name", "seed", "train_hours", "test_per_family"))
SPLIT = "test"


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "training workdir", required=True)
    flags.DEFINE_string("suite", ALL, "scenario families, separated by commas")
    flags.DEFINE_integer("limit", None, "test sessions of each family at most; all by default", lower_bound=1)
    flags.DEFINE_string(
        "output", None, "where the report goes; the workdir, or WORKDIR/part for a part of the test, by default"
    )
    verb.define_serving(DATA)
    flags.DEFINE_integer("sessions", 16, "sessions decoded at a time", lower_bound=1)
    flags.DEFINE_integer("fdb", None, "sessions of each family written to fdb/ at most; all by default", lower_bound=0)
    flags.DEFINE_string("pictures", None, "folder to write the report's timelines to as SVG files as well")
    flags.DEFINE_string("icc", None, "icc_gt_distribution.json of Full-Duplex-Bench, in place of the truth windows")


@dataclass(frozen=True)
class Options:
    """The flags; None is no limit, or not wanted."""

    workdir: str
    output: str | None = None
    suite: str = ALL
    limit: int | None = None
    step: str | None = None
    sessions: int = 16
    fdb: int | None = None
    icc: str | None = None
    pictures: str | None = None
    overrides: Sequence[str] = ()


def main(argv: Sequence[str]) -> None:
    cluster.refuse_many("launch.evaluate")
    verb.refuse_file("output")
    given = {f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(Options) if f.name in flags.FLAGS}
    evaluate(Options(**given | {"overrides": verb.overrides(DATA)}))


def evaluate(options: Options) -> Report:
    """The verb. Raises UserError for bad input before any work is done."""
    references = read_references(options.icc)
    cluster.enable_compile_cache()
    of_data = [override for override in options.overrides if override.partition("=")[0] in DATA]
    adapt = partial(verb.adapt, overrides=[override for override in options.overrides if override not in of_data])
    engine = engine_from_workdir(options.workdir, options.sessions, options.step, adapt)
    tested = verb.adapt(engine.experiment, of_data).data
    split = open_split(dataclasses.replace(engine.experiment, data=tested), SPLIT)
    chosen, microturns = choose(split, options.suite, options.limit)
    make_folder(options.pictures)
    whole = sum(map(len, chosen.values())) == len(split)
    output = place(options, engine.experiment.data, tested, whole)
    writer = Writer(output / "fdb")
    begin = time.perf_counter()
    tallies = [Tally(report.MODEL), *(Tally(name) for name, _ in baselines(engine.layout, engine.tokenizer))]
    gallery = Gallery(engine.layout.stream.video_every * MICROTURN_SECONDS)
    with tqdm(total=microturns, unit="tick", desc="evaluating", mininterval=0.5) as bar:
        for family, indices in chosen.items():
            bar.set_postfix_str(family)
            keep = keeper(gallery, writer, options.fdb)
            measure_family(tallies, family, [split[i] for i in indices], engine, bar.update, keep, references)
    writer.finish()
    made = report.make(
        f"{engine.name}, step {engine.step:,}",
        tallies,
        facts=describe(engine, tested, microturns, time.perf_counter() - begin),
        config=json.loads(to_json(engine.experiment)),
        sessions={family: len(indices) for family, indices in chosen.items()},
        training=metrics.read_rows(Path(options.workdir) / metrics.FILE),
        examples=gallery.examples,
        notes=[NOTE],
    )
    paths = report.write(made, output)
    write_pictures(gallery, options.pictures)
    print(report.to_text(made))
    print("wrote " + ", ".join(map(str, paths)) + f" and {writer.place}/")
    return made


def place(options: Options, trained: Data, tested: Data, whole: bool) -> Path:
    """Where a report goes. One of the model's whole own test is replaced by another such alone."""
    if options.output:
        return Path(options.output)
    own = dataclasses.replace(tested, root=trained.root) == trained
    return Path(options.workdir, "" if own else Path(DATASETS, tested.name), "" if whole else PART)


def make_folder(pictures: str | None) -> None:
    """Before any work, so that nothing is lost where it cannot be made."""
    if pictures == "":
        raise UserError("--pictures names no folder")
    try:
        if pictures is not None:
            Path(pictures).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--pictures={pictures} cannot be made: {e.strerror}") from None


def write_pictures(gallery: Gallery, folder: str | None) -> None:
    """The timelines of the report as files."""
    if folder is None:
        return
    for example in gallery.examples:
        (Path(folder) / f"{example.family}-{example.session}.svg").write_text(example.picture, encoding="utf-8")


NOTE = (
    "What is said is judged by the words that the model claims; stopping and keeping the floor by what is heard. "
    "User speech is timed by the words of the score where they are known. Speech is found by energy where "
    "Full-Duplex-Bench uses Silero VAD, and behaviour after an overlap is a proxy by exact content where it asks a "
    "language model, so numbers do not compare with its leaderboard."
)


def choose(split: Sequence[Session], families: str, limit: int | None) -> tuple[dict[str, list[int]], int]:
    """Indices of the wanted families, in the order of the split, and the micro-turns that they will take."""
    found: dict[str, list[int]] = {}
    ticks: dict[str, int] = {}
    for i, session in enumerate(split):
        indices = found.setdefault(session.family, [])
        if limit is None or len(indices) < limit:
            indices.append(i)
            runs = 2 if session.audio is not None and events_of(session) else 1
            ticks[session.family] = ticks.get(session.family, 0) + runs * math.ceil(session.frames / FRAMES)
    wanted = list(found) if families == ALL else [name.strip() for name in families.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in found]
    if unknown or not wanted:
        listed = f"the families of the test split are {', '.join(found)}"
        hint = f"{unknown[0]} is not one; {nearest(unknown[0], found, listed)}" if unknown else listed
        raise UserError(f"--suite={families}: {hint}")
    return {name: found[name] for name in wanted}, sum(ticks[name] for name in wanted)


def measure_family(
    tallies: Sequence[Tally],
    family: str,
    sessions: Sequence[Session],
    engine: Engine,
    progress: Callable[[int], object],
    keep: Callable[[Item, list], object],
    references: Sequence[Sequence[float]] | None,
) -> None:
    """The model, then every baseline, over the sessions of one family."""
    metrics = suite.measures(assign(references, sessions))
    model, *others = tallies
    suite.run(model, family, suite.stage(sessions, model_performer(engine, progress)), metrics, keep)
    for tally, (_, perform) in zip(others, baselines(engine.layout, engine.tokenizer), strict=True):
        suite.run(tally, family, suite.stage(sessions, each(perform)), metrics)


def model_performer(engine: Engine, progress: Callable[[int], object]) -> PerformMany:
    """The seed follows from the session's name, so that a session and its clean self share it."""

    def perform(sessions: Sequence[Session]) -> list[Performance]:
        seeds = [zlib.crc32(s.id.encode()) for s in sessions]
        transcripts = converse(engine, [as_input(s) for s in sessions], seeds, progress=progress)
        late = engine.vocoder.latency_samples / SAMPLE_RATE
        return [
            Performance(t.audio, tuple(t.words), tuple(t.heard), tuple(t.tick_ms), tuple(t.vocoder_ms), late)
            for t in transcripts
        ]

    return perform


def each(perform: Callable[[Session], Performance]) -> PerformMany:
    return lambda sessions: [perform(s) for s in sessions]


def as_input(session: Session) -> SessionInput:
    audio = user_audio(session) if session.user_dmel is not None else None
    seconds = session.frames * FRAME_SAMPLES / SAMPLE_RATE
    return SessionInput(audio=audio, typed=session.typed, video=session.video, seconds=seconds)


def keeper(gallery: Gallery, writer: Writer, most: int | None) -> Callable[[Item, list], None]:
    """Shows each item to the gallery and writes the first `most` of them in Full-Duplex-Bench layout."""
    written = 0

    def keep(item: Item, found: list) -> None:
        nonlocal written
        gallery.consider(item, found)
        if most is None or written < most:
            writer.write(item)
            written += 1

    return keep


def read_references(path: str | None) -> list[list[float]] | None:
    """Distributions in the order of their numbers, as Full-Duplex-Bench stores them: {"0": [...], "1": [...]}."""
    if path is None:
        return None
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        references = {key: [float(x) for x in tree[key]] for key in sorted(tree, key=int)}
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"--icc={path} is not an icc_gt_distribution.json: {e}") from None
    for key, values in references.items():
        if not all(math.isfinite(x) and x >= 0 for x in values) or not sum(values) > 0:
            raise UserError(f"--icc={path}: {key} is no distribution: numbers from 0 up, not all of them 0")
    return list(references.values())


def assign(
    references: Sequence[Sequence[float]] | None, sessions: Iterable[Session]
) -> dict[str, Sequence[float]] | None:
    """The k-th session gets the k-th distribution, and the first one where there are no more, as theirs do."""
    if not references:
        return None
    return {s.id: references[k if k < len(references) else 0] for k, s in enumerate(sessions)}


def sources_of(data: Data) -> list[str]:
    """What of the data has weight."""
    weights = parse_manifests(data.recordings)
    synthetic = [f"{data.train_hours:g} h of synthetic conversation"] if weights.get(SYNTHETIC, 1) else []
    return synthetic + ["recordings"] * bool(recorded(data.recordings))


def describe(engine: Engine, tested: Data, microturns: int, seconds: float) -> dict[str, str]:
    """The facts at the top of the report."""
    experiment = engine.experiment
    leaves = jax.tree.leaves(Definition(experiment.stream, experiment.model).abstract())
    parameters = sum(math.prod(leaf.shape) for leaf in leaves)
    moe = experiment.model.moe
    spoken = microturns * MICROTURN_SECONDS
    return {
        "parameters": f"{parameters / 1e6:.1f} M",
        "trunk": f"{experiment.model.layers} layers × {experiment.model.d_model}",
        "experts": f"{moe.experts} routed, top {moe.top_k}" + (", 1 shared" if moe.shared_width else ""),
        "slots in a micro-turn": f"{engine.layout.slots}",
        "looks back": f"{experiment.model.window * MICROTURN_SECONDS:.0f} s",
        "trained on": " and ".join(sources_of(experiment.data)),
        "training steps": f"{engine.step:,} × {experiment.data.batch} examples",
        "evaluated on": f"{spoken / 60:.3g} min of conversation, clean runs included",
        "test of": f"dataset {tested.name}, seed {tested.seed}",
        "evaluation took": f"{seconds / 60:.1f} min, {engine.sessions} sessions at a time",
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    define_flags()
    sys.exit(verb.run(main))
