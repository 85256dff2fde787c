"""An experiment of the big one's kind that fits a hand's arithmetic."""

import pytest

from tmljax import config


@pytest.fixture
def small() -> config.Experiment:
    """5 slots, one of them video at every other micro-turn; 18 positions an example, 16 examples."""
    moe = config.Moe(experts=8, top_k=2, expert_width=64, shared_width=128)
    model = config.Model(d_model=64, layers=2, heads=4, kv_heads=4, head_dim=16, window=8, moe=moe, remat="full")
    return config.Experiment(
        stream=config.Stream(vocab_size=320),
        model=model,
        data=config.Data(window=4, batch=16),
        optimizer=config.Optimizer(name="adamw"),
        mesh=config.Mesh(data=1, fsdp=-1, expert=2),
    )
