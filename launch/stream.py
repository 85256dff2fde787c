"""Streams a sound file through the decoder, as if it were spoken live, 200 ms at a time.

    python -m launch.stream --workdir=DIR --input=in.wav --output=out.wav [--json=out.json]

DIR is a training workdir or an export. The output is 16 kHz and lasts exactly as long as the input: what is
heard at 3.4 s of one file happens at 3.4 s of the other. It is mono, the model's voice; with --stereo the left
channel is the model's and the right one the user's. Of a stereo input the channels are averaged unless
--channel picks one (recordings in the moshi-finetune layout have the user on the right).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from launch import verb
from tmljax import cluster, files
from tmljax.config import UserError
from tmljax.decode.engine import Engine
from tmljax.decode.session import SessionInput, Transcript, converse, microturns
from tmljax.serve import bundle
from tmljax.stream.audio import read_audio, write_wav
from tmljax.stream.microturn import MICROTURN_SECONDS, SAMPLE_RATE
from tmljax.stream.record import Word

PAUSE = 0.6  # seconds of silence that end an utterance in the printed summary


class Input(NamedTuple):
    """What the user says and types."""

    path: str
    channel: str
    typed: Sequence[str]


class Output(NamedTuple):
    """The files to write."""

    path: str
    stereo: bool
    json_path: str | None


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "training workdir or export directory", required=True)
    flags.DEFINE_string("input", None, "sound file to stream: any rate, channels and width", required=True)
    flags.DEFINE_string("output", None, "WAV to write", required=True)
    flags.DEFINE_string("json", None, "also write words, latencies and settings here")
    flags.DEFINE_multi_string("typed", [], "text typed by the user, as SECONDS:TEXT; may be repeated")
    flags.DEFINE_string("channel", "mix", "of a stereo input: mix, left, right, or a number from 0")
    flags.DEFINE_bool("stereo", False, "write left = model, right = user")
    flags.DEFINE_integer("seed", 0, "of the model's sampling", lower_bound=0, upper_bound=2**32 - 1)
    verb.define_serving()


def main(argv: Sequence[str]) -> None:
    cluster.refuse_many("launch.stream")
    given = flags.FLAGS
    cluster.enable_compile_cache()
    spoken = Input(given.input, given.channel, given.typed)
    written = Output(given.output, given.stereo, given.json)
    stream(given.workdir, spoken, written, seed=given.seed, step=given.step, overrides=verb.overrides())


def stream(
    workdir: str,
    spoken: Input,
    written: Output,
    *,
    seed: int = 0,
    step: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """The verb; returns what --json writes. Raises UserError for bad input before any work is done."""
    for path in (written.path, written.json_path):
        check_writable(path, spoken.path)
    if written.json_path is not None and os.path.abspath(written.json_path) == os.path.abspath(written.path):
        raise UserError(f"--json and --output both name {written.path}; give each its own file")
    user = pick_channel(read_audio(spoken.path), spoken.channel, spoken.path)
    words = [parse_typed(one, len(user) / SAMPLE_RATE) for one in spoken.typed]
    engine = load_engine(workdir, step, overrides)
    source = SessionInput(audio=user, typed=words)
    with tqdm(total=microturns([source]), unit="tick", desc="streaming", mininterval=0.5) as bar:
        (transcript,) = converse(engine, [source], [seed], progress=bar.update)
    model = transcript.audio
    write_wav(written.path, np.stack([model, user], axis=1) if written.stereo else model)
    report = describe(engine, transcript, workdir, spoken, words, written.stereo, seed)
    if written.json_path:
        write_json(written.json_path, report)
    print(summary(transcript, words, report))
    print(f"wrote {written.path}" + (f" and {written.json_path}" if written.json_path else ""))
    return report


def load_engine(directory: str, step: str | None = None, overrides: Sequence[str] = ()) -> Engine:
    """The engine of an export, or of a workdir's checkpoint; the model's source is imported for the latter alone."""
    if not os.path.isdir(directory):
        raise UserError(f"{directory} is not a directory; --workdir takes a training workdir or an export")
    if bundle.is_export(directory):
        if step is not None:
            raise UserError(f"{directory} is an export and holds one step; leave --step out")
        if overrides:
            raise UserError(f"{directory} is an export; set config.{overrides[0]} when exporting")
        return bundle.load(directory)
    from tmljax.decode.program import engine_from_workdir

    return engine_from_workdir(directory, 1, step, partial(verb.adapt, overrides=overrides))


def check_writable(path: str | None, input_path: str) -> None:
    if path is None:
        return
    if not path:
        raise UserError("a file to write has an empty name; see --help")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UserError(f"cannot write {path}: there is no folder {folder}")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise UserError(f"cannot write {path}: nothing may be written to {folder} ({e.strerror})") from None
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"cannot write {path}: it is {'a folder' if os.path.isdir(path) else 'no regular file'}")
    if os.path.exists(path) and os.path.exists(input_path) and os.path.samefile(path, input_path):
        raise UserError(f"{path} is the input too; name another file to write")


def pick_channel(audio: np.ndarray, channel: str, path: str) -> np.ndarray:
    """float32 [n] of [n] or [n, channels]."""
    if audio.ndim == 1:
        audio = audio[:, None]
    if channel == "mix":
        return audio.mean(axis=1, dtype=np.float32)
    number = {"left": 0, "right": 1}.get(channel, int(channel) if channel.isdigit() else None)
    if number is None:
        raise UserError(f"--channel={channel} must be mix, left, right or a number from 0")
    if number >= audio.shape[1]:
        raise UserError(f"--channel={channel}: {path} has {audio.shape[1]} channel(s)")
    return np.ascontiguousarray(audio[:, number])


def parse_typed(text: str, seconds: float) -> Word:
    at, colon, words = text.partition(":")
    try:
        start = float(at)
    except ValueError:
        colon = ""
        start = 0.0
    if not colon or not words.strip():
        raise UserError(f"--typed={text!r} must read SECONDS:TEXT, as in --typed='2.5:three plus four'")
    if not 0 <= start < seconds:
        raise UserError(f"--typed={text!r} lies outside the input, which lasts {seconds:.2f} s")
    return Word(words.strip(), start, start)


def describe(
    engine: Engine,
    transcript: Transcript,
    workdir: str,
    spoken: Input,
    typed: Sequence[Word],
    stereo: bool,
    seed: int,
) -> dict[str, Any]:
    seconds = len(transcript.audio) / SAMPLE_RATE
    total_ms = [tick + vocoder for tick, vocoder in zip(transcript.tick_ms, transcript.vocoder_ms, strict=True)]
    return {
        "input": spoken.path,
        "channel": spoken.channel,
        "seconds": seconds,
        "layout": "left model, right user" if stereo else "mono model",
        "words": as_json(transcript.words),
        "heard": as_json(transcript.heard),
        "typed": as_json(typed),
        "latency": {
            "tick_ms": statistics(transcript.tick_ms),
            "vocoder_ms": statistics(transcript.vocoder_ms),
            "total_ms": statistics(total_ms),
            "budget_ms": 1e3 * MICROTURN_SECONDS,
        },
        "real_time_factor": round(sum(total_ms) / 1e3 / seconds, 5),  # seconds of work per second of conversation
        "config": engine.name,
        "step": engine.step,
        "settings": verb.settings(engine.experiment),
        "seed": seed,
        "source": "export" if bundle.is_export(workdir) else "workdir",
    }


def as_json(words: Sequence[Word]) -> list[dict[str, Any]]:
    return [{"text": w.text, "start": round(w.start, 3), "end": round(w.end, 3)} for w in words]


def statistics(ms: Sequence[float]) -> dict[str, float]:
    return {
        "p50": round(float(np.percentile(ms, 50)), 3),
        "p99": round(float(np.percentile(ms, 99)), 3),
        "max": round(max(ms), 3),
    }


def write_json(path: str, tree: Any) -> None:
    try:
        files.write_text(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None


def summary(transcript: Transcript, typed: Sequence[Word], report: dict[str, Any]) -> str:
    """The conversation as a person would read it, and how fast it ran."""
    lines = [(*one, "user ") for one in utterances(transcript.heard)]
    lines += [(w.start, w.end, w.text, "typed") for w in typed]
    lines += [(*one, "model") for one in utterances(transcript.words)]
    talk = [f"{start:7.2f} - {end:6.2f} s  {who}  {text}" for start, end, text, who in sorted(lines)]
    latency, factor = report["latency"], report["real_time_factor"]
    return "\n".join(
        [
            f"{report['config']}, step {report['step']}: {report['seconds']:.2f} s of conversation",
            *(talk or ["  (nothing was said)"]),
            f"a micro-turn of {latency['budget_ms']:.0f} ms took {latency['total_ms']['p50']:.1f} ms (median), "
            f"{latency['total_ms']['p99']:.1f} ms (p99), vocoder included; {1 / factor:.1f} times real time",
        ]
    )


def utterances(words: Sequence[Word]) -> list[tuple[float, float, str]]:
    """(start, end, text) of words with less than PAUSE between them."""
    joined: list[tuple[float, float, str]] = []
    for word in words:
        if joined and word.start - joined[-1][1] < PAUSE:
            start, _, text = joined.pop()
            joined.append((start, word.end, f"{text} {word.text}"))
        else:
            joined.append((word.start, word.end, word.text))
    return joined


if __name__ == "__main__":
    define_flags()
    sys.exit(verb.run(main))
