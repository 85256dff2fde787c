"""The model of `make quickstart`: takes turns, waits in pauses, stops when interrupted, leaves others alone.

Reached in 1,000 steps, ten to twelve minutes on two CPU cores: takes 96 % of turns at 0.33 s, takes over in 15 % of
pauses, answers 17 % of what wants no answer, content 49 %, visual cue 49 %, verbal cue 60 %.

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
    # When to speak comes before what to say at a cue: of cues there are fewer than by default.
    config.data.mixture = {
        "turn_taking": 0.27,
        "pause": 0.12,
        "self_correction": 0.05,
        "interruption": 0.07,
        "user_backchannel": 0.05,
        "model_backchannel": 0.03,
        "verbal_cue": 0.10,
        "no_answer": 0.16,
        "visual_cue": 0.09,
        "visual_question": 0.03,
        "typed_text": 0.03,
    }
    config.train.steps = 1_000
    config.optimizer.warmup = 80
    config.train.save_every = 100
    config.train.eval_every = 100
    config.train.eval_batches = 2
    return config
