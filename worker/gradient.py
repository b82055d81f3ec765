"""A minibatch's gradient, computed into flat vectors, and the way between host and device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.flat import FlatModule
from ps.lanes.segment import shared_zeros
from worker.compute import ComputeSettings, ForwardPass
from worker.data.loader import Batch
from worker.objective import Objective


@dataclass(frozen=True)
class GradientSummary:
    """The mean loss of a batch, and the gradient's global norm before clipping."""

    loss: float
    norm: float


class GradientComputer:
    """Forward and backward of one model on one device.

    `flat.gradients` receives the mean gradient, `statistics_delta` (float32, flat) what the batch
    did to the BN statistics: after - before. What was pulled into `flat.statistics` is used up.
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
        self._forward = ForwardPass(flat, compute or ComputeSettings())
        self.statistics_delta = torch.empty_like(flat.statistics)
        self._objective = objective
        self._clip_norm = clip_norm
        self._checked = False
        flat.module.train()

    def compute(self, batch: Batch) -> GradientSummary:
        """The gradient of a batch that holds at least one image.

        NaN throughout if it, its norm, or the BN deltas are not finite somewhere.

        Raises InputError if the module left its flat vectors in its first forward and backward,
        or if it was to be compiled and there is no compiler.
        """
        flat = self.flat
        flat.zero_gradients()
        self.statistics_delta.copy_(flat.statistics)
        loss = self._objective.loss(self._forward(batch.images), batch.labels)
        torch.autograd.backward(loss)
        self._check_once()
        torch.sub(flat.statistics, self.statistics_delta, out=self.statistics_delta)
        norm = torch.linalg.vector_norm(flat.gradients)
        if not torch.isfinite(norm + self.statistics_delta.sum()):
            # Every shard then drops it. If some kept their slice, synchronous workers could end
            # up waiting for each other, each for a version that the other has yet to help with.
            flat.gradients.fill_(torch.nan)
        elif self._clip_norm is not None:
            flat.gradients.mul_((self._clip_norm / norm).clamp_(max=1.0))
        return GradientSummary(loss.item(), norm.item())

    def _check_once(self) -> None:
        if not self._checked:
            self.flat.check_views()
            self._checked = True


class HostVectors:
    """Host memory for what is pulled and pushed; on a CPU, the model's own vectors.

    Lanes read and write host memory. On a GPU each vector has a pinned twin there. On a CPU the
    gradients and deltas move to shared memory, so that a server on this host reads them where
    backpropagation leaves them.
    """

    def __init__(
        self, computer: GradientComputer, allocate: Callable[[int], Tensor] = shared_zeros
    ) -> None:
        """allocate: memory for so many float32 elements, which hold zeros."""
        flat = computer.flat
        if flat.gradients.device.type == "cpu":
            flat.place_gradients(allocate(flat.gradients.numel()))
            computer.statistics_delta = allocate(flat.statistics.numel())
        self._device = (flat.parameters, flat.statistics, flat.gradients, computer.statistics_delta)
        self.parameters, self.statistics, self.gradients, self.statistics_delta = (
            _twin(vector) for vector in self._device
        )

    def to_device(self) -> None:
        """After a pull: parameters and statistics to where the model is."""
        self._device[0].copy_(self.parameters)
        self._device[1].copy_(self.statistics)

    def to_host(self) -> None:
        """Before a push: gradients and deltas to host memory."""
        self.gradients.copy_(self._device[2])
        self.statistics_delta.copy_(self._device[3])


def _twin(vector: Tensor) -> Tensor:
    if vector.device.type == "cpu":
        return vector
    return torch.empty(vector.shape, pin_memory=True)
