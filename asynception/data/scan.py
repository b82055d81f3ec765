"""One shard read from its first member to its last, going on after whatever is wrong with it."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asynception.data.decoding import why_corrupt
from asynception.data.shard_set import opened_shard
from model.errors import InputError
from worker.data import tar_index
from worker.data.fetch import FetchError
from worker.data.source import IMAGE_SUFFIXES

LOST = "shards that can't be read"
DAMAGED = "truncated or damaged shards"
DIFFERENT = "shards unlike their manifest"
INCOMPLETE = "samples without one image and labels"
OUTSIDE = "labels outside the classes"
CORRUPT = "images that can't be decoded"
REPEATED = "keys in several shards"


class Problem(NamedTuple):
    """Something wrong."""

    kind: str
    """One of the names above."""
    text: str
    """One line that begins with the shard."""


@dataclass(frozen=True)
class ScanTask:
    """Which shard to read, and what to look at."""

    folder: str
    name: str
    index: int
    num_classes: int | None = None
    """Labels must be below it; None lets all pass that are no less than 0."""
    max_pixels: int | None = None
    """Decode images, and refuse larger ones; None to leave them alone."""
    sha256: bool = False
    """Whether to hash the file."""
    max_problems: int = 100
    """Problems to describe; more are only counted."""


@dataclass
class ShardScan:
    """What a shard holds."""

    name: str
    index: int
    num_bytes: int | None = None
    """Of the file as it is stored; None if it can't be read."""
    sha256: str | None = None
    key_hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """One for each sample, sorted."""
    label_counts: Counter[int] = field(default_factory=Counter)
    """Samples of each label, of samples whose labels can be read."""
    labels_per_sample: Counter[int] = field(default_factory=Counter)
    """Samples with each number of labels."""
    problems: list[Problem] = field(default_factory=list)
    problem_counts: Counter[str] = field(default_factory=Counter)

    @property
    def num_samples(self) -> int:
        return len(self.key_hashes)


@dataclass
class _Seen:
    """What has been seen of a sample."""

    image: bool = False
    labels: dict[str, bytes] = field(default_factory=dict)


def key_hash(key: str) -> int:
    """64 bits."""
    content = key.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def scan_shard(task: ScanTask) -> ShardScan:
    """Never raises for what is wrong with the shard."""
    return _Scanner(task).scan()


def find_keys(folder: str, name: str, hashes: frozenset[int]) -> set[str]:
    """The keys of a shard that have such hashes; of those that can be read."""
    found = set()
    try:
        with opened_shard(folder, name) as (file, _):
            for key, _, _ in _members(name, file):
                if key_hash(key) in hashes:
                    found.add(key)
    except (FetchError, InputError):
        pass  # told of by the scan
    return found


class _Scanner:
    def __init__(self, task: ScanTask) -> None:
        self._task = task
        self._found = ShardScan(task.name, task.index)

    def scan(self) -> ShardScan:
        found, task = self._found, self._task
        try:
            with opened_shard(task.folder, task.name) as (file, stored):
                found.num_bytes = stored.stat().st_size
                if task.sha256:
                    with open(stored, "rb") as content:
                        found.sha256 = hashlib.file_digest(content, "sha256").hexdigest()
                samples = self._samples(file)
        except FetchError as error:
            self._add(LOST, f"{task.name}: {error.reason}")
            return found
        found.key_hashes = np.sort(np.array([key_hash(key) for key in samples], np.uint64))
        for key, seen in samples.items():
            self._check(f"{task.name}: sample {key!r}", seen)
        return found

    def _samples(self, file: BinaryIO) -> dict[str, _Seen]:
        samples: dict[str, _Seen] = {}
        key = None
        try:
            for key, suffix, content in _members(self._task.name, file):
                seen = samples.setdefault(key, _Seen())
                if suffix not in IMAGE_SUFFIXES:
                    seen.labels[suffix] = content.read()
                elif seen.image:
                    self._add(INCOMPLETE, f"{self._task.name}: sample {key!r} has two images")
                else:
                    seen.image = True
                    self._decode(key, content)
        except InputError as error:
            self._add(DAMAGED, str(error))
            if key is not None and not (samples[key].image and samples[key].labels):
                del samples[key]  # cut short, and told of already
        return samples

    def _decode(self, key: str, content: "_Content") -> None:
        if self._task.max_pixels is None:
            return
        image = content.read()
        if len(image) < content.num_bytes:
            return  # the tar is cut short, and told of when its next member is looked for
        reason = why_corrupt(image, self._task.max_pixels)
        if reason is not None:
            self._add(CORRUPT, f"{self._task.name}: sample {key!r}: {reason}")

    def _check(self, where: str, seen: _Seen) -> None:
        if not seen.image:
            self._add(INCOMPLETE, f"{where} has labels but no image")
            return
        try:
            labels = tar_index.parse_labels(where, seen.labels)
        except InputError as error:
            self._add(INCOMPLETE, str(error))
            return
        limit = self._task.num_classes
        for label in labels:
            if label < 0 or (limit is not None and label >= limit):
                allowed = "those from 0" if limit is None else f"0..{limit - 1}"
                self._add(OUTSIDE, f"{where} has the label {label}, outside {allowed}")
        self._found.label_counts.update(labels)
        self._found.labels_per_sample[len(labels)] += 1

    def _add(self, kind: str, text: str) -> None:
        self._found.problem_counts[kind] += 1
        if len(self._found.problems) < self._task.max_problems:
            self._found.problems.append(Problem(kind, text))


@dataclass(frozen=True)
class _Content:
    """A member's bytes, to be read before the next member is asked for."""

    file: BinaryIO
    offset: int
    num_bytes: int

    def read(self) -> bytes:
        self.file.seek(self.offset)
        return self.file.read(self.num_bytes)


def _members(name: str, file: BinaryIO) -> Iterator[tuple[str, str, _Content]]:
    """(key, suffix, content) of images and labels. Raises InputError at damage of the tar."""
    for member in tar_index.regular_files(name, file):
        key, suffix = tar_index.key_and_suffix(member.name)
        if key is not None and suffix in IMAGE_SUFFIXES | {".json", ".cls"}:
            yield key, suffix, _Content(file, member.offset_data, member.size)
