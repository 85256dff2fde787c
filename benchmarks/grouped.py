"""Speed of the experts' products, one JSON line a way: `python -m benchmarks.grouped [--config=configs/h200.py]`.

Rows of a step, sorted by expert, through gate, up and down, forward and backward, in every way that the platform has
(`config.model.moe.matmul`), and beside them "dense": the same number of products in one expert. Expert loads vary by a
sixth, and one expert has no row. "error" is the largest of the result and all gradients against float32, expert by
expert, over the largest number of each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch import verb
from tmljax.config import Model
from tmljax.ops import experts as ops
from tmljax.ops.experts import Experts

WAYS = {
    "cpu": {"ragged": ops.ragged},
    "gpu": {"ragged": ops.ragged, "hopper": ops.hopper},
    "tpu": {"ragged": ops.ragged, "grouped": ops.grouped},
}
Product = Callable[[jax.Array, jax.Array, Experts], jax.Array]


def define_flags() -> None:
    flags.DEFINE_string("config", "configs/h200.py", "config file, for widths, experts and dtype")
    flags.DEFINE_multi_string("config_field", [], "GROUP.FIELD=VALUE override of the config")
    flags.DEFINE_integer("rows", 81_920, "rows of all experts together", lower_bound=1)
    flags.DEFINE_integer("times", 5, "of which the median is told", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    given, model = flags.FLAGS, verb.load_experiment(flags.FLAGS.config, flags.FLAGS.config_field).model
    sizes = draw_sizes(given.rows, model.moe.experts)
    rows = draw_rows(model, given.rows)
    want = by_expert(sizes, *rows)
    one = (rows[0], Experts(*(w[:1] for w in rows[1])), rows[2])
    everything = [*WAYS[jax.default_backend()].items(), ("dense", dense)]
    for name, product in everything:
        own, groups = (one, jnp.array([given.rows])) if name == "dense" else (rows, jnp.asarray(sizes))
        seconds, got = clock(partial(forward_and_back, product, groups), own, given.times)
        tflops = 3 * 6 * given.rows * model.d_model * model.moe.expert_width / seconds / 1e12
        line = {"benchmark": "grouped", "way": name, "rows": given.rows, "ms": round(1e3 * seconds, 3)}
        line |= {
            "tflops_per_second": round(tflops, 4),
            "error": None if name == "dense" else round(error(got, want), 5),
        }
        print(json.dumps(line | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}), flush=True)


def draw_sizes(rows: int, experts: int) -> np.ndarray:
    """int32 [E], of which one is 0 where there are several."""
    share = np.random.default_rng(0).normal(1, 1 / 6, experts).clip(0.1)
    share[experts // 2] = 0 if experts > 1 else 1
    sizes = np.floor(share / share.sum() * rows).astype(np.int32)
    sizes[0] += rows - sizes.sum()
    return sizes


def draw_rows(model: Model, rows: int) -> tuple[jax.Array, Experts, jax.Array]:
    """Rows, experts, and the gradient that comes back, of variance 1 or what keeps it."""
    D, E, W = model.d_model, model.moe.experts, model.moe.expert_width
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, model.dtype)  # noqa: E731
    weights = Experts(draw(1, E, D, W) / D**0.5, draw(2, E, D, W) / D**0.5, draw(3, E, W, D) / W**0.5)
    return draw(0, rows, D), weights, draw(4, rows, D)


def forward_and_back(product: Product, sizes: jax.Array, x_RD: jax.Array, weights: Experts, d_RD: jax.Array) -> list:
    out, pull = jax.vjp(lambda x, weights: product(x, sizes, weights), x_RD, weights)
    return jax.tree.leaves((out, pull(d_RD.astype(out.dtype))))


def dense(x_RD: jax.Array, sizes: jax.Array, weights: Experts) -> jax.Array:
    return ops.swiglu(x_RD, *(w[0] for w in weights))


def by_expert(sizes: np.ndarray, x_RD: jax.Array, weights: Experts, d_RD: jax.Array) -> list[np.ndarray]:
    """What `forward_and_back` ought to give, in float32."""
    parts, ends = [], np.cumsum(sizes)
    run = jax.jit(partial(forward_and_back, dense, None))
    for e, (end, size) in enumerate(zip(ends, sizes)):
        x, d = (x[end - size : end].astype(jnp.float32) for x in (x_RD, d_RD))
        parts.append(run(x, Experts(*(w[e : e + 1].astype(jnp.float32) for w in weights)), d))
    return [np.concatenate(part) for part in zip(*parts)]


def clock(f: Callable[..., list], rows: tuple, times: int) -> tuple[float, list]:
    compiled = jax.jit(f).lower(*rows).compile()
    got, seconds = jax.block_until_ready(compiled(*rows)), []
    for _ in range(times):
        began = time.perf_counter()
        got = jax.block_until_ready(compiled(*rows))
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds)), got


def error(got: list[jax.Array], want: list[np.ndarray]) -> float:
    """Largest difference, over the largest number of each array."""
    return max(
        float(np.abs(np.asarray(g, np.float32) - w).max() / np.abs(w).max()) for g, w in zip(got, want, strict=True)
    )


if __name__ == "__main__":
    define_flags()
    sys.exit(verb.run(main))
