"""A worker of several processes on one node, which make one gradient and push it once.

Rank 0 is the worker for all others: it leases, pulls and pushes. Of its leases' batches, in their
order, rank r takes number r, r + L, r + 2 L, ... of L processes. For each push it hands what it
pulled to the other ranks; each adds up the gradients of its own batches, and the mean by samples
over all of them is reduced to rank 0, which clips it. So a push is what one process would make of
the same batches, one after another. BN statistics are the exception: each rank's passes start from
those that were pulled, and the deltas are averaged by samples, as synchronous workers' are.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
import torch.distributed as dist

from worker.data.lease import Lease
from worker.data.loader import Batch, BatchLoader
from worker.gradient import GradientComputer
from worker.loop import sum_counts
from worker.step_report import GradientSummary, StepReport

_NO_LEASE = -1
"""In a lease's place, once there are no more."""


class NodeRanks:
    """The processes of one worker, as this one sees them."""

    def __init__(self, group: dist.ProcessGroup, leases_group: dist.ProcessGroup) -> None:
        """leases_group: the same ranks once more, for the threads that read data; gloo's."""
        self.group, self._leases_group = group, leases_group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def batches(self, loader: BatchLoader, leases: Iterable[Lease]) -> Iterator[Batch]:
        """This rank's batches of rank 0's leases; see `BatchLoader.batches`.

        No rank waits for ever for a lease: rank 0 asks for the next one when it has room to read
        one batch of its own ahead, so those of the push at hand are always known to all.
        leases: of rank 0; other ranks' are not looked at.
        """
        known = self._given(leases) if self.rank == 0 else self._received()
        return loader.batches(known, first=self.rank, every=self.size)

    def _given(self, leases: Iterable[Lease]) -> Iterator[Lease]:
        for lease in leases:
            self._pass_on(torch.tensor([lease.start, lease.stop]))
            yield lease
        self._pass_on(torch.tensor([_NO_LEASE, _NO_LEASE]))

    def _received(self) -> Iterator[Lease]:
        while True:
            start, stop = self._pass_on(torch.empty(2, dtype=torch.int64)).tolist()
            if start == _NO_LEASE:
                return
            yield Lease(start, stop)

    def _pass_on(self, bounds: torch.Tensor) -> torch.Tensor:
        dist.broadcast(bounds, 0, self._leases_group)
        return bounds


@dataclass(frozen=True)
class Part:
    """What one rank brings to a push."""

    num_samples: int = 0
    loss_sum: float = 0.0
    """Over the samples."""
    corrupt_keys: Sequence[str] = ()
    lost: Mapping[str, int] = field(default_factory=dict)


class NodeGradient:
    """One rank's side of the gradients that a node makes together. All call the same in step."""

    def __init__(self, computer: GradientComputer, ranks: NodeRanks) -> None:
        self._computer, self._ranks = computer, ranks

    def tell(self, goes_on: bool) -> None:
        """Of rank 0: another push follows, or none."""
        dist.broadcast(torch.tensor([int(goes_on)]), 0, self._ranks.group)

    def hears(self) -> bool:
        """Of other ranks: whether another push follows. Waits for rank 0."""
        told = torch.empty(1, dtype=torch.int64)
        dist.broadcast(told, 0, self._ranks.group)
        return bool(told.item())

    def begin(self) -> None:
        """Give all ranks the parameters and statistics that rank 0 pulled.

        They travel once to each node, and all ranks compute from one version.
        """
        flat = self._computer.flat
        for vector in (flat.parameters, flat.statistics):
            if vector.numel():
                dist.broadcast(vector, 0, self._ranks.group)
        self._computer.begin()

    def meet(self, own: Part) -> list[Part]:
        """Every rank's part, by rank; waits for the slowest."""
        note = _note(own)
        numbers = torch.zeros(self._ranks.size, 3, dtype=torch.float64)
        numbers[self._ranks.rank] = torch.tensor([own.num_samples, own.loss_sum, len(note)])
        dist.all_reduce(numbers, group=self._ranks.group)
        longest = int(numbers[:, 2].max())
        notes = self._notes(note, longest) if longest else [b""] * self._ranks.size
        parts = zip(numbers.tolist(), notes, strict=True)
        return [_part(int(count), loss_sum, text) for (count, loss_sum, _), text in parts]

    def _notes(self, own: bytes, longest: int) -> list[bytes]:
        texts = torch.zeros(self._ranks.size, longest, dtype=torch.uint8)
        texts[self._ranks.rank, : len(own)] = torch.tensor(list(own), dtype=torch.uint8)
        dist.all_reduce(texts, group=self._ranks.group)
        return [bytes(text.tolist()).rstrip(b"\0") for text in texts]

    def reduce(self, total_samples: int) -> None:
        """Leave in rank 0 the mean over all ranks' samples, of gradients and of BN deltas."""
        computer = self._computer
        computer.share(total_samples)
        for vector in (computer.flat.gradients, computer.statistics_delta):
            if vector.numel():
                dist.reduce(vector, 0, group=self._ranks.group)


