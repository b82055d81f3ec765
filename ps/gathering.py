"""The gradients of one version, summed until there are enough of them for an update."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ps.push import Push


@dataclass(frozen=True)
class Gathered:
    """The mean of the gathered work, by samples; valid until the next `add`."""

    num_samples: int
    gradient: Tensor
    statistics_delta: Tensor


class Gathering:
    """One push of each worker at most, summed by samples in two vectors of its own.

    A mean by samples is the gradient of all samples together, as a single process with that batch
    has it; for equal batches it is the plain mean of Algorithm 4. BN deltas are averaged alike: the
    sum would move the statistics as many times as there are workers.
    """

    def __init__(self) -> None:
        self._gradient, self._statistics_delta = torch.empty(0), torch.empty(0)
        self._num_samples = 0
        self.sequences: dict[int, tuple[int, int]] = {}
        """Incarnation and sequence of each worker's push that is in the sum."""

    def __len__(self) -> int:
        return len(self.sequences)

    def __contains__(self, worker: int) -> bool:
        return worker in self.sequences

    def add(self, push: Push) -> None:
        """Add a push of a worker that is not in the sum yet."""
        assert push.worker not in self
        assert push.num_samples > 0
        if not self.sequences:
            self._gradient = torch.mul(push.gradient, push.num_samples, out=self._gradient)
            self._statistics_delta = torch.mul(
                push.statistics_delta, push.num_samples, out=self._statistics_delta
            )
        else:
            self._gradient.add_(push.gradient, alpha=push.num_samples)
            self._statistics_delta.add_(push.statistics_delta, alpha=push.num_samples)
        self._num_samples += push.num_samples
        self.sequences[push.worker] = (push.incarnation, push.sequence)

    def take(self) -> Gathered:
        """The mean of what is in the sum, which is then empty."""
        assert self.sequences, "there is nothing to take"
        num_samples, self._num_samples = self._num_samples, 0
        self.sequences = {}
        self._gradient.div_(num_samples)
        self._statistics_delta.div_(num_samples)
        return Gathered(num_samples, self._gradient, self._statistics_delta)
