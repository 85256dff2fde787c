"""What a training step asks of a device, by formula: products, memory traffic, and bytes over the links.

Legend: N positions of a device, R rows of its experts, D d_model, W expert width, L layers.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from tmljax.model.block import tile_rows
from tmljax.ops import experts, splash
from tmljax.plan.hardware import runs_of
from tmljax.plan.memory import dense_weights, gates_inside, layer_weights, routed_weights, rows
from tmljax.plan.roofline import Traffic, Work, hops_of
from tmljax.plan.setting import Setting, shard_bytes
from tmljax.stream.microturn import Layout
from tmljax.train.speed import attention_flops, step_flops

PASSES = {"none": 2, "dots": 3, "full": 3}  # of a layer's weights: forward, again, backward
FORWARD = {"none": 1, "dots": 1, "full": 2}  # passes of what remat="dots" keeps: products and attention


def estimate(setting: Setting) -> Work:
    accumulate = setting.experiment.optimizer.accumulate
    return Work(
        executed_flops(setting) / setting.where.devices, memory_traffic(setting, accumulate), link_traffic(setting)
    )


def model_flops(setting: Setting) -> float:
    """Of a step over all devices; MFU counts these, not what is computed again."""
    return step_flops(setting.experiment, setting.shapes)


def executed_flops(setting: Setting) -> float:
    """Of a step over all devices, what the remat policy computes again included."""
    experiment, model = setting.experiment, setting.experiment.model
    batch, moe, D = experiment.data.batch, model.moe, model.d_model
    places = 2.0 * batch * setting.length * model.layers
    routed = places * moe.top_k * 3 * D * moe.expert_width
    dense = 2 * D * (model.heads + model.kv_heads) * model.head_dim + 3 * D * moe.shared_width + D * moe.experts
    again = {"none": 0.0, "dots": 0.0, "full": places * dense}
    forward = 2 * FORWARD[model.remat] + last_products(setting)
    experts_again = routed / 3 * (forward - 3 + (forward + 6) * (rows_worked(setting) - 1))
    return model_flops(setting) + again[model.remat] + experts_again + attention_again(setting)


def last_products(setting: Setting) -> int:
    """Forward passes of the last of an expert's three products."""
    return 1 if gates_inside(setting) else FORWARD[setting.experiment.model.remat]


def rows_worked(setting: Setting) -> float:
    """Rows that the experts' products work on, against the rows there are.

    XLA:GPU works on every row for each of a device's experts. A grouped product works on whole tiles, and the last one
    of each expert is, bar chance, half full.
    """
    moe = setting.experiment.model.moe
    if moe.matmul == "ragged" and setting.where.chip.kind == "gpu":
        return moe.experts / setting.axes["expert"]
    tile, own = tile_rows(moe), setting.positions * moe.top_k * setting.axes["expert"] / moe.experts  # of an expert
    return max(own + (tile - 1) / 2, tile) / own


def attention_again(setting: Setting) -> float:
    """What attention computes beyond the six products that MFU counts: scores and mixtures forward, four backward.

    Blocks make scores again for the block with any remat, and with a full one for the layer. Splash works on whole
    blocks of pairs, seen or not, and its two backward kernels take seven products.
    """
    experiment, model = setting.experiment, setting.experiment.model
    product = experiment.data.batch * attention_flops(experiment) / 6
    if model.attention == "blocks":
        return 0.0 if model.remat == "none" else 2 * FORWARD[model.remat] * product
    worked = tile_pairs(setting.layout, experiment.data.window, model.window).worked
    return product * (worked / seen_pairs(setting) * (2 * FORWARD[model.remat] + 7) - 6)


class Tiles(NamedTuple):
    """Blocks of pairs of an example and a head in splash attention."""

    queries: int  # of the example, padded
    query: int  # of a block
    key: int
    worked: int  # pairs in the blocks that are not left out


