import numpy as np
import pytest

from tmljax.stream.patches import patchify, unpatchify


def test_patches_are_row_major_over_the_frame():
    frames = np.random.default_rng(0).integers(0, 256, (3, 80, 120, 3), np.uint8)
    patches = patchify(frames)
    assert patches.shape == (3, 6, 4800)
    assert patches.dtype == np.uint8
    for p in range(6):
        row, column = divmod(p, 3)
        expected = frames[1, 40 * row : 40 * row + 40, 40 * column : 40 * column + 40]
        assert np.array_equal(patches[1, p].reshape(40, 40, 3), expected)
    assert np.array_equal(unpatchify(patches, 80, 120), frames)


def test_no_frames():
    assert patchify(np.zeros((0, 40, 40, 3), np.uint8)).shape == (0, 1, 4800)


@pytest.mark.parametrize("shape", [(1, 41, 40, 3), (1, 40, 39, 3), (1, 40, 40, 4)])
def test_other_frames_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 40"):
        patchify(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        patchify(np.zeros((1, 40, 40, 3), np.float32))
