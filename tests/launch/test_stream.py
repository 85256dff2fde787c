"""The verbs `stream` and `export`, through their main functions: good files, bad files, interruption."""

import json
import os
import signal
import subprocess
import sys
import wave
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from absl import flags

from launch import export, stream, verb
from tmljax import checkpoint, cluster, config, lineage
from tmljax.model.interaction import Definition
from tmljax.serve import bundle
from tmljax.stream.text import Tokenizer

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
STREAM = config.Stream(vocab_size=320)
MODEL = config.Model(
    d_model=16, layers=1, heads=2, kv_heads=1, head_dim=8, window=4,
    moe=config.Moe(experts=2, top_k=1, expert_width=8, shared_width=8),
    flow=config.Flow(width=8, depth=1, steps=2),
)  # fmt: skip
EXPERIMENT = config.Experiment(stream=STREAM, model=MODEL, sampling=config.Sampling(temperature=1.0))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cluster.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """As training leaves it, with random weights."""
    folder, rng = tmp_path_factory.mktemp("run") / "tiny", np.random.default_rng(1)
    shapes = Definition(STREAM, MODEL).abstract()
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.normal(0.3, 0.3, leaf.shape), leaf.dtype), shapes)
    checkpoints = checkpoint.Checkpoints(folder, keep=1)
    lineage.keep_config(folder, EXPERIMENT)
    Tokenizer.train([" what is three plus four"] * 4, STREAM.vocab_size).save(folder / checkpoint.TOKENIZER)
    checkpoints.save(30, params, {"count": jax.numpy.zeros(())}, {"position": 0}, EXPERIMENT)
    checkpoints.wait()
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def exported(workdir) -> Path:
    assert run(export, workdir=workdir, output=workdir.parent / "export") == 0
    return workdir.parent / "export"


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("speech") / "in.wav"
    soundfile.write(path, noise(16000 * 2 + 123), 16000)
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32) * 0.1


def run(module, *arguments: str, **given) -> int:
    """The verb as the shell would run it, its flags gone afterwards."""
    before = set(flags.FLAGS)
    try:
        module.define_flags()
        return verb.run(module.main, ["verb", *arguments, *(f"--{name}={value}" for name, value in given.items())])
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


def test_stream_writes_what_it_promises(workdir, speech, tmp_path, capsys):
    out, report_path = tmp_path / "out.wav", tmp_path / "out.json"
    arguments = ["--typed=0.5:three plus", "--typed=1.5:four", "--stereo"]
    assert run(stream, *arguments, workdir=workdir, input=speech, output=out, json=report_path, seed=3) == 0
    both, rate = soundfile.read(out, dtype="float32")
    assert rate == 16000
    assert both.shape == (16000 * 2 + 123, 2)
    np.testing.assert_allclose(both[:, 1], soundfile.read(speech, dtype="float32")[0], atol=1e-4)  # right = user
    assert (both[:3200, 0] == 0).all()
    assert both[3200:, 0].any()

    report = json.loads(report_path.read_text())
    assert report["seconds"] == pytest.approx(len(both) / 16000)
    assert (report["step"], report["config"], report["seed"]) == (30, "tiny", 3)
    assert [w["text"] for w in report["typed"]] == ["three plus", "four"]
    assert report["words"]
    assert all(0 < w["start"] < w["end"] <= report["seconds"] + 1e-3 for w in report["words"])
    assert all(0 <= w["start"] < w["end"] <= report["seconds"] + 1e-3 for w in report["heard"])
    for kind in ("tick_ms", "vocoder_ms", "total_ms"):
        assert 0 < report["latency"][kind]["p50"] <= report["latency"][kind]["p99"] <= report["latency"][kind]["max"]
    assert report["real_time_factor"] > 0
    printed = capsys.readouterr().out
    assert "typed  three plus" in printed
    assert "tiny, step 30" in printed


def test_an_export_streams_the_same_bytes(workdir, exported, speech, tmp_path):
    reports = []
    for folder in (workdir, exported):
        out, report = tmp_path / f"{folder.name}.wav", tmp_path / f"{folder.name}.json"
        assert run(stream, workdir=folder, input=speech, output=out, json=report, seed=5) == 0
        reports.append(json.loads(report.read_text()))
    assert (tmp_path / "tiny.wav").read_bytes() == (tmp_path / "export.wav").read_bytes()
    for name in ("words", "heard", "config", "step"):
        assert reports[0][name] == reports[1][name]
    assert [r["source"] for r in reports] == ["workdir", "export"]
    assert run(stream, workdir=exported, input=speech, output=tmp_path / "other.wav", seed=6) == 0
    assert (tmp_path / "other.wav").read_bytes() != (tmp_path / "export.wav").read_bytes()


