"""AdamW and Muon over a tree of parameters whose leaves are stacked over layers and experts.

The transformations here return directions of descent; the step scales them by `schedule(step)`. So the learning
rate follows the step, whether or not an update was skipped, and decoupled weight decay follows it too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from tmljax import config

Axes = tuple[str, ...]  # the logical name of each dim of a parameter

STACKED = ("layers", "experts")  # dims that hold independent parameters side by side
MUON_RMS = 0.2  # of an update: that of AdamW, so that both take one learning rate (arXiv 2502.16982)


def schedule(optimizer: config.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, ...: linear warm-up, then wsd (stable, linear decay to 0) or cosine to 0."""
    peak, warmup = optimizer.learning_rate, min(optimizer.warmup, steps)
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)) if warmup else None
    rest = steps - warmup
    if optimizer.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(rest, 1))
    else:
        decay = min(rest, round(optimizer.decay * steps))
        stable = optax.constant_schedule(peak)
        fall = optax.linear_schedule(peak, 0.0, max(decay, 1))
        after = optax.join_schedules([stable, fall], [rest - decay])
    return after if rise is None else optax.join_schedules([rise, after], [warmup])


MUON_MOMENTUM = 0.95


def make_optimizer(optimizer: config.Optimizer, axes: Any) -> optax.GradientTransformation:
    """`axes` is the tree of the trained parameters' logical dims (`Definition.axes()`)."""
    decays = map_axes(is_matrix, axes)
    decay = optax.add_decayed_weights(optimizer.weight_decay, mask=decays)
    adam = optax.chain(optax.scale_by_adam(optimizer.b1, optimizer.b2), decay, optax.scale(-1.0))
    if optimizer.name == "adamw":
        return adam
    muon = optax.chain(
        scale_by_muon(beta=MUON_MOMENTUM, weight_dimension_numbers=muon_matrices(axes)),
        scale_to_rms(axes),
        optax.add_decayed_weights(optimizer.weight_decay),
        optax.scale(-1.0),
    )
    return optax.partition(
        {"muon": muon, "adam": adam}, map_axes(lambda names: "muon" if is_hidden(names) else "adam", axes)
    )


def is_matrix(names: Axes) -> bool:
    """Whether one layer's part of the parameter is a matrix: those are decayed, norms and biases are not."""
    return len(names) - names.count("layers") >= 2


def is_hidden(names: Axes) -> bool:
    """Whether Muon takes it: the matrices of stacked layers; embeddings and heads are AdamW's."""
    return "layers" in names and sum(name not in STACKED for name in names) >= 2


def muon_matrices(axes: Any) -> Any:
    """Which dims of each of Muon's leaves make up the matrix: the last is its output, the rest its input.

    The same structure as optax hands over: leaves that are not Muon's are masked.
    """

    def matrix(names: Axes) -> Any:
        if not is_hidden(names):
            return optax.MaskedNode()
        inputs = tuple(dim for dim, name in enumerate(names[:-1]) if name not in STACKED)
        return MuonDimensionNumbers(reduction_axis=inputs, output_axis=(len(names) - 1,))

    return map_axes(matrix, axes)


def scale_to_rms(axes: Any) -> optax.GradientTransformation:
    """An orthogonal [n, m] matrix has RMS 1 / sqrt(max(n, m)); this makes it MUON_RMS."""
    matrices = muon_matrices(axes)

    def scale(matrix: MuonDimensionNumbers, update: jax.Array) -> jax.Array:
        fan_in = 1
        for dim in matrix.reduction_axis:
            fan_in *= update.shape[dim]
        return update * (MUON_RMS * jnp.sqrt(jnp.float32(max(fan_in, update.shape[-1]))))

    def rescale(updates: Any, _: Any) -> Any:
        return jax.tree.map(scale, matrices, updates, is_leaf=lambda x: isinstance(x, MuonDimensionNumbers))

    return optax.stateless(rescale)


def map_axes(function: Any, axes: Any) -> Any:
    return jax.tree.map(function, axes, is_leaf=lambda x: isinstance(x, tuple))
