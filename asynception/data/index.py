"""A manifest for shards that exist already."""

import os
import re
from collections import Counter
from pathlib import Path

from asynception.data.pack_plan import Report
from asynception.data.parallel import map_unordered
from asynception.data.scan import ScanTask, ShardScan, scan_shard
from asynception.data.shard_set import ShardSet
from asynception.data.shard_writer import count_array, write_atomically
from asynception.data.vocabulary import Vocabulary
from model.errors import InputError
from worker.data.manifest import SUFFIX, Manifest, ShardEntry


def index_shards(
    shards: ShardSet,
    out: Path,
    *,
    vocabulary: Vocabulary | None = None,
    num_classes: int | None = None,
    num_workers: int = 1,
    report: Report = lambda stage, done, total: None,
) -> tuple[Path, Manifest]:
    """Read the shards, and write their manifest: `out` if that ends in .manifest.json, else in it.

    Local shards are named relative to the manifest, so it must lie beside or above them; that of
    remote ones says where they are, and may lie anywhere.
    Raises InputError for shards with which anything is wrong.
    """
    path = out if out.name.endswith(SUFFIX) else out / (_split(shards) + SUFFIX)
    names, base = _names(shards, path)
    limit = len(vocabulary.names) if vocabulary is not None else num_classes
    tasks = (
        ScanTask(shards.folder, name, index, limit, sha256=True, max_problems=1)
        for index, name in enumerate(shards.names)
    )
    entries: dict[int, ShardEntry] = {}
    label_counts: Counter[int] = Counter()
    lengths: set[int] = set()
    for scan in map_unordered(scan_shard, tasks, num_workers):
        entries[scan.index] = _entry(scan, names[scan.index])
        label_counts.update(scan.label_counts)
        lengths.update(scan.labels_per_sample)
        report("reading shards", len(entries), len(names))
    if not lengths:
        raise InputError(f"{shards.location}: holds no samples: name shards with images and labels")
    manifest = Manifest(
        tuple(entries[index] for index in range(len(names))),
        count_array(label_counts, limit),
        min(lengths),
        max(lengths),
        None if vocabulary is None else vocabulary.names,
        base,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, manifest.to_json().encode())
    return path, manifest


def _entry(scan: ShardScan, name: str) -> ShardEntry:
    if scan.problems:
        raise InputError(
            f"{scan.problems[0].text}: mend or leave out the shard; `asynception data check` lists "
            "all that is wrong"
        )
    assert scan.num_bytes is not None
    assert scan.sha256 is not None
    return ShardEntry(name, scan.num_samples, scan.num_bytes, scan.sha256)


def _split(shards: ShardSet) -> str:
    """What all names begin with, like `train` for train-0000.tar."""
    found = {
        re.sub(r"[-_.]?\d*\.(tar|tar\.gz|tgz)$", "", os.path.basename(n)) for n in shards.names
    }
    split = found.pop()
    if found or not split:
        raise InputError(
            f"{shards.location}: names of shards don't begin alike, so the manifest has no name: "
            f"give --out FOLDER/NAME{SUFFIX}, or shards of one split"
        )
    return split


def _names(shards: ShardSet, path: Path) -> tuple[list[str], str | None]:
    """The names of shards in the manifest at `path`, and its base."""
    if shards.is_remote:
        return list(shards.names), shards.folder
    folder = os.path.realpath(path.parent)
    names = [
        os.path.relpath(os.path.join(os.path.realpath(shards.folder), name), folder)
        for name in shards.names
    ]
    if any(name.split("/")[0] == ".." for name in names):
        raise InputError(
            f"--out={path}: lies neither beside nor above {shards.folder}, so names of shards "
            f"couldn't be relative to it: give --out {shards.folder}"
        )
    return names, None
