import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.train import toy
from tmljax import checkpoint, storage
from tmljax.config import UserError
from tmljax.fingerprint import compare, fingerprints, host_fingerprints
from tmljax.sharding import batch_sharding, make_mesh
from tmljax.stream.text import Tokenizer
from tmljax.train.feed import to_devices
from tmljax.train.step import make_program

EXPERIMENT = toy.experiment()


def tree():
    """Every dtype that a state holds, in classes that a plain dict cannot hold."""
    mu = {"w": jax.random.normal(jax.random.key(0), (16, 5, 3)), "b": jnp.arange(7.0)}
    return mu, ({"mu": mu, "nu": jax.tree.map(lambda x: x.astype(jnp.bfloat16), mu)}, [jnp.int32(3)], None)


def as_target(tree, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def save(workdir, *steps_and_losses, keep=2):
    """Saves the tree at each step as a run that ends after each would."""
    params, optimizer = tree()
    for step, loss in steps_and_losses:
        saver = checkpoint.Checkpoints(workdir, keep)
        saver.save(step, params, optimizer, {"taken": step}, EXPERIMENT, loss)
        saver.close()


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_everything_comes_back_to_the_bit(tmp_path):
    save(tmp_path, (5, None))
    params, optimizer = tree()
    restored = checkpoint.resume(tmp_path, as_target(params), as_target(optimizer))
    assert (restored.step, restored.iterator) == (5, {"taken": 5})
    same((restored.params, restored.optimizer), (params, optimizer))
    assert jax.tree.map(lambda x: x.dtype, restored.optimizer) == jax.tree.map(lambda x: x.dtype, optimizer)


def test_what_is_saved_is_the_step_though_the_next_one_takes_its_buffers(tmp_path):
    advance = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    state = {"w": jnp.zeros((500, 1000))}
    saver = checkpoint.Checkpoints(tmp_path, 3)
    for step in (1, 2, 3):
        state = advance(state)
        saver.save(step, state, {"count": jnp.int32(step)}, None, EXPERIMENT)
        for _ in range(50):  # while the save is under way
            state = advance(state)
    saver.close()
    for step, expected in ((1, 1), (2, 52), (3, 103)):
        params, _ = checkpoint.read_params(tmp_path, step)
        np.testing.assert_array_equal(params["w"], expected)


def test_restored_on_another_mesh_the_loss_is_the_same(tmp_path):
    toy.run(tmp_path, toy.experiment(4))
    losses = []
    for sizes, devices in (({}, 1), ({"data": 8}, 8), ({"data": 2, "fsdp": 2, "expert": 2}, 8)):
        experiment = toy.experiment(4, mesh=sizes)
        mesh = make_mesh(experiment.mesh, jax.devices()[:devices])
        program = make_program(experiment, toy.Definition(), toy.objective, mesh)
        abstract = program.abstract
        targets = abstract.params, (abstract.optimizer, abstract.step, abstract.skipped)
        restored = checkpoint.resume(tmp_path, *targets)
        for leaf, target in zip(jax.tree.leaves(restored.params), jax.tree.leaves(abstract.params), strict=True):
            assert leaf.sharding == target.sharding
        batch = to_devices(next(toy.Source(8)), batch_sharding(mesh))
        losses.append(float(program.evaluate(restored.params, batch)["loss/total"]))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_the_newest_and_the_best_are_kept(tmp_path):
    losses = {1: float("nan"), 2: 1.0, 3: None, 4: 5.0, 5: 2.0, 6: float("nan"), 7: None}
    save(tmp_path, *losses.items())
    assert checkpoint.steps(tmp_path) == [2, 6, 7]
    assert checkpoint.best_step(tmp_path) == 2
    save(tmp_path, (8, 0.5), (9, None), (10, None))
    assert checkpoint.steps(tmp_path) == [8, 9, 10]
    assert checkpoint.best_step(tmp_path) == 8


def test_without_a_held_out_loss_there_is_no_best(tmp_path):
    save(tmp_path, (1, None))
    assert checkpoint.best_step(tmp_path) is None


def test_serving_gets_experiment_tokenizer_and_numpy_parameters(tmp_path):
    tokenizer = Tokenizer.train(["one two three", "four five"], 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    save(tmp_path, (1, None), (2, None))
    step, experiment, found, params = checkpoint.load_for_serving(tmp_path)
    assert step == 2
    assert experiment == EXPERIMENT
    assert found.to_json() == tokenizer.to_json()
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    same(params, tree()[0])


def test_a_step_is_chosen_by_number_by_its_loss_or_as_the_newest(tmp_path):
    Tokenizer.train(["one two three", "four five"], 300).save(tmp_path / "tokenizer.json")
    save(tmp_path, (1, None))
    with pytest.raises(UserError, match=r"--step=best: no checkpoint of .* has a held-out loss"):
        checkpoint.load_for_serving(tmp_path, "best")
    save(tmp_path, (2, 1.0), (3, 2.0), keep=3)
    assert [checkpoint.load_for_serving(tmp_path, step).step for step in (None, "best", "1")] == [3, 2, 1]
    with pytest.raises(UserError, match="--step=newest is neither a number nor best"):
        checkpoint.load_for_serving(tmp_path, "newest")


def test_serving_reads_the_arrays_once(tmp_path, monkeypatch):
    Tokenizer.train(["one two three", "four five"], 300).save(tmp_path / "tokenizer.json")
    save(tmp_path, (1, None), (2, 1.0))
    for wanted in (None, "best", "2"):
        read, real = [], checkpoint.read_params
        monkeypatch.setattr(checkpoint, "read_params", lambda *where: (read.append(where), real(*where))[1])  # noqa: B023
        checkpoint.load_for_serving(tmp_path, wanted)
        monkeypatch.setattr(checkpoint, "read_params", real)
        assert read == [(tmp_path, 2)]


PASSING = [
    OSError(5, "Input/output error"),
    ValueError("UNAVAILABLE: the bucket is busy"),
    ValueError("Error reading local file [os_error_code='116']"),
]


@pytest.mark.parametrize("error", PASSING)
def test_a_read_that_storage_refused_is_tried_again(tmp_path, monkeypatch, error):
    save(tmp_path, (1, None), (2, None))
    failing(monkeypatch, error, times=2)
    assert checkpoint.resume(tmp_path, *[as_target(part) for part in tree()]).step == 2


def test_storage_that_does_not_answer_costs_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, (1, None), (2, None))
    failing(monkeypatch, PASSING[0], times=100)
    for act in (
        lambda: checkpoint.resume(tmp_path, *[as_target(part) for part in tree()]),
        lambda: checkpoint.read_newest(tmp_path),
    ):
        with pytest.raises(UserError, match=r"checkpoint 2 of .* cannot be read at present") as e:
            act()
        assert "\n" not in str(e.value)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_what_may_not_be_read_is_not_damaged(tmp_path, monkeypatch):
    """Root may read everything, so the system's answer is played; orbax finds nothing there, as it does then."""
    save(tmp_path, (1, None), (2, None))
    closed = tmp_path / checkpoint.FOLDER / "2" / "params"
    real = storage.os.access
    monkeypatch.setattr(storage.os, "access", lambda path, mode: Path(path) != closed and real(path, mode))
    failing(monkeypatch, FileNotFoundError("Individual parameter subdirectory not found"), times=100)
    with pytest.raises(UserError, match=r"checkpoint 2 of .* cannot be read at present .*/params may not be read"):
        checkpoint.resume(tmp_path, *[as_target(part) for part in tree()])
    assert checkpoint.steps(tmp_path) == [1, 2]


def failing(monkeypatch, error, times):
    """The next reads fail."""
    restore, left = storage.ocp.Checkpointer.restore, [error] * times

    def restore_or_raise(*args, **kwargs):
        if left:
            raise left.pop()
        return restore(*args, **kwargs)

    monkeypatch.setattr(storage.ocp.Checkpointer, "restore", restore_or_raise)
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0, 0.0))


