"""Sessions as TFDS features: what one record of the prepared dataset holds."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from tmljax.stream.microturn import MEL
from tmljax.stream.record import Session, Word


def features(height: int, width: int) -> tfds.features.FeaturesDict:
    """Arrays are raw bytes; one of no length stands for a stream that does not exist."""

    def array(shape: tuple[int | None, ...], dtype: type) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "family": tfds.features.Text(),
            "frames": tfds.features.Scalar(np.int64),
            "user_dmel": array((None, MEL), np.uint8),
            "model_mel": array((None, MEL), np.float16),
            "video": array((None, height, width, 3), np.uint8),
            "audio": array((None, 2), np.int16),
            "events": tfds.features.Text(doc="JSON: user_words, model_words, typed, seen as [text, start, end]; truth"),
        }
    )


class Serializer(example_serializer.ExampleSerializer):
    """TFDS's own, but for the order of the features in a record, which protobuf leaves to each process."""

    def serialize_example(self, example: dict[str, Any]) -> bytes:
        return self.get_tf_example(example).SerializeToString(deterministic=True)


def encode(session: Session, height: int, width: int) -> dict[str, Any]:
    def array(value: np.ndarray | None, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return np.zeros((0, *shape), dtype) if value is None else value

    return {
        "id": session.id,
        "family": session.family,
        "frames": session.frames,
        "user_dmel": array(session.user_dmel, (MEL,), np.uint8),
        "model_mel": array(session.model_mel, (MEL,), np.float16),
        "video": array(session.video, (height, width, 3), np.uint8),
        "audio": array(session.audio, (2,), np.int16),
        "events": json.dumps(
            {
                "user_words": session.user_words,
                "model_words": session.model_words,
                "typed": session.typed,
                "seen": session.seen,
                "truth": session.truth,
            },
            separators=(",", ":"),
        ),
    }


def decode(example: dict[str, Any]) -> Session:
    events = json.loads(example["events"])
    user_words, model_words, typed = (
        tuple(Word(*word) for word in events[name]) for name in ("user_words", "model_words", "typed")
    )

    def array(name: str) -> np.ndarray | None:
        return example[name] if len(example[name]) else None

    return Session(
        id=_text(example["id"]),
        family=_text(example["family"]),
        frames=int(example["frames"]),
        user_dmel=array("user_dmel"),
        model_mel=array("model_mel"),
        user_words=user_words,
        model_words=model_words,
        typed=typed,
        seen=None if events.get("seen") is None else tuple(Word(*word) for word in events["seen"]),
        video=array("video"),
        audio=array("audio"),
        truth=tuple(events["truth"]),
    )


HEAD, TAIL = 1 << 12, 1 << 17  # bytes: the first record's checksum; the last records, and where each record begins


def fingerprint(folder: str | os.PathLike[str], split: str) -> str:
    """Of the records of a split, as TFDS wrote them, by the size, the head and the tail of each file.

    So other records of the same number are told apart without reading them: at most 66 MB of any dataset are read.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob(f"*-{split}.array_record-*")):
        with open(path, "rb") as file:
            head, size = file.read(HEAD), file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            digest.update(repr((path.name, size)).encode() + head + file.read())
    return digest.hexdigest()[:16]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
