"""The kernels for NVIDIA Hopper: what is around them everywhere, they themselves where there is such a GPU."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

from tmljax.ops import dispatch, experts
from tmljax.ops.experts import Experts
from tmljax.ops.route import NOBODY

R, D, W = 1000, 256, 384  # rows that are no whole number of tiles, of which the last hundred are nobody's
ROWS_E = np.array([300, 0, 190, 410], np.int32)


def given(dtype: jnp.dtype) -> tuple[jax.Array, Experts, jax.Array]:
    """Rows, experts, and the gradient that comes back; nobody's rows are zero, as where rows are laid for experts."""
    shapes = [(R, D), (4, D, W), (4, D, W), (4, W, D), (R, D)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    x_RD, gate, up, down, d_RD = (jax.random.normal(key, shape, dtype) / 16 for key, shape in zip(keys, shapes))
    there_R1 = (jnp.arange(R) < ROWS_E.sum())[:, None]
    return jnp.where(there_R1, x_RD, 0), Experts(gate, up, down), jnp.where(there_R1, d_RD, 0)


def forward_and_back(product, dtype: jnp.dtype) -> list[jax.Array]:
    x_RD, weights, d_RD = given(dtype)
    out, pull = jax.vjp(lambda x, weights: product(x, jnp.asarray(ROWS_E), weights), x_RD, weights)
    return jax.tree.leaves((out, pull(d_RD.astype(out.dtype))))


def by_hand(x_RD: jax.Array, rows_E: jax.Array, weights: Experts) -> jax.Array:
    """Expert after expert, in float32."""
    ends = np.cumsum(ROWS_E)
    x_RD, weights = x_RD.astype(jnp.float32), jax.tree.map(lambda w: w.astype(jnp.float32), weights)
    parts = [
        experts.swiglu(x_RD[end - rows : end], *(w[e] for w in weights))
        for e, (end, rows) in enumerate(zip(ends, ROWS_E))
    ]
    return jnp.concatenate([*parts, jnp.zeros((R - ends[-1], D))]).astype(jnp.float32)


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins that, like the kernels, leave rows beyond the experts' as they were in memory."""

    def ragged_dot(x_RD, weight_EDW, group_sizes, transpose_rhs, **tiles):
        y_RW = jax.lax.ragged_dot(x_RD, weight_EDW.mT if transpose_rhs else weight_EDW, group_sizes)
        return jnp.where((jnp.arange(len(x_RD)) < group_sizes.sum())[:, None], y_RW, jnp.nan)

    def transposed_ragged_dot(x_RD, d_RW, group_sizes, **tiles):
        nothing = jnp.zeros((len(group_sizes), x_RD.shape[1], d_RW.shape[1]))
        return jax.vjp(lambda w: jax.lax.ragged_dot(x_RD, w, group_sizes), nothing)[1](d_RW)[0]

    monkeypatch.setattr(ragged_dot_mgpu, "ragged_dot", ragged_dot)
    monkeypatch.setattr(transposed_ragged_dot_mgpu, "transposed_ragged_dot", transposed_ragged_dot)


def test_one_product_for_gate_and_up_and_its_gradients(kernels):
    ours, plain = forward_and_back(experts.hopper, jnp.float32), forward_and_back(by_hand, jnp.float32)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=2e-4), ours, plain)


def test_shares_before_the_last_product(kernels):
    share_R = jnp.linspace(0.0, 1.0, R)
    before = forward_and_back(partial(experts.hopper, share_R=share_R), jnp.float32)
    after = forward_and_back(lambda *given: by_hand(*given) * share_R[:, None], jnp.float32)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=2e-4), before, after)


def test_positions_of_nobody_cost_nothing_and_get_nothing(kernels):
    """A third of the assignments are nobody's: they are rows beyond the experts'."""
    x_RD, weights, d_RD = given(jnp.float32)
    expert_A = jax.random.randint(jax.random.key(1), (2 * R,), 0, 4)
    expert_A = jnp.where(jnp.arange(2 * R) % 3 == 0, NOBODY, expert_A)

    def run(product):
        local = dispatch.in_rows(product)
        out, pull = jax.vjp(lambda x, weights: dispatch.work(x, expert_A, weights, local), x_RD, weights)
        return jax.tree.leaves((out, pull(jnp.repeat(d_RD, 2, axis=0))))

    ours, plain = run(experts.hopper), run(experts.ragged)
    assert not ours[0][::3].any()
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=2e-4), ours, plain)


@pytest.mark.slow
def test_kernels_on_a_gpu():
    if not any(name in gpus() for name in ("H100", "H200")):
        pytest.skip("no NVIDIA H100 or H200")
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, Path(__file__)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def gpus() -> str:
    found = shutil.which("nvidia-smi")
    return subprocess.run([found, "-L"], capture_output=True, text=True).stdout if found else ""


def check_kernels() -> None:
    """To what bfloat16 can tell, against float32 by hand, on the same numbers."""
    ours, plain = forward_and_back(experts.hopper, jnp.bfloat16), forward_and_back(by_hand, jnp.bfloat16)
    for have, want in zip(ours, plain, strict=True):
        have, want = np.asarray(have, np.float32), np.asarray(want, np.float32)
        worst = np.abs(have - want).max() / np.abs(want).max()
        print(have.shape, worst)
        assert worst < 0.02, worst


if __name__ == "__main__":
    check_kernels()
