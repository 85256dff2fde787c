"""An export is whole, tells when it was touched, and says bit for bit what its workdir says."""

import errno
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tmljax import config
from tmljax.config import UserError
from tmljax.decode.program import engine_from_params, lower_tick, weights_of
from tmljax.decode.session import SessionInput, converse
from tmljax.model.interaction import Definition
from tmljax.serve import bundle, export
from tmljax.stream.record import Word
from tmljax.stream.text import Tokenizer

STREAM = config.Stream(vocab_size=320)
MODEL = config.Model(
    d_model=16, layers=2, heads=2, kv_heads=1, head_dim=8, window=4,
    moe=config.Moe(experts=2, top_k=1, expert_width=8, shared_width=8),
    flow=config.Flow(width=8, depth=1, steps=2),
)  # fmt: skip
EXPERIMENT = config.Experiment(stream=STREAM, model=MODEL, sampling=config.Sampling(temperature=1.0))

# Streams a session from an export and prints what was said and what was imported on the way.
SERVER = """
import hashlib, json, sys
import numpy as np
from tmljax.serve import bundle
from tmljax.decode.session import SessionInput, converse
from tmljax.stream.record import Word
audio = np.load(sys.argv[2])
(said,) = converse(bundle.load(sys.argv[1]), [SessionInput(audio, [Word("three", 0.3, 0.3)])], [5])
forbidden = [m for m in sys.modules if m.startswith(("tmljax.train", "tmljax.model", "tmljax.decode.tick", "flax"))]
digest = hashlib.sha256(said.text.tobytes() + said.mel.tobytes() + said.audio.tobytes()).hexdigest()
print(json.dumps({"forbidden": forbidden, "digest": digest}))
"""


@pytest.fixture(scope="module")
def params():
    """Random everywhere: no path hides behind a zero."""
    rng = np.random.default_rng(1)
    shapes = Definition(STREAM, MODEL).abstract()
    return jax.tree.map(lambda leaf: rng.normal(0.3, 0.3, leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" what is three plus four"] * 4, STREAM.vocab_size)


@pytest.fixture(scope="module")
def exported(params, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "bundle"
    export.export(folder, EXPERIMENT, tokenizer, params, step=12, name="tiny")
    return folder


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return np.random.default_rng(0).normal(size=16000 * 2 + 77).astype(np.float32) * 0.1


def test_export_says_what_the_workdir_says_without_its_source(exported, params, tokenizer, audio, tmp_path):
    """In a fresh process that imports nothing of the model or the trainer, bit for bit."""
    np.save(tmp_path / "audio.npy", audio)
    command = [sys.executable, "-c", SERVER, str(exported), str(tmp_path / "audio.npy")]
    server = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert server["forbidden"] == []

    engine = engine_from_params(EXPERIMENT, tokenizer, params)
    (said,) = converse(engine, [SessionInput(audio, [Word("three", 0.3, 0.3)])], [5])
    assert (said.text > 2).any()  # it did speak
    digest = hashlib.sha256(said.text.tobytes() + said.mel.tobytes() + said.audio.tobytes()).hexdigest()
    assert server["digest"] == digest


def test_what_is_written(exported, params, tokenizer):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["format_version"] == bundle.FORMAT_VERSION
    assert manifest["step"] == 12
    assert set(manifest["files"]) == {*bundle.FILES} == {f.name for f in exported.iterdir()} - {"manifest.json"}
    for name, file in manifest["files"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == file["sha256"]
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["inputs"]["user_dmel"] == {"shape": [1, 8, 80], "dtype": "uint8"}
    assert manifest["versions"]["jax"] == jax.__version__
    weights = load_file(exported / "weights.safetensors")
    for name, leaf in weights_of(params, Definition(STREAM, MODEL)).items():
        np.testing.assert_array_equal(weights[name], leaf)
    assert manifest["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert config.from_json((exported / "config.json").read_text()) == EXPERIMENT
    assert Tokenizer.load(exported / "tokenizer.json").encode(" three") == tokenizer.encode(" three")


def test_half_precision_weighs_half_and_says_the_same(exported, params, tokenizer, audio, tmp_path):
    half = replace(EXPERIMENT, model=replace(MODEL, dtype="bfloat16"))
    export.export(tmp_path / "half", half, tokenizer, params, step=12)
    weights, full = (load_file(folder / "weights.safetensors") for folder in (tmp_path / "half", exported))
    assert 2 * weights["trunk.blocks.0.attention.q"].nbytes == full["trunk.blocks.0.attention.q"].nbytes
    (said,) = converse(bundle.load(tmp_path / "half"), [SessionInput(audio)], [5])
    (plain,) = converse(engine_from_params(half, tokenizer, params), [SessionInput(audio)], [5])
    for name in ("text", "mel", "audio"):
        np.testing.assert_array_equal(getattr(said, name), getattr(plain, name))


def test_initial_state_survives_its_description():
    state = {"a": np.full((2, 3), -(2**30), np.int32), "b": np.tile(np.float32([1.1, 2.2, np.pi]), (4, 1))}
    restored = bundle.restore(json.loads(json.dumps(export.describe(state))))
    for name, array in state.items():
        assert restored[name].dtype == array.dtype
        np.testing.assert_array_equal(restored[name], array)
    with pytest.raises(AssertionError):
        export.describe({"c": np.arange(6).reshape(2, 3)})


@pytest.mark.parametrize("name", bundle.FILES)
def test_an_altered_file_is_named(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} was altered"):
        bundle.load(copied)


@pytest.mark.parametrize("name", bundle.FILES)
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        bundle.load(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "format version 1, this program reads 2"),
        ({"format_version": None}, "format version None"),
        ({"format": "other"}, "does not describe"),
        ({"files": {}}, "does not list"),
    ],
)
def test_another_version_is_refused(copied, change, message):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=message):
        bundle.load(copied)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_broken_manifest_is_refused(copied, content):
    (copied / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        bundle.load(copied)


def test_a_program_of_another_platform_is_refused(copied):
    program = lower_tick(EXPERIMENT, 1, ("tpu",)).serialize()
    (copied / "tick.stablehlo").write_bytes(program)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"]["tick.stablehlo"]["sha256"] = hashlib.sha256(program).hexdigest()
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="runs on tpu, and this machine's device is a cpu"):
        bundle.load(copied)


