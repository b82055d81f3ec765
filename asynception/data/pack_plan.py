"""What a pack will write: which samples, in which order and shards, before an image is read."""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple, Self

from pydantic import Field, NonNegativeInt, PositiveInt

from asynception.data.listing import Listing
from asynception.data.shard_writer import EncodedSample, overflows, sample_num_bytes
from asynception.data.shuffle import KeyShuffle, is_held_out
from asynception.data.vocabulary import ClassIds, LabelNumbers, UnknownLabels, Vocabulary
from model.errors import InputError
from model.settings import Settings

_FORMAT = 1
"""Changes whenever the same plan would give other bytes."""
_STAT_ROWS = 1024
_STAT_THREADS = 16

Report = Callable[[str, int, int | None], None]
"""Told of progress: (what is being done, how many are done, of how many if that is known)."""


class PackSettings(Settings):
    """How to make shards."""

    split: str = "train"
    """What the names of shards begin with."""
    val_split: str = "val"
    """The same for samples that are held out."""
    val_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of samples to hold out: those whose keys have a low hash, whatever the seed."""
    shard_num_bytes: PositiveInt = 250_000_000
    """Largest size of a shard."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Determines the order of samples."""
    num_classes: PositiveInt | None = None
    """For labels that are ids; without it, the largest label plus one."""
    min_count: PositiveInt = 1
    """Samples of a class that the vocabulary is to name, where it is made from the data."""
    unknown_labels: UnknownLabels = "error"
    """What happens to a label outside the vocabulary."""
    keep_unlabelled: bool = False
    """Whether samples without a label are written."""
    max_missing: NonNegativeInt = 0
    """Images that may be listed but not there; they are left out and counted."""
    verify: bool = False
    """Decode each image, and leave out those that training couldn't read."""
    max_corrupt: NonNegativeInt = 100
    """Images that `verify` may leave out."""
    max_pixels: PositiveInt = 64_000_000
    """Larger images count as corrupt."""
    bucket_num_bytes: PositiveInt = 16_000_000
    """Part of the list of samples that is in memory while it is shuffled."""


class PlannedSample(NamedTuple):
    """A line of a plan's file."""

    key: str
    path: str
    labels: list[int]
    num_bytes: int
    """Of the image."""
    mtime_ns: int
    """When the image was last changed."""

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.path)[1].lower()

    def encoded(self) -> EncodedSample:
        return EncodedSample.of(self.key, self.suffix, self.num_bytes, self.labels, {})


class PlannedShard(NamedTuple):
    """A shard's lines in the plan's file."""

    offset: int
    num_samples: int


@dataclass
class SplitPlan:
    """The shards of one split."""

    split: str
    path: Path
    """A line for each sample, in order."""
    shards: list[PlannedShard] = field(default_factory=list)
    label_counts: Counter[int] = field(default_factory=Counter)
    """Samples of each class."""

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)


@dataclass(frozen=True)
class Plan:
    """All that determines the bytes of the shards, apart from the images' own."""

    splits: tuple[SplitPlan, ...]
    root: str
    """Folder that paths are relative to."""
    num_classes: int
    vocabulary: Vocabulary | None
    left_out: Counter[str]
    """What isn't written, in words, and how often."""
    fingerprint: str


def make_plan(
    listing: Listing,
    vocabulary: Vocabulary | None,
    settings: PackSettings,
    folder: Path,
    report: Report,
) -> Plan:
    """Reads the listing; the plan's files, and others on the way, lie in `folder`.

    Memory holds a bucket of the list, the vocabulary and the shards, but not the samples.
    Raises InputError for whatever can't be packed as listed.
    """
    numbers = LabelNumbers(listing, vocabulary, settings.num_classes, settings.unknown_labels)
    shuffle = _shuffled(listing, numbers, settings, folder, report)
    merged = folder / "merged.jsonl"
    counts, num_merged = _merge(listing, shuffle, merged)
    class_ids = numbers.class_ids(counts, settings.min_count)
    left_out = Counter(listing.left_out)
    left_out["labels outside the vocabulary"] += numbers.num_unknown
    with _SplitFiles(settings, folder) as splits:
        rows = _with_ids(merged, class_ids, settings, left_out)
        for sample in _with_files(listing, rows, settings, left_out):
            splits.add(sample)
            report("measuring images", splits.num_samples, num_merged)
    merged.unlink()
    return Plan(
        splits.plans(listing),
        listing.root,
        class_ids.num_classes,
        class_ids.vocabulary,
        +left_out,
        splits.fingerprint(class_ids),
    )


def _shuffled(
    listing: Listing, numbers: LabelNumbers, settings: PackSettings, folder: Path, report: Report
) -> KeyShuffle:
    shuffle = KeyShuffle(folder / "buckets", settings.seed, settings.bucket_num_bytes)
    for count, row in enumerate(listing.rows, 1):
        shuffle.add(row.key, json.dumps([row.key, row.path, numbers.of(row)]).encode())
        report("reading the list", count, None)
    return shuffle


