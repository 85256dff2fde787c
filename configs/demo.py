"""A duplex model that two CPU cores, not all of them ours, trained in 48 minutes.

Reached: takes 96 % of turns at 0.36 s, takes over in 8 % of pauses, always stops when interrupted (in 0.5 s), keeps the
floor in 96 % of backchannels, content 69 %, verbal cue 40 %, visual cue 21 %.

python -m launch.train --config=configs/demo.py --workdir=runs/demo
"""

import ml_collections

from configs import base, family


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    family.scale(config, 4)
    config.data.name = "demo"
    config.data.train_hours = 60.0
    config.optimizer.warmup = 120
    config.train.steps = 2000
    config.train.save_every = 200
    config.train.eval_every = 200
    config.train.eval_batches = 4
    return config
