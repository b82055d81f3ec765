"""Workers of several real processes, against one process that accumulates the same batches."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from local_shards import LocalClient, LocalShard
from torch import Tensor, nn

from asynception.process_group import Rendezvous, joined_on_node, open_store
from model.flat import FlatModule
from ps.consistency import Async
from ps.rules import Ema, Momentum
from ps.schedule import Constant, Horizon
from ps.service import ShardService
from ps.shard import Outcome, ShardConfig
from worker.data.lease import Lease
from worker.data.loader import Batch, BatchLoader
from worker.data.order import EpochOrder
from worker.data.source import LostShard, Sample
from worker.data.transform import Transform
from worker.gradient import GradientComputer
from worker.holdings import HeldCopy
from worker.loop import WorkerLoop
from worker.node import NodeLeader, follow
from worker.objective import create_objective
from worker.pipeline import PipelineSettings
from worker.step_report import StepReport

HOST = "127.0.0.1"
TIMEOUT_S = 240.0
"""For processes to start on a machine that does much else."""
NUM_CLASSES, SIDE, LR = 4, 6, 0.05
OBJECTIVE = create_objective("multilabel", NUM_CLASSES)
MAX_RANKS = 3


class Pictures:
    """Random pixels in three shards; images in `corrupt` don't decode, and shard 1 may be lost."""

    shard_sizes = (20, 9, 31)
    class_names = cached_shards = known_labels = None
    fetches = True

    def __init__(self, corrupt: Sequence[int], lost: bool) -> None:
        self._corrupt, self._lost = corrupt, lost

    def announce(self, shards: Sequence[int]) -> None:
        pass

    def labels(self, shard: int, index: int) -> tuple[int, ...]:
        return ((shard + index) % NUM_CLASSES,)

    def read(self, shard: int, index: int) -> Sample:
        if self._lost and shard == 1:
            raise LostShard("shard-1", "gone")
        number = sum(self.shard_sizes[:shard]) + index
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        image = b"broken" if number in self._corrupt else pixels
        return Sample(f"key-{number}", image, self.labels(shard, index))


