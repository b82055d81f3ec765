"""The gradients of one version, summed until there are enough of them for an update."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ps.push import Push

BLOCK_NUMEL = 1 << 18
"""Elements of another dtype that are cast and added at a time: they stay in cache."""


@dataclass(frozen=True)
class Gathered:
    """The mean of the gathered work, by samples; valid until the next `add`."""

    num_samples: int
    gradient: Tensor
    statistics_delta: Tensor


@dataclass(frozen=True)
class GatheringImage:
    """A copy of what is gathered. The vectors are named here as in a shard's image."""

    sequences: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """In the order in which they came."""
    num_summed: int = 0
    num_samples: int = 0
    held: Mapping[int, int] = field(default_factory=dict)
    """Samples of each worker's push that waits for its turn."""
    vectors: Mapping[str, Tensor] = field(default_factory=dict)


SUM = "sum"


def held_name(worker: int) -> str:
    """Under which an image has a push that waits for its turn."""
    return f"held.{worker}"


class Gathering:
    """One push of each worker at most, summed by samples in two vectors of its own.

    A mean by samples is the gradient of all samples together, as a single process with that batch
    has it; for equal batches it is the plain mean of Algorithm 4. BN deltas are averaged alike: the
    sum would move the statistics as many times as there are workers.

    In the order of workers, a push whose predecessors are not all in the sum is held until they
    are, or until the sum is taken: up to one gradient less than there are workers.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, in_rank_order: bool = False) -> None:
        """dtype: of the sums, whatever that of the gradients."""
        self._gradient = torch.empty(0, dtype=dtype)
        self._statistics_delta = torch.empty(0, dtype=dtype)
        self._in_rank_order = in_rank_order
        self._num_summed = 0
        self._num_samples = 0
        self._held: dict[int, _Held] = {}
        self._spare: list[_Held] = []
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
        self.sequences[push.worker] = (push.incarnation, push.sequence)
        self._num_samples += push.num_samples
        if self._in_rank_order and push.worker != self._num_summed:
            self._held[push.worker] = self._hold(push)
            return
        self._sum(push.gradient, push.statistics_delta, push.num_samples)
        while self._num_summed in self._held:
            self._release(self._held.pop(self._num_summed))

    def _sum(self, gradient: Tensor, statistics_delta: Tensor, num_samples: int) -> None:
        first = self._num_summed == 0
        self._num_summed += 1
        _add_times(self._gradient, gradient, num_samples, first)
        _add_times(self._statistics_delta, statistics_delta, num_samples, first)

    def _hold(self, push: Push) -> "_Held":
        """Copies, as the push's own vectors are about to be used again."""
        held = self._spare.pop() if self._spare else _Held()
        held.take(push)
        return held

    def _release(self, held: "_Held") -> None:
        self._sum(held.gradient, held.statistics_delta, held.num_samples)
        self._spare.append(held)

    def take(self) -> Gathered:
        """The mean of what is in the sum, which is then empty."""
        assert self.sequences, "there is nothing to take"
        for worker in sorted(self._held):  # some before them are not there
            self._release(self._held.pop(worker))
        num_samples, self._num_samples = self._num_samples, 0
        self.sequences, self._num_summed = {}, 0
        self._gradient.div_(num_samples)
        self._statistics_delta.div_(num_samples)
        return Gathered(num_samples, self._gradient, self._statistics_delta)

    def image(self) -> GatheringImage:
        """A copy of all of it."""
        vectors: dict[str, Tensor] = {}
        if self._num_summed:
            vectors |= _pair(SUM, self._gradient, self._statistics_delta)
        for worker, held in self._held.items():
            vectors |= _pair(held_name(worker), held.gradient, held.statistics_delta)
        copies = {name: vector.clone() for name, vector in vectors.items()}
        held_samples = {worker: held.num_samples for worker, held in self._held.items()}
        return GatheringImage(
            dict(self.sequences), self._num_summed, self._num_samples, held_samples, copies
        )

    def restore(self, image: GatheringImage) -> None:
        """Be as the one that the image is of; keeps its vectors."""
        self.sequences = dict(image.sequences)
        self._num_summed, self._num_samples = image.num_summed, image.num_samples
        if image.num_summed:
            self._gradient, self._statistics_delta = _pair_of(SUM, image)
        for worker, num_samples in image.held.items():
            held = self._held[worker] = _Held()
            held.gradient, held.statistics_delta = _pair_of(held_name(worker), image)
            held.num_samples = num_samples


class _Held:
    """A copy of a push that waits for its turn."""

    def __init__(self) -> None:
        self.gradient = self.statistics_delta = torch.empty(0)
        self.num_samples = 0

    def take(self, push: Push) -> None:
        self.gradient = _copied(self.gradient, push.gradient)
        self.statistics_delta = _copied(self.statistics_delta, push.statistics_delta)
        self.num_samples = push.num_samples


def _pair(name: str, gradient: Tensor, statistics_delta: Tensor) -> dict[str, Tensor]:
    return {f"{name}.gradient": gradient, f"{name}.statistics_delta": statistics_delta}


def _pair_of(name: str, image: GatheringImage) -> tuple[Tensor, Tensor]:
    return image.vectors[f"{name}.gradient"], image.vectors[f"{name}.statistics_delta"]


def _copied(into: Tensor, vector: Tensor) -> Tensor:
    """`into` with the values of `vector`, or a new tensor if it doesn't fit."""
    if into.shape == vector.shape and into.dtype == vector.dtype:
        return into.copy_(vector)
    return vector.clone()


def _add_times(total: Tensor, vector: Tensor, times: int, first: bool) -> None:
    """total += times * vector, or total = times * vector; in the dtype of `total`."""
    if first:
        total.resize_(vector.shape)
    if vector.dtype == total.dtype:
        _add_same(total, vector, times, first)
        return
    # Cast first: torch is six times slower at adding two dtypes.
    scratch = total.new_empty(min(BLOCK_NUMEL, total.numel()))
    for span in _spans(total.numel()):
        part = scratch[: span.stop - span.start].copy_(vector[span])
        _add_same(total[span], part, times, first)


def _add_same(total: Tensor, vector: Tensor, times: int, first: bool) -> None:
    if first:
        torch.mul(vector, times, out=total)
    else:
        total.add_(vector, alpha=times)


def _spans(numel: int) -> Iterator[slice]:
    for start in range(0, numel, BLOCK_NUMEL):
        yield slice(start, min(numel, start + BLOCK_NUMEL))
