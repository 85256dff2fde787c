"""The training step as libtpu compiles it, held to what the plan promises. Minutes; needs no TPU."""

import dataclasses
import importlib.util

import pytest

from tmljax import config
from tmljax.model.trunk import UNROLLED_IN_TRAINING
from tmljax.plan import inspect, memory
from tmljax.plan.compile import compile_step, devices_of
from tmljax.plan.forecast import by_compiler
from tmljax.plan.hardware import find_slice
from tmljax.plan.hlo import axis_of
from tmljax.plan.setting import settle, shard_bytes
from tmljax.plan.work import kernel_flops

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'tmljax[tpu]'"
    ),
]
WHERE = find_slice("v5p:2x2x1")
LAYERS = UNROLLED_IN_TRAINING["tpu"] + 1


@pytest.fixture(scope="module")
def experiment() -> config.Experiment:
    """Layers of the big model's kind, enough to be scanned: grouped, gathered, splash, bfloat16, rematerialised."""
    moe = config.Moe(
        experts=8, top_k=2, expert_width=256, shared_width=256, exchange="gathered", capacity_factor=1.25,
        matmul="grouped",
    )  # fmt: skip
    model = config.Model(
        d_model=256, layers=LAYERS, heads=4, kv_heads=4, head_dim=128, window=1500, moe=moe,
        attention="splash", flow=config.Flow(width=256), dtype="bfloat16", remat="full",
    )  # fmt: skip
    return config.Experiment(
        model=model,
        data=config.Data(window=64, batch=8),
        optimizer=config.Optimizer(name="adamw"),
        mesh=config.Mesh(data=1, fsdp=2, expert=2),
    )


@pytest.fixture(scope="module")
def setting(experiment):
    return settle(experiment, WHERE)


@pytest.fixture(scope="module")
def compiled(setting):
    return compile_step(setting, devices_of(WHERE))


def test_a_device_is_given_its_shards_and_nothing_else(setting, compiled):
    """No state is replicated that the plan thinks split: the program's arguments are the shards and the batch."""
    assert all(
        name.endswith(("table", "merge", "pixels", "enter", "leave", "time_in"))
        for name in inspect.replicated(setting, large=2**15)
    )
    assert compiled.arguments == pytest.approx(shard_bytes(setting.state) + memory.batch_bytes(setting), rel=0.01)


def test_no_parameter_is_gathered_for_all_layers_at_once(setting, compiled):
    assert inspect.gathered_layers(compiled.program, setting) == []


def test_every_layer_gathers_its_own_weights_and_tokens(compiled, setting):
    """Once forward, once again, once backward at the most, in the scan of the layers."""
    in_scan = [c for c in compiled.program.collectives() if c.operation == "all-gather" and c.times == LAYERS]
    axes = {axis_of(c.members, setting.axes) for c in in_scan}
    assert {"fsdp", "expert"} <= axes
    scattered = {
        axis_of(c.members, setting.axes)
        for c in compiled.program.collectives()
        if c.operation == "reduce-scatter" and c.times == LAYERS
    }
    assert {"fsdp", "expert"} <= scattered


def test_the_ragged_exchange_is_in_the_step_of_who_asks_for_it(experiment):
    """There and back, forward, again and backward, and no other in the layers."""
    moe = dataclasses.replace(experiment.model.moe, exchange="ragged")
    ragged = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, moe=moe))
    program = compile_step(settle(ragged, WHERE), devices_of(WHERE)).program
    found = [c for c in program.collectives() if c.times == LAYERS and c.operation.endswith("all-to-all")]
    rows = [c for c in found if c.bytes > 2**12 * LAYERS]  # the others tell how many there will be
    assert {c.operation for c in rows} == {"ragged-all-to-all"}
    assert len(rows) >= 5


@pytest.mark.parametrize(
    ("operation", "axes"), [("all-gather", ("fsdp", "fsdp+expert")), ("reduce-scatter", ("fsdp",))], ids=str
)
def test_products_run_beside_weights_and_the_experts_gradients(compiled, setting, operation, axes):
    """The first are gathered, the second scattered. LOG.md says which options make it so."""
    found = [
        c
        for c in compiled.program.collectives(kernel_flops(setting))
        if c.operation == operation and c.times == LAYERS and axis_of(c.members, setting.axes) in axes
    ]
    assert found
    assert sum(c.bytes for c in found if c.beside) > 0.5 * sum(c.bytes for c in found)


def test_experts_and_attention_of_both_passes_are_kernels(compiled):
    """Three products forward, again, and two each backward, none of them spread over all experts by XLA; and of
    attention one forward, again, and two backward."""
    kernels = [
        times
        for name, times in compiled.program.times.items()
        for i in compiled.program.computations[name]
        if i.kind == "custom-call" and "tpu_custom_call" in i.rest
    ]
    assert sum(times == LAYERS for times in kernels) >= 15


def test_the_forecast_takes_the_compilers_numbers(setting, compiled):
    forecast = by_compiler(setting, compiled)
    assert forecast.memory.total == pytest.approx(compiled.total, rel=0.01)
    assert {forecast.sources[what] for what in ("memory", "link traffic")} == {"compiler"}
    assert forecast.sources["memory traffic"] == "compiler, and by formula what kernels read again"
    assert forecast.sources["flops"] == "formula"
    estimate = memory.estimate(setting)
    assert estimate.parameters + estimate.optimizer == pytest.approx(compiled.arguments, rel=0.25)


def test_a_slice_that_libtpu_does_not_know_is_named():
    with pytest.raises(config.UserError, match="v5p:3x5x7 is unknown to libtpu"):
        devices_of(dataclasses.replace(WHERE, name="v5p:3x5x7"))
