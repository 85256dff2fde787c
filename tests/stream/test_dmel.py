import numpy as np
import pytest

from tmljax.stream import dmel


def plain_log_mel(samples):
    """The recipe as written, in float64, one frame after the other: frame i ends with sample 400 (i + 1)."""
    padded = np.concatenate([np.zeros(624), samples])
    window = np.zeros(1024)
    window[112:912] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(800) / 800)
    filters = dmel.filterbank()
    mels = []
    for start in range(0, len(samples), 400):
        power = np.abs(np.fft.rfft(padded[start : start + 1024] * window)) ** 2
        mels.append(np.log10(np.maximum(filters @ np.sqrt(np.maximum(power, 1e-10)), 1e-10)))
    return np.array(mels)


def noise(n, seed=0):
    return (np.random.default_rng(seed).standard_normal(n) * 0.1).astype(np.float32)


def test_log_mel_is_the_plain_recipe():
    samples = noise(400 * 37)
    samples[4000:8000] *= 1e-4
    mel, _ = dmel.log_mel(samples)
    np.testing.assert_allclose(mel, plain_log_mel(samples), atol=2e-4)


def test_chunked_equals_whole_bit_for_bit():
    samples = noise(400 * 531)
    whole, end = dmel.log_mel(samples)
    rng = np.random.default_rng(1)
    for longest in (1, 3, 8, 20, 200):
        state, mels, at = dmel.MelState(), [], 0
        while at < len(samples):
            n = 400 * int(rng.integers(0, longest + 1))
            mel, state = dmel.log_mel(samples[at : at + n], state)
            mels.append(mel)
            at += n
        assert np.array_equal(np.concatenate(mels), whole)
        assert np.array_equal(state.tail, end.tail)


def test_no_frame_hears_its_future():
    samples = noise(400 * 24)
    changed = samples.copy()
    changed[400 * 10 :] = noise(400 * 14, seed=5)
    before, after = dmel.log_mel(samples)[0], dmel.log_mel(changed)[0]
    assert np.array_equal(before[:10], after[:10])
    assert not np.array_equal(before[10], after[10])


def test_filterbank_against_constants_worked_by_hand():
    # Slaney: 80 Hz = 1.2 mel; 7600 Hz = 15 + 27 ln 7.6 / ln 6.4 = 44.4996 mel; 82 edges, so a step of 0.534563.
    step = (15 + 27 * np.log(7.6) / np.log(6.4) - 1.2) / 81
    assert step == pytest.approx(0.534563, abs=1e-6)
    filters = dmel.filterbank()
    assert filters.shape == (80, 513)
    # Filter 0 has its corners at 80, 115.637 and 151.275 Hz; bin 7 (109.375 Hz) is on its rising side.
    low, centre, high = 80.0, (1.2 + step) * 200 / 3, (1.2 + 2 * step) * 200 / 3
    assert filters[0, 7] == pytest.approx((109.375 - low) / (centre - low) * 2 / (high - low), rel=1e-9)
    assert filters[0, 5] == 0
    assert filters[0, 10] == 0
    # The last ends at 7600 Hz = bin 486.4.
    assert filters[79, 486] > 0
    assert filters[79, 487] == 0
    # Unit area in Hz, where a filter spans enough bins for a sum to be an integral.
    np.testing.assert_allclose(filters[60:].sum(axis=1) * 16000 / 1024, 1, rtol=0.01)


def test_a_tone_peaks_in_its_channel():
    tone = (0.5 * np.sin(2 * np.pi * 1000 * np.arange(8000) / 16000)).astype(np.float32)
    mel, _ = dmel.log_mel(tone)
    edges = dmel.mel_to_hz(np.linspace(dmel.hz_to_mel(80.0), dmel.hz_to_mel(7600.0), 82))
    assert mel[10].argmax() == np.abs(edges[1:-1] - 1000).argmin()


def test_quantise_takes_the_nearest_of_sixteen_centres():
    centres = np.float32([-7 + 0.6 * i for i in range(16)])
    assert np.array_equal(dmel.quantise(centres), np.arange(16))
    assert np.array_equal(dmel.quantise(np.float32([-99, -6.71, -6.69, 1.69, 1.71, 99])), [0, 0, 1, 14, 15, 15])
    mel = np.random.default_rng(0).uniform(-7, 2, (50, 80)).astype(np.float32)
    bins = dmel.quantise(mel)
    assert bins.dtype == np.uint8
    assert np.abs(dmel.dequantise(bins) - mel).max() <= 0.3 + 1e-5
    assert np.array_equal(dmel.quantise(dmel.dequantise(bins)), bins)


def test_silence_and_int16():
    assert np.array_equal(dmel.log_mel(np.zeros(4000, np.float32))[0], np.tile(dmel.SILENCE_MEL, (10, 1)))
    # Each bin sits at the magnitude floor of 1e-5, so a unit-area filter gives 1e-5 / 15.625 Hz.
    np.testing.assert_allclose(dmel.SILENCE_MEL[60:], np.log10(1e-5 / 15.625), atol=0.01)
    pcm = (noise(4000) * 32768).astype(np.int16)
    assert np.array_equal(dmel.log_mel(pcm)[0], dmel.log_mel(pcm.astype(np.float32) / 32768)[0])


def test_part_of_a_frame_is_refused_and_padding_mends_it():
    with pytest.raises(ValueError, match="pad_to_frames"):
        dmel.log_mel(noise(401))
    assert len(dmel.pad_to_frames(noise(401))) == 800
    assert len(dmel.pad_to_frames(noise(401), frames=8)) == 3200
    assert len(dmel.pad_to_frames(noise(800))) == 800
