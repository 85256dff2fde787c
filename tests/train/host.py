"""One host of a run of the toy model, which comes to harm where HARM says so: once, at a place that training names.

    python -m launch.local --hosts=2 -- python -m tests.train.host WORKDIR STEPS data=2,fsdp=2

HARM=HOST:PLACE:SIGNAL, as in "1:step 6:SIGKILL". The place "starting" is before anything is done, "writing" the middle
of writing a checkpoint.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from tmljax import pulse

pulse.begin()

from launch import verb  # noqa: E402  the pulse first
from tests.train import toy  # noqa: E402
from tmljax import checkpoint, cluster  # noqa: E402


def main(argv: list[str]) -> int:
    workdir, steps, sizes = Path(argv[1]), int(argv[2]), argv[3]
    cluster.leave_when_asked()
    cluster.initialize()
    cluster.enable_compile_cache()
    come_to_harm(workdir)
    mesh = {axis: int(size) for axis, size in (pair.split("=") for pair in sizes.split(","))}
    settings = toy.experiment(steps, mesh=mesh)
    outcome = toy.run(workdir, settings, toy.Source(settings.data.batch, delay=0.05), devices=None)
    if cluster.is_lead():
        print("ended at", outcome.step, outcome.signal and outcome.signal.name)
    cluster.part()
    return 130 if outcome.signal is signal.SIGINT else 0


def come_to_harm(workdir: Path) -> None:
    host, place, name = os.environ.get("HARM", "-1:nowhere:SIGKILL").split(":")
    mark, at = workdir.with_name(f"{workdir.name}.{place}.{name}"), pulse.at

    def harm() -> None:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.Signals[name])

    def harm_in_the_middle() -> None:
        while not list((workdir / checkpoint.FOLDER).glob("*tmp*")):
            time.sleep(0.001)
        harm()

    def noted(here: str, *rest, **more) -> None:
        at(here, *rest, **more)
        if here == place:
            harm()
        elif here == "checkpoint" and place == "writing":
            threading.Thread(target=harm_in_the_middle, daemon=True).start()

    if int(host) == cluster.process_index():
        pulse.at = noted
        if place == "starting":
            harm()


if __name__ == "__main__":
    with cluster.leaving():
        sys.exit(verb.run(lambda _: main(sys.argv), sys.argv[:1]))
