"""The best duplex model that two CPU cores train in 45 minutes.

python -m launch.train --config=configs/demo.py --workdir=runs/demo
"""

import ml_collections

from configs import base, family


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    family.scale(config, 4)
    config.data.name = "demo"
    config.data.train_hours = 50.0
    config.optimizer.warmup = 100
    config.train.steps = 700
    config.train.save_every = 200
    config.train.eval_every = 200
    config.train.eval_batches = 4
    return config
