"""The model of `make quickstart`: takes turns, waits in pauses, stops when interrupted, leaves others alone.

Reached in 900 steps, twelve minutes on two CPU cores: takes 87 % of turns at 0.36 s, takes over in 24 % of pauses,
answers 17 % of what wants no answer, content 46 %, visual cue 26 %, no verbal cue.

python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

import ml_collections

from configs import base, family


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    family.scale(config, 3)
    config.data.name = "quickstart"
    config.data.train_hours = 16.0
    config.data.test_per_family = 24
    config.train.steps = 900
    config.optimizer.warmup = 80
    config.train.save_every = 100
    config.train.eval_every = 100
    config.train.eval_batches = 2
    return config
