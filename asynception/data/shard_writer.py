"""WebDataset shards whose bytes depend on nothing but their samples, and their manifest.

Layout: https://github.com/webdataset/webdataset (KEY.jpg and KEY.json form a sample).
"""

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from model.errors import InputError
from worker.data.manifest import SUFFIX, Manifest, ShardEntry
from worker.data.source import IMAGE_SUFFIXES

PART_SUFFIX = ".part"
"""What the name of an unfinished file ends in."""
END_NUM_BYTES = 2 * tarfile.BLOCKSIZE
_SPLIT = re.compile(r"[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*")


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:06d}.tar"


def check_split(split: str) -> None:
    """Raises InputError for a name that can't begin the names of shards."""
    if not _SPLIT.fullmatch(split):
        raise InputError(
            f"split={split!r} can't begin the names of shards: use letters, digits, _ and -"
        )


def refuse_existing(folder: Path, split: str) -> None:
    """Raises InputError if `folder` has shards or a manifest of `split`, which would be mixed."""
    pattern = re.compile(rf"{re.escape(split)}(-\d+\.tar|{re.escape(SUFFIX)})")
    names = os.listdir(folder) if folder.is_dir() else []
    found = min((name for name in names if pattern.fullmatch(name)), default=None)
    if found is not None:
        raise InputError(
            f"{folder} already holds {found}, and two sets would be mixed: name another folder or "
            f"split, or remove {split}-*.tar and {split}{SUFFIX}"
        )


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file or none of it, also if the machine stops in between."""
    part = path.with_name(f".{path.name}.{os.getpid()}{PART_SUFFIX}")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_manifest(folder: Path, split: str, manifest: Manifest) -> Path:
    path = folder / (split + SUFFIX)
    write_atomically(path, manifest.to_json().encode())
    return path


@dataclass(frozen=True)
class EncodedSample:
    """A sample's members as they stand in a tar."""

    image_header: bytes
    json_header: bytes
    json: bytes
    image_num_bytes: int

    @classmethod
    def of(
        cls,
        key: str,
        suffix: str,
        image_num_bytes: int,
        labels: Sequence[int],
        extra: Mapping[str, Any],
    ) -> Self:
        """`key` and `suffix` must have been checked by `check_name`."""
        content = _json(extra, labels)
        return cls(
            _header(key + suffix, image_num_bytes),
            _header(key + ".json", len(content)),
            content,
            image_num_bytes,
        )

    @property
    def num_bytes(self) -> int:
        """What the sample takes in its tar."""
        headers = len(self.image_header) + len(self.json_header)
        return headers + _padded(self.image_num_bytes) + _padded(len(self.json))


def sample_num_bytes(key: str, suffix: str, image_num_bytes: int, labels: Sequence[int]) -> int:
    """What a sample without `extra` will take in its tar, without making it."""
    key_num_bytes = len(key.encode(errors="surrogateescape"))
    headers = _header_num_bytes(key_num_bytes + len(suffix)) + _header_num_bytes(key_num_bytes + 5)
    return headers + _padded(image_num_bytes) + _padded(len(_json({}, labels)))


def check_name(key: str, suffix: str) -> None:
    """Raises InputError unless readers will find `key` as it is: the name up to its first dot."""
    folder, _, last = key.rpartition("/")
    parts = [*folder.split("/"), last] if folder else [last]
    if "." in last or key.startswith("/") or {"", ".", ".."} & set(parts) or "\0" in key:
        raise InputError(
            f"key {key!r} can't name a sample, readers would see another one: no dot after the "
            "last /, no empty part, no . or .. between slashes"
        )
    if suffix not in IMAGE_SUFFIXES:
        raise InputError(
            f"key {key!r} has an image of suffix {suffix!r}, which no reader takes: use one of "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )


def check_labels(key: str, labels: Sequence[int], num_classes: int | None) -> None:
    """Raises InputError for a label outside 0..num_classes - 1, or one that is there twice."""
    for label in labels:
        if label < 0 or (num_classes is not None and label >= num_classes):
            limit = "0 or more" if num_classes is None else f"0..{num_classes - 1}"
            raise InputError(
                f"key {key!r} has the label {label}, outside {limit}: mend it or the number of "
                "classes"
            )
    if len(set(labels)) < len(labels):
        raise InputError(f"key {key!r} has a label twice in {list(labels)}: give each once")


