"""Every test sees eight devices on the CPU, and arrays of unequal rank do not broadcast by accident.

What is compiled once is not compiled again, in the same run of the tests or the next.
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import pytest

from tmljax import cluster, config

jax.config.update("jax_numpy_rank_promotion", "raise")
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # a folder for each: what JAX writes there is not whole at once
jax.config.update("jax_compilation_cache_dir", os.path.join(cluster.cache_folder(), "tests", WORKER))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture
def tiny() -> config.Experiment:
    """The smallest experiment that has all the parts of a big one."""
    return config.Experiment(
        stream=config.Stream(vocab_size=320),
        model=config.Model(
            d_model=32,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=8,
            window=8,
            moe=config.Moe(experts=4, top_k=2, expert_width=32, shared_width=32, block_rows=16),
            flow=config.Flow(width=32, depth=1),
        ),
        data=config.Data(window=12, batch=8, train_hours=0.02, test_per_family=2),
        optimizer=config.Optimizer(warmup=2, learning_rate=1e-2),
        train=config.Train(steps=8, log_every=2, save_every=4, eval_every=4, eval_batches=1),
        mesh=config.Mesh(),
    )
