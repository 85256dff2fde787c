"""Writes a checkpoint as a self-contained directory for serving.

    python -m launch.export --workdir=DIR --output=EXPORT [--sessions=1]

EXPORT holds weights, config, tokenizer, the tick as StableHLO for CPU, CUDA and TPU, and a manifest with hashes;
`python -m launch.stream --workdir=EXPORT` runs it without the model's source. The program has a fixed number of
session slots.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import verb
from tmljax import checkpoint, cluster
from tmljax.serve import export


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "training workdir", required=True)
    flags.DEFINE_string("output", None, "directory to write", required=True)
    flags.DEFINE_integer("sessions", 1, "session slots of the tick", lower_bound=1)
    verb.define_serving()


def main(argv: Sequence[str]) -> None:
    cluster.refuse_many("launch.export")
    given = flags.FLAGS
    export_workdir(given.workdir, given.output, given.sessions, given.step, verb.overrides())


def export_workdir(
    workdir: str, output: str, sessions: int = 1, step: str | None = None, overrides: Sequence[str] = ()
) -> dict:
    """The verb; returns the manifest."""
    export.refuse_foreign(Path(os.path.abspath(output)))
    chosen, trained, tokenizer, params = checkpoint.load_for_serving(workdir, step)
    experiment = verb.adapt(trained, overrides)
    name = os.path.basename(os.path.abspath(workdir))
    manifest = export.export(output, experiment, tokenizer, params, step=chosen, name=name, sessions=sessions)
    size = sum(file["bytes"] for file in manifest["files"].values())
    print(
        f"exported {name}, step {chosen}: {manifest['parameters']:,} parameters, {size / 2**20:.1f} MiB, "
        f"{sessions} session slot(s), for {', '.join(manifest['platforms'])}"
    )
    print(f"try: python -m launch.stream --workdir={output} --input=in.wav --output=out.wav")
    return manifest


if __name__ == "__main__":
    define_flags()
    sys.exit(verb.run(main))