class ShardFile:
    """One shard being written under a temporary name; `close` gives it its own.

    Raises OSError as files do.
    """

    def __init__(self, path: Path) -> None:
        self.num_samples = 0
        self.num_bytes = 0
        """Without the end-of-archive blocks."""
        self._path = path
        self._part = path.with_name(f".{path.name}.{os.getpid()}{PART_SUFFIX}")
        self._file = open(self._part, "wb")  # noqa: SIM115
        self._sha256 = hashlib.sha256()

    def add(self, sample: EncodedSample, image: bytes) -> None:
        assert len(image) == sample.image_num_bytes
        for content in (sample.image_header, image, sample.json_header, sample.json):
            self._write(content + bytes(_padded(len(content)) - len(content)))
        self.num_samples += 1

    def close(self) -> ShardEntry:
        """The finished shard, on the disk."""
        self._write(bytes(END_NUM_BYTES))
        self._write(bytes(-self.num_bytes % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self._path)
        return ShardEntry(
            self._path.name, self.num_samples, self.num_bytes, self._sha256.hexdigest()
        )

    def discard(self) -> None:
        """Remove what has been written; nothing happens after `close`."""
        if not self._file.closed:
            self._file.close()
            self._part.unlink()

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self.num_bytes += len(content)


class ShardWriter:
    """Writes samples into shards SPLIT-000000.tar, ... of a folder, and their manifest.

    A shard is closed before the sample that would make it larger than `shard_num_bytes`; a larger
    sample has a shard of its own. The manifest is written by `close`, last, and not at all if the
    `with` block is left by an exception. Without `class_names` and `num_classes`, the largest
    label tells the number of classes. Keys are remembered, 16 bytes each.

    Raises InputError for a folder that already holds the split, for names and labels that
    `check_name` and `check_labels` refuse, and for a key that comes twice.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        shard_num_bytes: int = 250_000_000,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        check_split(split)
        if class_names is not None and num_classes not in (None, len(class_names)):
            raise InputError(
                f"num_classes={num_classes} contradicts {len(class_names)} class_names: give one"
            )
        refuse_existing(folder, split)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._split = folder, split
        self._shard_num_bytes = shard_num_bytes
        self._class_names = None if class_names is None else tuple(class_names)
        self._num_classes = num_classes if class_names is None else len(class_names)
        self._digests: set[bytes] = set()
        self._entries: list[ShardEntry] = []
        self._shard: ShardFile | None = None
        self._label_counts: Counter[int] = Counter()
        self._labels_per_sample: set[int] = set()

    def add(
        self,
        key: str,
        image: bytes,
        suffix: str,
        labels: Sequence[int],
        extra: Mapping[str, Any] = {},
    ) -> None:
        """Write KEY + suffix and KEY.json, which is `labels` and what `extra` has.

        image: the encoded file. suffix: of its format, like ".jpg". labels: class ids.
        """
        check_name(key, suffix)
        check_labels(key, labels, self._num_classes)
        digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=16).digest()
        if digest in self._digests:
            raise InputError(f"key {key!r} comes twice in {self._split}: give each sample its own")
        self._digests.add(digest)
        sample = EncodedSample.of(key, suffix, len(image), labels, extra)
        self._shard_for(sample.num_bytes).add(sample, image)
        self._label_counts.update(labels)
        self._labels_per_sample.add(len(labels))

    def close(self) -> Manifest:
        """Finish the last shard and write SPLIT.manifest.json. Raises InputError if all is empty.

        Repeated, it only returns the manifest.
        """
        self._close_shard()
        if not self._entries:
            raise InputError(f"{self._folder}: no sample of {self._split}, nothing to write")
        manifest = Manifest(
            tuple(self._entries),
            count_array(self._label_counts, self._num_classes),
            min(self._labels_per_sample),
            max(self._labels_per_sample),
            self._class_names,
        )
        write_manifest(self._folder, self._split, manifest)
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.discard()

    def _shard_for(self, num_bytes: int) -> ShardFile:
        if self._shard is not None and overflows(
            self._shard.num_bytes, num_bytes, self._shard_num_bytes
        ):
            self._close_shard()
        if self._shard is None:
            name = shard_name(self._split, len(self._entries))
            self._shard = ShardFile(self._folder / name)
        return self._shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._entries.append(self._shard.close())
            self._shard = None


def overflows(shard_num_bytes: int, sample_num_bytes: int, limit: int) -> bool:
    """Whether a sample must begin a new shard; never true of an empty one."""
    return shard_num_bytes > 0 and shard_num_bytes + sample_num_bytes + END_NUM_BYTES > limit


def count_array(counts: Mapping[int, int], num_classes: int | None) -> np.ndarray[Any, Any]:
    """(num_classes,) int64; the largest label tells the number of classes where it is None."""
    length = max(counts, default=0) + 1 if num_classes is None else num_classes
    array = np.zeros(length, np.int64)
    array[list(counts.keys())] = list(counts.values())
    return array


def _json(extra: Mapping[str, Any], labels: Sequence[int]) -> bytes:
    values = {**extra, "labels": list(labels)}
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def _padded(num_bytes: int) -> int:
    return num_bytes + -num_bytes % tarfile.BLOCKSIZE


def _header(name: str, num_bytes: int) -> bytes:
    """One or more blocks; nothing in them comes from the clock, the user or the machine."""
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _header_num_bytes(name_num_bytes: int) -> int:
    """Of `_header`: a name of more than 100 bytes has a header and blocks of its own."""
    if name_num_bytes <= tarfile.LENGTH_NAME:
        return tarfile.BLOCKSIZE
    return 2 * tarfile.BLOCKSIZE + _padded(name_num_bytes + 1)
