"""What all configs share; other configs start from it.

python -m launch.train --config=configs/base.py --workdir=runs/base
"""

import ml_collections

from tmljax.config import Experiment, to_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = to_config_dict(Experiment())
    config.stream.video_every = 3
    return config
