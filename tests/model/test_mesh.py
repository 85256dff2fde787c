"""Every mesh computes the same thing: loss, metrics and every gradient equal the one-device run."""

import itertools
import re
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from tmljax import config
from tmljax.model.interaction import Definition, recalled_of
from tmljax.plan import hlo
from tmljax.sharding import AXES, batch_sharding, make_mesh, param_shardings
from tmljax.stream.microturn import ABSENT
from tmljax.train import objective as objectives
from tmljax.train.objective import objective

STREAM = config.Stream(video_every=2, vocab_size=320)
MOE = config.Moe(experts=8, top_k=2, expert_width=16, shared_width=16, block_rows=8)
MODEL = config.Model(
    d_model=32, layers=2, heads=8, kv_heads=8, head_dim=4, window=5, moe=MOE, flow=config.Flow(width=16, depth=1)
)
B, T = 8, 16  # micro-turns enough for a window to reach over three of eight shards

ALONE = [{axis: 8} for axis in AXES]
PAIRS = [{a: 2, b: 4} if a == "data" else {a: 4, b: 2} for a, b in itertools.combinations(AXES, 2)]
TRIPLES = [  # every pair is in one of them
    dict.fromkeys(axes, 2)
    for axes in (("data", "fsdp", "expert"), ("data", "context", "tensor"),
                 ("fsdp", "context", "tensor"), ("expert", "context", "tensor"))
]  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return scatter(Definition(STREAM, MODEL))


