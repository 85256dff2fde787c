"""The reference large config is what its docstring says, counted on shapes alone."""

import math
from pathlib import Path

import jax
import pytest

from launch import verb
from tmljax.model.interaction import Definition, count
from tmljax.plan.hardware import find_slice
from tmljax.plan.parts import add, count_parts
from tmljax.plan.setting import settle, shapes_of
from tmljax.stream.microturn import MICROTURN_SECONDS, Layout

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = CONFIGS / "tml_interaction_small.py"


@pytest.fixture(scope="module")
def big():
    return verb.load_experiment(str(CONFIG))


def test_parameters(big):
    definition = Definition(big.stream, big.model)
    parts = count_parts(definition)
    assert add(parts).total == count(shapes_of(definition).abstract())
    assert add(parts).total == pytest.approx(276e9, rel=0.01)
    assert add(parts).active == pytest.approx(12e9, rel=0.03)
    assert f"{add(parts).total / 1e9:.1f}B parameters, {add(parts).active / 1e9:.1f}B of them" in CONFIG.read_text()


def test_what_fills_an_h200():
    config = CONFIGS / "h200.py"
    experiment = verb.load_experiment(str(config))
    parts = add(count_parts(Definition(experiment.stream, experiment.model)))
    assert f"{parts.total / 1e9:.1f}B parameters, {parts.active / 1e9:.1f}B of them active" in config.read_text()
    positions = experiment.data.batch * len(Layout(experiment.stream).positions(experiment.data.window))
    assert f"a batch {positions:,}" in config.read_text()


def test_nothing_large_is_held_twice(big):
    """Every parameter beyond 8M numbers, and its moments, is split over all 256 devices."""
    setting = settle(big, find_slice("v5p:4x8x8"))
    large = [leaf for leaf in jax.tree.leaves(setting.state) if leaf.size > 2**23]
    assert len(large) > 40
    for leaf in large:
        assert math.prod(leaf.sharding.shard_shape(leaf.shape)) * 256 == leaf.size


def test_streams_and_context(big):
    layout = Layout(big.stream)
    assert (big.stream.video_width, big.stream.video_height) == (320, 240)
    assert big.stream.video_every * MICROTURN_SECONDS >= 1 / 5
    assert big.model.window * MICROTURN_SECONDS >= 5 * 60
    assert min(layout.user_audio, layout.user_video, layout.user_text, layout.model_text, layout.model_audio) >= 1
    assert layout.slots * big.data.window == 4096
    assert big.data.batch == 4 * 256
