"""Measures of a state on held-out images: of its EMA, BN statistics included, or of itself."""

import torch

from model.flat import FlatModule
from ps.client import ModelState
from worker.compute import ComputeSettings, ForwardPass
from worker.data.lease import Lease
from worker.data.loader import BatchLoader
from worker.metrics import create_metrics
from worker.objective import Objective
from worker.ranking import MapDefinition

EMA_VECTORS = ("ema", "ema_statistics")
"""What a cut must hold for its EMA to be evaluated."""
RAW_VECTORS = ("parameters", "statistics")
"""What it must hold besides for the parameters themselves."""


def load_state(flat: FlatModule, state: ModelState, *, ema: bool) -> None:
    """Give a model the averaged parameters and BN statistics of a state, or the present ones."""
    names = EMA_VECTORS if ema else RAW_VECTORS
    flat.parameters.copy_(state.vectors[names[0]])
    flat.statistics.copy_(state.vectors[names[1]])


class Evaluator:
    """Evaluates states on all images of a loader whose order is the stored one.

    definition: of MAP@k; softmax has no use for it.
    compute: the defaults unless given; whatever its precision, evaluations are in float32.
    """

    def __init__(
        self,
        flat: FlatModule,
        objective: Objective,
        loader: BatchLoader,
        num_samples: int,
        definition: MapDefinition,
        compute: ComputeSettings | None = None,
    ) -> None:
        self._flat, self._objective, self._loader = flat, objective, loader
        self._num_samples, self._definition = num_samples, definition
        self._forward = ForwardPass(flat, (compute or ComputeSettings()).for_evaluation)
        flat.module.eval()

    @torch.inference_mode()
    def evaluate(self, state: ModelState, *, ema: bool = True) -> dict[str, float]:
        """Metrics by name: "loss", and "map@K" or "top1" and "top5"."""
        load_state(self._flat, state, ema=ema)
        metrics = create_metrics(self._objective.name, self._definition)
        for batch in self._loader.batches([Lease(0, self._num_samples)]):
            if batch.labels.num_images:
                logits = self._forward(batch.images)
                metrics.update(logits, batch.labels, self._objective.loss(logits, batch.labels))
        return metrics.compute()
