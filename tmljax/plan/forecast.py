"""What a training step will cost: memory, time, and the money and days that follow from it.

Every number says where it is from: `compiler` read off the compiled program, `formula` computed from the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from tmljax.plan import memory as by_shape
from tmljax.plan import work as by_work
from tmljax.plan.compile import Compiled
from tmljax.plan.hardware import runs_of
from tmljax.plan.hlo import Collective, axis_of, shift_of
from tmljax.plan.inspect import gathered_layers, replicated
from tmljax.plan.memory import Memory
from tmljax.plan.parts import add, count_parts
from tmljax.plan.roofline import Terms, Traffic, Work, hops_of, product_seconds, terms, traffic_seconds
from tmljax.plan.setting import Setting

COMPILER, FORMULA, BOTH = "compiler", "formula", "compiler, and by formula what kernels read again"
DISK = 1e9  # bytes/s that a host writes to its checkpoint storage; an assumption
HOST = 4  # chips of a TPU slice that share a host


@dataclass(frozen=True)
class Forecast:
    setting: Setting
    memory: Memory
    work: Work
    sources: Mapping[str, str]  # what is from where
    compile_seconds: float | None = None
    complaints: Sequence[str] = ()  # of the compiled program
    price: float | None = None  # dollars an hour of one chip
    tokens: float | None = None  # positions to train on

    @property
    def terms(self) -> Terms:
        return terms(self.work, self.setting.where, self.setting.axes)

    @property
    def spare(self) -> float:
        """Share of a device's memory that stays free; negative where it does not fit."""
        return 1 - self.memory.total / self.setting.where.chip.memory

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def margin(self) -> str:
        return f"{self.spare:.1%} spare" if self.fits else f"{-self.spare:.1%} too large"

    @property
    def step_seconds(self) -> float:
        return self.terms.step

    @property
    def mfu(self) -> float:
        where = self.setting.where
        return by_work.model_flops(self.setting) / (self.step_seconds * where.chip.flops * where.devices)

    @property
    def rate(self) -> float:
        """Seconds of conversation a second."""
        return self.setting.conversation / self.step_seconds

    @property
    def per_dollar(self) -> float | None:
        """Seconds of conversation for a dollar."""
        return None if self.price is None else self.rate * 3600 / (self.price * self.setting.where.chips)

    @property
    def days(self) -> float | None:
        if self.tokens is None:
            return None
        positions = self.setting.experiment.data.batch * self.setting.length
        return self.tokens / positions * self.step_seconds / 86_400

    @property
    def cost(self) -> float | None:
        """Dollars for all positions."""
        if self.days is None or self.price is None:
            return None
        return self.days * 24 * self.price * self.setting.where.chips

    @property
    def checkpoint_bytes(self) -> float:
        """Of the whole state, once."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.setting.state))

    @property
    def checkpoint_seconds(self) -> float:
        """Every host writes its share."""
        where = self.setting.where
        hosts = where.shape[0] if where.chip.kind == "gpu" else max(1, where.chips / HOST)
        return self.checkpoint_bytes / (DISK * hosts)


def by_formula(setting: Setting, **asked: float | None) -> Forecast:
    sources = dict.fromkeys(("memory", "flops", "memory traffic", "link traffic"), FORMULA)
    return Forecast(setting, by_shape.estimate(setting), by_work.estimate(setting), sources, **asked)


def by_compiler(setting: Setting, compiled: Compiled, **asked: float | None) -> Forecast:
    """Gradients are told apart from the other temporaries by their shapes; products are counted by formula, for a
    kernel is a black box to the compiler."""
    forecast = by_formula(setting, **asked)
    exact = forecast.memory
    memory = Memory(
        exact.parameters,
        exact.optimizer,
        min(exact.gradients, compiled.temporaries),
        max(compiled.temporaries - exact.gradients, 0.0),
        max(compiled.arguments - exact.parameters - exact.optimizer, 0.0)
        + (by_shape.BATCHES - 1) * by_shape.batch_bytes(setting)
        + compiled.other,
    )
    sources = dict(forecast.sources) | {"memory": COMPILER}
    forecast = replace(forecast, memory=memory, sources=sources, compile_seconds=compiled.seconds)
    if compiled.program is None:
        return forecast
    complaints = [
        f"{c.operation} of {c.shape} outside the scan over layers" for c in gathered_layers(compiled.program, setting)
    ] + [f"{name} is not split over all devices" for name in replicated(setting)]
    again = by_work.kernel_traffic(setting)
    work = Work(forecast.work.flops, compiled.program.traffic_bytes() + again, gather_traffic(compiled, setting))
    sources |= {"memory traffic": BOTH if again else COMPILER, "link traffic": COMPILER}
    return replace(forecast, work=work, sources=sources, complaints=complaints)


def gather_traffic(compiled: Compiled, setting: Setting) -> list[Traffic]:
    """Collectives of the program, one entry for each kind along each axis, and one more for those that wait.

    One that runs beside products waits for as long as it takes longer than they do.
    """
    sums: dict[tuple[str, str, bool], list[float]] = {}
    where, kernels = setting.where, by_work.kernel_flops(setting)
    for c in compiled.program.collectives(kernels) if compiled.program else ():
        axis = axis_of(c.members, setting.axes)
        if not (axis and c.bytes):
            continue
        hops = hops_along(axis, c, setting) if c.operation == "collective-permute" else 1
        alone = traffic_seconds(Traffic(axis, c.operation, c.bytes, 1.0, hops=hops), where, setting.axes)
        waits = max(0.0, 1 - product_seconds(c.beside, where.chip) / alone)
        size = c.bytes * c.times
        entry = sums.setdefault((axis, c.operation, waits > 0), [0.0, 0.0, 0.0, 0.0])
        more = (size, size * waits, c.times, size * hops)
        entry[:] = (total + one for total, one in zip(entry, more, strict=True))
    return [
        Traffic(axis, operation, size, waiting / size, count, hopped / size)
        for (axis, operation, _), (size, waiting, count, hopped) in sums.items()
    ]


def hops_along(axis: str, shift: Collective, setting: Setting) -> int:
    runs = runs_of(setting.where, setting.axes)
    return hops_of(shift_of(shift.members, setting.axes), [run for name in axis.split("+") for run in runs[name]])


def as_json(forecast: Forecast) -> dict[str, Any]:
    setting, parts, t = forecast.setting, count_parts(forecast.setting.definition), forecast.terms
    where, model = setting.where, setting.experiment.model
    return {
        "topology": where.name,
        "chips": where.chips,
        "mesh": dict(setting.axes),
        "remat": model.remat,
        "parameters": {p.name: {"total": p.total, "active": p.active} for p in [*parts, add(parts)]},
        "positions_per_device": setting.positions * setting.experiment.optimizer.accumulate,
        "memory": forecast.memory._asdict() | {"total": forecast.memory.total, "device": where.chip.memory},
        "fits": forecast.fits,
        "spare": forecast.spare,
        "step_seconds": forecast.step_seconds,
        "terms": {"matmul": t.matmul, "memory": t.memory, "links": dict(t.links), "waits": t.waits},
        "binds": t.binds,
        "mfu": forecast.mfu,
        "model_flops": by_work.model_flops(setting),
        "executed_flops_per_device": forecast.work.flops,
        "memory_traffic_per_device": forecast.work.memory,
        "traffic": [x._asdict() for x in forecast.work.traffic],
        "conversation_seconds_per_second": forecast.rate,
        "conversation_seconds_per_dollar": forecast.per_dollar,
        "days": forecast.days,
        "dollars": forecast.cost,
        "checkpoint_bytes": forecast.checkpoint_bytes,
        "checkpoint_seconds": forecast.checkpoint_seconds,
        "compile_seconds": forecast.compile_seconds,
        "complaints": list(forecast.complaints),
        "sources": dict(forecast.sources),
    }
