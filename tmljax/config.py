"""Every knob of an experiment, as frozen dataclasses.

Config files are `ml_collections` ConfigDicts, because that is what JAX research code uses and what
`--config.a.b=value` edits. They become an `Experiment` once, at the boundary (`from_config_dict`), and
from there on a typo or a wrong type cannot exist: both are errors that name the field and the nearest
right one.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_collections


class UserError(ValueError):
    """A mistake that the user can mend. The verbs print it as one line and exit 2."""


@dataclass(frozen=True)
class Stream:
    """The shape of a micro-turn; `tmljax.stream.microturn.Layout` derives everything else from it."""

    frames_per_slot: int = 8  # dMel frames packed into one audio slot, a divisor of 8
    video_height: int = 40  # pixels, a multiple of 40
    video_width: int = 40
    patches_per_slot: int = 1  # 40x40 patches packed into one video slot
    video_every: int = 2  # micro-turns between frames
    user_text_slots: int = 1  # tokens of typed text a micro-turn takes
    model_text_slots: int = 1  # tokens a micro-turn writes
    vocab_size: int = 1024


@dataclass(frozen=True)
class Moe:
    """Routed experts beside at most one shared expert (DeepSeekMoE, arXiv 2401.06066)."""

    experts: int = 8
    top_k: int = 2
    expert_width: int = 128
    shared_width: int = 384  # 0: no shared expert
    exchange: Literal["padded", "ragged", "gathered"] = "padded"  # between devices; ragged: TPU and GPU only
    capacity_factor: float | None = None  # room in the exchange against a balanced load; None: dropless
    # Of the experts in training; blocks: CPUs, ragged: as XLA does it, grouped: TPUs, hopper: NVIDIA H100 and H200.
    matmul: Literal["blocks", "ragged", "grouped", "hopper"] = "blocks"
    tick_matmul: Literal["every", "gathered"] = "every"  # of the experts for the few tokens of a tick
    block_rows: int = 256  # rows of a block of "blocks"
    balance_rate: float = 1e-3  # step of the routing bias (loss-free balancing, arXiv 2408.15664)
    z_loss: float = 1e-4


@dataclass(frozen=True)
class Flow:
    """The flow head (facts: MAR-type MLP, conditional flow matching)."""

    width: int = 256
    depth: int = 3
    draws: int = 1  # (noise, time) draws per target in training
    share: float = 0.5  # of an example's micro-turns, those trained on in a step (speaking ones, at random)
    feedback_noise: float = 1.0  # most noise, in variance, on the model's own speech that training feeds back
    steps: int = 4  # Euler steps per micro-turn when streaming
    temperature: float = 0.7  # noise variance when streaming


@dataclass(frozen=True)
class Model:
    d_model: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    window: int = 64  # micro-turns that attention looks back, this one included
    attention: Literal["blocks", "splash"] = "blocks"  # in training; splash: TPUs
    moe: Moe = field(default_factory=Moe)
    flow: Flow = field(default_factory=Flow)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32 in training
    remat: Literal["none", "dots", "full"] = "none"


@dataclass(frozen=True)
class Data:
    """What is generated or imported, and how windows are cut from it."""

    root: str = "data"  # folder of prepared datasets
    name: str = "duplex"  # the prepared dataset is root/name
    seed: int = 0
    train_hours: float = 2.0  # of rendered conversation
    test_per_family: int = 48  # test sessions of each scenario family
    mixture: Mapping[str, float] = field(default_factory=dict)  # family -> weight; empty: the default mixture
    recordings: str = ""  # moshi-finetune manifest(s) "a.jsonl:0.5,b.jsonl:1"; "" for none
    tokenizer: str = ""  # tokenizer.json; "" for one trained on the words of this data
    window: int = 60  # micro-turns in a training example
    batch: int = 32  # examples a step, over all processes
    workers: int = 0  # grain worker processes; 0 reads in threads


@dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "muon"] = "muon"
    learning_rate: float = 3e-3
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: int = 100  # steps
    decay: float = 0.4  # share of the steps spent decaying (wsd)
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.95
    clip: float = 1.0  # global gradient norm
    accumulate: int = 1  # micro-batches a step; terms of the loss are means over the whole batch, accuracies of means


@dataclass(frozen=True)
class Loss:
    """Weights of the terms; each is also reported alone, without its own weight."""

    idle: float = 0.5  # of a silent model_text or heard target against a word's
    hold: float = 0.5  # of a "still speaking" target
    flow: float = 0.5
    notes: float = 1.0  # of the user's words, and of what a frame shows


@dataclass(frozen=True)
class Train:
    steps: int = 1000
    seed: int = 0
    log_every: int = 10
    save_every: int = 200
    keep: int = 2  # newest checkpoints; the best is kept besides
    eval_every: int = 200  # held-out loss
    eval_batches: int = 4


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 on at most one takes what is left."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1  # of the micro-turns of an example
    slices: int = 1  # groups of devices along `data` that only DCN joins


@dataclass(frozen=True)
class Sampling:
    """Text sampling while streaming; flow sampling is in `Flow`."""

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all


@dataclass(frozen=True)
class Experiment:
    stream: Stream = field(default_factory=Stream)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    loss: Loss = field(default_factory=Loss)
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)
    sampling: Sampling = field(default_factory=Sampling)


def to_config_dict(experiment: Experiment) -> ml_collections.ConfigDict:
    """The ConfigDict that config files edit. Fields that may be None keep their type open."""
    placeholder = ml_collections.ConfigDict(type_safe=False)
    placeholder.update(dataclasses.asdict(experiment))
    return placeholder


def to_json(experiment: Experiment) -> str:
    return json.dumps(dataclasses.asdict(experiment), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> Experiment:
    """Raises UserError when `text` is no JSON or does not describe an experiment."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"config is not valid JSON: {e}") from None
    return from_tree(Experiment, tree)