class Net(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.dense = nn.Linear(5, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.dense(self.norm(self.conv(images)).relu().mean(dim=(2, 3)))


@dataclass(frozen=True)
class Work:
    """One life of a worker."""

    leases: Sequence[tuple[int, int]]
    num_ranks: int
    batches_per_push: int = 1
    """Of each process."""
    batch_size: int = 4
    prefetch_batches: int = 1
    clip_norm: float | None = None
    corrupt: Sequence[int] = ()
    lost: bool = False
    norm: bool = False
    overlap: bool = False
    poisoned: int | None = None
    """The backward pass of rank 1 whose gradient is NaN."""

    def computer(self) -> GradientComputer:
        torch.manual_seed(2)
        return GradientComputer(FlatModule(Net(self.norm)), OBJECTIVE, self.clip_norm)

    def loader(self) -> BatchLoader:
        source = Pictures(self.corrupt, self.lost)
        return BatchLoader(
            source,
            EpochOrder(source.shard_sizes, 1, 0),
            Transform(SIDE),
            batch_size=self.batch_size,
            prefetch_batches=self.prefetch_batches,
            skip_lost=True,
        )

    def leased(self) -> Iterator[Lease]:
        return (Lease(*bounds) for bounds in self.leases)


@dataclass
class Lived:
    """What became of a life."""

    parameters: Tensor
    statistics: Tensor
    reports: list[StepReport]
    held: list[bool | None]
    """After each report, by shard: whether what was held was what had been pulled; None for none.
    """


class Kept(LocalShard):
    """Keeps each version that was pulled."""

    def __init__(self, service: ShardService) -> None:
        super().__init__(service)
        self.versions: dict[int, tuple[Tensor, Tensor]] = {}

    def pull(self, parameters, statistics, *arguments):
        pulled = super().pull(parameters, statistics, *arguments)
        self.versions[pulled.version] = parameters.clone(), statistics.clone()
        return pulled

    def is_held(self, copy: HeldCopy | None) -> bool | None:
        """Whether it is one that was pulled, bit for bit."""
        if copy is None:
            return None
        parameters, statistics = self.versions[copy.version]
        same = torch.equal(copy.parameters, parameters)
        return same and torch.equal(copy.statistics, statistics)


def client_of(computer: GradientComputer) -> LocalClient:
    return LocalClient(
        computer.flat,
        2,
        lambda ranges: ShardConfig(
            ranges,
            Momentum(momentum=0.5),
            Constant(lr=LR),
            Horizon(epoch_samples=60, num_workers=1),
            Ema(),
            Async(),
        ),
    )


def lead(
    work: Work,
    computer: GradientComputer,
    batches: Iterator[Batch],
    node: NodeLeader | None,
    batches_per_push: int,
) -> Lived:
    client, reports, held = client_of(computer), [], []
    client.shards = [Kept(shard.service) for shard in client.shards]
    pipeline = PipelineSettings(overlap=work.overlap)

    def report(done: StepReport) -> None:
        reports.append(done)
        held.extend(
            shard.is_held(loop.holdings.copy(number)) for number, shard in enumerate(client.shards)
        )

    loop = WorkerLoop(
        0, 0, computer, client, node=node, batches_per_push=batches_per_push, pipeline=pipeline
    )
    loop.run(batches, report)
    return Lived(*client.held(), reports, held)


def live(work: Work, address: str, rank: int) -> Lived | None:
    """One process's part of a life; rank 0 returns what became of it."""
    torch.set_num_threads(1)
    computer = work.computer()
    rendezvous = Rendezvous(address, work.num_ranks, TIMEOUT_S, use_gpu=False)
    with joined_on_node(rendezvous, rank, HOST, None) as ranks:
        batches = ranks.batches(work.loader(), work.leased() if rank == 0 else iter(()))
        if rank > 0:
            computer.flat.parameters.fill_(torch.nan)  # rank 0's are everyone's
            computer.flat.statistics.fill_(torch.nan)
            poison(computer.flat, work.poisoned if rank == 1 else None)
            follow(computer, ranks, batches, work.batches_per_push)
            return None
        node = NodeLeader(computer, ranks)
        lived = lead(work, computer, batches, node, work.batches_per_push)
        node.end()
        return lived


def poison(flat: FlatModule, step: int | None) -> None:
    seen = iter(range(1000))
    first = next(flat.module.parameters())
    first.register_hook(lambda g: g * torch.nan if next(seen) == step else g)


def alone(work: Work) -> Lived:
    """The same in one process."""
    computer = work.computer()
    batches = work.loader().batches(work.leased())
    return lead(work, computer, batches, None, work.batches_per_push * work.num_ranks)


@pytest.fixture(scope="module")
def together() -> Iterator[Callable[[Work], Lived]]:
    """Runs a worker's life in so many processes."""
    with ProcessPoolExecutor(MAX_RANKS, multiprocessing.get_context("spawn")) as pool:

        def run(work: Work) -> Lived:
            store, address = open_store(HOST, work.num_ranks, TIMEOUT_S)
            parts = [pool.submit(live, work, address, rank) for rank in range(work.num_ranks)]
            lived: list[Any] = [part.result(TIMEOUT_S) for part in parts]
            del store  # where they met, until now
            return lived[0]

        yield run


def assert_same(ours: Lived, expected: Lived, num_alike: int | None) -> None:
    """num_alike: the first gradients, which come from the same parameters; None for all."""
    assert [each.sequence for each in ours.reports] == [each.sequence for each in expected.reports]
    for mine, theirs in zip(ours.reports, expected.reports, strict=True):
        assert mine.num_samples == theirs.num_samples
        assert sorted(mine.corrupt_keys) == sorted(theirs.corrupt_keys)
        assert mine.lost == theirs.lost
        assert [replace(each, staleness=0) for each in mine.receipts] == [
            replace(each, staleness=0) for each in theirs.receipts
        ]
        assert (mine.gradient is None) == (theirs.gradient is None)
    for mine, theirs in zip(ours.reports, expected.reports[:num_alike], strict=False):
        if mine.gradient and theirs.gradient:
            assert mine.gradient.loss == pytest.approx(theirs.gradient.loss, rel=1e-5)
            assert mine.gradient.norm == pytest.approx(theirs.gradient.norm, rel=1e-4)


def lacks_last(lived: Lived) -> list[bool]:
    """Of each push, whether the worker's last one is missing from what it was computed from."""
    return [any(receipt.staleness for receipt in each.receipts) for each in lived.reports]


bounds = st.tuples(st.integers(0, 80), st.integers(1, 40)).map(lambda each: (each[0], sum(each)))
works = st.builds(
    Work,
    leases=st.lists(bounds, max_size=5),
    num_ranks=st.integers(2, MAX_RANKS),
    batches_per_push=st.integers(1, 3),
    batch_size=st.integers(1, 5),
    prefetch_batches=st.integers(1, 3),
    clip_norm=st.sampled_from([None, 0.2]),
    corrupt=st.lists(st.integers(0, 59), max_size=20),
    lost=st.booleans(),
    overlap=st.booleans(),
)


@settings(max_examples=12)
@given(work=works)
@example(work=Work([(0, 47)], num_ranks=3, batches_per_push=2, clip_norm=0.2, corrupt=[3, 30]))
@example(work=Work([(0, 60), (3, 20)], num_ranks=2, overlap=True))
@example(work=Work([(0, 30)], num_ranks=2, batch_size=1, lost=True, overlap=True))
def test_processes_make_what_one_makes_of_the_same_batches(together, work):
    ours, expected = together(work), alone(work)
    # Rank 0 has what a lost server's successor would go on from. While it pulls it may have none.
    assert set(ours.held) <= ({True, None} if work.overlap else {True})
    # A group without images has pulled all the same, and what is pulled next is newer by a push.
    pushed = [bool(each.receipts) for each in expected.reports]
    stale = [work.overlap and each for each in pushed]
    assert lacks_last(ours) == [now and any(pushed[n - 1 : n]) for n, now in enumerate(stale)]
    assert lacks_last(expected) == [now and any(pushed[:n]) for n, now in enumerate(stale)]
    num_alike = pushed.index(False) if work.overlap and not all(pushed) else None
    assert_same(ours, expected, num_alike)
    if num_alike is None:
        torch.testing.assert_close(ours.parameters, expected.parameters, rtol=1e-5, atol=1e-6)


def test_a_push_holds_the_batches_of_all(together):
    lived = together(Work([(0, 60), (60, 64)], num_ranks=3, batches_per_push=2))
    assert [each.num_samples for each in lived.reports] == [24, 24, 16]


def test_statistics_move_by_the_mean_of_what_the_processes_saw(together):
    """Each rank's two passes start from those of the push, here of 4, 3, 4, 4 images."""
    work = Work([(0, 15)], num_ranks=2, batches_per_push=2, norm=True)
    computer = work.computer()
    statistics, mean = computer.flat.statistics, torch.zeros_like(computer.flat.statistics)
    before = statistics.clone()
    batches = list(work.loader().batches(work.leased()))
    for rank in range(2):
        statistics.copy_(before)
        computer.begin()
        for batch in batches[rank::2]:
            computer.add(batch)
        mean += computer.statistics_delta * computer.num_samples / 15
    lived = together(work)
    assert [each.num_samples for each in lived.reports] == [15]
    assert set(lived.held) == {True}
    torch.testing.assert_close(lived.statistics, before + mean, rtol=1e-5, atol=1e-6)
    # One batch more, which leaves rank 1 without any.
    computer.flat.parameters.copy_(lived.parameters)
    statistics.copy_(lived.statistics)
    longer = replace(work, leases=[(0, 15), (15, 17)])
    computer.compute(list(longer.loader().batches(longer.leased()))[-1])
    torch.testing.assert_close(together(longer).statistics, statistics, rtol=1e-5, atol=1e-6)


def test_a_gradient_of_one_process_that_is_not_finite_is_dropped_whole(together):
    lived = together(Work([(0, 60)], num_ranks=2, poisoned=2))
    outcomes = [{receipt.outcome for receipt in each.receipts} for each in lived.reports]
    assert outcomes[2] == {Outcome.NOT_FINITE}
    assert outcomes[:2] + outcomes[3:] == [{Outcome.APPLIED}] * 7
    assert torch.isfinite(lived.parameters).all()
