"""Everything that is wrong with a set of shards, as far as reading it can tell."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from asynception.data.key_hashes import KeyHashes
from asynception.data.pack_plan import Report
from asynception.data.parallel import map_unordered
from asynception.data.scan import (
    DIFFERENT,
    REPEATED,
    Problem,
    ScanTask,
    ShardScan,
    find_keys,
    scan_shard,
)
from asynception.data.shard_set import ShardSet
from asynception.data.vocabulary import Vocabulary
from worker.data.manifest import Manifest, ShardEntry


@dataclass
class CheckResult:
    """What was read, and what is wrong with it."""

    num_shards: int = 0
    """Those that could be read, as far as they could."""
    num_samples: int = 0
    num_bytes: int = 0
    """Of the shards as they are stored."""
    label_counts: Counter[int] = field(default_factory=Counter)
    labels_per_sample: Counter[int] = field(default_factory=Counter)
    problem_counts: Counter[str] = field(default_factory=Counter)
    """All problems, by kind."""
    problems: list[Problem] = field(default_factory=list)
    """The first of them, in the order of shards."""


def check_shards(
    shards: ShardSet,
    *,
    vocabulary: Vocabulary | None = None,
    num_classes: int | None = None,
    max_pixels: int | None = None,
    sha256: bool = False,
    num_workers: int = 1,
    max_problems: int = 50,
    report: Report = lambda stage, done, total: None,
) -> CheckResult:
    """Reads every shard, and goes on after each problem.

    num_classes: labels must be below it; without it and a vocabulary, the manifest tells.
    max_pixels: decode the images, and count larger ones as corrupt; None leaves them alone.
    sha256: compare the files with their manifest's hashes; sizes and counts always are.
    Raises InputError only for a process that was killed.
    """
    limit = len(vocabulary.names) if vocabulary is not None else num_classes
    if limit is None and shards.manifest is not None:
        limit = len(shards.manifest.label_counts)
    tasks = (
        ScanTask(shards.folder, name, index, limit, max_pixels, sha256, max_problems)
        for index, name in enumerate(shards.names)
    )
    result = CheckResult()
    ordered: list[tuple[int, Problem]] = []
    with KeyHashes() as hashes:
        for done, scan in enumerate(map_unordered(scan_shard, tasks, num_workers), 1):
            _compare(scan, shards.entry(scan.index))
            _count(result, scan)
            hashes.add(scan.index, scan.key_hashes)
            ordered += [(scan.index, problem) for problem in scan.problems]
            ordered = sorted(ordered, key=lambda pair: pair[0])[:max_problems]
            report("reading shards", done, len(shards.names))
        result.problems = [problem for _, problem in ordered]
        _find_repeated(shards, hashes, result, max_problems)
    _check_set(shards, vocabulary, result)
    result.problems = result.problems[:max_problems]
    return result


def _compare(scan: ShardScan, entry: ShardEntry | None) -> None:
    if entry is None or scan.num_bytes is None:
        return
    for what, found, said in [
        ("bytes", scan.num_bytes, entry.num_bytes),
        ("samples", scan.num_samples, entry.num_samples),
        ("the sha256", scan.sha256 or entry.sha256, entry.sha256),
    ]:
        if found != said:
            text = f"{scan.name}: has {found} {what}, and its manifest says {said}"
            if what == "the sha256":
                text = f"{scan.name}: its sha256 is {found}, and its manifest says {said}"
            scan.problem_counts[DIFFERENT] += 1
            scan.problems.append(Problem(DIFFERENT, text))


def _count(result: CheckResult, scan: ShardScan) -> None:
    result.num_shards += scan.num_bytes is not None
    result.num_bytes += scan.num_bytes or 0
    result.num_samples += scan.num_samples
    result.label_counts.update(scan.label_counts)
    result.labels_per_sample.update(scan.labels_per_sample)
    result.problem_counts.update(scan.problem_counts)


def _find_repeated(
    shards: ShardSet, hashes: KeyHashes, result: CheckResult, max_problems: int
) -> None:
    """Counts by hash; those that are to be shown are looked up, so that they can be named."""
    repeated = hashes.repeated()
    for found, places in islice(repeated, max(0, max_problems - len(result.problems))):
        names = [shards.names[place] for place in places]
        keys = [find_keys(shards.folder, name, frozenset([found])) for name in names]
        for key in sorted(set().union(*keys)):
            holders = [name for name, has in zip(names, keys, strict=True) if key in has]
            if len(holders) > 1:
                text = f"{holders[0]}: key {key!r} is also in {', '.join(holders[1:])}"
                result.problem_counts[REPEATED] += 1
                result.problems.append(Problem(REPEATED, text))
    result.problem_counts[REPEATED] += sum(1 for _ in repeated)


def _check_set(shards: ShardSet, vocabulary: Vocabulary | None, result: CheckResult) -> None:
    """What only shows for all shards together."""
    if shards.manifest is None:
        return
    texts = list(_unlisted(shards))
    names = shards.manifest.class_names
    if vocabulary is not None and names is not None and names != vocabulary.names:
        texts.append("its class_names aren't those of the vocabulary")
    if not +result.problem_counts:
        texts += _wrong_sums(shards.manifest, result)
    for text in texts:
        result.problem_counts[DIFFERENT] += 1
        result.problems.append(Problem(DIFFERENT, f"{shards.location}: {text}"))


def _unlisted(shards: ShardSet) -> list[str]:
    """Shards that lie beside those of the manifest and are named like them."""
    if shards.is_remote:
        return []
    listed = set(shards.names)
    patterns = {re.sub(r"\d+", r"\\d+", re.escape(name)) for name in listed if "/" not in name}
    wanted = re.compile("|".join(sorted(patterns)) or r"(?!)")
    others = sorted(set(os.listdir(shards.folder)) - listed) if os.path.isdir(shards.folder) else []
    return [
        f"{name} isn't listed, so it wouldn't be read" for name in others if wanted.fullmatch(name)
    ]


def _wrong_sums(manifest: Manifest, result: CheckResult) -> list[str]:
    texts = []
    lengths = result.labels_per_sample
    limits = (min(lengths, default=0), max(lengths, default=0))
    said = (manifest.fewest_labels, manifest.most_labels)
    if limits != said:
        texts.append(
            f"says {said[0]} to {said[1]} labels a sample; found {limits[0]} to {limits[1]}"
        )
    counts = np.zeros(len(manifest.label_counts), np.int64)
    counts[list(result.label_counts)] = list(result.label_counts.values())
    wrong = np.flatnonzero(counts != manifest.label_counts)
    if len(wrong):
        first = int(wrong[0])
        texts.append(
            f"counts of {len(wrong)} labels are wrong, such as {manifest.label_counts[first]} "
            f"instead of {counts[first]} for label {first}"
        )
    return texts
