"""Which sessions a dataset has: a plan that follows from the config alone.

Session i of a split depends on (config.data, config.stream, its split and i), so that shards can be rendered
anywhere, in any order, again.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipelines.render import render
from data_pipelines.scenarios import FAMILIES, SECONDS
from data_pipelines.scenarios.stage import Stage
from data_pipelines.voices import Voice
from tmljax.config import Experiment, UserError, nearest
from tmljax.stream.record import Session

SPLITS = ("train", "validation", "test")
SHARD = 64  # sessions, at least; a split has at most MOST_SHARDS shards
MOST_SHARDS = 512
LEAST_VALIDATION = 4  # sessions per family


@dataclass(frozen=True)
class Shard:
    split: str
    index: int
    first: int
    sessions: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.index:05d}"


def mixture(experiment: Experiment) -> dict[str, float]:
    """family -> share of the sessions, in a fixed order; families without weight are left out."""
    wanted = experiment.data.mixture or {family: weight for family, (_, weight) in FAMILIES.items()}
    for family, weight in wanted.items():
        if family not in FAMILIES:
            hint = nearest(family, FAMILIES, f"the families are {', '.join(FAMILIES)}")
            raise UserError(f"config.data.mixture names {family}, which does not exist; {hint}")
        if not (weight >= 0 and math.isfinite(weight)):
            raise UserError(f"config.data.mixture.{family}={weight} must be a weight of 0 or more")
    total = sum(wanted.values())
    if total <= 0:
        raise UserError("config.data.mixture has no family with a positive weight")
    if not math.isfinite(total):
        raise UserError("config.data.mixture has weights whose sum is more than a number can be; make them smaller")
    return {family: wanted[family] / total for family in FAMILIES if wanted.get(family, 0) > 0}


def count_sessions(experiment: Experiment) -> dict[str, int]:
    """split -> sessions. Training hours become sessions by what a session of each family lasts on average."""
    data, shares = experiment.data, mixture(experiment)
    if data.test_per_family < 1:
        raise UserError(f"config.data.test_per_family={data.test_per_family} must be at least 1")
    mean = sum(share * SECONDS[family] for family, share in shares.items())
    return {
        "train": max(math.ceil(data.train_hours * 3600 / mean), 1),
        "validation": len(shares) * max(data.test_per_family // 2, LEAST_VALIDATION),
        "test": len(shares) * data.test_per_family,
    }


def shards(experiment: Experiment) -> list[Shard]:
    """All shards; the small splits first, so that what can fail does so early."""
    counts = count_sessions(experiment)
    planned = []
    for split in ("test", "validation", "train"):
        size = max(SHARD, math.ceil(counts[split] / MOST_SHARDS))
        for index, first in enumerate(range(0, counts[split], size)):
            planned.append(Shard(split, index, first, min(size, counts[split] - first)))
    return planned


def render_session(experiment: Experiment, split: str, index: int, voices: Voice) -> Session:
    shares = mixture(experiment)
    families = list(shares)
    seed = experiment.data.seed % 2**64
    entropy = [seed % 2**32, seed // 2**32, zlib.crc32(split.encode()), index]
    choice, composition, sound = np.random.SeedSequence(entropy).spawn(3)
    if split == "train":
        drawn = np.random.default_rng(choice).choice(len(families), p=list(shares.values()))
        family = families[drawn]
    else:
        family = families[index % len(families)]
    compose, _ = FAMILIES[family]
    score = compose(Stage(np.random.default_rng(composition), split, experiment.stream, voices))
    return render(score, f"{split}-{index:06d}", voices, np.random.default_rng(sound), keep_audio=split == "test")


def render_shard(experiment: Experiment, shard: Shard, voices: Voice) -> Iterator[Session]:
    for index in range(shard.first, shard.first + shard.sessions):
        yield render_session(experiment, shard.split, index, voices)
