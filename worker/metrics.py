"""What an evaluation reports: ranking measures and the loss, streamed, and a baseline for them."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Self

from torch import Tensor

from worker.data.labels import LabelLists
from worker.objective import Objective, unknown_objective
from worker.ranking import (
    MapDefinition,
    MeanAveragePrecision,
    MeanOverImages,
    Ranking,
    TopKAccuracy,
)

_BASELINE_BATCH = 256


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


def create_metrics(objective_name: str, definition: MapDefinition) -> Metrics:
    """`map@k`, as defined, and `loss` for multilabel; `top1`, `top5` and `loss` for softmax.

    Raises InputError for an unknown objective.
    """
    if objective_name == "multilabel":
        return Metrics(MeanAveragePrecision(definition))
    if objective_name == "softmax":
        return Metrics(TopKAccuracy((1, 5)))
    raise unknown_objective(objective_name)


def frequency_baseline(
    objective: Objective,
    label_counts: Tensor,
    num_train_samples: int,
    labels: Iterable[Sequence[int]],
    definition: MapDefinition,
) -> dict[str, float]:
    """The metrics of predicting each class's training frequency for every image.

    What a network must beat to have learned anything from pixels.
    label_counts: int64 (num_classes,) of the training set. labels: of the evaluated images.
    """
    # A class seen never or always counts as half an image from the end: logits stay finite.
    counts = label_counts.double().clamp(0.5, num_train_samples - 0.5)
    frequency = counts / num_train_samples
    logits = (frequency.logit() if objective.name == "multilabel" else frequency.log()).float()
    metrics = create_metrics(objective.name, definition)
    rows = iter(labels)
    while chunk := list(islice(rows, _BASELINE_BATCH)):
        lists = LabelLists.from_lists(chunk)
        same = logits.expand(len(chunk), -1)
        metrics.update(same, lists, objective.loss(same, lists))
    return metrics.compute()
