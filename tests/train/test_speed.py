"""Legend: B batch, T micro-turns."""

import dataclasses
import math

import jax
import pytest

from tmljax import config
from tmljax.model.interaction import Definition
from tmljax.plan.setting import batch_shapes
from tmljax.stream.microturn import FRAMES, Layout
from tmljax.train import speed
from tmljax.train.objective import objective


def matmul_flops(jaxpr) -> float:
    """Of all matrix products in a jaxpr, the bodies of scans as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[dim] for dim in contracted)
        elif equation.primitive.name.startswith("ragged_dot"):
            rows, weights = (variable.aval.shape for variable in equation.invars[:2])
            total += 2 * rows[0] * weights[1] * weights[2]
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * matmul_flops(inner)
    return total


def batch_like(experiment: config.Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = batch_shapes(experiment, experiment.data.batch)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


@pytest.mark.parametrize("changes", [{}, {"layers": 4}, {"d_model": 128, "heads": 8}])
def test_model_flops_are_those_of_the_traced_forward_pass(tiny, changes):
    moe = config.Moe(experts=4, top_k=2, expert_width=96, shared_width=64, matmul="ragged")
    model = dataclasses.replace(tiny.model, **{"d_model": 64, "moe": moe, "window": 64} | changes)
    experiment = dataclasses.replace(tiny, model=model, data=dataclasses.replace(tiny.data, window=6, batch=8))
    model = Definition(experiment.stream, experiment.model)

    def forward(params, batch):
        return objective(model, params, batch, jax.random.key(0), experiment.loss)[0]

    traced = matmul_flops(jax.make_jaxpr(forward)(model.abstract(), batch_like(experiment)).jaxpr)
    # The model looks its dMel tables up by a one-hot product, and multiplies scores that it masks.
    tables = sum(leaf["table"].size for leaf in (model.abstract()["user_dmel"], model.abstract()["model_dmel"]))
    lookups = 2 * 8 * 6 * FRAMES * tables
    positions, pairs = len(Layout(experiment.stream).positions(6)), experiment.model.layers * 4 * model.model.heads * 8
    unmasked = 8 * (pairs * positions**2 - speed.attention_flops(experiment) / 3)
    assert (traced - lookups - unmasked) / (speed.step_flops(experiment, model) / 3) == pytest.approx(1, rel=0.02)


def test_attention_is_counted_within_the_causal_window(tiny):
    """By counting pairs one at a time."""
    model = dataclasses.replace(tiny.model, window=3)
    experiment = dataclasses.replace(tiny, model=model, data=dataclasses.replace(tiny.data, window=6))
    places = [tuple(place) for place in Layout(tiny.stream).positions(6).tolist()]
    pairs = sum(1 for q in places for k in places if k <= q and q[0] - k[0] < 3)
    assert speed.attention_flops(experiment) == 12 * model.layers * model.heads * model.head_dim * pairs


@pytest.fixture
def clock(monkeypatch):
    """A hand that tests move."""
    hand = [100.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: hand[0])
    return hand


class Device:
    device_kind = "TPU v5p"


def test_the_stopwatch_gives_means_since_the_last_reading(tiny, clock):
    watch = speed.Stopwatch(tiny, flops=459e12, devices=[Device(), Device()], step=10)
    for _ in range(4):
        clock[0] += 0.5
        watch.stand_still(0.1)
    with watch.apart():
        clock[0] += 60
    row = watch.read(14)
    seconds = tiny.data.batch * tiny.data.window * 0.2
    positions = tiny.data.batch * len(Layout(tiny.stream).positions(tiny.data.window))
    assert row["time/step_seconds"] == pytest.approx(0.5)
    assert row["time/conversation_seconds_per_second"] == pytest.approx(seconds / 0.5)
    assert row["time/positions_per_second"] == pytest.approx(positions / 0.5)
    assert row["time/data_wait"] == pytest.approx(0.2)
    assert row["time/mfu"] == pytest.approx(459e12 / 0.5 / (2 * 459e12))
    clock[0] += 3
    assert watch.read(15)["time/step_seconds"] == pytest.approx(3)


def test_the_use_of_a_device_of_unknown_peak_is_left_out(tiny):
    assert speed.peak_flops(jax.devices()) is None
    assert "time/mfu" not in speed.Stopwatch(tiny, 1e12, jax.devices(), step=0).read(1)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_peaks_by_the_kind_that_jax_reports(kind, peak):
    device = Device()
    device.device_kind = kind
    assert speed.peak_flops([device] * 3) == 3 * peak