def biggest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "bit" and data:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how in ("bit", "empty"):
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "bit", "gone"])
def test_serving_passes_a_damaged_checkpoint_over_and_says_so(tmp_path, capfd, how):
    save(tmp_path, (1, None), (2, None))
    manifest = tmp_path / checkpoint.FOLDER / "2" / "params" / "manifest.ocdbt"
    damage(manifest if how == "gone" else biggest_file(manifest.parent / "d"), how)
    assert checkpoint.read_newest(tmp_path)[0] == 1
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("checkpoint 2 is damaged")
    assert said[0].endswith("using checkpoint 1")


def test_resuming_sets_a_damaged_checkpoint_aside_so_that_its_step_can_be_written_again(tmp_path, capfd):
    save(tmp_path, (1, None), (2, None))
    damage(biggest_file(tmp_path / checkpoint.FOLDER / "2" / "optimizer" / "d"), "bit")
    targets = [as_target(part) for part in tree()]
    assert checkpoint.resume(tmp_path, *targets).step == 1
    assert "checkpoint 2 is damaged" in capfd.readouterr().err
    assert checkpoint.steps(tmp_path) == [1]
    assert (tmp_path / checkpoint.FOLDER / "2.damaged").is_dir()
    save(tmp_path, (2, None))
    assert checkpoint.resume(tmp_path, *targets).step == 2


@pytest.mark.parametrize("how", ["cut", "bit", "empty"])
@pytest.mark.parametrize("step", [1, 2], ids=["older", "newest"])
def test_whatever_file_is_damaged_the_run_goes_on_with_what_was_saved(tmp_path, how, step):
    """File by file, as a run that resumes reads them; the older one is the best."""
    save(tmp_path / "whole", (1, 1.0), (2, 2.0), keep=1)
    whole, targets = tmp_path / "whole" / checkpoint.FOLDER, [as_target(part) for part in tree()]
    files = sorted(p.relative_to(whole) for p in (whole / str(step)).rglob("*") if p.is_file())
    assert {"progress/metadata", "metrics/metrics"} <= {"/".join(file.parts[1:]) for file in files}
    for number, file in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", workdir)
        damage(workdir / checkpoint.FOLDER / file, how)
        restored = checkpoint.resume(workdir, *targets)
        same((restored.params, restored.optimizer), tree())
        assert restored.iterator == {"taken": restored.step}, file
        assert restored.step == 2 or step == 2, file
        save(workdir, (3, None), keep=1)
        assert checkpoint.steps(workdir)[-1] == 3


