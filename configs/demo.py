"""A duplex model that two CPU cores train in 40 to 45 minutes, 2,200 steps of 1.1 to 1.2 s (`benchmarks.train`).

Reached: takes 96 % of turns, at 0.36 s, takes over in 6 % of pauses, stops at every interruption (in 0.5 s), keeps the
floor under all backchannels, answers 2 % of what wants no answer, content 91 %, verbal cue 92 %, visual cue 90 %.

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
    config.train.steps = 2200
    config.train.save_every = 200
    config.train.eval_every = 200
    config.train.eval_batches = 4
    return config
