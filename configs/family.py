"""The model family: one dial sets depth, width, heads, experts and learning rate together.

    python -m launch.train --config=configs/family.py:6 --workdir=runs/family6

Dial n is n layers of width 64 n, so parameters grow as the cube of the dial. Dial 4 is the size of the base config.
"""

import ml_collections

from configs import base
from tmljax.config import UserError


def scale(config: ml_collections.ConfigDict, dial: int) -> None:
    """Sets the size of the model in place; everything else stays."""
    width, head_dim = 64 * dial, 64 if dial < 24 else 128
    heads = width // head_dim
    config.model.d_model = width
    config.model.layers = dial
    config.model.head_dim = head_dim
    config.model.heads = heads
    config.model.kv_heads = max(k for k in range(1, max(2, heads // 2 + 1)) if heads % k == 0)
    config.model.moe.expert_width = width // 2
    config.model.moe.shared_width = width * 3 // 2
    config.model.flow.width = max(width, 128)
    config.optimizer.learning_rate = 6e-3 * 4 / dial


def get_config(dial: str = "4") -> ml_collections.ConfigDict:
    if not dial.isdecimal() or int(dial) < 1:
        raise UserError(f"family.py:{dial}: the dial is a whole number from 1 on, as in family.py:6")
    config = base.get_config()
    scale(config, int(dial))
    return config
