"""Every mesh computes the same thing: loss, metrics and gradients equal the one-device run."""

from functools import partial

import jax
import numpy as np
import pytest

from tmljax import config
from tmljax.model.interaction import Definition
from tmljax.sharding import batch_sharding, make_mesh, param_shardings
from tmljax.train.objective import objective

STREAM = config.Stream(video_every=2, vocab_size=320)
MODEL = config.Model(
    d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, window=4,
    moe=config.Moe(experts=8, top_k=2, expert_width=16, shared_width=16, block_rows=8),
    flow=config.Flow(width=16, depth=1),
)  # fmt: skip
DEFINITION = Definition(STREAM, MODEL)
B, T = 8, 4


@pytest.fixture(scope="module")
def params():
    leaves, tree = jax.tree.flatten(DEFINITION.init(jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    text = rng.integers(1, 8, (B, T, 1), dtype=np.int32)
    return {
        "user_dmel": rng.integers(0, 16, (B, T, 8, 80), dtype=np.uint8),
        "user_present": np.ones((B, T), bool),
        "video": rng.integers(0, 256, (B, T // 2, 1, 4800), dtype=np.uint8),
        "video_present": rng.random((B, T // 2)) < 0.5,
        "user_text": rng.integers(0, 9, (B, T, 1), dtype=np.int32),
        "model_text": text,
        "model_mel": rng.uniform(-7, 2, (B, T, 8, 80)).astype(np.float16),
        "heard": rng.integers(1, 9, (B, T), dtype=np.int32),
        "valid": rng.random((B, T)) < 0.9,
        "start": np.zeros(B, np.int32),
    }


def run(params, batch, mesh):
    step = jax.value_and_grad(partial(objective, DEFINITION, weights=config.Loss(), mesh=mesh), has_aux=True)
    (loss, (metrics, routing)), grads = jax.jit(step)(params, batch=batch, key=jax.random.key(3))
    return loss, metrics, routing, grads


@pytest.fixture(scope="module")
def alone(params, batch):
    return run(params, batch, None)


@pytest.mark.parametrize(
    "sizes", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 1, 4, 1), (2, 2, 2, 1), (2, 1, 2, 2), (1, 2, 1, 2)], ids=str
)
def test_mesh_parity(params, batch, alone, sizes):
    mesh = make_mesh(config.Mesh(*sizes), jax.devices()[: int(np.prod(sizes))])
    shardings = param_shardings(mesh, DEFINITION.axes(), DEFINITION.abstract())
    there = run(jax.device_put(params, shardings), jax.device_put(batch, batch_sharding(mesh)), mesh)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), there, alone)


def test_a_dimension_that_does_not_divide_is_named():
    mesh = make_mesh(config.Mesh(data=1, expert=1, tensor=8, fsdp=1))
    model = config.Model(d_model=32, heads=8, kv_heads=8, head_dim=8, moe=config.Moe(expert_width=12))
    narrow = Definition(STREAM, model)
    with pytest.raises(config.UserError, match=r"config\.mesh\.tensor=8 .* width dimension of 12"):
        param_shardings(mesh, narrow.axes(), narrow.abstract())


def test_devices_that_the_mesh_does_not_use_are_named():
    with pytest.raises(config.UserError, match="6 places for 8 devices"):
        make_mesh(config.Mesh(data=3, fsdp=2))
