"""From feature maps to class scores."""

import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from model.class_count import check_num_classes
from model.settings import Settings


class HeadSettings(Settings):
    """What can be varied between the last feature maps and the logits."""

    fc_widths: tuple[PositiveInt, ...] = ()
    """Widths of fully connected layers before the last one; the paper has [4096, 4096] on JFT."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of features dropped before the last layer; the paper has 0.5 for ImageNet."""


class Head(nn.Module):
    """Global average pool, fully connected layers with ReLU, dropout, dense.

    Takes (N, num_features, H, W) and gives (N, num_classes) logits. Softmax or sigmoid belongs
    to the objective, so both kinds of training share this head. The hidden layers, `fc1` and on,
    have biases and no batch norm: sizes are then those of the paper's JFT models.

    Raises InputError if `num_classes` is below 1.
    """

    def __init__(self, num_features: int, num_classes: int, settings: HeadSettings) -> None:
        super().__init__()
        check_num_classes(num_classes)
        self.dropout = settings.dropout
        self.num_hidden = len(settings.fc_widths)
        for number, width in enumerate(settings.fc_widths, start=1):
            self.add_module(f"fc{number}", nn.Linear(num_features, width))
            num_features = width
        self.dense = nn.Linear(num_features, num_classes)

    def forward(self, maps: Tensor) -> Tensor:
        features = pooled(maps)
        for number in range(1, self.num_hidden + 1):
            features = F.relu(getattr(self, f"fc{number}")(features), inplace=True)
        if self.dropout > 0:
            features = F.dropout(features, self.dropout, self.training)
        logits: Tensor = self.dense(features)
        return logits

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


def pooled(maps: Tensor) -> Tensor:
    """Global average pool: (N, C, H, W) to (N, C)."""
    return maps.mean(dim=(2, 3))
