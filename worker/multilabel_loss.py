"""Sigmoid cross-entropy of logits with sparse targets, in one matrix of memory.

With y 1 where an image carries a class and 0 elsewhere, the loss of one logit x is

    softplus(x) - y x,   which is   softplus(x) for y = 0,   softplus(-x) for y = 1,

and its gradient is sigmoid(x) - y. Both are computed for y = 0 everywhere, then overwritten at
the labels: no dense target is built, nothing cancels, and a class that is named twice for one
image counts once. softplus and sigmoid neither overflow nor lose small values, so the loss is
finite wherever the exact one is, infinite logits of the right sign included.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from worker.data.labels import LabelLists


def multilabel_loss(logits: Tensor, labels: LabelLists, weights: Tensor | None = None) -> Tensor:
    """float32 scalar: the sum over images and classes c of weights[c] (softplus(x) - y x).

    logits: (N, num_classes), any float type; computed in float32. weights: float32
    (num_classes,) on the logits' device; None weighs every class 1. NaN logits give NaN. Besides
    the logits nothing of their size outlives the forward pass. Differentiates once only.
    """
    rows, ids = labels.rows().to(logits.device), labels.ids.to(logits.device)
    loss: Tensor = _MultilabelLoss.apply(logits, rows, ids, weights)  # type: ignore[no-untyped-call]
    return loss


class _MultilabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Tensor, ids: Tensor, weights: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(logits, rows, ids, weights)
        losses = F.softplus(logits.float())
        losses[rows, ids] = F.softplus(-logits[rows, ids].float())
        if weights is not None:
            losses *= weights
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the multilabel loss has no second derivative (create_graph=True)")
        logits, rows, ids, weights = ctx.saved_tensors
        gradient = torch.sigmoid(logits.float())
        gradient[rows, ids] = -torch.sigmoid(-logits[rows, ids].float())
        gradient *= scale if weights is None else scale * weights
        return gradient.to(logits.dtype), None, None, None
