"""Measures of a state on held-out images: of its EMA, BN statistics included, or of itself."""

import torch

from model.flat import FlatModule
from ps.client import ModelState
from worker.data.lease import Lease
from worker.data.loader import BatchLoader
from worker.data.transform import normalize
from worker.metrics import create_metrics
from worker.objective import Objective

EMA_VECTORS = ("ema", "ema_statistics")
"""What a cut must hold to be evaluated."""


def load_state(flat: FlatModule, state: ModelState, *, ema: bool) -> None:
    """Give a model the averaged parameters and BN statistics of a state, or the present ones."""
    names = EMA_VECTORS if ema else ("parameters", "statistics")
    flat.parameters.copy_(state.vectors[names[0]])
    flat.statistics.copy_(state.vectors[names[1]])


class Evaluator:
    """Evaluates states on all images of a loader whose order is the stored one."""

    def __init__(
        self,
        flat: FlatModule,
        objective: Objective,
        loader: BatchLoader,
        num_samples: int,
        map_k: int,
    ) -> None:
        self._flat, self._objective, self._loader = flat, objective, loader
        self._num_samples, self._map_k = num_samples, map_k
        flat.module.eval()

    @torch.inference_mode()
    def evaluate(self, state: ModelState, *, ema: bool = True) -> dict[str, float]:
        """Metrics by name: "loss", and "map@K" or "top1" and "top5"."""
        load_state(self._flat, state, ema=ema)
        device = self._flat.parameters.device
        metrics = create_metrics(self._objective.name, self._map_k)
        for batch in self._loader.batches([Lease(0, self._num_samples)]):
            if batch.labels.num_images:
                logits = self._flat.module(normalize(batch.images.to(device)))
                metrics.update(logits, batch.labels, self._objective.loss(logits, batch.labels))
        return metrics.compute()
