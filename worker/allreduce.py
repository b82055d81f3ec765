"""Data parallelism without servers: torch's DistributedDataParallel inside a worker's loop.

The mean of each step's gradients is by samples, as it is in the servers' synchronous mode, and so
is that of the BN deltas: every rank keeps the same statistics.
"""

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from model.errors import InputError
from ps.consistency import AllReduce
from ps.shard import Outcome, Receipt
from worker.data.loader import Batch
from worker.data.transform import normalize
from worker.gradient import GradientComputer
from worker.replica import Replica
from worker.step_report import StepReport

IDLE_IMAGES = 2
"""Of a rank without images, so that it takes part: BN needs more than one."""

_SETTINGS = inspect.signature(DistributedDataParallel).parameters
_NEWER, _OLDER = "forward_sync_buffers", "broadcast_buffers"
_NO_SYNC: Mapping[str, Any] = {_NEWER if _NEWER in _SETTINGS else _OLDER: False}
"""Keeps rank 0's buffers from replacing everyone's in each pass, by what torch calls that."""


@dataclass(frozen=True)
class Meeting:
    """What the ranks bring to one step."""

    num_samples: Sequence[int]
    """Images of each rank's batch."""
    has_batch: Sequence[int]
    """1 for each rank that has a batch, be it without images; 0 for those that have no more."""

    @property
    def total_samples(self) -> int:
        return sum(self.num_samples)

    @property
    def leader(self) -> int:
        """The first rank with images."""
        return next(rank for rank, count in enumerate(self.num_samples) if count)