@functools.cache  # a search asks for each of its meshes
def tile_pairs(layout: Layout, turns: int, window: int) -> Tiles:
    turn_P, slot_P = layout.positions(turns).T
    mask_PR = splash.make_mask(turn_P, slot_P, len(turn_P), window)
    return Tiles(len(mask_PR), *splash.block_sizes(mask_PR), splash.count_worked(mask_PR))


def seen_pairs(setting: Setting) -> float:
    """Pairs of a query and a key it sees, of an example and a head."""
    model = setting.experiment.model
    return attention_flops(setting.experiment) / (12 * model.layers * model.heads * model.head_dim)


def memory_traffic(setting: Setting, accumulate: int) -> float:
    """Bytes: the update, the weights of each pass, activations in and out of each product, attention scores."""
    model, N, R = setting.experiment.model, setting.positions, rows(setting)
    D, W, tensor = model.d_model, model.moe.expert_width, setting.axes["tensor"]
    params, optimizer = shard_bytes(setting.state.params), shard_bytes(setting.state.optimizer)
    update = 5 * params + 2 * optimizer
    passes = PASSES[model.remat]
    weights = layer_weights(setting) * (2 * passes + 2)
    qkv = (2 * model.heads + 2 * model.kv_heads) * model.head_dim / tensor
    times = FORWARD[model.remat] + 2
    spared = (FORWARD[model.remat] - last_products(setting)) * R * (D + W / tensor)
    activations = ((N * (10 * D + 3 * qkv) + R * (8 * D + 6 * W / tensor)) * times - spared) * setting.width
    scores = 0.0 if model.attention == "splash" else attended(setting) * 4 * 4 * times
    return update + accumulate * model.layers * (weights + activations + scores) + kernel_traffic(setting)


def attended(setting: Setting) -> float:
    """The same of a layer on a device."""
    return seen_pairs(setting) * heads_here(setting)


def heads_here(setting: Setting) -> float:
    """Heads of examples that a device attends with."""
    return setting.examples / setting.axes["context"] * setting.experiment.model.heads / setting.axes["tensor"]


def kernel_flops(setting: Setting) -> dict[str, float]:
    """Of one call of each kernel on a device, by how its name begins in the compiled program."""
    model = setting.experiment.model
    found = {}
    if model.attention == "splash":
        pairs = tile_pairs(setting.layout, setting.experiment.data.window, model.window).worked
        product = 2 * pairs * heads_here(setting) * model.head_dim
        found |= {"splash_mha_fwd": 2 * product, "splash_mha_dq": 3 * product, "splash_mha_dkv": 4 * product}
    if model.moe.matmul == "grouped":
        width = model.moe.expert_width / setting.axes["tensor"]
        worked = setting.positions * model.moe.top_k * rows_worked(setting)
        found |= dict.fromkeys(("gmm", "tgmm"), 2 * worked * model.d_model * width)
    return found


def kernel_traffic(setting: Setting) -> float:
    """Bytes that kernels read more than once in a step, block by block; a compiler counts a kernel's operands once."""
    model, accumulate = setting.experiment.model, setting.experiment.optimizer.accumulate
    forward, layer = FORWARD[model.remat], 0.0
    if model.attention == "splash":  # its backward pass is two kernels
        layer += (forward + 2) * splash_reads(setting)
    if model.moe.matmul == "grouped":
        D, W = model.d_model, model.moe.expert_width / setting.axes["tensor"]
        for passes, depth, columns in ((forward, D, W), (forward, D, W), (last_products(setting), W, D)):
            layer += (passes + 1) * rows_again(setting, depth, columns) + rows_again(setting, columns, depth)
    return accumulate * model.layers * layer


