"""What a device's memory holds during a training step, by formula.

Parameters, optimizer and gradients are exact, being the sizes of shards. Activations are those that the remat policy
keeps for the backward pass, and the largest of what single places need while they are worked on.

Legend: N positions of a device, R rows of its experts, D d_model, H heads, K kv heads, h head dim, W expert width,
S shared width, V vocab, L layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tmljax.model.block import tile_rows
from tmljax.model.embed import FRAMES_AT_ONCE
from tmljax.model.trunk import QUERY_TURNS
from tmljax.ops.experts import laid_rows
from tmljax.plan.setting import Setting, batch_shapes, shard_bytes

BATCHES = 2  # on the devices at a time (tmljax/train/feed.py)


class Memory(NamedTuple):
    """Bytes of a device."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(self)


def estimate(setting: Setting) -> Memory:
    state = setting.state
    parameters = shard_bytes(state.params)
    return Memory(
        parameters=parameters,
        optimizer=shard_bytes(state.optimizer),
        gradients=parameters * (1 if setting.experiment.optimizer.accumulate == 1 else 2),  # and their sum so far
        activations=saved(setting)
        + max(at_experts(setting), at_attention(setting), at_heads(setting), at_patches(setting)),
        buffers=BATCHES * batch_bytes(setting),
    )


def saved(setting: Setting) -> float:
    """Kept from the forward to the backward pass over all layers."""
    model, N, width = setting.experiment.model, setting.positions, setting.width
    tensor = setting.axes["tensor"]
    D, qkv = model.d_model, (model.heads + 2 * model.kv_heads) * model.head_dim / tensor
    S, W, heads = (n / tensor for n in (model.moe.shared_width, model.moe.expert_width, model.heads * model.head_dim))
    per_position = {
        "full": D,
        "dots": 3 * D + qkv + heads + 2 * S + model.moe.experts * 4 / width,
        "none": 6 * D + 3 * qkv + 4 * S + model.moe.experts * 12 / width,
    }[model.remat]
    layer = N * per_position * width
    if model.remat == "none":
        layer += rows(setting) * (3 * D + 4 * W) * width + 2 * score_bytes(
            setting, setting.length / setting.axes["context"]
        )
        layer += layer_weights(setting)
    elif model.remat == "dots":
        layer += rows(setting) * (2 * W + (0 if gates_inside(setting) else D)) * width
    return model.layers * layer


def gates_inside(setting: Setting) -> bool:
    """Whether gates come before the last of an expert's three products, whose result no gradient then asks for."""
    moe = setting.experiment.model.moe
    return moe.exchange == "gathered" and setting.axes["expert"] > 1 and moe.matmul != "blocks"


def rows(setting: Setting) -> float:
    """That a device's experts are given room for, those that fill tiles among them."""
    moe, mine = setting.experiment.model.moe, setting.experiment.model.moe.experts // setting.axes["expert"]
    room = balanced = setting.positions * moe.top_k
    if setting.axes["expert"] > 1:
        worst = setting.positions * setting.axes["expert"] * min(moe.top_k, mine)
        room = worst if moe.capacity_factor is None else min(worst, balanced * moe.capacity_factor)
    return laid_rows(math.ceil(room), mine, tile_rows(moe))


def layer_weights(setting: Setting) -> float:
    """One layer's weights as they are gathered for use, in the dtype of the activations."""
    return routed_weights(setting) + dense_weights(setting)


def routed_weights(setting: Setting) -> float:
    """Those of its routed experts on a device."""
    model, axes = setting.experiment.model, setting.axes
    of_one = 3 * model.d_model * model.moe.expert_width / axes["tensor"]
    return model.moe.experts / axes["expert"] * of_one * setting.width


def dense_weights(setting: Setting) -> float:
    """Those that every position uses, and the router, which is in float32."""
    model, D = setting.experiment.model, setting.experiment.model.d_model
    dense = 2 * D * (model.heads + model.kv_heads) * model.head_dim + 3 * D * model.moe.shared_width
    return dense / setting.axes["tensor"] * setting.width + D * model.moe.experts * 4


def at_experts(setting: Setting) -> float:
    """In a layer's backward pass: rows sent, received, multiplied and returned, their gradients, and the weights'."""
    model = setting.experiment.model
    D, W = model.d_model, model.moe.expert_width / setting.axes["tensor"]
    all_positions = setting.positions * (2 * setting.axes["expert"] if model.moe.exchange == "gathered" else 0)
    return (rows(setting) * (4 * D + 4 * W) + all_positions * D) * setting.width + 2 * layer_weights(setting)


def score_bytes(setting: Setting, queries: float) -> float:
    """Attention scores in float32 of so many queries against all they could see; splash keeps them to itself."""
    model = setting.experiment.model
    if model.attention == "splash":
        return 0.0
    turns = min(setting.experiment.data.window, model.window + QUERY_TURNS)
    keys = turns * setting.length / setting.experiment.data.window
    return setting.examples * model.heads / setting.axes["tensor"] * queries * keys * 4


def at_attention(setting: Setting) -> float:
    """In a layer's backward pass: queries, keys, values and their gradients, and the scores of a block three times."""
    model = setting.experiment.model
    qkv = (2 * model.heads + 2 * model.kv_heads) * model.head_dim / setting.axes["tensor"]
    turns = setting.experiment.data.window
    block = min(turns / setting.axes["context"], QUERY_TURNS) * setting.length / turns
    return 2 * setting.positions * (qkv + model.d_model) * setting.width + 3 * score_bytes(setting, block)


def at_heads(setting: Setting) -> float:
    """Logits of what is written, heard and seen, in float32, with their gradient."""
    turns = setting.examples * setting.experiment.data.window / setting.axes["context"]
    vocab = setting.experiment.stream.vocab_size / setting.axes["tensor"]
    slots = setting.layout.model_text + 1 + 1 / setting.experiment.stream.video_every
    return 2 * turns * slots * vocab * 4


def at_patches(setting: Setting) -> float:
    """In the backward pass of the frames that are embedded at a time: sub-patches before and after the first two
    layers' norm and activation, and their gradients."""
    model, frames = setting.experiment.model, setting.experiment.data.window / setting.experiment.stream.video_every
    if model.remat != "none":
        frames = min(frames, FRAMES_AT_ONCE)
    patches = setting.examples * frames / setting.axes["context"] * setting.layout.patches
    return 6 * patches * (100 + 25) * model.d_model / 4 * setting.width


def batch_bytes(setting: Setting) -> float:
    """A device's part of a batch."""
    examples = setting.experiment.data.batch // setting.members
    shapes = batch_shapes(setting.experiment, examples).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
