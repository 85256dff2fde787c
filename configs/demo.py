"""A duplex model that two CPU cores train in 40 to 45 minutes, 1,750 steps of 1.3 to 1.5 s (`benchmarks.train`).

Reached: takes 98 % of turns at 0.35 s, takes over in 11 % of pauses, stops at every interruption (in 0.5 s), keeps the
floor under 96 % of backchannels, answers 6 % of what wants no answer, content 85 %, verbal cue 91 %, visual cue 85 %.

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
    config.train.steps = 1750
    config.train.save_every = 200
    config.train.eval_every = 200
    config.train.eval_batches = 4
    return config
