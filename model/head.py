"""From feature maps to class scores."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import InputError


class Head(nn.Module):
    """Global average pool, dropout, dense.

    Takes (N, num_features, H, W) and gives (N, num_classes) logits. Softmax or sigmoid belongs
    to the objective, so both kinds of training share this head.

    Raises InputError if `num_classes` is below 1.
    """

    def __init__(self, num_features: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        if num_classes < 1:
            raise InputError(
                f"num_classes = {num_classes} leaves the model without outputs: make it at least 1"
            )
        self.dropout = dropout
        self.dense = nn.Linear(num_features, num_classes)

    def forward(self, maps: Tensor) -> Tensor:
        features = maps.mean(dim=(2, 3))
        if self.dropout > 0:
            features = F.dropout(features, self.dropout, self.training)
        logits: Tensor = self.dense(features)
        return logits

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"