def _merge(listing: Listing, shuffle: KeyShuffle, merged: Path) -> tuple[Counter[int], int]:
    """Writes one line (key, path, label numbers) a sample.

    Returns the samples of each label, and of all.
    """
    counts: Counter[int] = Counter()
    num_samples = 0
    with open(merged, "wb") as file:
        for _, records in groupby(shuffle.drain(), lambda record: record[0]):
            rows = [json.loads(payload) for _, payload in records]
            key, path, _ = rows[0]
            other = next((row[1] for row in rows if row[1] != path), None)
            if other is not None:
                raise InputError(
                    f"{listing.name}: {path} and {other} would both have the key {key!r}: rename "
                    "one"
                )
            labels = sorted({label for row in rows for label in row[2]})
            counts.update(labels)
            num_samples += 1
            file.write(json.dumps([key, path, labels]).encode() + b"\n")
    return counts, num_samples


def _with_ids(
    merged: Path, class_ids: ClassIds, settings: PackSettings, left_out: Counter[str]
) -> Iterator[tuple[str, str, list[int]]]:
    with open(merged, "rb") as file:
        for line in file:
            key, path, labels = json.loads(line)
            if class_ids.ids is not None:
                known = [class_ids.ids[label] for label in labels if label in class_ids.ids]
                left_out["labels of too few samples"] += len(labels) - len(known)
                labels = sorted(known)
            if labels or settings.keep_unlabelled:
                yield key, path, labels
            else:
                left_out["images without a label"] += 1


def _with_files(
    listing: Listing,
    rows: Iterator[tuple[str, str, list[int]]],
    settings: PackSettings,
    left_out: Counter[str],
) -> Iterator[PlannedSample]:
    """With the size and time of each image, of those that are there."""
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        while chunk := list(islice(rows, _STAT_ROWS)):
            paths = [os.path.join(listing.root, path) for _, path, _ in chunk]
            for row, where, found in zip(chunk, paths, pool.map(_found, paths), strict=True):
                if found is not None:
                    yield PlannedSample(*row, found.st_size, found.st_mtime_ns)
                    continue
                left_out["images that aren't there"] += 1
                if left_out["images that aren't there"] > settings.max_missing:
                    raise InputError(
                        f"{where}: listed by {listing.name}, but no such file: mend the list or "
                        f"the folder of images, or raise --max-missing={settings.max_missing}"
                    )


def _found(path: str) -> os.stat_result | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return found if stat.S_ISREG(found.st_mode) else None


class _SplitFile:
    """Writes a split's lines and draws the borders of its shards."""

    def __init__(self, plan: SplitPlan, shard_num_bytes: int) -> None:
        self._plan, self._shard_num_bytes = plan, shard_num_bytes
        self._file: BinaryIO = open(plan.path, "wb")  # noqa: SIM115
        self._sha256 = hashlib.sha256()
        self._offset = 0
        self._num_bytes = 0

    def add(self, sample: PlannedSample) -> None:
        num_bytes = sample_num_bytes(sample.key, sample.suffix, sample.num_bytes, sample.labels)
        shards = self._plan.shards
        if not shards or overflows(self._num_bytes, num_bytes, self._shard_num_bytes):
            shards.append(PlannedShard(self._offset, 0))
            self._num_bytes = 0
        self._num_bytes += num_bytes
        shards[-1] = shards[-1]._replace(num_samples=shards[-1].num_samples + 1)
        line = json.dumps(sample).encode() + b"\n"
        self._file.write(line)
        self._sha256.update(line)
        self._offset += len(line)
        self._plan.label_counts.update(sample.labels)

    def close(self) -> str:
        """The hash of all lines."""
        self._file.close()
        return self._sha256.hexdigest()


class _SplitFiles:
    """Deals samples out to the splits."""

    def __init__(self, settings: PackSettings, folder: Path) -> None:
        self.num_samples = 0
        self._settings = settings
        names = [settings.split, *([settings.val_split] if settings.val_share else [])]
        self._plans = tuple(SplitPlan(name, folder / f"{name}.plan.jsonl") for name in names)
        self._files = [_SplitFile(plan, settings.shard_num_bytes) for plan in self._plans]
        self._hashes: list[str] = []

    def add(self, sample: PlannedSample) -> None:
        self._files[is_held_out(sample.key, self._settings.val_share)].add(sample)
        self.num_samples += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hashes = [file.close() for file in self._files]

    def plans(self, listing: Listing) -> tuple[SplitPlan, ...]:
        """Raises InputError if one is empty."""
        for plan in self._plans:
            if not plan.shards:
                raise InputError(
                    f"{listing.name}: leaves no sample for {plan.split} (of {self.num_samples} in "
                    f"all, with --val-share={self._settings.val_share:g}): list more images"
                )
        return self._plans

    def fingerprint(self, class_ids: ClassIds) -> str:
        """Of all that determines the bytes, and of the times when images were changed."""
        settings = self._settings
        parts = {
            "format": _FORMAT,
            "splits": [
                [plan.split, sha256, plan.shards]
                for plan, sha256 in zip(self._plans, self._hashes, strict=True)
            ],
            "verify": settings.max_pixels if settings.verify else None,
            "num_classes": class_ids.num_classes,
            "names": class_ids.vocabulary and class_ids.vocabulary.names,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
