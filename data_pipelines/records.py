"""Sessions as TFDS features, what one record of a prepared dataset holds; files of them, and datasets of such files."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format
from tensorflow_datasets.core import dataset_builder, example_serializer, file_adapters
from tensorflow_datasets.core import splits as tfds_splits
from tensorflow_datasets.core import writer as tfds_writer

from tmljax import files
from tmljax.config import Stream, UserError
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


@functools.cache
def _writer(stream: Stream) -> tfds_writer.ShardWriter:
    described = features(stream.video_height, stream.video_width)
    serializer = Serializer(described.get_serialized_info())
    return tfds_writer.ShardWriter(
        described, serializer, tfds_writer.ExampleWriter(file_adapters.FileFormat.ARRAY_RECORD)
    )


def write(path: Path, sessions: Iterable[Session], stream: Stream) -> int:
    """One file, the same bytes for the same sessions whoever writes it; returns how many they were. Raises OSError when
    the disk is full, which ArrayRecord's writer says in its own way."""
    count = 0

    def encoded() -> Iterator[tuple[int, dict[str, Any]]]:
        nonlocal count
        for session in sessions:
            yield count, encode(session, stream.video_height, stream.video_width)
            count += 1

    try:
        with files.whole(path) as part:
            _writer(stream).write(encoded(), part)
        return count
    except (RuntimeError, ValueError) as e:
        if files.is_full(e):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


def read(source: Sequence[dict[str, Any]], index: int, home: str | os.PathLike[str]) -> Session:
    """A record of the dataset in the folder `home`. Raises UserError where its bytes are not those written."""
    try:
        return decode(source[index])
    except RuntimeError as e:
        if "Corrupted" not in str(
            e
        ):  # as ArrayRecord says of chunks that miss their hash; a disk that fails may recover
            raise
        raise damage(home, f"its records cannot be read ({str(e).splitlines()[0]})") from None


def damage(home: str | os.PathLike[str], what: str) -> UserError:
    return UserError(f"{home} is damaged: {what}; delete it and run the same command again, which makes the same anew")


class Dataset(dataset_builder.FileReaderBuilder, skip_registration=True):
    """Files of records that TFDS takes over as its own: it would buffer and sort them, for which it needs TensorFlow.

    `staged` are the files of each split in order, and how many records each has. Raises UserError where what TFDS
    wrote about them is damaged.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar[dict[str, Any]] = {}  # nothing is downloaded

    def __init__(
        self, home: Path, stream: Stream, staged: Mapping[str, Sequence[tuple[Path, int]]] | None = None, **options: Any
    ) -> None:
        self._stream, self._staged = stream, staged
        try:
            super().__init__(data_dir=os.fspath(home), file_format="array_record", **options)
        except (json_format.ParseError, ValueError):
            raise damage(home, "its dataset_info.json or features.json cannot be read") from None

    def _info(self) -> tfds.core.DatasetInfo:
        described = features(self._stream.video_height, self._stream.video_width)
        return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=described, disable_shuffling=True)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        infos = []
        for split, staged in self._staged.items():
            template = self._get_filename_template(split_name=split)
            for index, (source, _) in enumerate(staged):
                target = template.sharded_filepath(shard_index=index, num_shards=len(staged))
                _link(source, Path(os.fspath(target)))
            infos.append(
                tfds_splits.SplitInfo(
                    name=split,
                    shard_lengths=[records for _, records in staged],
                    num_bytes=sum(source.stat().st_size for source, _ in staged),
                    filename_template=template,
                )
            )
        self.info.set_splits(tfds_splits.SplitDict(infos))

    @property
    def whole(self) -> bool:
        return (Path(self.data_dir) / "dataset_info.json").exists()

    def damaged(self, splits: Iterable[str]) -> list[str]:
        """Of these splits, those whose files are not all there, or have another size together than when they were taken
        over."""
        found = self.info.splits
        return [s for s in splits if s not in found or sum(map(_size, found[s].filepaths)) != found[s].num_bytes]

    def take_over(self, scratch: Path) -> None:
        """Makes the staged files a dataset, as which they are whole or not there."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.download_and_prepare(download_dir=scratch)


def _size(path: str | os.PathLike[str]) -> int:
    """In bytes; 0 where there is no file."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def _link(source: Path, target: Path) -> None:
    """Without moving `source`: a kill right now must leave a staging folder that is whole."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


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
