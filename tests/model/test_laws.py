"""The laws of the stream contract: causality, streaming equals teacher forcing, isolation."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmljax import config
from tmljax.decode.tick import Forced, TickInput, init_state, tick
from tmljax.model.interaction import Definition, Outputs, notes_of, quantise, recalled_of
from tmljax.ops.flow import normalise
from tmljax.stream import dmel
from tmljax.stream.microturn import ABSENT, HOLD, IDLE

STREAM = config.Stream(
    frames_per_slot=4,
    video_height=80,
    patches_per_slot=2,
    video_every=2,
    user_text_slots=2,
    model_text_slots=2,
    vocab_size=320,
)
MODEL = config.Model(
    d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, window=5,
    moe=config.Moe(experts=4, top_k=2, expert_width=16, shared_width=16, block_rows=8),
    flow=config.Flow(width=16, depth=1),
)  # fmt: skip
DEFINITION = Definition(STREAM, MODEL)
T = 18  # more than three windows: the ring wraps, and the training forward takes more than one block of queries


@pytest.fixture(scope="module")
def params():
    return random_params(DEFINITION)


def random_params(definition: Definition) -> dict:
    """Random everywhere, zero-initialised layers and biases included: no path may hide behind a zero."""
    leaves, tree = jax.tree.flatten(definition.init(jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.fixture(scope="module")
def batch():
    return random_batch(2)


def random_batch(B: int) -> dict:
    rng, layout = np.random.default_rng(0), DEFINITION.layout
    integers = partial(rng.integers, dtype=np.int32)
    text_BTS = integers(1, 24, (B, T, 2))  # few words, so that what is heard brings back what was said
    return {
        "user_dmel": rng.integers(0, 16, (B, T, 8, 80), dtype=np.uint8),
        "user_present": rng.random((B, T)) < 0.8,
        "video": rng.integers(0, 256, (B, T // 2, layout.patches, 4800), dtype=np.uint8),
        "video_present": (rng.random((B, T // 2)) < 0.6) | (np.arange(T // 2) % 2 == 1)[None],
        "user_text": integers(0, 320, (B, T, 2)) * (rng.random((B, T, 2)) < 0.5).astype(np.int32),
        "model_text": text_BTS,
        "model_mel": rng.uniform(-7, 2, (B, T, 8, 80)).astype(np.float16),
        "heard": integers(1, 24, (B, T)),
        "seen": show_what_was_said(text_BTS, integers(0, 320, (B, T // 2, 2))),
        "valid": np.ones((B, T), bool),
        "start": np.array([0] * B, np.int32),
    }


def show_what_was_said(text_BTS: np.ndarray, seen_BNW: np.ndarray) -> np.ndarray:
    """Every second frame shows two words that the model said one after the other, in either order, some of them longer
    ago than a window."""
    (B, _, S), every = text_BTS.shape, STREAM.video_every
    seen_BNW = seen_BNW.copy()
    for n in range(1, seen_BNW.shape[1], 2):
        turn = every * n - (1, 2, 8, 3)[n // 2 % 4]
        last = S * (turn + 1) - 1
        pair_BW = text_BTS.reshape(B, -1)[:, last - 1 : last + 1]
        seen_BNW[:, n] = pair_BW if n % 4 == 1 else pair_BW[:, ::-1]
    return seen_BNW


def inputs_at(batch: dict, t: int, reset: bool) -> TickInput:
    B, frame = len(batch["start"]), t // STREAM.video_every
    due = t % STREAM.video_every == 0
    return TickInput(
        batch["user_dmel"][:, t], batch["user_present"][:, t], batch["video"][:, frame],
        batch["video_present"][:, frame] & due, batch["user_text"][:, t],
        np.full(B, reset), np.arange(B, dtype=np.uint32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_tick():
    return jax.jit(partial(tick, DEFINITION, sampling=config.Sampling()))


@pytest.fixture(scope="module")
def decided(params):
    """`params` with a notes head that is sure of itself now and then."""
    return params | {"notes_head": jax.tree.map(lambda w: 8 * w, params["notes_head"])}


def test_streaming_equals_teacher_forcing(decided, batch, run_tick):
    whole = jax.jit(lambda p, b: DEFINITION.bind(p)(b))(decided, batch)
    state, note_BTK, noted = init_state(DEFINITION, 2), notes_of(batch), []
    for t in range(T):
        forced = Forced(batch["model_text"][:, t], batch["model_mel"][:, t].astype(np.float32), note_BTK[:, t])
        state, out = run_tick(decided, state, inputs_at(batch, t, t == 0), forced=forced)
        np.testing.assert_allclose(out.text_logits, whole.text_BTSV[:, t], atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(out.audio_condition, whole.condition_BTSD[:, t], atol=2e-4, rtol=1e-4)
        noted.append(expect_notes(whole, batch, t))
        np.testing.assert_array_equal(out.notes, noted[-1])
    heard_BT, seen_BTW = np.split(np.stack(noted, axis=1), [1], axis=2)
    assert 0 < np.sum(heard_BT != ABSENT) < heard_BT.size
    for notes in (slice(1), slice(1, None)):  # the word heard, those seen
        recalled_BTK, of_all_BTK = (recalled_of(batch, window)[..., notes] for window in (MODEL.window, T))
        assert 0 < np.sum(recalled_BTK != ABSENT) < np.sum(of_all_BTK != ABSENT) < of_all_BTK.size
    assert set(np.sum(seen_BTW != ABSENT, axis=2).ravel().tolist()) == {0, 1, 2}


@pytest.mark.parametrize(("frames_per_slot", "texts"), [(8, 1), (8, 2), (4, 1), (2, 2)])
def test_streaming_equals_teacher_forcing_in_every_layout(batch, frames_per_slot, texts):
    """The last word enters the ring with the next speech slot of its micro-turn, or with the next micro-turn."""
    definition = Definition(replace(STREAM, frames_per_slot=frames_per_slot, model_text_slots=texts), MODEL)
    text_BTS = batch["model_text"][:, :, :texts]
    batch = batch | {"model_text": text_BTS, "seen": show_what_was_said(text_BTS, batch["seen"])}
    assert all((recalled_of(batch, MODEL.window) != ABSENT).any(axis=(0, 1)))
    params = random_params(definition)
    whole = jax.jit(lambda p, b: definition.bind(p)(b))(params, batch)
    assert whole.condition_BTSD.shape[2] == 8 // frames_per_slot
    state, run = init_state(definition, 2), jax.jit(partial(tick, definition, sampling=config.Sampling()))
    for t in range(T):
        forced = Forced(batch["model_text"][:, t], batch["model_mel"][:, t].astype(np.float32), notes_of(batch)[:, t])
        state, out = run(params, state, inputs_at(batch, t, t == 0), forced=forced)
        np.testing.assert_allclose(out.text_logits, whole.text_BTSV[:, t], atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(out.audio_condition, whole.condition_BTSD[:, t], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("texts", [1, 2])
def test_speech_depends_on_the_word_just_written(batch, texts):
    """The last token, which has not passed the trunk, decides what its own micro-turn sounds like, nothing before."""
    definition, t = Definition(replace(STREAM, model_text_slots=texts), MODEL), 8
    one = batch | {"model_text": batch["model_text"][:, :, :texts]}
    other = one | {"model_text": one["model_text"].copy()}
    other["model_text"][:, t, -1] = 5 + (one["model_text"][:, t, -1] == 5)
    params = random_params(definition)
    a, b = (jax.jit(lambda p, x: definition.bind(p)(x))(params, x) for x in (one, other))
    assert np.abs(a.condition_BTSD[:, t] - b.condition_BTSD[:, t]).max(axis=-1).min() > 1e-3
    np.testing.assert_allclose(a.condition_BTSD[:, :t], b.condition_BTSD[:, :t], atol=1e-5)
    np.testing.assert_allclose(a.text_BTSV[:, : t + 1], b.text_BTSV[:, : t + 1], atol=1e-5)


def expect_notes(whole: Outputs, batch: dict, t: int) -> list[list[int]]:
    """Plainly: tokens of a quarter of the probability or more, if the stream was there; for a frame, words alone."""
    rows, frame = [], t // STREAM.video_every
    for b, (heard_V, seen_V) in enumerate(zip(whole.heard_BTV[:, t], whole.seen_BNV[:, frame])):
        heard, seen = (np.asarray(jax.nn.softmax(x)) for x in (heard_V, seen_V))
        looks = batch["video_present"][b, frame] and t % STREAM.video_every == 0
        words = [w for w in np.argsort(-seen).tolist() if looks and seen[w] >= 0.25 and w > HOLD][:2]
        listens = batch["user_present"][b, t] and heard.max() >= 0.25
        rows.append([int(heard.argmax()) if listens else ABSENT, *words, *[ABSENT] * (2 - len(words))])
    return rows


@pytest.mark.parametrize("every", [2, 3])
def test_notes_stand_where_they_were_taken(every):
    heard, seen = np.arange(11, 17)[None], np.array([[[21, 22], [23, ABSENT], [24, 25]]])[:, : 6 // every]
    there = {"user_present": heard != 13, "video_present": seen[..., 0] != 24}
    expected = [[word, ABSENT, ABSENT] for word in (11, 12, ABSENT, 14, 15, 16)]
    expected[0][1:], expected[every][1] = [21, 22], 23
    assert notes_of({"heard": heard, "seen": seen, **there})[0].tolist() == expected


@pytest.mark.parametrize("note", ["heard", "seen"])
def test_a_note_is_read_from_the_next_micro_turn_on(params, batch, note):
    """And not before: nothing of its own micro-turn may know it, least of all what predicts it."""
    t = 8
    there = {name: np.ones_like(batch[name]) for name in ("user_present", "video_present")}
    one = batch | there
    index = t if note == "heard" else t // STREAM.video_every
    other = one | {note: one[note].copy()}
    other[note][:, index] = 5 + (one[note][:, index] == 5)
    a, b = (jax.jit(lambda p, x: DEFINITION.bind(p)(x))(params, x) for x in (one, other))
    for name in ("text_BTSV", "condition_BTSD", "heard_BTV"):
        x, y = (np.asarray(getattr(out, name)) for out in (a, b))
        np.testing.assert_allclose(x[:, : t + 1], y[:, : t + 1], atol=1e-5)
        assert np.abs(x[:, t + 1] - y[:, t + 1]).max() > 1e-3
    np.testing.assert_allclose(a.seen_BNV[:, : t // 2 + 1], b.seen_BNV[:, : t // 2 + 1], atol=1e-5)


def test_the_decoder_reads_its_own_notes(decided, batch, run_tick):
    """Left to itself it goes on as if its notes had been forced on it; and what was heard is not what was seen."""
    own = forced = init_state(DEFINITION, 2)
    for t in range(6):
        inputs = inputs_at(batch, t, t == 0)
        own, free = run_tick(decided, own, inputs)
        told = Forced(free.model_text, free.model_mel, free.notes)
        forced, out = run_tick(decided, forced, inputs, forced=told)
        np.testing.assert_allclose(out.text_logits, free.text_logits, atol=1e-4)
    words = [own._replace(note_NK=jnp.tile(jnp.array([[7, ABSENT, ABSENT]]), (2, 1)).at[:, i].set(8)) for i in (1, 2)]
    words += [own._replace(note_NK=jnp.tile(jnp.array([[8, 7, ABSENT]]), (2, 1)))]
    one, same, swapped = (np.asarray(run_tick(decided, s, inputs_at(batch, 6, False))[1].text_logits) for s in words)
    np.testing.assert_allclose(one, same, atol=1e-4)  # words of a frame have no order
    assert np.abs(one - swapped).max() > 1e-3


@pytest.mark.parametrize("notes", [[7, ABSENT, ABSENT], [ABSENT, 9, 7]], ids=["heard", "seen"])
def test_the_decoder_reads_what_a_note_brings_back(params, batch, run_tick, notes):
    """And not in a session that begins with this micro-turn."""
    state, _ = run_tick(params, init_state(DEFINITION, 2), inputs_at(batch, 0, True))
    state = state._replace(note_NK=jnp.tile(jnp.array([notes]), (2, 1)))

    def text_after(word: int, follower: int, reset: bool = False) -> np.ndarray:
        said_NX = state.said_NX.at[:, 2:4].set(jnp.array([[word, follower]]))
        _, out = run_tick(params, state._replace(said_NX=said_NX), inputs_at(batch, 1, reset))
        return np.asarray(out.text_logits)

    nothing, other, recalled, another = (text_after(*pair) for pair in ((7, IDLE), (8, 9), (7, 9), (7, 10)))
    np.testing.assert_array_equal(nothing, other)
    assert np.abs(nothing - recalled).max() > 1e-3
    if notes[0] == 7:
        assert np.abs(another - recalled).max() > 1e-3
    else:  # what follows is not there to be seen
        np.testing.assert_array_equal(another, nothing)
    np.testing.assert_array_equal(text_after(7, IDLE, reset=True), text_after(7, 9, reset=True))


def test_one_session_forgets_and_the_other_does_not(params, batch, run_tick):
    """What a session reads back is its own, from its first micro-turn on."""
    state, fresh = init_state(DEFINITION, 2), init_state(DEFINITION, 2)
    said_NX = jnp.tile(jnp.arange(7, 7 + state.said_NX.shape[1])[None], (2, 1))
    note_NK = jnp.full_like(state.note_NK, 8)
    inputs = inputs_at(batch, 0, False)._replace(reset=np.array([True, False]))
    after, out = run_tick(params, state._replace(said_NX=said_NX, note_NK=note_NK), inputs)
    clean, expected = run_tick(params, fresh, inputs)
    np.testing.assert_array_equal(out.text_logits[0], expected.text_logits[0])
    np.testing.assert_array_equal(after.said_NX[0], clean.said_NX[0])
    np.testing.assert_array_equal(after.said_NX[1, :-2], said_NX[1, 2:])


def test_a_head_that_knows_nothing_notes_nothing(params, batch, run_tick):
    ignorant = params | {"notes_head": jax.tree.map(lambda w: 0.1 * w, params["notes_head"])}
    _, out = run_tick(ignorant, init_state(DEFINITION, 2), inputs_at(batch, 0, True))
    assert (np.asarray(out.notes) == ABSENT).all()


def test_window_makes_a_difference(params, batch):
    """The law above would hold trivially if nothing beyond the window were ever forgotten."""
    wide = Definition(STREAM, replace(MODEL, window=T))
    near, far = (jax.jit(lambda p, b, d=d: d.bind(p)(b).text_BTSV)(params, batch) for d in (DEFINITION, wide))
    np.testing.assert_allclose(near[:, :3], far[:, :3], atol=1e-4)
    assert np.abs(near[:, -1] - far[:, -1]).max() > 1e-2


@pytest.mark.parametrize("kind", ["text", "speech", "heard"])
def test_causality(params, batch, kind):
    """The gradient of an output with respect to anything after its inputs is exactly zero, per stream."""
    t, layout = 16, DEFINITION.layout
    model, place_P2 = DEFINITION.bind(params), layout.positions(T)
    turn_P, slot_P = place_P2.T
    x_BPD, _ = model.weave(batch)
    at = {int(slot): int(p) for p, slot in enumerate(slot_P) if turn_P[p] == t}

    def output(x_BPD):
        there_BP = jnp.ones(x_BPD.shape[:2], bool)
        z_BPD, _ = model.trunk(x_BPD, jnp.asarray(batch["start"]), place_P2, there_BP, None)
        if kind == "speech":
            z_BD, size = z_BPD[:, at[layout.slots - 2]], len(x_BPD)
            return jnp.sum(model.flow_head.endpoint(z_BD, jnp.ones((size, 320)), jnp.full(size, 0.5)) ** 2)
        head = model.notes_head if kind == "heard" else model.text_head
        return jnp.sum(head(z_BPD[:, at[layout.inputs - 1]]) ** 2)

    last = at[layout.slots - 2 if kind == "speech" else layout.inputs - 1]
    grad_BP = np.abs(jax.jit(jax.grad(output))(x_BPD)).max(axis=-1)
    assert (grad_BP[:, last + 1 :] == 0).all()
    assert (grad_BP[:, turn_P == t][:, : last + 1 - at[0]] > 0).all()  # every slot before it is seen
    reach = MODEL.layers * (MODEL.window - 1)
    assert (grad_BP[:, turn_P < t - reach] == 0).all()
    assert (grad_BP[:, turn_P == t - reach] > 0).any()


def test_positions_leave_out_what_nothing_sees():
    """Every slot of every micro-turn is there in order, but for video between frames."""
    turn_P, slot_P = DEFINITION.layout.positions(4).T
    video = (DEFINITION.layout.user_audio + np.arange(DEFINITION.layout.user_video)).tolist()
    for t in range(4):
        expected = [s for s in range(DEFINITION.layout.slots) if t % STREAM.video_every == 0 or s not in video]
        assert slot_P[turn_P == t].tolist() == expected


def test_absent_streams_are_not_seen(params, batch):
    """Whatever lies in the arrays of an absent stream changes nothing."""
    other = dict(batch)
    other["user_dmel"] = np.where(batch["user_present"][..., None, None], batch["user_dmel"], 3)
    other["video"] = np.where(batch["video_present"][..., None, None], batch["video"], 99)
    other["heard"] = np.where(batch["user_present"], batch["heard"], 9)
    other["seen"] = np.where(batch["video_present"][..., None], batch["seen"], 9)
    run = jax.jit(lambda p, b: DEFINITION.bind(p)(b))
    for a, b in zip(run(params, batch)[:2], run(params, other)[:2]):
        np.testing.assert_array_equal(a, b)


def test_isolation_bit_for_bit(params, batch, run_tick):
    """A session says the same whatever its neighbours do, and when they start."""
    four = random_batch(4)
    lonely = jax.tree.map(lambda x: x.copy(), four)
    for name in ("user_dmel", "user_text", "video"):
        lonely[name][1:] = 0
    a, b = (converse(run_tick, params, x, late) for x, late in ((four, 0), (lonely, 3)))
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])


def converse(run_tick, params, batch, late: int):
    """Free-running ticks; sessions 1.. start anew again at micro-turn `late`. Returns session 0's text and mel."""
    state, texts, mels = init_state(DEFINITION, 4), [], []
    for t in range(T):
        inputs = inputs_at(batch, t, t == 0)
        if t == late:
            inputs = inputs._replace(reset=np.array([t == 0, True, True, True]))
        state, out = run_tick(params, state, inputs)
        texts.append(out.model_text[0])
        mels.append(out.model_mel[0])
    return np.array(texts), np.array(mels)


