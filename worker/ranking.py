"""Streaming measures of how logits rank the classes: sums over images, which merge.

An image with a NaN among its logits scores 0, so a diverged network never looks good.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from worker.data.labels import LabelLists
from worker.objective import single_labels


class MeanOverImages:
    """Named sums over images, whose quotients by the number of images are reported."""

    def __init__(self, names: Iterable[str]) -> None:
        self._sums = dict.fromkeys(names, 0.0)
        self._num_images = 0

    def merge(self, other: Self) -> None:
        """Add what another of the same names has seen."""
        assert other._sums.keys() == self._sums.keys(), (self._sums, other._sums)
        for name, value in other._sums.items():
            self._sums[name] += value
        self._num_images += other._num_images

    def compute(self) -> dict[str, float]:
        """The means by name; NaN before the first image that counts."""
        return {
            name: value / self._num_images if self._num_images else math.nan
            for name, value in self._sums.items()
        }


class Ranking(MeanOverImages, ABC):
    """The mean of a score of how an image's logits rank the classes."""

    @abstractmethod
    def update(self, logits: Tensor, labels: LabelLists) -> None:
        """Add N images. logits: (N, num_classes), any float type and device."""


@dataclass(frozen=True, eq=False)
class MapDefinition:
    """What MAP@k looks at; see `MeanAveragePrecision`."""

    k: int = 100
    """Best predictions of each image that count."""
    weights: Tensor | None = None
    """float32 (num_classes,), none negative, some positive; None weighs every class 1."""
    classes: Tensor | None = None
    """int64, rising: the ids of the subset; None takes all classes."""

    def __post_init__(self) -> None:
        assert self.k >= 1, self.k

    def class_weights(self, num_classes: int) -> Tensor:
        """float64 (num_classes,): 0 outside the subset."""
        weights = torch.ones(num_classes) if self.weights is None else self.weights
        assert weights.shape == (num_classes,), (weights.shape, num_classes)
        if self.classes is None:
            return weights.double()
        inside = torch.zeros(num_classes, dtype=torch.float64)
        inside[self.classes] = weights[self.classes].double()
        return inside


class MeanAveragePrecision(Ranking):
    """`map@k`: the mean of AP@k over the images whose labels carry weight.

    Xception (arXiv 1610.02357, section 4.1) reports MAP@100 on FastEval14k, a subset of JFT's
    classes, each "weighted" by how common it is, but publishes neither weights nor formula: this
    is our reading. Classes outside the subset are dropped first, from predictions and labels
    alike. With the rest ranked by falling logit, c(i) the class at rank i, w its weight, and an
    image's L labels,

        AP@k = sum over i = 1..k of w(c(i)) relevant(i) precision(i)
               / sum of the min(k, L) largest weights among the L labels,

    where relevant(i) is 1 if c(i) is a label of the image, else 0, and precision(i) is the
    share of labels among ranks 1..i, which weights don't touch. Equal weights give the usual
    AP@k, whose denominator is min(k, L). A perfect ranking (labels first, and the heaviest of
    them first where k < L) scores 1; nothing scores more.

    - Ties: equal logits (compared in float32; -0 equals 0) rank by rising class id.
    - Fewer than k labels: the denominator has L terms, so that a perfect ranking still scores 1.
    - Fewer than k ranked classes: ranks past the last hold nothing.
    - No label, no label inside the subset, or only labels of weight 0: the denominator is 0, and
      the image doesn't count, whatever was predicted.
    - A class of weight 0 scores nothing itself, but takes up its rank, and counts in precision
      where it is a label. (To have a class ignored, leave it out of the subset.)
    - A class named twice among an image's labels is one label.
    - A NaN among the image's logits, even outside the subset: it scores 0, and counts.

    On the logits' device the classes are ranked; the host does the rest with k numbers an image.
    """

    def __init__(self, definition: MapDefinition) -> None:
        self._definition = definition
        self._name = f"map@{definition.k}"
        super().__init__([self._name])

    def update(self, logits: Tensor, labels: LabelLists) -> None:
        k, weights = self._definition.k, self._definition.class_weights(logits.shape[1])
        ranked = self._ranked(logits).cpu()
        is_ranked = ~logits.isnan().any(1).cpu()
        cells = _cells(labels, logits.shape[1])
        best = _best_sums(cells, weights, labels.num_images, k)
        hits = _contained(ranked, cells, logits.shape[1]).double()
        precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
        scores = (weights[ranked] * hits * precision).sum(1)
        counts = best > 0
        self._sums[self._name] += float((scores / best)[counts & is_ranked].sum())
        self._num_images += int(counts.sum())

    def _ranked(self, logits: Tensor) -> Tensor:
        """int64 (N, at most k): each image's best classes of the subset, best first."""
        k, classes = self._definition.k, self._definition.classes
        if classes is None:
            return _top_classes(logits, min(k, logits.shape[1]))
        classes = classes.to(logits.device)
        return classes[_top_classes(logits.index_select(1, classes), min(k, len(classes)))]


