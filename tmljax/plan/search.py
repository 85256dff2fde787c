"""Which mesh and remat policy for a slice: all that make sense by formula, the best few by the compiler."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product

from tmljax.config import Experiment, Mesh, UserError
from tmljax.plan.forecast import Forecast, by_formula
from tmljax.plan.hardware import Slice, runs_of
from tmljax.plan.setting import Setting, settle
from tmljax.sharding import AXES

REMAT = ("none", "dots", "full")
ROOM = 0.05  # of the memory that a formula leaves alone


def variants(experiment: Experiment, where: Slice) -> Iterator[Experiment]:
    """Meshes of the whole slice with each remat policy; of TPU slices those that lie along whole dims of the torus."""
    devices, model, context = where.devices, experiment.model, max(1, experiment.mesh.context)
    for expert, tensor, data in product(divisors(model.moe.experts), divisors(model.kv_heads), (1, 2, 4)):
        fixed = expert * tensor * data * context
        if devices % fixed or (where.chip.kind == "gpu" and tensor > where.shape[1]):
            continue
        mesh = dataclasses.replace(
            experiment.mesh, data=data, fsdp=devices // fixed, expert=expert, context=context, tensor=tensor
        )
        if not lies_whole(mesh, where):
            continue
        for remat in REMAT:
            yield dataclasses.replace(experiment, mesh=mesh, model=dataclasses.replace(model, remat=remat))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def lies_whole(mesh: Mesh, where: Slice) -> bool:
    """Whether no axis needs a part of a torus dim, where the links around it would be open."""
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    if where.chip.kind == "gpu":
        return True
    whole = set(where.shape) | {where.devices_per_chip}
    return all(
        math.prod(run.size for run in runs) == sizes[axis] and all(run.size in whole for run in runs)
        for axis, runs in runs_of(where, sizes).items()
        if sizes[axis] > 1
    )


def rank(forecasts: list[Forecast], room: float = 0.0) -> list[Forecast]:
    """The fastest that fits first; then those that do not, the smallest first."""
    return sorted(forecasts, key=lambda f: (f.spare < room, f.step_seconds if f.spare >= room else -f.spare))


def candidates(experiment: Experiment, where: Slice, **asked: float | None) -> list[Forecast]:
    """Ranked by formula. Raises UserError where none will do, with what is wrong with most."""
    found, refused = [], Counter[str]()
    for variant in variants(experiment, where):
        try:
            found.append(by_formula(settle(variant, where), **asked))
        except UserError as e:
            refused[str(e)] += 1
    if not found and not refused:
        context = experiment.mesh.context
        raise UserError(f"no mesh of {where.name} has config.mesh.context={context}; set config.mesh.context=1")
    if not found:
        ((why, _),) = refused.most_common(1)
        raise UserError(f"no mesh of {where.name} will do; what is wrong with most: {why}")
    return rank(found, ROOM)


def search(
    experiment: Experiment,
    where: Slice,
    confirm: Callable[[Setting], Forecast] | None,
    seconds: float,
    say: Callable[[str], None],
    **asked: float | None,
) -> list[Forecast]:
    """The best first. `confirm` compiles; as many of the best as `seconds` allow, one at least.

    Where the compiler finds more than the formula did, the next to be compiled are those with room for as much more;
    where none that was compiled fits, those come first, unconfirmed. What the compiler refuses for another reason than
    its size is named and left out. Raises UserError where it refuses all that it was given.
    """
    ranked, since = candidates(experiment, where, **asked), time.monotonic()
    say(f"{len(ranked)} meshes and remat policies by formula; {sum(f.fits for f in ranked)} fit")
    if confirm is None:
        return ranked
    confirmed, tried, longest, room, refusal = list[Forecast](), 0, 0.0, ROOM, None
    while ranked:
        left = seconds - (time.monotonic() - since)
        if tried and (left < 1.2 * longest or (len(confirmed) >= 3 and any(f.fits for f in confirmed))):
            break
        forecast, *ranked = ranked
        tried, started = tried + 1, time.monotonic()
        say(f"compiling {tried}: {describe(forecast)} ({max(left, 0):.0f} s left)")
        try:
            confirmed.append(confirm(forecast.setting))
        except UserError as e:
            say(f"  {e}")
            refusal = e
            continue
        finally:
            longest = max(longest, time.monotonic() - started)
        say(f"  {describe(confirmed[-1])}")
        room = max(room, 1 - forecast.memory.total / confirmed[-1].memory.total)
        ranked = rank(ranked, room)
    if refusal is not None and not confirmed:
        raise refusal
    hopeful = [] if any(f.fits for f in confirmed) else [f for f in ranked if f.spare >= room]
    if hopeful:
        say("none that was compiled fits; the first is by formula, with room for as much more as the compiler found")
    return [*hopeful, *rank(confirmed), *ranked[len(hopeful) :]]


def describe(forecast: Forecast) -> str:
    axes = " ".join(f"{axis}={size}" for axis, size in forecast.setting.axes.items() if size > 1) or "one device"
    remat = forecast.setting.experiment.model.remat
    return f"{axes} remat={remat}: {forecast.margin}, {forecast.step_seconds:.2f} s a step, MFU {forecast.mfu:.0%}"


def overrides(forecast: Forecast) -> str:
    """A flag file for training and planning: `--flagfile=best.flags`."""
    setting = forecast.setting
    lines = [f"mesh.{axis}={size}" for axis, size in setting.axes.items()]
    lines.append(f"model.remat={setting.experiment.model.remat}")
    return "".join(f"--config_field={line}\n" for line in lines)
