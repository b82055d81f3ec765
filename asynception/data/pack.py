"""Packing: a plan, its shards in any number of processes, their manifests; resumable."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from asynception.data.journal import Journal, ShardRecord, SkippedSample, locked
from asynception.data.listing import Listing
from asynception.data.pack_plan import (
    PackSettings,
    Plan,
    PlannedSample,
    Report,
    SplitPlan,
    make_plan,
)
from asynception.data.parallel import map_unordered
from asynception.data.shard_writer import (
    PART_SUFFIX,
    ShardFile,
    check_split,
    count_array,
    refuse_existing,
    shard_name,
    write_atomically,
    write_manifest,
)
from asynception.data.vocabulary import Vocabulary
from model.errors import InputError
from worker.data.manifest import Manifest

LABELS_NAME = "labels.txt"
_NO_LABELS = 2**31


@dataclass(frozen=True)
class PackResult:
    """What a pack has written."""

    manifests: dict[str, Manifest]
    """By split."""
    left_out: Counter[str]
    """What isn't in the shards, in words, and how often."""
    corrupt: tuple[SkippedSample, ...]
    """Images that couldn't be decoded."""
    num_resumed: int
    """Shards that an earlier run had finished."""


@dataclass(frozen=True)
class ShardTask:
    """All that a process must know to write one shard."""

    split: str
    index: int
    plan: Path
    offset: int
    num_samples: int
    root: str
    out: Path
    max_pixels: int | None
    """Limit of an image that is verified; None to verify none."""


def pack(
    listing: Listing,
    out: Path,
    settings: PackSettings,
    *,
    vocabulary: Vocabulary | None = None,
    num_workers: int = 1,
    report: Report = lambda stage, done, total: None,
) -> PackResult:
    """Write SPLIT-000000.tar, ..., SPLIT.manifest.json and labels.txt into `out`.

    The bytes are determined by the images, the listing's content, the vocabulary and the
    settings; not by the order of the listing, the number of workers, or interruptions. Repeated
    after one, it makes the plan again and goes on with the shards that are missing. Temporary
    files lie in `out`/.pack-SPLIT. Raises InputError.
    """
    _check(listing, settings, vocabulary)
    work = out / f".pack-{settings.split}"
    journal = work / "journal.jsonl"
    if not journal.exists():
        for split in _splits(settings):
            refuse_existing(out, split)
    work.mkdir(parents=True, exist_ok=True)
    with locked(work):
        _clear(work, out, settings)
        try:
            plan = make_plan(listing, vocabulary, settings, work, report)
            result = _write(plan, out, settings, journal, num_workers, report)
        except BaseException:
            if not journal.exists():
                shutil.rmtree(work)
            raise
        shutil.rmtree(work)
    return result


def write_shard(task: ShardTask) -> ShardRecord:
    """Writes one shard. Raises InputError when an image can't be read or isn't as planned."""
    lengths = [_NO_LABELS]
    skipped = []
    shard = ShardFile(task.out / shard_name(task.split, task.index))
    try:
        for sample in _planned(task):
            image = _read_image(task.root, sample)
            reason = _why_corrupt(image, task.max_pixels)
            if reason is None:
                shard.add(sample.encoded(), image)
                lengths.append(len(sample.labels))
            else:
                skipped.append(SkippedSample(sample.key, reason, sample.labels))
        entry = shard.close()
    finally:
        shard.discard()
    most = max(lengths[1:], default=0)
    return ShardRecord(task.split, task.index, entry, min(lengths), most, tuple(skipped))


def _check(listing: Listing, settings: PackSettings, vocabulary: Vocabulary | None) -> None:
    for split in _splits(settings):
        check_split(split)
    if settings.val_share and settings.val_split == settings.split:
        raise InputError(
            f"--val-split={settings.val_split!r} is --split as well, so held-out samples would be "
            "mixed in: choose another"
        )
    made = vocabulary is None and listing.label_kind != "ids"
    if settings.min_count > 1 and not made:
        raise InputError(
            f"--min-count={settings.min_count} has no effect on a vocabulary or ids that are "
            "given: remove it"
        )
    if settings.num_classes is not None and listing.label_kind == "names":
        raise InputError(
            f"--num-classes={settings.num_classes} has no effect on names: remove it, or give "
            "--label-kind ids"
        )


def _splits(settings: PackSettings) -> list[str]:
    return [settings.split, *([settings.val_split] if settings.val_share else [])]


def _clear(work: Path, out: Path, settings: PackSettings) -> None:
    """Remove what a killed run was in the middle of."""
    for split in _splits(settings):
        for part in out.glob(f".{split}-*{PART_SUFFIX}"):
            part.unlink()
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("journal.jsonl", "lock"):
            path.unlink()


