"""The host driver: what reaches the tick, what comes back, and that neighbours do not matter."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

from tmljax import config
from tmljax.decode.engine import Engine
from tmljax.decode.program import engine_from_params, weights_of
from tmljax.decode.session import Chunk, Live, SessionInput, converse, microturns
from tmljax.model.interaction import Definition, Params
from tmljax.stream import dmel
from tmljax.stream.microturn import HOLD, IDLE, MICROTURN_SAMPLES, Layout, output_seconds
from tmljax.stream.record import Session, Word
from tmljax.stream.text import Tokenizer
from tmljax.stream.weave import weave

STREAM = config.Stream(user_text_slots=2, video_every=2, vocab_size=320)
MODEL = config.Model(
    d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, window=4,
    moe=config.Moe(experts=4, top_k=2, expert_width=16, shared_width=16),
    flow=config.Flow(width=16, depth=1, steps=2),
)  # fmt: skip
EXPERIMENT = config.Experiment(stream=STREAM, model=MODEL, sampling=config.Sampling(temperature=1.0))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" what is three plus four and five"] * 4, STREAM.vocab_size)


class CountingVocoder:
    """Push t (from 1) returns t everywhere: placement in time becomes visible."""

    latency_samples = 0

    def stream(self):
        return itertools.count(1)

    def push(self, streams, mel_NFM):
        return np.stack([np.full(MICROTURN_SAMPLES, next(stream), np.float32) for stream in streams])


class ScriptedEngine:
    """A tick that writes down its inputs and says `script[t]` in micro-turn t of each session."""

    def __init__(self, tokenizer, sessions=1, script=(), heard=()):
        self.calls, self.script, self.heard = [], script, heard
        self.engine = Engine(
            EXPERIMENT, tokenizer, CountingVocoder(), sessions, lambda: np.zeros(sessions, int), self.tick
        )

    def tick(self, time_N, inputs):
        self.calls.append({name: array.copy() for name, array in inputs.items()})
        time_N = np.where(inputs["reset"], 0, time_N)
        say = lambda script, t: script[t] if t < len(script) else IDLE  # noqa: E731
        outputs = {
            "model_text": np.array([[say(self.script, t)] for t in time_N], np.int32),
            "model_mel": np.tile(dmel.SILENCE_MEL, (len(time_N), 8, 1)),
            "heard": np.array([say(self.heard, t) for t in time_N], np.int32),
        }
        return time_N + 1, outputs


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=samples).astype(np.float32) * 0.1


def test_the_tick_gets_what_training_gets(tokenizer):
    """Fed 200 ms at a time, a session reaches the tick exactly as `weave` lays it out from the whole."""
    audio = noise(16000 * 2 + 777)
    T = -(-len(audio) // MICROTURN_SAMPLES)
    typed = [Word("three plus four", 0.45, 0.45), Word("five", 0.5, 0.5), Word("and", 1.9, 1.9)]
    video = np.random.default_rng(1).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    scripted = ScriptedEngine(tokenizer)
    converse(scripted.engine, [SessionInput(audio, typed, video)], [0])
    assert len(scripted.calls) == T

    whole_dmel = dmel.quantise(dmel.log_mel(dmel.pad_to_frames(audio, 8))[0])
    session = Session("s", "f", T * 8, whole_dmel, None, typed=tuple(typed), video=video)
    expected = weave(session, Layout(STREAM), tokenizer)
    for t, call in enumerate(scripted.calls):
        for name in ("user_dmel", "user_present", "user_text"):
            np.testing.assert_array_equal(call[name][0], expected[name][t], err_msg=f"{name} of micro-turn {t}")
        shown = t % 2 == 0 and expected["video_present"][t // 2]
        assert call["video_present"][0] == shown
        if shown:
            np.testing.assert_array_equal(call["video"][0], expected["video"][t // 2])
    assert sum(call["user_text"].astype(bool).sum() for call in scripted.calls) > 4  # the queue was used


def test_absent_streams_are_absent(tokenizer):
    scripted = ScriptedEngine(tokenizer)
    (transcript,) = converse(scripted.engine, [SessionInput(seconds=1.0)], [0])
    assert len(scripted.calls) == 5
    assert len(transcript.audio) == 16000
    for call in scripted.calls:
        assert not call["user_present"].any()
        assert not call["video_present"].any()
        assert not call["user_text"].any()


@pytest.mark.parametrize("samples", [1, 100, 3200, 3201, 16000 * 2 + 77])
def test_output_is_as_long_as_input_and_one_microturn_late(tokenizer, samples):
    (transcript,) = converse(ScriptedEngine(tokenizer).engine, [SessionInput(noise(samples))], [0])
    wall_microturn = np.arange(samples) // MICROTURN_SAMPLES
    np.testing.assert_array_equal(transcript.audio, wall_microturn.astype(np.float32))
    assert len(transcript.text) == len(transcript.tick_ms) == len(transcript.vocoder_ms) == -(-samples // 3200)


def test_silence_follows_audio_that_ends_early(tokenizer):
    scripted = ScriptedEngine(tokenizer)
    audio = noise(4000)
    (transcript,) = converse(scripted.engine, [SessionInput(audio, seconds=1.0)], [0])
    whole = dmel.quantise(dmel.log_mel(np.pad(audio, (0, 12000)))[0]).reshape(5, 8, 80)
    np.testing.assert_array_equal(np.stack([call["user_dmel"][0] for call in scripted.calls]), whole)
    assert len(transcript.audio) == 16000


def test_slots_are_reset_for_each_session(tokenizer):
    scripted = ScriptedEngine(tokenizer, sessions=2)
    lengths, progress = [5, 1, 3, 2], []
    inputs = [SessionInput(seconds=0.2 * n) for n in lengths]
    transcripts = converse(scripted.engine, inputs, [10, 11, 12, 13], progress.append)
    assert [len(t.text) for t in transcripts] == lengths
    assert sum(progress) == microturns(inputs) == sum(lengths)
    assert len(scripted.calls) == 6  # 5+1 and 3+2 side by side: no slot waits while a session does
    seeds = [int(call["seed"][n]) for call in scripted.calls for n in range(2) if call["reset"][n]]
    assert sorted(seeds) == [0, 10, 11, 12, 13]  # 0: the slot that ran empty, reset at every tick


def test_words_are_on_the_wall_clock(tokenizer):
    four, three = tokenizer.encode_word("four"), tokenizer.encode_word("three")
    assert len(four) == len(three) == 1
    script = [IDLE, IDLE, *four, HOLD, *three, IDLE, IDLE, IDLE, IDLE, *four]
    scripted = ScriptedEngine(tokenizer, script=script, heard=[IDLE, *three, IDLE])
    (transcript,) = converse(scripted.engine, [SessionInput(seconds=2.0)], [0])
    (first, second) = transcript.words  # the last word would be heard after the end
    assert first == Word("four", output_seconds(2), output_seconds(4))
    assert second == Word("three", output_seconds(4), output_seconds(5))
    (heard,) = transcript.heard
    assert heard.text == "three"
    assert (heard.start, heard.end) == pytest.approx((0.2, 0.4))


def test_live_keeps_a_frame_until_the_model_looks(tokenizer):
    scripted = ScriptedEngine(tokenizer, sessions=2)
    live = Live(scripted.engine)
    slot = live.open(seed=3)
    frame = np.full((40, 40, 3), 7, np.uint8)
    live.push(slot, Chunk())
    live.push(slot, Chunk(frame=frame))  # micro-turn 1 takes no video
    spoken = live.push(slot, Chunk())
    assert [bool(call["video_present"][slot]) for call in scripted.calls] == [False, False, True]
    assert (scripted.calls[2]["video"][slot] == 7).all()
    assert spoken.audio.shape == (MICROTURN_SAMPLES,)
    assert spoken.mel.shape == (8, 80)


def test_live_refuses_what_it_cannot_do(tokenizer):
    live = Live(ScriptedEngine(tokenizer, sessions=2).engine)
    first, second = live.open(), live.open()
    with pytest.raises(RuntimeError, match="all 2 slots"):
        live.open()
    with pytest.raises(ValueError, match="every session"):
        live.push(first, Chunk())
    with pytest.raises(ValueError, match="3200"):
        live.step({first: Chunk(noise(100)), second: Chunk()})
    live.close(second)
    live.push(first, Chunk(noise(3200)))
    assert live.open() == second


def test_a_chunk_that_is_refused_costs_no_session_anything(tokenizer):
    """Neither its neighbours nor itself: what the next tick gets is what it would have got."""
    made = []
    for refused in (False, True):
        script = ScriptedEngine(tokenizer, sessions=2)
        live = Live(script.engine)
        first, second = live.open(), live.open()
        frame, typed = np.full((40, 40, 3), 9, np.uint8), [5, 6]
        good = {first: Chunk(noise(3200), typed=typed, frame=frame), second: Chunk(noise(3200, 1))}
        for _ in range(2):
            if refused:
                with pytest.raises(ValueError, match="3200"):
                    live.step(good | {second: Chunk(noise(100))})
            live.step(good)
        made.append(script.calls)
    for plain, disturbed in zip(*made, strict=True):
        for name in plain:
            np.testing.assert_array_equal(plain[name], disturbed[name], err_msg=name)


@pytest.fixture(scope="module")
def params() -> Params:
    """Random everywhere: no path hides behind a zero."""
    rng = np.random.default_rng(1)
    shapes = Definition(STREAM, MODEL).abstract()
    return jax.tree.map(lambda leaf: rng.normal(0.3, 0.3, leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture(scope="module")
def engine(tokenizer, params) -> Engine:
    """Three slots of a real tick."""
    return engine_from_params(EXPERIMENT, tokenizer, params, sessions=3)


def assert_same(one, other):
    for name in ("text", "heard_ids", "mel", "audio"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_isolation_bit_for_bit(engine):
    """The same session alone, among others, in another slot, and in a slot that others used before."""
    video = np.random.default_rng(5).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
    me = SessionInput(noise(16000 * 2, 1), [Word("three", 0.5, 0.5)], video)
    (alone,) = converse(engine, [me], [7])
    longer = [SessionInput(noise(16000 * 3 + 50 * i, 10 + i)) for i in range(2)]
    beside = converse(engine, [*longer, me], [1, 2, 7])[2]  # longest first: slot 2
    assert_same(alone, beside)
    after = converse(engine, [SessionInput(noise(16000 * 3, 20 + i)) for i in range(5)] + [me], [3, 4, 5, 6, 8, 7])[5]
    assert_same(alone, after)


def test_seed_and_input_matter(engine):
    me = SessionInput(noise(16000, 1))
    (first,) = converse(engine, [me], [7])
    (again,) = converse(engine, [me], [7])
    assert_same(first, again)
    (other_seed,) = converse(engine, [me], [8])
    (other_input,) = converse(engine, [replace(me, audio=noise(16000, 2))], [7])
    assert (first.mel != other_seed.mel).any()
    assert (first.text != other_seed.text).any()
    assert (first.mel != other_input.mel).any()


def test_a_tick_holds_matrices_in_the_dtype_of_activations(tokenizer, params, monkeypatch):
    """And so says what one says that holds them in float32."""
    half = replace(EXPERIMENT, model=replace(MODEL, dtype="bfloat16"))
    me = SessionInput(noise(16000, 1))
    (said,) = converse(engine_from_params(half, tokenizer, params), [me], [7])
    weights = weights_of(params, Definition(STREAM, half.model))
    dtypes = {name.split("trunk.blocks.0.")[-1]: weight.dtype.name for name, weight in weights.items()}
    matrices = (
        "attention.q",
        "attention.out",
        "experts.down",
        "experts.shared_up",
        "text_head.unembed",
        "patches.last",
    )
    for name in matrices:
        assert dtypes[name] == "bfloat16"
    for name in ("attention.norm", "experts.router", "tokens", "flow_head.enter"):  # work in float32
        assert dtypes[name] == "float32"

    monkeypatch.setattr(Definition, "held", Definition.abstract)
    (plain,) = converse(engine_from_params(half, tokenizer, params), [me], [7])
    assert (said.text > 2).any()
    assert_same(said, plain)
