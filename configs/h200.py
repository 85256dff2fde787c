"""4.3B parameters, 2.2B of them active: what fills one NVIDIA H200 in training, 45 % of its peak (LOG.md).

XLA_PYTHON_CLIENT_MEM_FRACTION=.95 python -m benchmarks.breakdown --config=configs/h200.py --batch=full

A micro-turn is 8 positions, an example of 64 micro-turns 512 of them, a batch 40,960.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.stream.frames_per_slot = 4
    config.stream.video_every = 1
    config.stream.model_text_slots = 2
    config.model.d_model = 4096
    config.model.layers = 14
    config.model.heads = 32
    config.model.kv_heads = 8
    config.model.head_dim = 128
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.model.moe.experts = 8
    config.model.moe.top_k = 2
    config.model.moe.expert_width = 2048
    config.model.moe.shared_width = 4096
    config.model.moe.matmul = "hopper"
    config.model.flow.width = 1024
    config.data.name = "h200"
    config.data.train_hours = 60.0
    config.data.window = 64
    config.data.batch = 80
    config.data.workers = 8
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup = 500
    config.train.steps = 20_000
    return config
