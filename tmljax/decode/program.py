"""The tick as a program: traced once from the model's source, and run from there on without it.

The program is serialisable StableHLO (`jax.export`) of (weights, state, inputs) -> (state, outputs), each a
flat dict of named arrays. A workdir is streamed through the very program that an export would hold, so the
two agree bit for bit by construction.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmljax import checkpoint
from tmljax.config import Experiment, Model
from tmljax.decode.engine import Arrays, Engine, compile_engine
from tmljax.decode.tick import TickInput, init_state, tick
from tmljax.fingerprint import flatten
from tmljax.model.interaction import Definition
from tmljax.model.trunk import unrolled
from tmljax.stream.microturn import FRAMES, MEL, PATCH_VALUES, Layout
from tmljax.stream.text import Tokenizer

BLOCKS = "trunk.blocks."
PLATFORMS = ("cpu", "cuda", "tpu")


def unflatten(like: Any, named: dict[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in flatten(like)])


def input_shapes(layout: Layout, sessions: int) -> dict[str, jax.ShapeDtypeStruct]:
    N, shape = sessions, jax.ShapeDtypeStruct
    return {
        "user_dmel": shape((N, FRAMES, MEL), np.uint8),
        "user_present": shape((N,), np.bool_),
        "video": shape((N, layout.patches, PATCH_VALUES), np.uint8),
        "video_present": shape((N,), np.bool_),
        "user_text": shape((N, layout.user_text), np.int32),
        "reset": shape((N,), np.bool_),
        "seed": shape((N,), np.uint32),
    }


def weights_of(params: Any, definition: Definition) -> Arrays:
    """Parameters under the names and in the dtypes that the program has for them: where the tick does not scan its
    layers, each is an array of its own, which the compiled program reads in place."""
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    for name, shape in flatten(definition.held()).items():
        if name in arrays:  # what is missing, and what is there beside, `compile_engine` names
            arrays[name] = arrays[name].astype(shape.dtype, copy=False)
    return {own: array[i] for name, array in arrays.items() for own, i in layer_names(name, definition.model)}


def layer_names(name: str, model: Model) -> list[tuple[str, Any]]:
    """[("trunk.blocks.0.attention.q", 0), ...] of a stack of layers, and [(name, ...)] of anything else."""
    if not name.startswith(BLOCKS) or not unrolled(model):
        return [(name, ...)]
    return [(f"{BLOCKS}{i}.{name.removeprefix(BLOCKS)}", i) for i in range(model.layers)]


def stack_layers(params: Any, weights: dict[str, jax.Array], model: Model) -> Any:
    """The parameters that `weights` are the parts of. XLA sees through it: nothing is copied."""

    def whole(name: str) -> jax.Array:
        parts = [weights[own] for own, _ in layer_names(name, model)]
        return parts[0] if parts[0].ndim == flat[name].ndim else jnp.stack(parts)

    flat = flatten(params)
    return unflatten(params, {name: whole(name) for name in flat})


def initial_state(experiment: Experiment, sessions: int) -> Arrays:
    state = init_state(Definition(experiment.stream, experiment.model), sessions)
    return {name: np.asarray(leaf) for name, leaf in flatten(state).items()}


def lower_tick(experiment: Experiment, sessions: int, platforms: tuple[str, ...]) -> jax.export.Exported:
    model = Definition(experiment.stream, experiment.model)
    params = model.held()
    state = jax.eval_shape(lambda: init_state(model, sessions))

    shapes = {
        own: leaf if at is ... else jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        for name, leaf in flatten(params).items()
        for own, at in layer_names(name, experiment.model)
    }

    def step(weights: dict, state_arrays: dict, inputs: dict) -> tuple[dict, dict]:
        whole, before = stack_layers(params, weights, experiment.model), unflatten(state, state_arrays)
        new_state, output = tick(model, whole, before, TickInput(**inputs), experiment.sampling)
        spoken = {"model_text": output.model_text, "model_mel": output.model_mel, "heard": output.notes[:, 0]}
        return flatten(new_state), spoken

    arguments = shapes, flatten(state), input_shapes(model.layout, sessions)
    return jax.export.export(jax.jit(step), platforms=platforms)(*arguments)


def engine_from_params(
    experiment: Experiment, tokenizer: Tokenizer, params: Any, sessions: int = 1, step: int = 0, name: str = ""
) -> Engine:
    """An engine of N slots around parameters at hand (a nested dict, from a checkpoint or of a model in training)."""
    program = lower_tick(experiment, sessions, PLATFORMS)
    weights = weights_of(params, Definition(experiment.stream, experiment.model))
    state = initial_state(experiment, sessions)
    return compile_engine(program, weights, state, experiment, tokenizer, step, name)


def engine_from_workdir(
    workdir: str | Path,
    sessions: int = 1,
    step: str | None = None,
    adapt: Callable[[Experiment], Experiment] = lambda trained: trained,
) -> Engine:
    """`adapt` may change what serving is free to. Raises UserError when the workdir holds no complete checkpoint."""
    chosen, trained, tokenizer, params = checkpoint.load_for_serving(workdir, step)
    name = os.path.basename(os.path.abspath(workdir))
    return engine_from_params(adapt(trained), tokenizer, params, sessions, chosen, name)
