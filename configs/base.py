"""What all configs share; other configs start from it.

python -m launch.train --config=configs/base.py --workdir=runs/base
"""

import ml_collections

from tmljax.config import Experiment, to_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = to_config_dict(Experiment())
    config.stream.video_every = 3
    config.data.batch = 16  # twice the examples a step learnt less than half as much from each
    config.loss.flow = 0.2  # else the voice, whose loss is the largest for long, keeps the words waiting
    return config