class MeanGradient:
    """A module's gradient as the mean over all ranks' samples, reduced while it is computed.

    DDP copies each bucket's mean back into the gradients, which stay views of the flat vector.
    (With `gradient_as_bucket_view` they would not.)
    """

    def __init__(
        self, computer: GradientComputer, group: dist.ProcessGroup, policy: AllReduce
    ) -> None:
        """All ranks of the group call this together, with the same parameters."""
        self._computer, self._group = computer, group
        flat = computer.flat
        self._numel = sum(parameter.numel() for parameter in flat.module.parameters())
        self._network = DistributedDataParallel(
            flat.module,
            process_group=group,
            bucket_cap_mb=policy.bucket_mb,
            find_unused_parameters=policy.find_unused_parameters,
            **_NO_SYNC,
        )
        self._network.register_comm_hook(None, self._reduce)
        self._share = 0.0
        self._reduced_numel = 0
        computer.run_through(self._network)

    def add(self, batch: Batch, share: float) -> None:
        """The gradient of this rank's batch, which has this share of all samples.

        Raises InputError if backpropagation didn't reach every parameter.
        """
        self._share, self._reduced_numel = share, 0
        self._computer.begin()
        self._computer.add(batch)
        self._check_all_reduced()

    def join_in(self, image_size: int) -> None:
        """Take part without images: the other ranks' mean arrives here all the same.

        DDP reduces during a backward pass alone, so there is one, of which nothing is kept.
        """
        self._share, self._reduced_numel = 0.0, 0
        self._computer.begin()
        device = self._computer.flat.parameters.device
        nothing = torch.zeros(IDLE_IMAGES, 3, image_size, image_size, dtype=torch.uint8)
        torch.autograd.backward(self._network(normalize(nothing.to(device))).sum())
        self._check_all_reduced()

    def reduce_statistics(self) -> None:
        """Make the BN deltas the mean over all ranks' samples."""
        delta = self._computer.statistics_delta
        if delta.numel():
            _weigh(delta, self._share)
            dist.all_reduce(delta, group=self._group)

    def _reduce(self, state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's way to reduce a bucket: the sum, each rank's part weighed by its share."""
        gradients = bucket.buffer()
        self._reduced_numel += gradients.numel()
        _weigh(gradients, self._share)
        work = dist.all_reduce(gradients, group=self._group, async_op=True)
        reduced: torch.futures.Future[Tensor] = work.get_future().then(_first_of)
        return reduced

    def _check_all_reduced(self) -> None:
        if self._reduced_numel != self._numel:
            raise InputError(
                "consistency.find_unused_parameters = false, but backpropagation leaves out some"
                " of the model's parameters, so that workers would part: set it to true"
            )


def _weigh(part: Tensor, share: float) -> None:
    if share:
        part.mul_(share)
    else:
        part.zero_()  # what it holds may be NaN, of which 0 times is NaN


def _first_of(future: torch.futures.Future[list[Tensor]]) -> Tensor:
    return future.value()[0]


class AllReduceLoop:
    """One life of one rank: steps with all ranks, until none has a batch left.

    A rank whose own batches are used up goes on in the others' steps. num_receipts: how often each
    answer counts, for figures that count the answers of servers.
    """

    def __init__(
        self,
        computer: GradientComputer,
        replica: Replica,
        group: dist.ProcessGroup,
        policy: AllReduce,
        *,
        image_size: int,
        num_receipts: int = 1,
        slowdown: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """All ranks call this together; the state of rank 0's replica becomes everyone's.

        slowdown: how many times as long this rank is to take for a gradient, by sleeping.
        """
        self._computer, self._replica, self._group = computer, replica, group
        self._rank, self._image_size = dist.get_rank(group), image_size
        self._num_receipts, self._clock = num_receipts, clock
        replica.share(group)
        self._mean = MeanGradient(computer, group, policy)
        self._last = _LastGradient(computer, clock, slowdown, sleep)
        self.num_batches = [0] * dist.get_world_size(group)
        """Batches that each rank has brought so far."""

    def run(
        self,
        batches: Iterable[Batch],
        report: Callable[[StepReport], None],
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Work until no rank has a batch, reporting each of this rank's, in order.

        after_step: called after each step of the group, with or without a batch of this rank.
        Raises RuntimeError if another rank is lost, and what `batches` and the calls raise.
        """
        own = iter(batches)
        while True:
            done = StepReport(self.num_batches[self._rank])
            batch = self._next(own, done)
            meeting = self._meet(batch, done)
            if not any(meeting.has_batch):
                return
            self.num_batches = [
                count + new for count, new in zip(self.num_batches, meeting.has_batch, strict=True)
            ]
            if meeting.total_samples:
                self._step(batch, meeting, done)
            if batch is not None:
                report(done)
            after_step()

    def _next(self, batches: Iterator[Batch], done: StepReport) -> Batch | None:
        start_s = self._clock()
        batch = next(batches, None)
        done.data_s = self._clock() - start_s
        if batch is not None:
            done.corrupt_keys, done.lost = batch.corrupt_keys, batch.lost
            done.num_samples = batch.labels.num_images
        return batch

    def _meet(self, batch: Batch | None, done: StepReport) -> Meeting:
        """Tell all ranks what each one has; waits for the slowest."""
        start_s = self._clock()
        size = len(self.num_batches)
        brought = torch.zeros(2, size, dtype=torch.int64)
        brought[0, self._rank], brought[1, self._rank] = done.num_samples, int(batch is not None)
        dist.all_reduce(brought, group=self._group)
        done.pull_s = self._clock() - start_s
        return Meeting(*brought.tolist())

    def _step(self, batch: Batch | None, meeting: Meeting, done: StepReport) -> None:
        start_s = self._clock()
        if batch is not None and done.num_samples:
            self._last.start()
            self._mean.add(batch, done.num_samples / meeting.total_samples)
            computed_s = self._last.computed_s or self._clock()
        else:
            self._mean.join_in(self._image_size)
            computed_s = self._clock()
        self._mean.reduce_statistics()
        reduced_s = self._clock()
        self._update(meeting, done)
        done.push_s = reduced_s - computed_s
        done.compute_s = self._clock() - start_s - done.push_s

    def _update(self, meeting: Meeting, done: StepReport) -> None:
        """The same on every rank: what is not finite is dropped by all, and makes no version."""
        computer, replica = self._computer, self._replica
        if done.num_samples:
            done.gradient = computer.finish()
        else:
            computer.bound()
        outcome = Outcome.APPLIED if self._rank == meeting.leader else Outcome.ACCUMULATED
        version, lr = replica.clocks.updates, replica.lr
        if torch.isfinite(computer.flat.gradients[0]):  # none is finite, or all are
            replica.apply(computer.statistics_delta, meeting.total_samples)
        else:
            outcome = Outcome.NOT_FINITE
        replica.restore_statistics()
        if done.num_samples:
            done.receipts = (Receipt(outcome, version, 0, lr),) * self._num_receipts


class _LastGradient:
    """Tells when a backward pass has computed its last gradient, and may hold that one up."""

    def __init__(
        self,
        computer: GradientComputer,
        clock: Callable[[], float],
        slowdown: float,
        sleep: Callable[[float], object],
    ) -> None:
        assert slowdown >= 1
        self._clock, self._slowdown, self._sleep = clock, slowdown, sleep
        self._start_s: float | None = None
        self.computed_s: float | None = None
        """When that was, since `start`; None if it can't be told."""
        register_multi_grad_hook(tuple(computer.flat.module.parameters()), self._note)

    def start(self) -> None:
        """Before a forward pass."""
        self._start_s, self.computed_s = self._clock(), None

    def _note(self, gradients: Sequence[Tensor | None]) -> None:
        if self._start_s is None:
            return
        if self._slowdown > 1:
            self._sleep((self._slowdown - 1) * (self._clock() - self._start_s))
        self._start_s, self.computed_s = None, self._clock()
