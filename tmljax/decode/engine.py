"""An engine: the compiled tick and what stands around it.

The tick comes as a program (`jax.export`), made from the model's source (`tmljax.decode.program`) or read from an
export (`tmljax.serve.bundle`). This file knows neither, and treats both alike.

N slots of the decoder batch, F frames and M mel channels of a micro-turn, k text slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.export
import numpy as np

from tmljax.config import Experiment, UserError
from tmljax.stream.microturn import Layout
from tmljax.stream.text import Tokenizer
from tmljax.stream.vocoder import GriffinLim, Vocoder

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Engine:
    """A compiled tick and what is needed around it.

    `tick(state, inputs)` consumes the state it is given; `inputs` are the named arrays of one micro-turn
    (see `Live` in session.py), the outputs are `model_text [N, k]`, `model_mel [N, F, M]` and `heard [N]`.
    """

    experiment: Experiment
    tokenizer: Tokenizer
    vocoder: Vocoder
    sessions: int  # N
    start: Callable[[], Any]  # a fresh state
    tick: Callable[[Any, Arrays], tuple[Any, Arrays]]
    step: int = 0  # training step of the weights
    name: str = ""  # of the workdir they were trained in

    @property
    def layout(self) -> Layout:
        return Layout(self.experiment.stream)


def compile_engine(
    program: jax.export.Exported,
    weights: Arrays,
    state: Arrays,
    experiment: Experiment,
    tokenizer: Tokenizer,
    step: int = 0,
    name: str = "",
) -> Engine:
    """Compiles a tick program for this machine and runs it once; weights on the device, the state donated.

    Raises UserError when the weights are not those that the program takes.
    """
    shapes = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), part) for part in program_shapes(program)]
    for leaf in sorted(shapes[0].keys() | weights.keys()):
        have, want = (getattr(tree.get(leaf), "shape", "absent") for tree in (weights, shapes[0]))
        if have != want:
            raise UserError(f"the weights do not fit the model: {leaf} is {have}, and the config makes it {want}")
    compiled = jax.jit(program.call, donate_argnums=1).lower(*shapes).compile()
    weights = jax.device_put(weights)
    blank = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), shapes[2])
    jax.block_until_ready(compiled(weights, jax.device_put(state), blank))
    return Engine(
        experiment=experiment,
        tokenizer=tokenizer,
        vocoder=GriffinLim(),
        sessions=shapes[2]["reset"].shape[0],
        start=lambda: jax.device_put(state),
        tick=lambda state, inputs: compiled(weights, state, inputs),
        step=step,
        name=name,
    )


def program_shapes(program: jax.export.Exported) -> tuple[dict, dict, dict]:
    """Shapes of (weights, state, inputs), by name."""
    arguments, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    return arguments
