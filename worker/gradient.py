"""A minibatch's gradient, computed into flat vectors."""

import torch
from torch import Tensor, nn

from model.flat import FlatModule
from worker.compute import ComputeSettings, ForwardPass
from worker.data.loader import Batch
from worker.objective import Objective
from worker.step_report import GradientSummary


class GradientComputer:
    """Forward and backward of one model on one device, over one batch or several.

    `begin`, `add` for each batch, `finish`: `flat.gradients` then holds the mean gradient by
    samples, `statistics_delta` (float32, flat) what the batches did to the BN statistics: after -
    before. What was pulled into `flat.statistics` is used up.
    compute: the defaults unless given.
    """

    def __init__(
        self,
        flat: FlatModule,
        objective: Objective,
        clip_norm: float | None,
        compute: ComputeSettings | None = None,
    ) -> None:
        self.flat = flat
        self._settings = compute or ComputeSettings()
        self._forward = ForwardPass(flat, self._settings)
        self.statistics_delta = torch.empty_like(flat.statistics)
        self._before = torch.empty_like(flat.statistics)
        self._objective = objective
        self._clip_norm = clip_norm
        self._checked = False
        self._losses: list[tuple[int, Tensor]] = []
        flat.module.train()

    def run_through(self, network: nn.Module) -> None:
        """From now on compute through `network`, which wraps the module, as DDP does."""
        self._forward = ForwardPass(self.flat, self._settings, network)

    def compute(self, batch: Batch) -> GradientSummary:
        """All three steps for one batch."""
        self.begin()
        self.add(batch)
        return self.finish()

    def begin(self) -> None:
        """Forget the last gradient."""
        self.flat.zero_gradients()
        self._before.copy_(self.flat.statistics)
        self._losses = []

    @property
    def pulled(self) -> tuple[Tensor, Tensor]:
        """Parameters and statistics as they were at `begin`, until parameters are pulled again."""
        return self.flat.parameters, self._before

    def add(self, batch: Batch) -> None:
        """Add the gradient of a batch that holds at least one image.

        Of a single batch the gradient is complete part by part as its backward pass goes on, and
        `statistics_delta` before that.

        Raises InputError if the module left its flat vectors in its first forward and backward,
        or if it was to be compiled and there is no compiler.
        """
        flat, num_samples = self.flat, batch.labels.num_images
        loss = self._objective.loss(self._forward(batch.images), batch.labels)
        torch.sub(flat.statistics, self._before, out=self.statistics_delta)
        self._losses.append((num_samples, loss.detach()))
        # In terms of the first batch's samples, so that a single one is not scaled at all.
        weight = num_samples / self._losses[0][0]
        torch.autograd.backward(loss * weight if weight != 1 else loss)
        self._check_once()

    def finish(self) -> GradientSummary:
        """Make the sum a mean, and clip it.

        NaN throughout if it, its norm, or the BN deltas are not finite somewhere.
        """
        self.share(self.num_samples)
        norm = self.bound()
        return GradientSummary(self.loss_sum / self.num_samples, norm.item())

    @property
    def num_samples(self) -> int:
        """Images of the batches since `begin`."""
        return sum(count for count, _ in self._losses)

    @property
    def loss_sum(self) -> float:
        """Of these images."""
        return float(sum(count * loss.item() for count, loss in self._losses))

    def share(self, total_samples: int) -> None:
        """Make gradients and deltas this computer's part of the mean over so many samples.

        Of the mean over its own samples, that is the whole. Zero without a batch.
        """
        if not self._losses:
            self.statistics_delta.zero_()  # the last push's, or never written
            return
        scale = total_samples / self._losses[0][0]
        if scale != 1:
            self.flat.gradients.div_(scale)
        if self.num_samples != total_samples:
            self.statistics_delta.mul_(self.num_samples / total_samples)

    def bound(self) -> Tensor:
        """Clip what is in the flat gradients; their norm before that.

        NaN throughout if it, its norm, or the BN deltas are not finite somewhere.
        """
        norm: Tensor = torch.linalg.vector_norm(self.flat.gradients)
        if not torch.isfinite(norm + self.statistics_delta.sum()):
            # Every shard then drops it. If some kept their slice, synchronous workers could end
            # up waiting for each other, each for a version that the other has yet to help with.
            self.flat.gradients.fill_(torch.nan)
        elif self._clip_norm is not None:
            self.flat.gradients.mul_((self._clip_norm / norm).clamp_(max=1.0))
        return norm

    def _check_once(self) -> None:
        if not self._checked:
            self.flat.check_views()
            self._checked = True
