"""What a run must know of its data before it starts."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import InputError
from worker.data.source import ImageSource, KnownLabels


@dataclass(frozen=True)
class DataSummary:
    num_samples: int
    shard_sizes: tuple[int, ...]
    num_classes: int
    label_counts: Tensor
    """int64 (num_classes,): the samples that carry each class."""


def summarize(source: ImageSource, num_classes: int | None) -> DataSummary:
    """Count samples and labels, and check every label, without reading images.

    num_classes: None takes as many as the source names, or else the largest label plus one.
    Raises InputError for a label that is negative or not below num_classes.
    """
    if (known := source.known_labels) is not None:
        return _summary(source, _checked_counts(known, num_classes))
    counts = np.zeros(num_classes or 0, np.int64)
    for shard, num_samples in enumerate(source.shard_sizes):
        labels = [source.labels(shard, index) for index in range(num_samples)]
        ids = np.array([label for sample in labels for label in sample], np.int64)
        if ids.size and (ids.min() < 0 or (num_classes is not None and ids.max() >= num_classes)):
            raise _outside(source, shard, labels, num_classes)
        counts = _sum_padded(counts, np.bincount(ids))
    if num_classes is None and source.class_names is not None:
        counts = _sum_padded(counts, np.zeros(len(source.class_names), np.int64))
    return _summary(source, counts)


def _checked_counts(known: KnownLabels, num_classes: int | None) -> NDArray[np.int64]:
    counts = known.counts
    if num_classes is None:
        return counts
    if counts[num_classes:].any():
        label = int(np.flatnonzero(counts)[-1])
        raise InputError(
            f"the set has samples with the label {label}, but data.num_classes="
            f"{num_classes} allows 0 to {num_classes - 1}: raise data.num_classes"
        )
    return _sum_padded(counts[:num_classes], np.zeros(num_classes, np.int64))


def _summary(source: ImageSource, counts: NDArray[np.int64]) -> DataSummary:
    return DataSummary(
        num_samples=sum(source.shard_sizes),
        shard_sizes=source.shard_sizes,
        num_classes=len(counts),
        label_counts=torch.from_numpy(counts),
    )


def _sum_padded(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    total = np.zeros(max(len(left), len(right)), np.int64)
    total[: len(left)] += left
    total[: len(right)] += right
    return total


def _outside(
    source: ImageSource, shard: int, labels: list[tuple[int, ...]], num_classes: int | None
) -> InputError:
    """The error that names the first bad label of the shard."""
    index, label = next(
        (index, label)
        for index, sample in enumerate(labels)
        for label in sample
        if label < 0 or (num_classes is not None and label >= num_classes)
    )
    key = source.read(shard, index).key
    if label < 0:
        return InputError(f"sample {key!r} has the label {label}: number the classes from 0")
    return InputError(
        f"sample {key!r} has the label {label}, but data.num_classes={num_classes} allows 0 to "
        f"{num_classes - 1 if num_classes else 0}: raise data.num_classes or mend the label"
    )