def test_serving_sets_its_own_sampling(workdir, speech, tmp_path):
    cold = "--config.sampling.temperature=0"
    assert run(export, cold, workdir=workdir, output=tmp_path / "cold") == 0
    assert config.from_json((tmp_path / "cold/config.json").read_text()).sampling.temperature == 0
    heard = []
    for folder, flag in ((workdir, ()), (workdir, (cold,)), (tmp_path / "cold", ())):
        out, report = tmp_path / "out.wav", tmp_path / "out.json"
        assert run(stream, *flag, workdir=folder, input=speech, output=out, json=report, seed=5) == 0
        heard.append(out.read_bytes())
        wanted = EXPERIMENT.sampling.temperature if not heard[1:] else 0
        assert json.loads(report.read_text())["settings"]["sampling.temperature"] == wanted
    assert heard[0] != heard[1] == heard[2]


@pytest.fixture
def one_engine(exported, monkeypatch):
    """Compiled once for all the tests whose matter is the file."""
    if exported not in ENGINES:
        ENGINES[exported] = bundle.load(exported)
    monkeypatch.setattr(stream, "load_engine", lambda *_, **__: ENGINES[exported])


ENGINES = {}


@pytest.mark.usefixtures("one_engine")
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_width(exported, tmp_path, subtype):
    check_duration(exported, tmp_path, noise(8000), 16000, subtype)


@pytest.mark.usefixtures("one_engine")
@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 192000])
def test_every_rate(exported, tmp_path, rate):
    check_duration(exported, tmp_path, noise(rate // 2 + 7, 2), rate, "PCM_16")


def check_duration(exported, tmp_path, samples, rate, subtype):
    soundfile.write(tmp_path / "in.wav", samples, rate, subtype)
    assert run(stream, workdir=exported, input=tmp_path / "in.wav", output=tmp_path / "out.wav") == 0
    out, out_rate = soundfile.read(tmp_path / "out.wav")
    assert abs(len(out) - len(samples) * out_rate / rate) <= 1


def test_channels(tmp_path):
    stereo = np.stack([noise(100), -noise(100)], axis=1)
    np.testing.assert_array_equal(stream.pick_channel(stereo, "mix", "a"), np.zeros(100))
    np.testing.assert_array_equal(stream.pick_channel(stereo, "left", "a"), stereo[:, 0])
    np.testing.assert_array_equal(stream.pick_channel(stereo, "right", "a"), stereo[:, 1])
    np.testing.assert_array_equal(stream.pick_channel(stereo, "1", "a"), stereo[:, 1])
    np.testing.assert_array_equal(stream.pick_channel(stereo[:, 0], "mix", "a"), stereo[:, 0])
    for channel, message in {"2": "has 2 channel", "up": "must be mix"}.items():
        with pytest.raises(config.UserError, match=message):
            stream.pick_channel(stereo, channel, "a")
    with pytest.raises(config.UserError, match="has 1 channel"):
        stream.pick_channel(stereo[:, 0], "right", "a")


def write_bad(kind: str, path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(b"" if kind == "zero-length" else bytes(20000))
    whole = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[:9000])
    elif kind == "header only":
        path.write_bytes(whole[:30])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no sound\n" * 50)
    elif kind == "missing":
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "truncated"),
        ("header only", "truncated"),
        ("empty", "empty"),
        ("zero-length", "no samples"),
        ("text", "not a readable sound file"),
        ("missing", "no such file"),
    ],
)
def test_bad_wav(exported, tmp_path, capsys, kind, message):
    write_bad(kind, tmp_path / "bad.wav")
    assert run(stream, workdir=exported, input=tmp_path / "bad.wav", output=tmp_path / "out.wav") == 2
    expect_one_line(capsys, "bad.wav", message)
    assert not (tmp_path / "out.wav").exists()


