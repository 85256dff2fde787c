"""The same for serving: how many live sessions a slice holds, and how long a micro-turn of all of them takes.

By formula, and for a tick that is split over the slice: the decoder itself runs on one device. Every device but a
tensor neighbour has sessions of its own; nothing is gathered: experts are split over `expert`, and what all positions
use is on every device. Weights are as a tick holds them (`Definition.held`).

Legend: n positions of a pass, K kv heads, h head dim, E experts, W expert width, D d_model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from tmljax.config import Experiment, Mesh, UserError
from tmljax.plan.hardware import Slice, runs_of
from tmljax.plan.memory import dense_weights, routed_weights
from tmljax.plan.parts import add_bytes, by_part, count_parts
from tmljax.plan.roofline import MATMUL_SHARE, MEMORY_SHARE, Traffic, collective_seconds
from tmljax.plan.search import divisors, lies_whole
from tmljax.plan.setting import Setting
from tmljax.sharding import fill
from tmljax.stream.microturn import MICROTURN_SECONDS

RESERVE = 0.05  # of the memory: work space and code


class Turn(NamedTuple):
    """Seconds of one micro-turn, each part alone."""

    matmul: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.matmul, self.memory) + self.links

    @property
    def binds(self) -> str:
        return max(self._fields, key=lambda name: getattr(self, name))


def best_serving(experiment: Experiment, where: Slice) -> Serving:
    """On the mesh that serves the most sessions. Raises UserError where the weights fit on none."""
    found = []
    for expert, tensor in product(divisors(experiment.model.moe.experts), divisors(experiment.model.kv_heads)):
        if where.devices % (expert * tensor):
            continue
        mesh = Mesh(data=where.devices // (expert * tensor), expert=expert, tensor=tensor)
        if lies_whole(mesh, where):
            found.append(Serving(Setting(replace(experiment, mesh=mesh), where, fill(mesh, where.devices))))
    room = [serving for serving in found if serving.by_memory]
    if not room:
        least = min((serving.weight_bytes + serving.session_bytes for serving in found), default=math.inf)
        raise UserError(
            f"{where.name} holds no session: at least {least / 1e9:.1f} GB a device are needed, and each has "
            f"{where.chip.memory / 1e9:.0f} GB; name a larger --topology or lower config.model.window"
        )
    return max(room, key=lambda serving: (serving.sessions, -serving.turn(1).seconds))


@dataclass(frozen=True)
class Serving:
    setting: Setting

    @cached_property
    def parts(self) -> dict[str, int]:
        return {part.name: part.total for part in count_parts(self.setting.definition)}

    @cached_property
    def held(self) -> dict[str, float]:
        """Bytes of each part's weights."""
        return {part: add_bytes(leaves) for part, leaves in by_part(self.setting.shapes.held).items()}

    @property
    def weight_bytes(self) -> float:
        """Of a device."""
        routed = self.held["routed experts"]
        there = sum(self.held.values()) - routed + routed / self.setting.axes["expert"]
        return there / self.setting.axes["tensor"]

    @property
    def session_bytes(self) -> float:
        """A session's ring of keys and values, on the device that has it."""
        model, slots = self.setting.experiment.model, self.setting.layout.slots
        row = 2 * model.kv_heads * model.head_dim / self.setting.axes["tensor"] * self.setting.width
        return model.layers * (model.window + 1) * slots * row

    @property
    def by_memory(self) -> int:
        """Sessions that a device has room for."""
        room = self.setting.where.chip.memory * (1 - RESERVE) - self.weight_bytes
        return max(0, int(room / self.session_bytes))

    @property
    def by_time(self) -> int:
        """Sessions of a device whose micro-turn is over before the next one; 0 where not even one is in time."""
        low, high = 0, max(1, 2 * self.by_memory)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.turn(middle).seconds <= MICROTURN_SECONDS else (low, middle - 1)
        return low

    @property
    def sessions(self) -> int:
        """On the slice, in memory and in time."""
        return min(self.by_memory, self.by_time) * self.setting.members

    def passes(self) -> list[int]:
        """Positions of each pass through the trunk, for a session: input, then token by token, slot by slot; the last
        token goes with the first slot of speech, the last slot with the next input."""
        layout = self.setting.layout
        if layout.model_audio == 1:
            return [layout.inputs + 2] + [1] * (layout.model_text - 1)
        return [layout.inputs + 1] + [1] * (layout.model_text - 1) + [2] + [1] * (layout.model_audio - 2)

    def turn(self, sessions: int) -> Turn:
        """Of so many sessions a device."""
        parts = [*(self.one_pass(sessions, n) for n in self.passes()), self.heads(sessions)]
        return Turn(*(sum(times) for times in zip(*parts, strict=True)))

    def one_pass(self, sessions: int, n: int) -> Turn:
        setting, model = self.setting, self.setting.experiment.model
        chip, axes, moe, layers = setting.where.chip, setting.axes, model.moe, model.layers
        fresh = sessions * n  # positions of this device
        crowd = fresh * axes["expert"]  # that its experts see
        mine = moe.experts / axes["expert"]
        per_expert = 6 * model.d_model * moe.expert_width / axes["tensor"]
        worked = crowd * (mine if moe.tick_matmul == "every" else moe.top_k / axes["expert"])
        dense = 2 * fresh * (self.parts["attention"] + self.parts.get("shared expert", 0)) / axes["tensor"]
        keys = (model.window + 1) * setting.layout.slots
        attention = 4 * fresh * keys * model.heads * model.head_dim / axes["tensor"] * layers
        matmul = (layers * worked * per_expert + dense + attention) / (chip.flops * MATMUL_SHARE)

        chosen = 1.0 if moe.tick_matmul == "every" else 1 - (1 - moe.top_k / moe.experts) ** crowd
        weights = layers * (dense_weights(setting) + routed_weights(setting) * max(chosen, 1 / mine))
        memory = (weights + sessions * self.session_bytes) / (chip.memory_bandwidth * MEMORY_SHARE)

        mixed, runs = fresh * model.d_model * setting.width * layers, runs_of(setting.where, axes)
        moved = (
            Traffic("expert", "all-gather", 2 * mixed * axes["expert"], 1.0),
            Traffic("tensor", "all-reduce", 2 * mixed, 1.0),
        )
        return Turn(
            matmul, memory, sum(collective_seconds(t, axes[t.axis], runs[t.axis], setting.where) for t in moved)
        )

    def heads(self, sessions: int) -> Turn:
        """Text heads once for each token, the flow head for each of its steps towards a slot of speech."""
        setting, flow = self.setting, self.setting.experiment.model.flow
        layout, chip, tensor = setting.layout, setting.where.chip, setting.axes["tensor"]
        times = {"text heads": layout.model_text, "flow head": flow.steps * layout.model_audio}
        places = {"text heads": 1, "flow head": setting.experiment.stream.frames_per_slot}  # at once, of a session
        flops = sum(2 * sessions * places[head] * times[head] * self.parts[head] for head in times)
        read = sum(times[head] * self.held[head] for head in times)
        return Turn(
            flops / tensor / (chip.flops * MATMUL_SHARE), read / tensor / (chip.memory_bandwidth * MEMORY_SHARE), 0.0
        )

    def as_json(self) -> dict[str, Any]:
        here = min(self.by_memory, self.by_time)
        turn = self.turn(max(here, 1))
        return {
            "topology": self.setting.where.name,
            "mesh": dict(self.setting.axes),
            "sessions": self.sessions,
            "sessions_per_device_by_memory": self.by_memory,
            "sessions_per_device_by_time": self.by_time,
            "weight_bytes": self.weight_bytes,
            "session_bytes": self.session_bytes,
            "turn_seconds": turn.seconds,
            "turn_seconds_of_one": self.turn(1).seconds,
            "limit_seconds": MICROTURN_SECONDS,
            "terms": turn._asdict(),
            "binds": turn.binds if self.by_time < self.by_memory else "room in memory",
            "sources": {"all": "formula"},
        }
