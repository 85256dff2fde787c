"""Builds the dataset of a config: python -m launch.data --config=configs/smoke.py

Renders synthetic conversations on all cores, and imports the recordings that config.data.recordings names. It can be
interrupted and run again, and does nothing where the dataset is already there. --runner=beam renders on the workers of
Apache Beam, which must see config.data.root:

    python -m launch.data --config=configs/demo.py --config.data.root=/shared/data --runner=beam \\
        --beam_options="--runner=FlinkRunner --flink_master=HOST:8081 --environment_type=LOOPBACK"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from data_pipelines import builder, manifest, recordings
from data_pipelines.words import choose_tokenizer, count_unwritable, measure_pace, own_tokenizer
from launch import verb
from tmljax.config import Experiment, UserError
from tmljax.stream.microturn import Layout
from tmljax.stream.text import Tokenizer


def define_flags() -> None:
    verb.define_config()
    flags.DEFINE_enum("runner", "local", ["local", "beam"], "who renders: the cores of this machine, or Apache Beam")
    flags.DEFINE_string("beam_options", "", "of its pipelines; without any, Beam runs on this machine")


def main(argv: Sequence[str]) -> None:
    given = flags.FLAGS
    if given.beam_options and given.runner != "beam":
        raise UserError("--beam_options is for --runner=beam")
    options = verb.words_of("beam_options") if given.runner == "beam" else None
    experiment = verb.experiment()
    manifests = manifest.recorded(experiment.data.recordings)
    own_tokenizer(experiment)
    for path in manifests:
        recordings.check(path, experiment)
    print(table(builder.build(experiment, beam_options=options)))
    if manifests:
        tokenizer = choose_tokenizer(experiment)
        for path in manifests:
            print(import_recordings(path, experiment, tokenizer))


def import_recordings(path: str, experiment: Experiment, tokenizer: Tokenizer) -> str:
    """Imports a manifest and says what it holds, and whether one can write as fast as its people speak."""
    home, layout = recordings.prepare(path, experiment), Layout(experiment.stream)
    read = manifest.read_manifest(path, experiment.stream)
    counts = [measure_pace(one.model_words, layout, tokenizer) for one in read]
    said, tokens, late = (sum(column) for column in zip(*counts))
    line = f"{path}: {sum(one.seconds for one in read) / 3600:.2f} hours in {home}"
    if not said:
        return line + "; the model's side has no words"
    line += f"; {said} words of the model, {tokens / said:.2f} tokens each, {late / said:.1%} written late"
    lost = count_unwritable((w.text for one in read for w in one.model_words), tokenizer)
    if lost:
        line += f"; {lost} words cannot be written with this tokenizer: choose another config.data.tokenizer"
    if late > 0.05 * said:
        slots = experiment.stream.model_text_slots
        line += f"; a larger config.stream.vocab_size or model_text_slots (now {slots}) lets it keep pace"
    return line


def table(summary: builder.Summary) -> str:
    """Sessions and hours by family and split."""
    splits = list(summary.sessions)
    families = sorted({family for split in splits for family in summary.sessions[split]})
    lines = ["family".ljust(20) + "".join(f"{split:>12}{'hours':>8}" for split in splits)]
    for name, members in [*((family, [family]) for family in families), ("all", families)]:
        cells = ""
        for split in splits:
            sessions = sum(summary.sessions[split].get(family, 0) for family in members)
            hours = sum(summary.seconds[split].get(family, 0.0) for family in members) / 3600
            cells += f"{sessions:>12}{hours:>8.2f}"
        lines.append(name.ljust(20) + cells)
    if summary.rendered_seconds:
        rate = summary.rendered_seconds / summary.wall_seconds
        hours = summary.rendered_seconds / 3600
        lines.append(f"{hours:.2f} hours in {summary.wall_seconds:.0f} s: {rate:.0f} times real time")
    lines.append(f"prepared in {summary.path}")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    sys.exit(verb.run(main))