def expect_one_line(capsys, *parts: str) -> None:
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    for part in parts:
        assert part in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"workdir": "nowhere"}, ["nowhere", "not a directory"]),
        ({"workdir": "."}, ["holds no checkpoint"]),
        ({"output": "no/such/folder/out.wav"}, ["no/such/folder", "there is no folder"]),
        ({"output": "in.wav"}, ["is the input too"]),
        ({"json": "in.wav"}, ["is the input too"]),
        ({"json": "./out.wav"}, ["--json and --output both name out.wav"]),
        ({"output": "."}, ["is a folder"]),
        ({"output": ""}, ["empty name"]),
        ({"output": os.devnull}, ["no regular file"]),
        ({"json": os.devnull}, ["no regular file"]),
        pytest.param({"json": "/proc/out.json"}, ["nothing may be written to /proc"], marks=linux),
        ({"typed": "three plus four"}, ["SECONDS:TEXT"]),
        ({"typed": "1.0:"}, ["SECONDS:TEXT"]),
        ({"typed": "99:four"}, ["outside the input"]),
        ({"typed": "nan:four"}, ["outside the input"]),
        ({"channel": "3"}, ["has 1 channel"]),
        ({"seed": "-1"}, ["seed"]),
        ({"speed": "2"}, ["speed"]),
        ({"step": "7"}, ["leave --step out"]),
        ({"config.sampling.temperature": "1"}, ["is an export", "set config.sampling.temperature=1 when exporting"]),
        ({"config.model.layers": "1"}, ["config.model.layers cannot be set after training"]),
    ],
)
def test_bad_flags(exported, speech, tmp_path, monkeypatch, capsys, changed, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.wav").write_bytes(speech.read_bytes())
    given = {"workdir": exported, "input": "in.wav", "output": "out.wav"} | changed
    assert run(stream, **given) == 2
    expect_one_line(capsys, *parts)
    assert sorted(os.listdir(tmp_path)) == ["in.wav"]


def test_missing_flag_and_help(capsys):
    assert run(stream, "--input=a.wav", "--output=b.wav") == 2
    expect_one_line(capsys, "--workdir is missing")
    assert run(stream, "--help") == 0
    assert "--workdir" in capsys.readouterr().out


def test_an_unknown_step_is_named(workdir, speech, tmp_path, capsys):
    assert run(stream, workdir=workdir, input=speech, output=tmp_path / "out.wav", step=31) == 2
    expect_one_line(capsys, "31", "30")


def test_weights_of_another_shape_are_refused(workdir, tmp_path, monkeypatch, capsys, speech):
    served = checkpoint.load_for_serving(workdir)
    params = served.params
    params["tokens"] = params["tokens"][:-1]
    monkeypatch.setattr(checkpoint, "load_for_serving", lambda *_: served)
    assert run(stream, workdir=workdir, input=speech, output=tmp_path / "out.wav") == 2
    expect_one_line(capsys, "tokens is (319, 16)")
    del params["tokens"]
    params["letters"] = np.zeros((2, 2), np.float32)
    assert run(stream, workdir=workdir, input=speech, output=tmp_path / "out.wav") == 2
    expect_one_line(capsys, "letters is (2, 2), and the config makes it absent")


def test_export_verb(workdir, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    assert run(export, workdir=workdir, output=tmp_path / "full") == 2
    expect_one_line(capsys, "holds other things")
    assert run(export, workdir=tmp_path, output=tmp_path / "new") == 2
    expect_one_line(capsys, "holds no checkpoint")
    assert not (tmp_path / "new").exists()
    assert run(export, workdir=workdir, output=tmp_path / "new", sessions=2) == 0
    assert "2 session slot(s), for cpu, cuda, tpu" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert (manifest["sessions"], manifest["step"], manifest["name"]) == (2, 30, "tiny")


def test_interrupt_leaves_nothing_behind(exported, tmp_path):
    """Ctrl-C in the middle of a conversation: exit 130, one line, no half-written file."""
    soundfile.write(tmp_path / "in.wav", np.zeros(16000 * 3600, np.int16), 16000)
    command = [sys.executable, "-m", "launch.stream", f"--workdir={exported}", f"--input={tmp_path}/in.wav"]
    command += [f"--output={tmp_path}/out.wav", f"--json={tmp_path}/out.json"]
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # tests started with & ignore Ctrl-C
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=heed)
    seen = b""
    while b"streaming:   0%" not in seen:
        piece = os.read(process.stderr.fileno(), 4096)
        assert piece, f"ended before it began: {seen}"
        seen += piece
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, seen + rest
    assert b"Traceback" not in seen + rest
    assert b"interrupted" in rest
    assert os.listdir(tmp_path) == ["in.wav"]