def scatter(definition):
    """Random everywhere, zero-initialised layers and biases included: no path may hide behind a zero."""
    leaves, tree = jax.tree.flatten(definition.init(jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.fixture(scope="module")
def batch():
    """In which words heard and seen bring something back, from other shards of `context` too."""
    rng = np.random.default_rng(0)
    typed = rng.integers(1, 9, (B, T, 1), dtype=np.int32)
    return {
        "user_dmel": rng.integers(0, 16, (B, T, 8, 80), dtype=np.uint8),
        "user_present": rng.random((B, T)) < 0.8,
        "video": rng.integers(0, 256, (B, T // 2, 1, 4800), dtype=np.uint8),
        "video_present": rng.random((B, T // 2)) < 0.5,
        "user_text": np.where(rng.random((B, T, 1)) < 0.5, typed, ABSENT).astype(np.int32),
        "model_text": rng.integers(1, 8, (B, T, 1), dtype=np.int32),
        "model_mel": rng.uniform(-7, 2, (B, T, 8, 80)).astype(np.float16),
        "heard": rng.integers(1, 9, (B, T), dtype=np.int32),
        "seen": rng.integers(0, 9, (B, T // 2, 2), dtype=np.int32),
        "valid": np.arange(T)[None] < rng.integers(T // 2, T + 1, B)[:, None],
        "start": rng.integers(0, 50, B, dtype=np.int32) * 2,
    }


def test_notes_bring_back_words_of_other_shards(batch):
    near, all_of_it = (recalled_of(batch, window) != ABSENT for window in (T // 8, MODEL.window))
    assert (near.sum(axis=(0, 1)) < all_of_it.sum(axis=(0, 1))).all()


def run(params, batch, mesh=None, model=MODEL):
    """(loss, metrics, routing, gradients), as the training step has them."""
    step, params, batch = prepare(params, batch, mesh, model)
    (loss, (metrics, routing)), grads = step(params, batch=batch, key=jax.random.key(3))
    return jax.tree.map(np.asarray, (loss, metrics, routing, grads))


def prepare(params, batch, mesh=None, model=MODEL):
    """(the step, params and batch in their places)."""
    definition = Definition(STREAM, model)
    if mesh is not None:
        params = jax.device_put(params, param_shardings(mesh, definition.axes(), definition.abstract()))
        batch = jax.device_put(batch, batch_sharding(mesh))
    step = jax.value_and_grad(partial(objective, definition, weights=config.Loss(), mesh=mesh), has_aux=True)
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0}), params, batch


@pytest.fixture(scope="module")
def alone(params, batch):
    return run(params, batch)


def errors(there, here):
    """Of each array, the largest difference against its largest value; where all is zero, all must be."""
    tell = lambda a, b: float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30))  # noqa: E731
    flat = jax.tree_util.tree_leaves_with_path(jax.tree.map(tell, there, here))
    return {jax.tree_util.keystr(path): error for path, error in flat}


def assert_equal(there, here, within=1e-5):
    wrong = {path: error for path, error in errors(there, here).items() if not error <= within}
    assert not wrong


def mesh_of(sizes):
    return make_mesh(config.Mesh(**{"data": 1} | sizes))


@pytest.mark.parametrize("sizes", [*ALONE, *TRIPLES], ids=str)
def test_mesh_parity(params, batch, alone, sizes):
    assert_equal(run(params, batch, mesh_of(sizes)), alone)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", PAIRS, ids=str)
def test_mesh_parity_in_pairs(params, batch, alone, sizes):
    assert_equal(run(params, batch, mesh_of(sizes)), alone)


def test_more_tensor_members_than_kv_heads(batch):
    model = replace(MODEL, kv_heads=2)
    params = scatter(Definition(STREAM, model))
    there = run(params, batch, mesh_of({"tensor": 4, "context": 2}), model)
    assert_equal(there, run(params, batch, None, model))


def test_each_pair_of_axes_is_in_a_triple():
    assert all(any(set(pair) <= set(triple) for triple in TRIPLES) for pair in itertools.combinations(AXES, 2))


def test_a_wrong_gradient_would_be_seen(alone):
    """The measure above, on a run that differs in one parameter's gradient by the sixth digit."""
    loss, metrics, routing, grads = alone
    bent = jax.tree.map(np.copy, grads)
    bent["trunk"]["norm"][3] += 3e-5 * np.abs(bent["trunk"]["norm"]).max()
    with pytest.raises(AssertionError, match="norm"):
        assert_equal((loss, metrics, routing, bent), alone)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputation_changes_nothing(params, batch, alone, remat):
    there = run(params, batch, mesh_of({"fsdp": 2, "expert": 2, "context": 2}), replace(MODEL, remat=remat))
    assert_equal(there, alone)


@pytest.mark.parametrize("moe", [{"matmul": "ragged"}, {"exchange": "gathered", "matmul": "ragged"}], ids=str)
def test_other_matmuls_and_exchanges_in_the_whole_model(params, batch, alone, moe):
    model = replace(MODEL, moe=replace(MOE, **moe))
    assert_equal(run(params, batch, mesh_of({"expert": 4, "context": 2}), model), alone)


def test_bfloat16_stays_near_float32(params, batch, alone):
    """Close in direction, leaf by leaf; some positions choose other experts, where two are nearly as good."""
    loss, metrics, _, grads = run(params, batch, mesh_of({"fsdp": 2, "expert": 4}), replace(MODEL, dtype="bfloat16"))
    assert loss == pytest.approx(alone[0], rel=0.02)
    assert metrics["loss/flow"] == pytest.approx(alone[1]["loss/flow"], rel=0.02)
    cosine = lambda a, b: float(np.vdot(a, b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))  # noqa: E731
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(alone[3]), strict=True)
    cosines = [cosine(a, b) for a, b in pairs if np.any(b)]
    assert min(cosines) > 0.95
    assert loss != alone[0]


def test_padding_and_unseen_positions_have_no_say_in_the_load(params, batch, alone):
    """What lies behind the end of a session, or in a slot that holds nothing and predicts nothing, is as good as not
    there: other sounds in it change no load and no gradient."""
    rng = np.random.default_rng(1)
    other = {name: array.copy() for name, array in batch.items()}
    other["user_dmel"][~batch["valid"]] = rng.integers(0, 16, (np.sum(~batch["valid"]), 8, 80))
    other["video"][~batch["video_present"]] = rng.integers(0, 256, other["video"].shape[2:])
    there = run(params, other)
    assert_equal(there, alone)
    load_LE = there[2].load_LE
    np.testing.assert_allclose(load_LE.sum(axis=1), 1, rtol=1e-6)
    assert there[2].dropped == 0


def test_a_session_half_as_long_gives_the_load_of_its_half(params, batch, monkeypatch):
    """The load of a batch whose second half is padding is that of the first half alone."""
    half = {n: a[:, : a.shape[1] // 2] if a.ndim > 1 else a for n, a in batch.items()} | {
        "valid": np.ones((B, T // 2), bool)
    }
    whole = batch | {"valid": np.arange(T)[None] < np.full((B, 1), T // 2)}
    # drawn noise depends on the length
    monkeypatch.setattr(objectives, "MISHEARD", 0.0)
    clear = replace(MODEL, flow=replace(MODEL.flow, feedback_noise=0.0))
    loads = [run(params, b, model=clear)[2].load_LE for b in (half, whole)]
    np.testing.assert_allclose(loads[1], loads[0], rtol=1e-6)


def test_copies_of_the_model_gather_no_activations_from_each_other(params, batch):
    """Between them there may be the slowest network, for which the sums of gradients are enough. XLA:CPU has its own
    `top_k`, which takes all rows at once."""
    mesh = make_mesh(config.Mesh(data=2, fsdp=2, expert=2))
    step, params, batch = prepare(params, batch, mesh)
    text = step.lower(params, batch=batch, key=jax.random.key(3)).compile().as_text()
    gathers = re.findall(r" = b?f\d+\[.* all-gather(?:-start)?\((.*)", text)
    axes = [hlo.axis_of(hlo.first_group(attributes), mesh.shape) for attributes in gathers if "top_k" not in attributes]
    assert "fsdp+expert" in axes  # weights are
    assert not [axis for axis in axes if "data" in axis]
