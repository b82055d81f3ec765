"""Streaming evaluation: sums over images that merge, so that evaluators can share the work.

An image with a NaN among its logits scores 0, so a diverged network never looks good.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Self

import torch
from torch import Tensor

from worker.data.labels import LabelLists
from worker.objective import Objective, single_labels, unknown_objective

_BASELINE_BATCH = 256


class MeanOverImages:
    """Named sums over images, whose quotients by the number of images are reported."""

    def __init__(self, names: Iterable[str]) -> None:
        self._sums = dict.fromkeys(names, 0.0)
        self._num_images = 0

    def merge(self, other: "MeanOverImages") -> None:
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


class MeanAveragePrecision(Ranking):
    """`map@k`: the mean of AP@k over the images that have at least one label.

    With the classes ranked by falling logit, equal logits by rising class id,

        AP@k = 1 / min(k, number of labels) * sum over i = 1..k of precision(i) * relevant(i),

    where relevant(i) is 1 if the class at rank i is a label of the image, else 0, and
    precision(i) is the share of labels among ranks 1..i. Ranks past the number of classes
    hold nothing. A perfect ranking scores 1.
    """

    def __init__(self, k: int) -> None:
        assert k >= 1, k
        self._k = k
        self._name = f"map@{k}"
        super().__init__([self._name])

    def update(self, logits: Tensor, labels: LabelLists) -> None:
        num_classes = logits.shape[1]
        relevant = labels.multi_hot(num_classes, logits.device, torch.bool)
        num_labels = relevant.sum(1)
        hits = relevant.gather(1, _top_classes(logits, min(self._k, num_classes))).double()
        ranks = torch.arange(1, hits.shape[1] + 1, device=logits.device)
        precision = hits.cumsum(1) / ranks
        score = (precision * hits).sum(1) / num_labels.clamp(min=1, max=self._k)
        self._sums[self._name] += float(score[~logits.isnan().any(1)].sum())
        self._num_images += int((num_labels > 0).sum())


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


class MeanLoss(MeanOverImages):
    """`loss`: the mean over images."""

    def __init__(self) -> None:
        super().__init__(["loss"])

    def update(self, loss: Tensor | float, num_images: int) -> None:
        """Add images whose mean loss is `loss`."""
        if num_images:
            self._sums["loss"] += float(loss) * num_images
            self._num_images += num_images


class Metrics:
    """What an evaluation reports for one objective. Pickles, and merges with its like."""

    def __init__(self, ranking: Ranking) -> None:
        self._ranking = ranking
        self._loss = MeanLoss()

    def update(self, logits: Tensor, labels: LabelLists, loss: Tensor | float) -> None:
        """Add a batch. logits: (N, num_classes). loss: their mean loss."""
        self._ranking.update(logits, labels)
        self._loss.update(loss, labels.num_images)

    def merge(self, other: Self) -> None:
        """Add what another evaluator of the same metrics has seen."""
        self._ranking.merge(other._ranking)
        self._loss.merge(other._loss)

    def compute(self) -> dict[str, float]:
        return self._ranking.compute() | self._loss.compute()


def create_metrics(objective_name: str, k: int = 100) -> Metrics:
    """`map@k` and `loss` for multilabel; `top1`, `top5` and `loss` for softmax.

    Raises InputError for an unknown objective.
    """
    if objective_name == "multilabel":
        return Metrics(MeanAveragePrecision(k))
    if objective_name == "softmax":
        return Metrics(TopKAccuracy((1, 5)))
    raise unknown_objective(objective_name)


def frequency_baseline(
    objective: Objective,
    label_counts: Tensor,
    num_train_samples: int,
    labels: Iterable[Sequence[int]],
    k: int = 100,
) -> dict[str, float]:
    """The metrics of predicting each class's training frequency for every image.

    What a network must beat to have learned anything from pixels.
    label_counts: int64 (num_classes,) of the training set. labels: of the evaluated images.
    """
    # A class seen never or always counts as half an image from the end: logits stay finite.
    counts = label_counts.double().clamp(0.5, num_train_samples - 0.5)
    frequency = counts / num_train_samples
    logits = (frequency.logit() if objective.name == "multilabel" else frequency.log()).float()
    metrics = create_metrics(objective.name, k)
    rows = iter(labels)
    while chunk := list(islice(rows, _BASELINE_BATCH)):
        lists = LabelLists.from_lists(chunk)
        same = logits.expand(len(chunk), -1)
        metrics.update(same, lists, objective.loss(same, lists))
    return metrics.compute()


def _top_classes(logits: Tensor, k: int) -> Tensor:
    """int64 (N, k): the classes by falling logit, equal logits by rising id.

    torch.topk breaks ties as it likes, so logits become integers that hold the class id in their
    lower half: the bits of a float, those below the sign flipped where it is negative, sort as
    the float does.
    """
    # Adding 0 turns -0.0, which has other bits, into 0.0.
    bits = (logits.float() + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    lower_ids_first = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    return ((ordered << 32) + lower_ids_first).topk(k, dim=1).indices
