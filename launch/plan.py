"""Says what a run will need before any hardware is booked: memory, time, money.

    python -m launch.plan --config=configs/tml_interaction_small.py --topology=v5p:4x8x8 [--price=4.2] [--tokens=1e13]

The real training step is compiled for that slice with no accelerator present, which takes libtpu: pip install
'tmljax[tpu]'. --method=formula does without, and is all there is for GPUs (--topology=h200:8x8, nodes x GPUs).
--search tries the meshes and remat policies that make sense and writes the best as best.flags, for this verb and
launch.train: --flagfile=DIR/best.flags. --what=tick says, by formula, how many live sessions the slice would serve.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import verb
from tmljax.config import Experiment, UserError
from tmljax.plan import report
from tmljax.plan.compile import compile_step, devices_of
from tmljax.plan.forecast import Forecast, by_compiler, by_formula
from tmljax.plan.hardware import Slice, find_slice
from tmljax.plan.search import overrides, search
from tmljax.plan.serving import best_serving
from tmljax.plan.setting import Setting, settle


def define_flags() -> None:
    verb.define_config()
    flags.DEFINE_string("topology", None, "v5p:4x8x8 (a TPU slice), h200:8x8 (nodes x GPUs)", required=True)
    flags.DEFINE_enum("what", "train", ["train", "tick"], "the training step, or a micro-turn of serving")
    flags.DEFINE_enum("method", "compile", ["compile", "formula"], "where memory and traffic come from")
    flags.DEFINE_bool("search", False, "try other meshes and remat policies")
    flags.DEFINE_float("search_seconds", 540, "time that a search may take", lower_bound=0)
    flags.DEFINE_float("price", None, "dollars an hour of one chip", lower_bound=1e-9)
    flags.DEFINE_float("tokens", None, "positions to train on", lower_bound=1)
    flags.DEFINE_string("output", None, "folder for plan.json, plan.html and best.flags")


def main(argv: Sequence[str]) -> int:
    given = [name for name in ("search", "search_seconds", "price", "tokens") if flags.FLAGS[name].present]
    given += ["method"] if flags.FLAGS["method"].present and flags.FLAGS.method != "formula" else []
    if flags.FLAGS.what == "tick" and given:
        raise UserError(f"--{given[0]} is for the training step; leave it out, or --what=tick")
    verb.refuse_file("output")
    if flags.FLAGS.output is not None:  # before minutes of compiling, not after
        make_output(flags.FLAGS.output)
    experiment, where = verb.experiment(), find_slice(flags.FLAGS.topology)
    title = f"{Path(flags.FLAGS.config.partition('.py')[0]).name} on {where.name}"
    if flags.FLAGS.what == "tick":
        serving = best_serving(experiment, where).as_json()
        print(report.to_text(report.serving_lines(serving)))
        save(title, [], serving)
        return 0
    ranked = plan(experiment, where)
    print(report.to_text(report.to_lines(ranked[0])))
    save(title, ranked, None)
    return 0


def make_output(folder: str) -> None:
    """Raises UserError where nothing can be written there."""
    if not folder:
        raise UserError("--output is empty, which would be this folder; name one")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f"--output={folder} cannot be written: {e.strerror}; name another folder") from None


def plan(experiment: Experiment, where: Slice) -> list[Forecast]:
    """The plan, and after a search its alternatives."""
    asked = {"price": flags.FLAGS.price, "tokens": flags.FLAGS.tokens}
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    compiles = flags.FLAGS.method == "compile" and where.compiles
    devices = devices_of(where) if compiles else []
    if flags.FLAGS.method == "compile" and not where.compiles:
        say(f"{where.name}: no compiler runs without the GPUs, so by formula")

    def confirm(setting: Setting) -> Forecast:
        return by_compiler(setting, compile_step(setting, devices), **asked)

    if flags.FLAGS.search:
        return search(experiment, where, confirm if compiles else None, flags.FLAGS.search_seconds, say, **asked)
    setting = settle(experiment, where)
    if not compiles:
        return [by_formula(setting, **asked)]
    say(f"compiling the training step for {where.name}, which takes minutes")
    return [confirm(setting)]


def save(title: str, ranked: list[Forecast], serving: dict | None) -> None:
    if flags.FLAGS.output is None:
        return
    folder = Path(flags.FLAGS.output)
    paths = report.write(folder, title, ranked, serving)
    if flags.FLAGS.search and ranked and not ranked[0].fits:
        print(f"nothing fits, so there is no {folder / 'best.flags'}", file=sys.stderr)
    elif flags.FLAGS.search and ranked:
        (folder / "best.flags").write_text(overrides(ranked[0]), encoding="utf-8")
        paths = (*paths, folder / "best.flags")
    print("wrote " + ", ".join(str(path) for path in paths))


if __name__ == "__main__":
    define_flags()
    sys.exit(verb.run(main))
