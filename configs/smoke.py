"""Does every part work? A model too small to converse, in under two minutes on two CPU cores.

python -m launch.train --config=configs/smoke.py --workdir=runs/smoke
"""

import ml_collections

from configs import base, family


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    family.scale(config, 1)
    config.data.name = "smoke"
    config.data.train_hours = 0.05
    config.data.test_per_family = 2
    config.data.window = 42
    config.data.batch = 8
    config.optimizer.warmup = 5
    config.train.steps = 20
    config.train.log_every = 5
    config.train.save_every = 10
    config.train.eval_every = 10
    config.train.eval_batches = 1
    return config
