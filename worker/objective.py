"""What the network's logits are trained towards."""

from typing import Literal, Protocol

from torch import Tensor
from torch.nn import functional as F

from model.errors import InputError
from worker.data.labels import LabelLists
from worker.multilabel_loss import multilabel_loss

ObjectiveName = Literal["multilabel", "softmax"]


class Objective(Protocol):
    """A loss over logits (N, num_classes) of any float type, computed in float32."""

    name: ObjectiveName
    num_classes: int

    def loss(self, logits: Tensor, labels: LabelLists) -> Tensor:
        """float32 scalar: the mean over the N images, 0 for none."""
        ...


class Multilabel:
    """Sigmoid cross-entropy of every class, summed over classes (Xception on JFT).

    label_weights: float32 (num_classes,), not negative: a factor on each class's term of the
    sum; None weighs every class 1.
    """

    name: ObjectiveName = "multilabel"

    def __init__(self, num_classes: int, label_weights: Tensor | None = None) -> None:
        assert label_weights is None or label_weights.shape == (num_classes,), num_classes
        self.num_classes = num_classes
        self._label_weights = label_weights

    def loss(self, logits: Tensor, labels: LabelLists) -> Tensor:
        """Differentiates once only."""
        _check_shape(logits, labels, self.num_classes)
        if self._label_weights is not None:
            self._label_weights = self._label_weights.to(logits.device)
        total = multilabel_loss(logits, labels, self._label_weights)
        return total / max(1, labels.num_images)


class Softmax:
    """Cross-entropy against the one class of each image.

    label_smoothing: share of the target spread evenly over all classes (Szegedy et al.,
    arXiv 1512.00567, section 7).
    """

    name: ObjectiveName = "softmax"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise InputError(
                f"objective.label_smoothing={label_smoothing} leaves no weight on the label: "
                "choose 0 or more, less than 1"
            )
        self.num_classes = num_classes
        self._label_smoothing = label_smoothing

    def loss(self, logits: Tensor, labels: LabelLists) -> Tensor:
        """Raises InputError unless every image has exactly one label."""
        _check_shape(logits, labels, self.num_classes)
        total = F.cross_entropy(
            logits.float(),
            single_labels(labels).to(logits.device),
            reduction="sum",
            label_smoothing=self._label_smoothing,
        )
        return total / max(1, labels.num_images)


def create_objective(
    name: str,
    num_classes: int,
    label_smoothing: float | None = None,
    label_weights: Tensor | None = None,
) -> Objective:
    """label_smoothing is for softmax only, label_weights (see `Multilabel`) for multilabel only.

    Raises InputError for an unknown name and for what the objective has no use for.
    """
    if name == "softmax":
        if label_weights is not None:
            raise InputError(
                "training.label_weights has no meaning for the softmax objective: remove it or "
                "choose multilabel"
            )
        return Softmax(num_classes, label_smoothing or 0.0)
    if name != "multilabel":
        raise unknown_objective(name)
    if label_smoothing:
        raise InputError(
            f"objective.label_smoothing={label_smoothing} has no meaning for the multilabel "
            "objective: leave it at 0 or choose softmax"
        )
    return Multilabel(num_classes, label_weights)


def single_labels(labels: LabelLists) -> Tensor:
    """int64 (N,): the label of each image. Raises InputError unless each has exactly one."""
    wrong = (labels.counts() != 1).nonzero()
    if wrong.numel():
        count = int(labels.counts()[wrong[0, 0]])
        raise InputError(
            f"objective=softmax needs one label per image, but an image has {count}: choose "
            "objective=multilabel or mend the data"
        )
    return labels.ids


def unknown_objective(name: str) -> InputError:
    return InputError(f"objective={name!r} is not known: choose multilabel or softmax")


def _check_shape(logits: Tensor, labels: LabelLists, num_classes: int) -> None:
    assert logits.shape == (labels.num_images, num_classes), (logits.shape, labels.num_images)