class TopKAccuracy(Ranking):
    """`topK` for each K: the share of images whose one label is among the K highest logits.

    Equal logits rank by rising class id.
    """

    def __init__(self, ks: Sequence[int]) -> None:
        self._ks = tuple(ks)
        super().__init__(f"top{k}" for k in self._ks)

    def update(self, logits: Tensor, labels: LabelLists) -> None:
        """Raises InputError unless every image has exactly one label."""
        label = single_labels(labels).to(logits.device)[:, None]
        own = logits.gather(1, label)
        lower_id = torch.arange(logits.shape[1], device=logits.device) < label
        num_ahead = ((logits > own) | ((logits == own) & lower_id)).sum(1)
        is_ranked = ~logits.isnan().any(1)
        for k in self._ks:
            self._sums[f"top{k}"] += int(((num_ahead < k) & is_ranked).sum())
        self._num_images += labels.num_images


def _cells(labels: LabelLists, num_classes: int) -> Tensor:
    """int64, rising, on the host: image * num_classes + class of each label, each once."""
    cells = (labels.rows() * num_classes + labels.ids).cpu()
    unique: Tensor = cells.unique()  # type: ignore[no-untyped-call]
    return unique


def _contained(ranked: Tensor, cells: Tensor, num_classes: int) -> Tensor:
    """bool (N, k): whether the class at each rank is a label of its image."""
    wanted = torch.arange(len(ranked))[:, None] * num_classes + ranked
    end = torch.tensor([len(ranked) * num_classes])  # larger than any cell
    padded = torch.cat([cells, end])
    return padded[torch.searchsorted(padded, wanted)] == wanted


def _best_sums(cells: Tensor, weights: Tensor, num_images: int, k: int) -> Tensor:
    """float64 (N,): the sum of the k largest weights among each image's labels, all if fewer."""
    num_classes = len(weights)
    values = weights[cells % num_classes]
    rows = cells // num_classes
    # By image, and there by falling weight; `rows` is in order already and stays so.
    by_weight = values.argsort(descending=True, stable=True)
    values = values[by_weight[rows[by_weight].argsort(stable=True)]]
    position = torch.arange(len(rows)) - torch.searchsorted(rows, rows)
    kept = position < k
    sums = torch.zeros(num_images, dtype=torch.float64)
    return sums.index_add_(0, rows[kept], values[kept])


def _top_classes(logits: Tensor, k: int) -> Tensor:
    """int64 (N, k): the columns by falling logit, equal logits by rising column.

    torch.topk breaks ties as it likes, so logits become integers that hold the column in their
    lower half: the bits of a float, those below the sign flipped where it is negative, sort as
    the float does. In place, for that matrix has twice the logits' size.
    """
    # Adding 0 turns -0.0, which has other bits, into 0.0, and makes a copy.
    bits = (logits.float() + 0.0).view(torch.int32)
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    keys = bits.long()
    keys <<= 32
    keys += torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    return keys.topk(k, dim=1).indices