def splash_reads(setting: Setting) -> float:
    """Bytes of keys, values and masks: for each block of queries those of the blocks it works on, of which two are
    seen in part, at the window's edges, and come with a mask of int32."""
    model, turns = setting.experiment.model, setting.experiment.data.window
    tiles = tile_pairs(setting.layout, turns, model.window)
    keys = tiles.worked / tiles.query * 2 * model.head_dim * setting.width
    masks = min(tiles.worked, 2 * tiles.queries * tiles.key) * 4
    return heads_here(setting) * (keys + masks)


def rows_again(setting: Setting, depth: float, columns: float) -> float:
    """Bytes that a grouped product reads again, or the product that gives its weights' gradient: its rows [R, depth]
    for each tile of columns but the first. It reads an expert's weights once."""
    *_, width = experts.tile(0, round(depth), round(columns))
    worked = setting.positions * setting.experiment.model.moe.top_k * rows_worked(setting)
    return worked * depth * (math.ceil(columns / width) - 1) * setting.width


def exchange(setting: Setting, steps: float) -> list[Traffic]:
    """Of positions with the owners of their experts, there and back, in so many layers, forward and backward.

    Gathered, sums on their way home are no gradient's business and so not made again."""
    model, members, row = setting.experiment.model, setting.axes["expert"], setting.experiment.model.d_model
    times = PASSES[model.remat] * steps
    if model.moe.exchange == "gathered":
        size, sums = members * setting.positions * row * setting.width, 2 * steps
        return [
            Traffic("expert", "all-gather", size * times, 1.0, times),
            Traffic("expert", "reduce-scatter", size * sums, 1.0, sums),
        ]
    exact = model.moe.exchange == "ragged"  # rows there are, not those there is room for
    sent = setting.positions * model.moe.top_k if exact else rows(setting)
    operation = "ragged-all-to-all" if exact else "all-to-all"
    return [Traffic("expert", operation, 2 * sent * row * setting.width * times, 1.0, 2 * times)]


def look_back(setting: Setting, times: float) -> Traffic:
    """Keys and values that a member of `context` gets from those before it (tmljax/ops/context.py), so many times."""
    model, members = setting.experiment.model, setting.axes["context"]
    turns = setting.experiment.data.window // members
    shards = min(members - 1, -(-(model.window - 1) // turns))
    row = 2 * model.kv_heads * model.head_dim / setting.axes["tensor"] * setting.width
    size, runs = shards * setting.positions * row * times, runs_of(setting.where, setting.axes)["context"]
    hops = sum(hops_of(n, runs) for n in range(1, shards + 1)) / max(shards, 1)
    return Traffic("context", "collective-permute", size, 1.0, 2 * shards * times, hops)


def link_traffic(setting: Setting) -> list[Traffic]:
    """Weights are gathered and gradients scattered while others are used; nothing hides the exchange of positions."""
    model, axes = setting.experiment.model, setting.axes
    accumulate = setting.experiment.optimizer.accumulate
    steps = model.layers * accumulate
    passes, width = PASSES[model.remat], setting.width
    routed, dense = routed_weights(setting), dense_weights(setting)
    copies = "+".join(axis for axis in ("data", "context") if axes[axis] > 1) or "data"  # have the same parameters
    mixed = setting.positions * model.d_model * width
    traffic = [
        Traffic("fsdp", "all-gather", routed * passes * steps, 0.0, 3 * passes * steps),
        Traffic("fsdp+expert", "all-gather", dense * passes * steps, 0.0, 8 * passes * steps),
        Traffic("fsdp", "reduce-scatter", routed * steps, 0.0, 3 * steps),
        Traffic("fsdp+expert", "reduce-scatter", dense * steps, 0.0, 8 * steps),
        Traffic(copies, "all-reduce", shard_bytes(setting.state.params) * accumulate, 0.0, accumulate),
        *exchange(setting, steps),
        look_back(setting, passes * steps),
        Traffic("tensor", "all-reduce", 2 * mixed * passes * steps, 1.0, 2 * passes * steps),
    ]
    present = {axis for axis, size in axes.items() if size > 1}
    return [t for t in traffic if set(t.axis.split("+")) & present]