def test_when_all_are_damaged_nothing_is_touched_and_nothing_starts_anew(tmp_path):
    save(tmp_path, (1, None), (2, None))
    for step in ("1", "2"):
        (tmp_path / checkpoint.FOLDER / step / "progress" / "metadata").write_text("{")
    for act in (
        lambda: checkpoint.resume(tmp_path, *[as_target(part) for part in tree()]),
        lambda: checkpoint.read_newest(tmp_path),
    ):
        with pytest.raises(UserError, match=r"checkpoint 2 of .* cannot be read .* nor can 1"):
            act()
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_save_cut_short_is_removed_and_said_so(tmp_path, capfd):
    save(tmp_path, (1, None))
    (tmp_path / checkpoint.FOLDER / "2.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.read_newest(tmp_path)[0] == 1
    assert checkpoint.resume(tmp_path, *[as_target(part) for part in tree()]).step == 1
    assert "checkpoint 2 was being written" in capfd.readouterr().err
    assert [p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()] == ["1"]


def test_no_checkpoint_is_a_users_error_for_those_who_need_one(tmp_path):
    assert checkpoint.resume(tmp_path, {}, {}) is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.read_newest(tmp_path)[0]
    with pytest.raises(UserError, match="there is no such folder"):
        checkpoint.read_newest(tmp_path / "absent")[0]
    save(tmp_path, (3, None))
    with pytest.raises(UserError, match=r"no checkpoint of step 4; it has \[3\]"):
        checkpoint.load_for_serving(tmp_path, "4")


def test_fingerprints_do_not_depend_on_the_sharding_or_the_machine():
    plain = tree()[0] | {"half": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)}
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    expected = fingerprints(plain)
    assert host_fingerprints(jax.tree.map(np.asarray, plain)) == expected
    for spec in (P(), P("a"), P(("a", "b")), P("b")):
        assert fingerprints({"w": jax.device_put(plain["w"], NamedSharding(mesh, spec))})["w"] == expected["w"]


def test_fingerprints_see_a_bit_and_a_swap():
    x = np.arange(12, dtype=np.float32)
    swapped, flipped = x.copy(), x.copy()
    swapped[[3, 8]] = swapped[[8, 3]]
    flipped.view(np.uint32)[5] ^= 1
    saved = host_fingerprints({"x": x})
    compare(host_fingerprints({"x": x.copy()}), saved)
    for other in ({"x": swapped}, {"x": flipped}, {"x": -x}, {"y": x}, {}):
        with pytest.raises(ValueError, match="is not what was saved"):
            compare(host_fingerprints(other), saved)


def test_a_seal_shows_every_wrong_bit_that_changes_what_is_said():
    said = {"format": 4, "iterator": {"examples": 6400, "of": [1.5e-05, None, "a"]}, "loss": float("inf")}
    text = json.dumps(storage.seal(said)).encode()
    assert storage.unseal(json.loads(text), "it") == said
    seen = 0
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = json.loads(flipped)
        except ValueError:
            continue
        if found != json.loads(text):
            seen += 1
            with pytest.raises(storage.Damaged, match="it is not what was saved"):
                storage.unseal(found, "it")
    assert seen > 100


def test_progress_is_plain_json_that_names_the_config(tmp_path):
    save(tmp_path, (1, None))
    progress = json.loads((tmp_path / checkpoint.FOLDER / "1" / "progress" / "metadata").read_text())
    assert progress["config"] == dataclasses.asdict(EXPERIMENT)


@pytest.mark.parametrize("written", [{"format": checkpoint.FORMAT + 1}, {}], ids=["newer", "before there were formats"])
def test_parameters_of_another_version_are_neither_served_nor_trained_on(tmp_path, written):
    save(tmp_path, (1, None))
    path = tmp_path / checkpoint.FOLDER / "1" / "progress" / "metadata"
    progress = storage.unseal(json.loads(path.read_text()), "progress")
    assert progress.pop("format") == checkpoint.FORMAT
    path.write_text(json.dumps(storage.seal(progress | written) if written else progress))
    params, optimizer = (as_target(part) for part in tree())
    for act in (
        lambda: checkpoint.resume(tmp_path, {"of another shape": params["w"]}, optimizer),
        lambda: checkpoint.resume(tmp_path, params, optimizer),
        lambda: checkpoint.load_for_serving(tmp_path),
    ):
        with pytest.raises(UserError, match=rf"has format {written.get('format', 1)}, .* reads {checkpoint.FORMAT}"):
            act()
    assert checkpoint.steps(tmp_path) == [1]


def test_an_export_is_no_workdir(tmp_path):
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="is an export, or what is left of one"):
        checkpoint.read_newest(tmp_path)[0]
