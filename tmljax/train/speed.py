"""How fast a run is, against the clock of the conversation and against the arithmetic of its devices.

Model FLOPs are those of the mathematics: 6 per parameter of a matrix and place where it is applied (2 forward, 4
backward), and 12 per head value and pair of positions that see each other. Recomputation and pairs that the window
masks are not counted, a table that is looked up counts nothing, and a routed expert counts for the share of tokens it
serves. Slots of text that hold nothing, and the end of a short example, count as positions like any other.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from tmljax.config import Experiment
from tmljax.fingerprint import flatten
from tmljax.model.block import ROUTED
from tmljax.stream.microturn import MICROTURN_SECONDS, Layout
from tmljax.train.metrics import TIME, Row
from tmljax.train.optimizer import is_matrix
from tmljax.train.state import Definition

# Dense bfloat16 FLOP/s of one JAX device, by the first that its kind begins with; the makers' numbers.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153.5e12,  # a chip is two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Of all devices together; None where their kind is not in the table, as for CPUs."""
    peak = next((peak for kind, peak in PEAKS.items() if devices[0].device_kind.startswith(kind)), None)
    return None if peak is None else peak * len(devices)


def step_flops(experiment: Experiment, definition: Definition) -> float:
    """Model FLOPs of a training step of the interaction model."""
    params = flatten(definition.abstract())
    axes = jax.tree.leaves(definition.axes(), is_leaf=lambda x: isinstance(x, tuple))
    matrices = sum(
        leaf.size * places(name.split("."), experiment)
        for (name, leaf), names in zip(params.items(), axes, strict=True)
        if is_matrix(names)
    )
    return experiment.data.batch * (6 * matrices + attention_flops(experiment))


def places(path: list[str], experiment: Experiment) -> float:
    """How often an example applies each number of the parameter at this path."""
    layout, model, length = Layout(experiment.stream), experiment.model, experiment.data.window
    group, name = path[0], path[-1]
    if group in ("tokens", "slots", "senses", "sense_scales") or name == "table":
        return 0  # looked up
    if group == "trunk":
        return len(layout.positions(length)) * (model.moe.top_k / model.moe.experts if name in ROUTED else 1)
    if group == "patches":
        patches = length // experiment.stream.video_every * layout.patches
        return patches * {"pixels": 100, "merge": 25, "last": 1 / experiment.stream.patches_per_slot}[name]
    return {
        "user_dmel": length * layout.user_audio,
        "model_dmel": length * layout.model_audio,
        "text_head": length * layout.model_text,
        "notes_head": length + length // experiment.stream.video_every,
        "flow_head": max(1, round(model.flow.share * length)) * layout.model_audio * model.flow.draws,
    }[group]


def attention_flops(experiment: Experiment) -> float:
    """Scores and mixtures of one example, over the pairs that the causal window lets see each other."""
    model, turn_P = experiment.model, Layout(experiment.stream).positions(experiment.data.window)[:, 0]
    pairs = sum(p + 1 - np.searchsorted(turn_P, turn - model.window + 1) for p, turn in enumerate(turn_P))
    return 12 * model.layers * model.heads * model.head_dim * pairs


class Stopwatch:
    """The time/ part of a row."""

    def __init__(self, experiment: Experiment, flops: float | None, devices: list[jax.Device], step: int):
        batch, length = experiment.data.batch, experiment.data.window
        self._positions = batch * len(Layout(experiment.stream).positions(length))
        self._seconds = batch * length * MICROTURN_SECONDS
        peak = peak_flops(devices)
        self._use = None if flops is None or peak is None else flops / peak
        self.begin(step)

    def begin(self, step: int, ahead: float = 0.0) -> None:
        """After this step, `ahead` of which the devices have waited for the next one's batch."""
        self._step, self._since, self._waited, self._apart = step, time.perf_counter() - ahead, ahead, 0.0

    def stand_still(self, seconds: float) -> None:
        """Time that the devices waited for a batch."""
        self._waited += seconds

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Time that is not training: evaluation, a checkpoint."""
        before = time.perf_counter()
        yield
        self._apart += time.perf_counter() - before

    def read(self, step: int, ahead: float = 0.0) -> Row:
        """Means over the steps since the last reading. After `step` the devices have waited `ahead` seconds for the
        batch of one that was dispatched since."""
        elapsed = max(time.perf_counter() - self._since - self._apart - ahead, 1e-9)
        seconds = elapsed / (step - self._step)
        row = {
            "step_seconds": seconds,
            "positions_per_second": self._positions / seconds,
            "conversation_seconds_per_second": self._seconds / seconds,
            "data_wait": (self._waited - ahead) / elapsed,
        }
        if self._use is not None:
            row["mfu"] = self._use / seconds
        self.begin(step, ahead)
        return {TIME + name: value for name, value in row.items()}


def as_row(step: int, values: dict[str, Any]) -> Row:
    return {"step": step, **{name: float(value) for name, value in values.items()}}
