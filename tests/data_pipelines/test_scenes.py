"""Frames show what the scene says."""

import itertools

import numpy as np

from data_pipelines.scenes import COLOURS, SHAPES, Scene, Thing, describe, draw, draw_thing
from tmljax.stream.record import Word


def still(thing: Thing | None, size: int = 40) -> np.ndarray:
    return draw(Scene(size, size, (thing,)), np.random.default_rng(0))[0].astype(int)


def covered(colour: str, shape: str) -> np.ndarray:
    blank, shown = still(None), still(Thing(colour, shape, 0.5, 0.5, 0.35))
    return np.abs(shown - blank).sum(axis=-1) > 0


def test_every_colour_is_seen_in_the_middle():
    for colour, value in COLOURS.items():
        middle = still(Thing(colour, "circle", 0.5, 0.5, 0.35))[18:22, 18:22].mean(axis=(0, 1))
        nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - middle).sum())
        assert nearest == colour, (colour, value, middle)


def test_shapes_differ_in_what_they_cover():
    masks = {shape: covered("white", shape) for shape in SHAPES}
    for a, b in itertools.combinations(SHAPES, 2):
        assert (masks[a] ^ masks[b]).sum() > 40, (a, b)
    area = masks["circle"].sum() / 40**2
    assert abs(area - np.pi * 0.35**2) < 0.02


def test_nothing_is_nothing_and_sizes_follow_the_frame():
    blank = still(None)
    assert blank.std() < 15
    assert blank.max() < 120
    frames = draw(Scene(80, 120, (None, Thing("red", "square", 0.5, 0.5, 0.3))), np.random.default_rng(0))
    assert frames.shape == (2, 80, 120, 3)
    assert frames.dtype == np.uint8


def test_a_scene_is_described_frame_by_frame():
    thing = Thing("red", "square", 0.5, 0.5, 0.3)
    assert describe(Scene(40, 40, (None, thing)), 0.6) == (Word("red", 0.6, 1.2), Word("square", 0.6, 1.2))
    assert describe(Scene(40, 40, (None,)), 0.6) == ()


def test_things_stay_inside_the_frame():
    rng = np.random.default_rng(0)
    for _ in range(200):
        thing = draw_thing(rng, "red", "circle")
        assert thing.x - thing.radius >= 0
        assert thing.x + thing.radius <= 1
        assert thing.y - thing.radius >= 0
        assert thing.y + thing.radius <= 1