def from_config_dict(config: ml_collections.ConfigDict) -> Experiment:
    """Raises UserError naming the field for an unknown name, a wrong type or an impossible value."""
    experiment = from_tree(Experiment, config.to_dict())
    validate(experiment)
    return experiment


def from_tree(cls: type, tree: Any, path: str = "config") -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(f"{path} must be a group of fields, got {tree!r}")
    kinds = typing.get_type_hints(cls)
    for name in tree:
        if name not in kinds:
            hint = nearest(name, kinds, f"the fields are {', '.join(sorted(kinds))}")
            raise UserError(f"{path}.{name} does not exist; {hint}")
    return cls(**{name: _convert(kinds[name], value, f"{path}.{name}") for name, value in tree.items()})


def nearest(name: str, known: typing.Iterable[str], otherwise: str) -> str:
    """The remedy for a name that is not among those known: the one it may have meant, or else what they are."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else otherwise


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_tree(kind, value, path)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{path}={value!r} must be one of {', '.join(map(repr, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{path} must map names to numbers, got {value!r}")
        return {str(k): _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{path} must be {kind.__name__}, got {type(value).__name__} {value!r}")
    return value


# Bounds of every number that has one: path -> (least, most); None is open.
LIMITS: dict[str, tuple[float | None, float | None]] = {
    "stream.patches_per_slot": (1, None),
    "stream.video_every": (1, None),
    "stream.user_text_slots": (1, None),
    "stream.model_text_slots": (1, None),
    "stream.vocab_size": (320, None),  # bytes, control tokens, and some words
    "model.d_model": (4, None),
    "model.layers": (1, None),
    "model.heads": (1, None),
    "model.kv_heads": (1, None),
    "model.head_dim": (2, None),
    "model.window": (1, None),
    "model.moe.experts": (1, None),
    "model.moe.top_k": (1, None),
    "model.moe.expert_width": (1, None),
    "model.moe.shared_width": (0, None),
    "model.moe.capacity_factor": (0.01, None),
    "model.moe.block_rows": (1, None),
    "model.moe.balance_rate": (0, None),
    "model.moe.z_loss": (0, None),
    "model.flow.width": (1, None),
    "model.flow.depth": (1, None),
    "model.flow.draws": (1, None),
    "model.flow.share": (0.001, 1),
    "model.flow.feedback_noise": (0, 1),
    "model.flow.steps": (1, None),
    "model.flow.temperature": (0, None),
    "data.seed": (0, 2**32 - 1),
    "data.train_hours": (1e-4, 1e7),
    "data.test_per_family": (1, None),
    "data.window": (1, None),
    "data.batch": (1, None),
    "data.workers": (0, None),
    "optimizer.learning_rate": (0, None),
    "optimizer.warmup": (0, None),
    "optimizer.b1": (0, 0.9999999),
    "optimizer.b2": (0, 0.9999999),
    "optimizer.decay": (0, 1),
    "optimizer.weight_decay": (0, None),
    "optimizer.clip": (1e-9, None),
    "optimizer.accumulate": (1, None),
    "loss.idle": (1e-6, None),
    "loss.hold": (1e-6, None),
    "loss.flow": (0, None),
    "loss.notes": (0, None),
    "train.steps": (1, None),
    "train.seed": (0, 2**32 - 1),
    "train.log_every": (1, None),
    "train.save_every": (1, None),
    "train.keep": (1, None),
    "train.eval_every": (1, None),
    "train.eval_batches": (1, None),
    "sampling.temperature": (0, None),
    "sampling.top_k": (0, None),
}


def validate(experiment: Experiment) -> None:
    """Raises UserError for values that no part of the system could use."""
    for path, (least, most) in LIMITS.items():
        value = functools.reduce(getattr, path.split("."), experiment)
        if value is None:
            continue
        _require(math.isfinite(value), f"config.{path}={value} must be finite")
        _require(least is None or value >= least, f"config.{path}={value} must be at least {least}")
        _require(most is None or value <= most, f"config.{path}={value} must be at most {most}")

    stream, model, data = experiment.stream, experiment.model, experiment.data
    _require(
        data.name not in ("", ".", "..") and "/" not in data.name,
        f"config.data.name={data.name!r} must be a name without a path; config.data.root is the folder it lies in",
    )
    refuse_address("config.data.root", data.root)
    _require(stream.frames_per_slot in (1, 2, 4, 8), "config.stream.frames_per_slot must be 1, 2, 4 or 8")
    for name in ("video_height", "video_width"):
        size = getattr(stream, name)
        _require(size > 0 and size % 40 == 0, f"config.stream.{name}={size} must be a positive multiple of 40")
    _require(
        model.heads % model.kv_heads == 0,
        f"config.model.heads={model.heads} must be a multiple of config.model.kv_heads={model.kv_heads}",
    )
    _require(model.head_dim % 2 == 0, f"config.model.head_dim={model.head_dim} must be even (rotary pairs)")
    _require(model.d_model % 4 == 0, f"config.model.d_model={model.d_model} must be a multiple of 4 (hMLP)")
    _require(
        model.moe.top_k <= model.moe.experts,
        f"config.model.moe.top_k={model.moe.top_k} must lie between 1 and config.model.moe.experts={model.moe.experts}",
    )
    _require(
        experiment.sampling.top_k <= stream.vocab_size,
        f"config.sampling.top_k={experiment.sampling.top_k} is more than config.stream.vocab_size={stream.vocab_size}",
    )
    _require(
        data.window % stream.video_every == 0,
        f"config.data.window={data.window} must be a multiple of config.stream.video_every={stream.video_every}",
    )
    accumulate = experiment.optimizer.accumulate
    _require(
        data.batch % accumulate == 0,
        f"config.data.batch={data.batch} must be a multiple of config.optimizer.accumulate={accumulate}",
    )


def refuse_address(name: str, path: str | None) -> None:
    """Raises UserError for gs://bucket/folder, say, which would become the local folder ./gs:/bucket/folder."""
    _require(
        "://" not in (path or ""),
        f"{name}={path} is an address; mount the bucket, with gcsfuse say, and name the folder",
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
