"""276B parameters, 12B active: audio, 320x240 video at 5 frames/s and text, a context of 5 minutes.

Planned, not trained: what a step asks of the hardware comes from

python -m launch.plan --config=configs/tml_interaction_small.py --topology=v5p:4x8x8

A micro-turn is 16 positions, an example of 4,096 positions is 51 s, and a batch of 1,024 gives each of 256 chips four
of them. Counted by tests/plan/test_config.py: 276.1B parameters, 11.9B of them active.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    set_streams(config)
    set_model(config)
    config.data.name = "tml_interaction_small"
    config.data.train_hours = 500_000.0
    config.data.window = 256
    config.data.batch = 1024
    config.data.workers = 16
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup = 2000
    config.optimizer.decay = 0.2
    config.optimizer.weight_decay = 0.1
    config.train.steps = 250_000
    config.train.save_every = 500
    config.train.eval_every = 1000
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 4
    return config


def set_streams(config: ml_collections.ConfigDict) -> None:
    """2 audio + 8 video + 2 typed + 2 written + 2 spoken slots."""
    config.stream.frames_per_slot = 4
    config.stream.video_height = 240
    config.stream.video_width = 320
    config.stream.patches_per_slot = 6
    config.stream.video_every = 1
    config.stream.user_text_slots = 2
    config.stream.model_text_slots = 2
    config.stream.vocab_size = 65_536


def set_model(config: ml_collections.ConfigDict) -> None:
    config.model.d_model = 4096
    config.model.layers = 48
    config.model.heads = 48
    config.model.kv_heads = 4
    config.model.head_dim = 128
    config.model.window = 1500
    config.model.attention = "splash"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.moe.experts = 256
    config.model.moe.top_k = 6
    config.model.moe.expert_width = 1792
    config.model.moe.shared_width = 2048
    config.model.moe.exchange = "gathered"
    config.model.moe.capacity_factor = 1.1  # of the rows of 64 experts; up to a sixth more fill their tiles
    config.model.moe.matmul = "grouped"
    config.model.moe.tick_matmul = "every"
    config.model.flow.width = 2048
    config.model.flow.depth = 6
