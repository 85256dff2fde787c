"""A duplex model that two CPU cores train in 40 to 45 minutes, 1,750 steps of 1.3 to 1.5 s (`benchmarks.train`).

Reached: takes every turn, at 0.35 s, takes over in 5 % of pauses, stops at 98 % of interruptions (in 0.5 s), keeps the
floor under 98 % of backchannels, answers nothing that wants no answer, content 83 %, verbal cue 97 %, visual cue 88 %.

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
