import errno
import io
import os
import struct

import numpy as np
import pytest
import soundfile

from tmljax.config import UserError
from tmljax.stream import audio


def tone(hz, seconds, rate, level=0.3):
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 96000, 192000])
def test_any_rate_becomes_16_khz(rate, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(440, 0.5, rate), rate, subtype="FLOAT")
    samples = audio.read_audio(tmp_path / "a.wav")
    assert samples.dtype == np.float32
    assert abs(len(samples) - 8000) <= 1
    middle = slice(1000, 7000)
    np.testing.assert_allclose(samples[middle], tone(440, 0.5, 16000)[middle], atol=2e-3)


@pytest.mark.parametrize(
    ("subtype", "step"),
    [("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-24), ("DOUBLE", 1e-7)],
)
def test_any_width(subtype, step, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(440, 0.1, 16000), 16000, subtype=subtype)
    np.testing.assert_allclose(audio.read_audio(tmp_path / "a.wav"), tone(440, 0.1, 16000), atol=step)


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_other_containers(suffix, tmp_path):
    soundfile.write(tmp_path / f"a.{suffix}", tone(440, 1, 16000), 16000)
    assert len(audio.read_audio(tmp_path / f"a.{suffix}")) == 16000


def test_channels_stay_apart(tmp_path):
    stereo = np.stack([tone(440, 0.1, 16000), np.zeros(1600, np.float32)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 16000, subtype="FLOAT")
    assert np.array_equal(audio.read_audio(tmp_path / "a.wav"), stereo)


def wav_bytes(samples=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(440, 0.1, 16000) if samples is None else samples, 16000, format="WAV")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "empty"),
        (wav_bytes()[:-100], "truncated, 3100 of 3200 bytes"),
        (wav_bytes()[:20], "truncated|not a readable"),
        (wav_bytes()[:36], "no data chunk"),
        (wav_bytes(np.zeros(0)), "no samples"),
        (b"once upon a time" * 100, "not a readable sound file"),
    ],
)
def test_bad_files_say_what_is_wrong(content, complaint, tmp_path):
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        audio.read_audio(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_and_not_finite(tmp_path):
    (tmp_path / "headerless.raw").write_bytes(bytes(4000))
    with pytest.raises(UserError, match="not a readable sound file"):
        audio.read_audio(tmp_path / "headerless.raw")
    with pytest.raises(UserError, match="no such file"):
        audio.read_audio(tmp_path / "none.wav")
    with pytest.raises(UserError, match="not a file"):
        audio.read_audio(tmp_path)
    soundfile.write(tmp_path / "nan.wav", np.float32([0, np.nan]), 16000, subtype="FLOAT")
    with pytest.raises(UserError, match="not finite"):
        audio.read_audio(tmp_path / "nan.wav")


def test_a_streamed_wav_without_length_is_read(tmp_path):
    content = bytearray(wav_bytes())
    at = content.index(b"data") + 4
    content[4:8] = content[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    (tmp_path / "pipe.wav").write_bytes(content)
    assert len(audio.read_audio(tmp_path / "pipe.wav")) == 1600


def test_write_and_read_back(tmp_path):
    for samples in (tone(440, 0.1, 16000), np.stack([tone(440, 0.1, 16000)] * 2, axis=1)):
        audio.write_wav(tmp_path / "a.wav", samples)
        assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
        assert np.abs(audio.read_audio(tmp_path / "a.wav") - samples).max() <= 2**-16 + 1e-9
    pcm = np.array([-32768, -1, 0, 1, 32767], np.int16)
    assert np.array_equal(audio.to_int16(pcm.astype(np.float32) / 32768), pcm)
    assert audio.to_int16(np.float32([3, -3, np.nan])).tolist() == [32767, -32768, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize(("code", "complaint"), [(errno.ENOSPC, "disk is full"), (errno.EIO, "Input/output error")])
def test_a_failed_write_leaves_the_old_file(code, complaint, tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    audio.write_wav(path, tone(440, 0.1, 16000))
    old = path.read_bytes()

    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=complaint):
        audio.write_wav(path, tone(880, 0.1, 16000))
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_writing_into_no_folder(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        audio.write_wav(tmp_path / "none" / "a.wav", np.zeros(10, np.float32))


def test_vad_finds_bursts_and_merges_them():
    samples = np.zeros(48000, np.float32)
    samples[8000:16000] = tone(300, 0.5, 16000, 0.1)
    samples[17600:24000] = tone(300, 0.4, 16000, 0.1)  # 0.1 s later
    samples[36000:36400] = tone(300, 0.025, 16000, 0.1)  # a click of one frame
    frames = audio.energy_vad(samples)
    assert len(frames) == 120
    assert np.flatnonzero(frames).tolist() == [*range(20, 40), *range(44, 60), 90]
    assert audio.voiced_segments(samples) == [(0.5, 1.5)]
    assert audio.voiced_segments(samples, merge_gap=0.1, min_length=0.0) == [(0.5, 1.5), (2.25, 2.275)]
    assert audio.voiced_segments(samples, merge_gap=0.09, min_length=0.0) == [(0.5, 1.0), (1.1, 1.5), (2.25, 2.275)]
    assert audio.voiced_segments(np.zeros(1000, np.float32)) == []
    assert len(audio.energy_vad(np.zeros(401, np.float32))) == 2


def test_vad_keeps_soft_ends_but_not_soft_noise():
    level = 10 ** (-46 / 20) * np.sqrt(2)  # between KEEP_DB and ONSET_DB
    soft = tone(300, 0.5, 16000, level)
    assert not audio.energy_vad(soft).any()
    assert audio.energy_vad(np.concatenate([tone(300, 0.5, 16000, 0.1), soft])).all()
    noise = np.random.default_rng(0).normal(size=16000).astype(np.float32) * 10 ** (-60 / 20)
    assert not audio.energy_vad(noise).any()