def _note(part: Part) -> bytes:
    """What seldom is there, and then has any length."""
    if not part.corrupt_keys and not part.lost:
        return b""
    return json.dumps([list(part.corrupt_keys), dict(part.lost)]).encode()


def _part(num_samples: int, loss_sum: float, note: bytes) -> Part:
    corrupt_keys, lost = json.loads(note) if note else ([], {})
    return Part(num_samples, loss_sum, tuple(corrupt_keys), lost)


class NodeLeader:
    """Rank 0's work, for `worker.loop.WorkerLoop`."""

    def __init__(self, computer: GradientComputer, ranks: NodeRanks) -> None:
        self._computer, self._node = computer, NodeGradient(computer, ranks)
        self._total_samples, self._loss_sum = 0, 0.0

    @property
    def pulled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Parameters and statistics as they were at `begin`."""
        return self._computer.pulled

    def begin(self) -> None:
        """With what was pulled in the model: hand it to the others."""
        self._node.tell(True)
        self._node.begin()

    def add(self, batch: Batch) -> None:
        """Add the gradient of a batch that holds at least one image."""
        self._computer.add(batch)

    def gather(self, done: StepReport) -> None:
        """Add what the others bring: their samples, and what they left out."""
        computer = self._computer
        mine, *others = self._node.meet(Part(computer.num_samples, computer.loss_sum))
        for part in others:
            done.num_samples += part.num_samples
            done.corrupt_keys = (*done.corrupt_keys, *part.corrupt_keys)
            done.lost = sum_counts(done.lost, part.lost)
        self._total_samples = done.num_samples
        self._loss_sum = sum(part.loss_sum for part in (mine, *others))

    def finish(self) -> GradientSummary:
        """Reduce the gradients of all, and clip their mean; for at least one sample.

        NaN throughout if a rank's gradient or BN deltas are not finite somewhere.
        """
        self._node.reduce(self._total_samples)
        norm = self._computer.bound()
        return GradientSummary(self._loss_sum / self._total_samples, norm.item())

    def end(self) -> None:
        """There is no other push."""
        self._node.tell(False)


def follow(
    computer: GradientComputer, ranks: NodeRanks, batches: Iterator[Batch], batches_per_push: int
) -> None:
    """The work of a rank that isn't 0, until rank 0 ends it.

    batches_per_push: of each rank. Raises RuntimeError if another rank is lost.
    """
    node, own_batches = NodeGradient(computer, ranks), _started(batches)
    while node.hears():
        node.begin()
        corrupt_keys: tuple[str, ...] = ()
        lost: Mapping[str, int] = {}
        for batch in islice(own_batches, batches_per_push):
            corrupt_keys, lost = (*corrupt_keys, *batch.corrupt_keys), sum_counts(lost, batch.lost)
            if batch.labels.num_images:
                computer.add(batch)
        own = Part(computer.num_samples, computer.loss_sum, corrupt_keys, lost)
        total_samples = sum(part.num_samples for part in node.meet(own))
        if total_samples:
            node.reduce(total_samples)


def _started(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, of which the first is read at once.

    A loader reads ahead, and takes leases, from its first batch on. Rank 0's can't go on before.
    """
    first = next(batches, None)
    return batches if first is None else chain([first], batches)