def test_only_an_export_is_replaced(copied, params, tokenizer):
    foreign = copied.parent / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other things"):
        export.export(foreign, EXPERIMENT, tokenizer, params, step=1)
    with pytest.raises(UserError, match="is a file"):
        export.export(foreign / "thesis.tex", EXPERIMENT, tokenizer, params, step=1)
    assert [f.name for f in foreign.iterdir()] == ["thesis.tex"]

    (copied / "out.wav").write_bytes(b"a talk")
    with pytest.raises(UserError, match=r"holds out\.wav beside an export"):
        export.export(copied, EXPERIMENT, tokenizer, params, step=1)
    (copied / "out.wav").unlink()
    (foreign / "thesis.tex").unlink()
    for folder in (copied, foreign):  # an earlier export, an empty directory
        export.export(folder, EXPERIMENT, tokenizer, params, step=99)
        assert bundle.read_manifest(folder)["step"] == 99
        bundle.verify(folder, bundle.read_manifest(folder))
    assert sorted(f.name for f in copied.parent.iterdir()) == ["copy", "foreign"]  # no leftovers


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "the disk is full"),
        (export.SafetensorError("I/O error: No space left on device (os error 28)"), UserError, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), UserError, "Permission denied"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_failed_export_leaves_all_as_it_was(copied, params, tokenizer, monkeypatch, error, raised, message):
    def fail(*args, **kwargs):
        raise error

    before = {file.name: file.read_bytes() for file in copied.iterdir()}
    monkeypatch.setattr(export.files, "sync", fail)
    with pytest.raises(raised, match=message):
        export.export(copied, EXPERIMENT, tokenizer, params, step=99)
    assert {file.name: file.read_bytes() for file in copied.iterdir()} == before
    assert [f.name for f in copied.parent.iterdir()] == ["copy"]


def test_what_a_killed_export_left_is_put_in_order(copied, params, tokenizer, monkeypatch):
    """One killed between the two renames, and the next that fails."""
    before = {file.name: file.read_bytes() for file in copied.iterdir()}
    copied.rename(copied.with_name(".copy.replaced"))
    copied.with_name(".copy.partial").mkdir()
    monkeypatch.setattr(export, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk")))
    with pytest.raises(UserError, match="bad disk"):
        export.export(copied, EXPERIMENT, tokenizer, params, step=99)
    assert {file.name: file.read_bytes() for file in copied.iterdir()} == before
    assert [f.name for f in copied.parent.iterdir()] == ["copy"]


def test_an_export_that_cannot_take_its_place_gives_the_old_one_back(copied, params, tokenizer, monkeypatch):
    rename = Path.rename

    def refuse_new(self, target):
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(UserError, match="Permission denied"):
        export.export(copied, EXPERIMENT, tokenizer, params, step=99)
    assert bundle.read_manifest(copied)["step"] == 12
    assert [f.name for f in copied.parent.iterdir()] == ["copy"]
