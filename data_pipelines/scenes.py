"""Procedural video: one coloured shape at a time on a noisy background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tmljax.stream.record import Word

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
    "white": (235, 235, 235),
}
SHAPES = ("circle", "square", "triangle", "cross")


class Thing(NamedTuple):
    """A shape in units of the frame: centre x, y and radius against the shorter side."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Frame i shows things[i] (None: nothing) for `video_every` micro-turns."""

    height: int
    width: int
    things: tuple[Thing | None, ...]


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points of the plane a unit shape covers; y grows downwards."""
    if shape == "circle":
        return x * x + y * y < 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.85
    if shape == "triangle":
        return (y < 0.8) & (y > 2 * abs(x) - 1)
    return (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1)


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """uint8 [N, H, W, 3]."""
    shade = rng.integers(20, 90)
    shape = (len(scene.things), scene.height, scene.width, 3)
    frames = rng.integers(-18, 19, shape, dtype=np.int16) + np.int16(shade)
    y, x = np.mgrid[: scene.height, : scene.width].astype(np.float32)
    side = min(scene.height, scene.width)
    for frame, thing in zip(frames, scene.things):
        if thing is not None:
            radius = thing.radius * side
            covered = _inside(thing.shape, (x - thing.x * scene.width) / radius, (y - thing.y * scene.height) / radius)
            frame[covered] += np.array(COLOURS[thing.colour], np.int16) - np.int16(shade)
    return np.clip(frames, 0, 255).astype(np.uint8)


def describe(scene: Scene, period: float) -> tuple[Word, ...]:
    """The colour and shape of each frame's thing, while the frame is there: `period` seconds."""
    return tuple(
        Word(text, round(i * period, 4), round((i + 1) * period, 4))
        for i, thing in enumerate(scene.things)
        if thing is not None
        for text in (thing.colour, thing.shape)
    )


def draw_thing(rng: np.random.Generator, colour: str, shape: str) -> Thing:
    radius = rng.uniform(0.2, 0.38)
    x, y = rng.uniform(radius, 1 - radius, 2)
    return Thing(colour, shape, float(x), float(y), float(radius))
