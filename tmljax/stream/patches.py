"""Frames as 40x40 patches, row-major over the frame, and back.

Legend: N frames, H and W pixels, P = (H / 40)(W / 40) patches.
"""

from __future__ import annotations

import numpy as np

from tmljax.stream.microturn import PATCH, PATCH_VALUES


def patchify(frames_NHWC: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] RGB -> uint8 [N, P, 4800]; each patch is [40, 40, 3], flattened."""
    N, H, W, C = frames_NHWC.shape
    if H % PATCH or W % PATCH or C != 3 or frames_NHWC.dtype != np.uint8:
        raise ValueError(f"patches need uint8 RGB frames with sides in multiples of {PATCH}, got {frames_NHWC.shape}")
    tiles = frames_NHWC.reshape(N, H // PATCH, PATCH, W // PATCH, PATCH, 3).swapaxes(2, 3)
    return tiles.reshape(N, (H // PATCH) * (W // PATCH), PATCH_VALUES)


def unpatchify(patches_NPV: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [N, P, 4800] -> uint8 [N, height, width, 3]; the inverse of `patchify`."""
    N = len(patches_NPV)
    tiles = patches_NPV.reshape(N, height // PATCH, width // PATCH, PATCH, PATCH, 3).swapaxes(2, 3)
    return tiles.reshape(N, height, width, 3)
