"""What the loss counts, and what the model hears of itself in training."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.test_laws import DEFINITION, random_batch
from tmljax import config
from tmljax.ops.flow import normalise
from tmljax.ops.losses import cross_entropy
from tmljax.stream import dmel
from tmljax.stream.microturn import ABSENT, HOLD, IDLE
from tmljax.train import objective
from tmljax.train.objective import among_likeliest, blur, mishear
from tmljax.train.step import accumulate

B, T = 64, 20


@pytest.fixture(scope="module")
def mel_BTFM():
    return -3.0 + 2.0 * jax.random.normal(jax.random.key(0), (B, T, 8, 80))


def test_silence_stays_silence_and_without_noise_nothing_changes(mel_BTFM):
    speaks_BT = jnp.arange(T)[None] % 3 == jnp.arange(B)[:, None] % 3
    blurred_BTFM = blur(mel_BTFM, speaks_BT, 1.0, jax.random.key(1))
    np.testing.assert_array_equal(blurred_BTFM[~speaks_BT], mel_BTFM[~speaks_BT])
    assert (jnp.abs(blurred_BTFM - mel_BTFM)[speaks_BT].max(axis=(1, 2)) > 0).all()
    np.testing.assert_allclose(blur(mel_BTFM, speaks_BT, 0.0, jax.random.key(1)), mel_BTFM, atol=1e-5)


@pytest.mark.parametrize("most", [0.5, 1.0])
def test_each_example_keeps_its_variance_and_loses_a_share_of_itself(mel_BTFM, most):
    blurred_BTFM = blur(mel_BTFM, jnp.ones((B, T), bool), most, jax.random.key(2))
    before_BX, after_BX = (np.asarray(normalise(x)).reshape(B, -1) for x in (mel_BTFM, blurred_BTFM))
    assert after_BX.var(axis=1) == pytest.approx(np.ones(B), abs=0.06)
    kept_B = np.mean(before_BX * after_BX, axis=1) ** 2  # 1 - k
    assert kept_B.min() == pytest.approx(1 - most, abs=0.1 * most)
    assert kept_B.max() == pytest.approx(1, abs=0.1 * most)
    assert np.mean(kept_B) == pytest.approx(1 - most / 2, abs=0.1 * most)


@pytest.fixture
def lose(monkeypatch):
    """Metrics of one batch with this much noise; "loss/flow" is the mean of the mel that the flow head is to learn."""
    monkeypatch.setattr(objective, "MISHEARD", 0.0)
    monkeypatch.setattr(objective, "flow_loss", lambda model, condition, mel, speaks, total, key: jnp.mean(mel))
    params, batch = DEFINITION.init(jax.random.key(1)), random_batch(2)
    batch["model_mel"] = dmel.dequantise(dmel.quantise(batch["model_mel"]))  # no value on the border of two bins

    def metrics(noise: float, key: jax.Array | None) -> dict[str, float]:
        flow = replace(DEFINITION.model.flow, feedback_noise=noise)
        model = replace(DEFINITION.model, flow=flow)
        definition = replace(DEFINITION, model=model)
        run = jax.jit(lambda p: objective.objective(definition, p, batch, key, config.Loss())[1][0])
        return {name: float(value) for name, value in run(params).items()}

    return metrics


def test_the_trunk_hears_the_blurred_mel_and_the_flow_head_learns_the_clean_one(lose):
    held_out, clean, blurred = lose(1.0, None), lose(0.0, jax.random.key(3)), lose(1.0, jax.random.key(3))
    for name in ("loss/text", "loss/heard"):
        assert clean[name] == pytest.approx(held_out[name], rel=1e-5)
        assert abs(blurred[name] - held_out[name]) > 1e-4 * held_out[name]
    assert blurred["loss/flow"] == clean["loss/flow"] == held_out["loss/flow"]


def test_so_many_words_are_misheard_as_what_another_example_hears():
    heard_BT = 10 + jnp.arange(B * T).reshape(B, T)
    misheard_BT = mishear(heard_BT, 0.2, jax.random.key(1))
    wrong_BT = misheard_BT != heard_BT
    assert wrong_BT.mean() == pytest.approx(0.2, abs=0.03)
    np.testing.assert_array_equal(misheard_BT[wrong_BT], 10 + (heard_BT[wrong_BT] - 10 - T) % (B * T))
    np.testing.assert_array_equal(mishear(heard_BT, 0.0, jax.random.key(1)), heard_BT)
    unknown_BT = jnp.where(jnp.arange(B)[:, None] % 2 == 0, ABSENT, heard_BT)
    np.testing.assert_array_equal(mishear(unknown_BT, 1.0, jax.random.key(1)), unknown_BT)


def test_what_is_misheard_is_no_target(monkeypatch):
    """The notes to learn are the true ones, whatever was read back before them: with all of it wrong, the loss is that
    of the true words given those of the other example."""
    params, batch = DEFINITION.init(jax.random.key(1)), random_batch(2)
    batch["model_mel"] = dmel.dequantise(dmel.quantise(batch["model_mel"]))
    monkeypatch.setattr(objective, "MISHEARD", 1.0)
    model = replace(DEFINITION.model, flow=replace(DEFINITION.model.flow, feedback_noise=0.0))
    quiet, key = replace(DEFINITION, model=model), jax.random.key(3)
    metrics = jax.jit(lambda p, b: objective.objective(quiet, p, b, key, config.Loss())[1][0])(params, batch)
    out = jax.jit(lambda p, b: DEFINITION.bind(p)(b))(params, batch | {"heard": batch["heard"][::-1]})
    weight_BT = np.where(batch["heard"] == IDLE, config.Loss().idle, 1.0) * batch["user_present"]
    expected = np.average(cross_entropy(out.heard_BTV, batch["heard"]), weights=weight_BT)
    assert metrics["loss/heard"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("weights", [config.Loss(), config.Loss(idle=0.1, hold=3.0)])
def test_the_head_learns_the_true_odds_whatever_silence_weighs(weights):
    """With the same logits everywhere, the loss is least where their softmax is how often each token is due."""
    often_V = {IDLE: 12, HOLD: 5, 3: 2, 4: 1}
    target_BTS = np.repeat(list(often_V), list(often_V.values())).reshape(2, 10, 1)
    log_odds_V = jnp.log(jnp.array([often_V.get(v, 1e-3) for v in range(5)]))

    def loss(logit_V):
        logit_BTSV = jnp.broadcast_to(logit_V[None, None, None], (*target_BTS.shape, 5))
        weight_BTS = objective.text_weights(5, weights)[target_BTS]
        return jnp.average(objective.text_loss(logit_BTSV, target_BTS, weights), weights=weight_BTS)

    np.testing.assert_allclose(jax.grad(loss)(log_odds_V), 0, atol=1e-3)
    assert jnp.abs(jax.grad(loss)(log_odds_V.at[IDLE].add(0.7))).max() > 0.05


def test_only_frames_that_somebody_described_teach():
    """Words of frames that are absent, or beyond the end of the session, are no target; nor is what nobody wrote."""
    params, batch = DEFINITION.init(jax.random.key(1)), random_batch(2)
    batch["valid"][:, 8:] = False
    run = jax.jit(lambda b: objective.objective(DEFINITION, params, b, None, config.Loss())[1][0]["loss/seen"])
    others = batch | {"seen": np.where(batch["video_present"][..., None], batch["seen"], 7)}
    others["seen"][:, 4:] = 7
    assert run(batch) == run(others) > 0
    assert run(batch | {"seen": np.full_like(batch["seen"], ABSENT)}) == 0


def test_micro_batches_make_the_loss_of_the_whole(monkeypatch):
    """Though one of them has all the words and the other all the frames: the mean of two means would be another."""
    monkeypatch.setattr(objective, "MISHEARD", 0.0)
    monkeypatch.setattr(objective, "matching_loss", lambda endpoint, x, noise, time: jnp.ones_like(x[..., 0]))
    model = replace(
        DEFINITION.model,
        flow=replace(DEFINITION.model.flow, feedback_noise=0.0),
        moe=replace(DEFINITION.model.moe, z_loss=0.0),  # of routing, a mean of its own over positions
    )
    definition, batch = replace(DEFINITION, model=model), random_batch(4)
    batch["model_text"][::2, 3:] = IDLE
    batch["user_present"][1::2], batch["video_present"][::2], batch["valid"][1::2, 11:] = False, False, False
    params = definition.init(jax.random.key(1))

    def lose(trained, routing, batch, key, whole=None):
        return objective.objective(definition, trained, batch, key, config.Loss(), whole=whole)

    run = jax.jit(partial(accumulate, lose), static_argnums=0)
    (whole, (metrics, *_)), grads = run(1, params, None, batch, jax.random.key(3))
    (loss, (split_metrics, *_)), split_grads = run(2, params, None, batch, jax.random.key(3))
    assert metrics["loss/flow"] == pytest.approx(1)
    assert loss == pytest.approx(float(whole), rel=1e-5)
    judged = {name for name in metrics if name.endswith("_accuracy")}
    assert len(judged) == 4
    for name in {"loss/text", "loss/heard", "loss/seen", "loss/flow"} | judged:
        assert split_metrics[name] == pytest.approx(float(metrics[name]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(split_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_words_are_found_among_the_likeliest_as_many():
    logit_SV = jnp.array([[0.1, 0.9, 0.5, 0.0]] * 2)
    assert among_likeliest(logit_SV, jnp.array([2, 1])).tolist() == [True, True]
    assert among_likeliest(logit_SV, jnp.array([1, 3])).tolist() == [True, False]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_accuracies_by_hand_and_none_where_there_is_nothing_to_judge(micro_batches):
    params, batch = DEFINITION.init(jax.random.key(1)), random_batch(4)
    batch["heard"][1:] = ABSENT  # one micro-batch hears no word at all
    batch["seen"][:] = ABSENT

    def lose(trained, routing, batch, key, whole=None):
        return objective.objective(DEFINITION, trained, batch, None, config.Loss(), whole=whole)

    predict = jax.jit(lambda p, b: jnp.argmax(DEFINITION.bind(p)(b).heard_BTV, axis=-1))
    batch["user_present"][0, -1] = batch["valid"][0, -1] = True
    batch["heard"][0, -1] = predict(params, batch)[0, -1]  # which it does not see
    word_BT = (batch["heard"] > ABSENT) & (batch["heard"] != IDLE) & batch["user_present"] & batch["valid"]
    found_BT = (predict(params, batch) == batch["heard"]) & word_BT
    assert not word_BT[1:].any()
    assert 0 < found_BT.sum() < word_BT.sum()

    run = jax.jit(partial(accumulate, lose, micro_batches))
    (_, (metrics, *_)), _ = run(params, None, batch, jax.random.key(3))
    assert float(metrics["heard/word_accuracy"]) == pytest.approx(found_BT.sum() / word_BT.sum())
    assert np.isnan(metrics["seen/word_accuracy"])
    assert metrics["loss/seen"] == 0
