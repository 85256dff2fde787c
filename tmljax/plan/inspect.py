"""What a compiled training step must not do: questions that tests and reports ask of it."""

from __future__ import annotations

import math

import jax

from tmljax.plan.hlo import Collective, Program
from tmljax.plan.setting import Setting

LARGE = 2**23  # numbers of a parameter, beyond which a second copy matters


def gathered_layers(program: Program, setting: Setting) -> list[Collective]:
    """Gathers outside the scan over layers of what is stacked over layers: all of a parameter at once, in whatever
    shape."""
    layers, leaves = setting.experiment.model.layers, jax.tree.leaves(setting.state.params)
    stacked = {leaf.size for leaf in leaves if leaf.ndim > 2 and leaf.shape[0] == layers}
    once = [c for c in program.collectives() if c.operation == "all-gather" and c.times == 1]
    return [c for c in once if (len(c.shape) > 2 and c.shape[0] == layers) or math.prod(c.shape) in stacked]


def replicated(setting: Setting, large: int = LARGE) -> list[str]:
    """Names of large parameters and moments that are not split over every device that works on its own examples."""
    leaves = jax.tree_util.tree_leaves_with_path((setting.state.params, setting.state.optimizer))
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in leaves
        if leaf.size > large
        and math.prod(leaf.sharding.shard_shape(leaf.shape)) * setting.members / setting.axes["data"] > leaf.size
    ]