def _write(
    plan: Plan,
    out: Path,
    settings: PackSettings,
    journal_path: Path,
    num_workers: int,
    report: Report,
) -> PackResult:
    _check_vocabulary(plan, out)
    remove = f"{journal_path.parent} and {' and '.join(f'{s}-*.tar' for s in _splits(settings))}"
    with Journal(journal_path, plan.fingerprint, remove) as journal:
        if plan.vocabulary is not None:
            write_atomically(out / LABELS_NAME, plan.vocabulary.to_text())
        finished = [record for record in journal.records if _is_there(out, record)]
        tasks = _tasks(plan, out, settings, {(each.split, each.index) for each in finished})
        records = _run(
            plan,
            settings,
            journal,
            finished,
            map_unordered(write_shard, tasks, num_workers),
            report,
        )
    by_split = {
        split.split: [r for r in records if r.split == split.split] for split in plan.splits
    }
    manifests = {
        split.split: _manifest(plan, split, by_split[split.split]) for split in plan.splits
    }
    for split, manifest in manifests.items():
        write_manifest(out, split, manifest)
    corrupt = tuple(chain.from_iterable(record.skipped for record in records))
    left_out = +(plan.left_out + Counter({"corrupt images": len(corrupt)}))
    return PackResult(manifests, left_out, corrupt, len(finished))


def _run(
    plan: Plan,
    settings: PackSettings,
    journal: Journal,
    finished: Sequence[ShardRecord],
    new: Iterator[ShardRecord],
    report: Report,
) -> list[ShardRecord]:
    """All records, by split and index."""
    total = sum(split.num_samples for split in plan.splits)
    records: list[ShardRecord] = []
    done = num_corrupt = 0
    for number, record in enumerate(chain(finished, new)):
        if number >= len(finished):
            journal.add(record)
        records.append(record)
        num_corrupt += len(record.skipped)
        if num_corrupt > settings.max_corrupt:
            last = record.skipped[-1]
            raise InputError(
                f"{last.key}: corrupt like {num_corrupt - 1} others ({last.reason}), more than "
                f"--max-corrupt={settings.max_corrupt}: mend the images, or raise it to leave "
                "them out"
            )
        done += record.entry.num_samples + len(record.skipped)
        report("writing shards", done, total)
    return sorted(records, key=lambda record: (record.split, record.index))


def _check_vocabulary(plan: Plan, out: Path) -> None:
    path = out / LABELS_NAME
    if plan.vocabulary is None or not path.exists():
        return
    if path.read_bytes() != plan.vocabulary.to_text():
        raise InputError(
            f"{path}: is the vocabulary of other shards, and ids would contradict each other: give "
            f"--labels {path}, or another --out"
        )


def _is_there(out: Path, record: ShardRecord) -> bool:
    path = out / record.entry.name
    return path.exists() and path.stat().st_size == record.entry.num_bytes


def _tasks(
    plan: Plan, out: Path, settings: PackSettings, finished: set[tuple[str, int]]
) -> Iterator[ShardTask]:
    max_pixels = settings.max_pixels if settings.verify else None
    for split in plan.splits:
        for index, shard in enumerate(split.shards):
            if (split.split, index) not in finished:
                yield ShardTask(split.split, index, split.path, *shard, plan.root, out, max_pixels)


def _planned(task: ShardTask) -> Iterator[PlannedSample]:
    with open(task.plan, "rb") as file:
        file.seek(task.offset)
        for _ in range(task.num_samples):
            yield PlannedSample(*json.loads(file.readline()))


def _read_image(root: str, sample: PlannedSample) -> bytes:
    path = os.path.join(root, sample.path)
    try:
        with open(path, "rb") as file:
            image = file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(image) != sample.num_bytes:
        raise InputError(
            f"{path}: had {sample.num_bytes} bytes when packing began, and now {len(image)}: let "
            "nothing write there, and begin anew"
        )
    return image


def _why_corrupt(image: bytes, max_pixels: int | None) -> str | None:
    if max_pixels is None:
        return None
    from asynception.data.decoding import why_corrupt

    return why_corrupt(image, max_pixels)


def _manifest(plan: Plan, split: SplitPlan, records: Sequence[ShardRecord]) -> Manifest:
    counts = Counter(split.label_counts)
    for skipped in chain.from_iterable(record.skipped for record in records):
        counts.subtract(skipped.labels)
    if not any(record.entry.num_samples for record in records):
        raise InputError(f"{plan.root}: all images of {split.split} are corrupt, nothing is left")
    return Manifest(
        tuple(record.entry for record in records),
        count_array(counts, plan.num_classes),
        min(record.fewest_labels for record in records),
        max(record.most_labels for record in records),
        None if plan.vocabulary is None else plan.vocabulary.names,
    )
