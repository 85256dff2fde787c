"""Shards rendered by Apache Beam, on many machines that see the disk of config.data.root.

Beam only says who renders which shard: the files are those of data_pipelines/staging.py, byte for byte, and a build
goes on where it was interrupted, whoever began it. Apache Beam is the extra `beam`; it asks for older versions of
packages than training does, so it has an environment of its own (`make test-beam` shows how).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines import staging
from data_pipelines.plan import Shard
from tmljax.config import Experiment, UserError

POLL = 0.5  # seconds between looks at what is done
ONE_AT_A_TIME = threading.Lock()  # of the threads of a Beam worker: espeak-ng has one state a process


def render_all(
    experiment: Experiment, missing: Sequence[Shard], folder: Path, options: Sequence[str]
) -> Iterator[tuple[Shard, float]]:
    """Each shard as it appears in `folder`, with its seconds of conversation; `options` are those of Beam's pipelines.

    Raises UserError where Beam is not installed, refuses the options, or its workers write elsewhere.
    """
    pipeline = make_pipeline(experiment, missing, folder, options)
    failures: list[Exception] = []

    def run() -> None:
        try:
            pipeline.run().wait_until_finish()
        except Exception as e:
            failures.append(e)

    thread = threading.Thread(target=run, name="beam", daemon=True)
    thread.start()
    left = list(missing)
    while left:
        over = not thread.is_alive()
        for shard in [shard for shard in left if staging.is_whole(shard, folder)]:
            left.remove(shard)
            yield shard, sum(staging.read_summary(shard, folder)["seconds"].values())
        if over and left:
            reason = failures[0] if failures else f"its workers wrote no {left[0].name}: they must see {folder}"
            raise UserError(f"Apache Beam did not render {len(left)} of {len(missing)} shards: {reason}")
        thread.join(POLL)
    thread.join()


def make_pipeline(experiment: Experiment, missing: Sequence[Shard], folder: Path, options: Sequence[str]) -> Any:
    """A pipeline that renders `missing`, a shard at a time wherever there is room."""
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(
            "--runner=beam needs Apache Beam: pip install -e '.[beam]' in its own environment (see make test-beam)"
        ) from None
    try:
        pipeline = apache_beam.Pipeline(options=PipelineOptions(list(options)))
    except (ValueError, SystemExit) as e:
        raise UserError(f"--beam_options: {e}") from None
    shards = pipeline | "shards" >> apache_beam.Create(missing) | apache_beam.Reshuffle()
    _ = shards | "render" >> apache_beam.Map(render_once, experiment, folder)
    return pipeline


def render_once(shard: Shard, experiment: Experiment, folder: Path) -> None:
    """On a worker. Beam may ask for a shard twice; its bytes are the same."""
    with ONE_AT_A_TIME:
        if not staging.is_whole(shard, folder):
            staging.render_to_file(experiment, shard, folder)