def test_speech_follows_the_flow(params, batch):
    """The sampled mel is a fixed point's neighbour: one Euler step ends at the predicted endpoint."""
    model = DEFINITION.bind(params)
    z = jax.random.normal(jax.random.key(0), (3, MODEL.d_model))
    noise = normalise(jax.random.normal(jax.random.key(1), (3, 320)))
    one = model.flow_head.sample(z, noise, steps=1)
    np.testing.assert_allclose(one, model.flow_head.endpoint(z, noise, jnp.zeros(3)), rtol=1e-5, atol=1e-5)


def test_the_models_own_mel_is_quantised_as_the_users():
    """The decoder's dMel bins of its own speech, and those that the host makes of sound, but on a border itself."""
    mel = np.linspace(-8, 3, 4401, dtype=np.float32)
    place = (mel.astype(np.float64) - dmel.LOG_LOW) / dmel.BIN_WIDTH
    inside = np.abs(place - np.floor(place) - 0.5) > 1e-4
    assert inside.mean() > 0.95
    np.testing.assert_array_equal(quantise(jnp.asarray(mel))[inside], dmel.quantise(mel)[inside])


def test_sampling_is_eulers_method_on_the_trained_field(params):
    """Step by step, with the network asked at each time as training asks it."""
    head, steps = DEFINITION.bind(params).flow_head, 4
    z = jax.random.normal(jax.random.key(0), (3, MODEL.d_model))
    x = noise = jax.random.normal(jax.random.key(1), (3, 320))
    for i in range(steps):
        t = i / steps
        field = (head.endpoint(z, x, jnp.full(3, t)) - x) / (1 - t)
        x = x + field / steps
    np.testing.assert_allclose(head.sample(z, noise, steps), x, rtol=1e-4, atol=1e-4)


MEANT = {
    "text": [-0.365, -0.6507, -0.3483, -0.5346],
    "heard": [0.4317, 1.2164, 0.5554, 0.9107],
    "seen": [-0.1856, -0.3109, -0.1882, -0.8317],
    "speech": [4.9099, 1.1457, -0.2862, 6.6783],
}


def test_the_same_parameters_compute_the_same(batch):
    """Or they are another model's: whoever changes it raises `checkpoint.FORMAT` and writes down what is computed."""
    rng, shapes = np.random.default_rng(0), DEFINITION.abstract()
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)
    model = DEFINITION.bind(params)
    out = model(batch, None)
    noise_BTSX = 0.3 * rng.standard_normal((*out.condition_BTSD.shape[:3], 4 * 80))
    end_BTSX = model.flow_head.endpoint(out.condition_BTSD, noise_BTSX, jnp.full(noise_BTSX.shape[:3], 0.4))
    computed = {"text": out.text_BTSV, "heard": out.heard_BTV, "seen": out.seen_BNV, "speech": end_BTSX}
    for name, value in computed.items():
        found = [float(x) for x in np.ravel(value)[:: value.size // 4][:4]]
        np.testing.assert_allclose(found, MEANT[name], atol=2e-4, err_msg=name)
