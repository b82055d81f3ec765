"""Ranks as real processes with gloo between them, against one process with all their images."""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asynception.process_group import Rendezvous, joined, open_store
from model.errors import InputError
from model.flat import FlatModule
from ps.consistency import AllReduce, Async
from ps.layout import plan_layout
from ps.push import Push
from ps.rules import SGD, Adam, Ema, Momentum, RMSprop, Rule
from ps.schedule import Clocks, Exponential, Horizon
from ps.shard import Outcome, Shard, ShardConfig, ShardState, initial_state
from worker.allreduce import AllReduceLoop
from worker.data.labels import LabelLists
from worker.data.loader import Batch
from worker.gradient import GradientComputer
from worker.objective import create_objective
from worker.replica import Replica
from worker.step_report import StepReport

HOST = "127.0.0.1"
TIMEOUT_S = 60.0
NUM_CLASSES, IMAGE_SIZE, NUM_STEPS = 4, 6, 50
OBJECTIVE = create_objective("multilabel", NUM_CLASSES)
SCHEDULE = Exponential(lr=0.05, decay=0.9, every=1.0)
EMA = Ema(decay=0.9, warmup=True)
RMS = RMSprop(weight_decay=0.01, epsilon=0.1)


class Plain(nn.Module):
    """No BN: the mean over ranks is then the gradient of all their images."""

    def __init__(self, *, unused: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm: nn.Module = nn.Identity()
        self.dense = nn.Linear(5, NUM_CLASSES)
        if unused:
            self.unused = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.dense(self.norm(self.conv(images)).relu().mean(dim=(2, 3)))


def build(kind: str) -> FlatModule:
    torch.manual_seed(2)
    module = Plain(unused=kind == "unused")
    if kind == "norm":
        module.norm = nn.BatchNorm2d(5)
    return FlatModule(module)


def batch_of(number: int, num_images: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    shape = (num_images, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = LabelLists.from_lists([(number + i) % NUM_CLASSES] for i in range(num_images))
    return Batch(images, labels, number, number + num_images, ())


Sizes = Sequence[Sequence[int]]
"""Images of each batch, by rank."""


def batches_of(sizes: Sizes, rank: int) -> list[Batch]:
    return [batch_of(100 * step + rank, size) for step, size in enumerate(sizes[rank])]


def horizon(sizes: Sizes) -> Horizon:
    return Horizon(epoch_samples=40, num_workers=len(sizes))


def train_rank(
    rank: int,
    address: str,
    sizes: Sizes,
    rule: Rule,
    kind: str,
    clip_norm: float | None,
    poisoned: int | None,
    store: Any = None,
) -> tuple[dict[str, Tensor], list[StepReport], list[int]]:
    """One rank's whole life; its vectors, reports and the batches of all ranks at the end."""
    torch.set_num_threads(1)
    flat = build(kind)
    if rank:
        flat.parameters.add_(1.0)  # rank 0's are everyone's
    computer = GradientComputer(flat, OBJECTIVE, clip_norm)
    computer.statistics_delta.fill_(torch.nan)  # as memory that was never written may be
    replica = Replica(flat, rule, SCHEDULE, horizon(sizes), EMA if rank == 0 else None)
    if poisoned is not None and rank == 1:
        _poison(flat, poisoned)
    steps: list[StepReport] = []
    rendezvous = Rendezvous(address, len(sizes), TIMEOUT_S, use_gpu=False)
    with joined(rendezvous, rank, HOST, store) as group:
        policy = AllReduce(bucket_mb=0.0005)  # several buckets, small as the model is
        loop = AllReduceLoop(computer, replica, group, policy, image_size=IMAGE_SIZE)
        loop.run(batches_of(sizes, rank), steps.append)
        flat.check_views()
    return dict(replica._vectors()), steps, loop.num_batches


def _poison(flat: FlatModule, step: int) -> None:
    """One gradient of this rank is not finite."""
    seen = iter(range(1000))
    first = next(flat.module.parameters())
    first.register_hook(lambda g: g * torch.nan if next(seen) == step else g)


def lead(sizes: Sizes, *arguments: Any) -> Any:
    """Rank 0, which says through `addresses` where to meet."""
    store, address = open_store(HOST, len(sizes), TIMEOUT_S)
    _ADDRESSES.put(address)
    return train_rank(0, address, sizes, *arguments, store)


_ADDRESSES: Any = None


def _set_addresses(addresses: Any) -> None:
    global _ADDRESSES
    _ADDRESSES = addresses


Run = Callable[..., list[tuple[dict[str, Tensor], list[StepReport], list[int]]]]


@pytest.fixture(scope="module")
def run() -> Any:
    """Runs a group of processes; gives what each of its ranks returned."""
    context = multiprocessing.get_context("spawn")
    addresses = context.Queue()
    with ProcessPoolExecutor(3, context, _set_addresses, (addresses,)) as pool:

        def start(
            sizes: Sizes,
            rule: Rule = RMS,
            kind: str = "plain",
            clip_norm: float | None = None,
            poisoned: int | None = None,
        ) -> list[Any]:
            arguments = (rule, kind, clip_norm, poisoned)
            first: Future[Any] = pool.submit(lead, sizes, *arguments)
            address = addresses.get(timeout=TIMEOUT_S)
            others = [
                pool.submit(train_rank, rank, address, sizes, *arguments)
                for rank in range(1, len(sizes))
            ]
            return [each.result(TIMEOUT_S) for each in (first, *others)]

        yield start


def steps_of(sizes: Sizes) -> list[list[tuple[int, int]]]:
    """What each step consists of: ranks and their images."""
    last = max(len(each) for each in sizes)
    return [
        [(rank, each[step]) for rank, each in enumerate(sizes) if step < len(each) and each[step]]
        for step in range(last)
    ]


def reference(sizes: Sizes, rule: Rule, clip_norm: float | None, kind: str = "plain") -> ShardState:
    """A shard that gets the gradient of all images of a step in one push."""
    flat = build(kind)
    (ranges,) = plan_layout(flat.parameter_segments, flat.statistic_segments, 1).shards
    config = ShardConfig(ranges, rule, SCHEDULE, horizon(sizes), EMA, Async())
    shard = Shard(config, initial_state(rule, flat.parameters, flat.statistics))
    computer = GradientComputer(flat, OBJECTIVE, clip_norm)
    for step, parts in enumerate(steps_of(sizes)):
        snapshot = shard.pin()
        flat.parameters.copy_(snapshot.parameters)
        shard.release(snapshot)
        if not parts:
            continue
        computer.begin()
        for rank, size in parts:
            computer.add(batch_of(100 * step + rank, size))
        computer.finish()
        total = sum(size for _, size in parts)
        gradient, delta = flat.gradients.clone(), torch.zeros_like(flat.statistics)
        shard.push(Push(0, 0, step, shard.version, total, gradient, delta))
    return shard.capture()


def assert_alike(ranks: Sequence[Any]) -> None:
    """All ranks hold the very same bits."""
    names = [name for name in ranks[1][0] if not name.startswith("ema")]
    for vectors, _, num_batches in ranks[1:]:
        assert num_batches == ranks[0][2]
        for name in names:
            assert torch.equal(vectors[name], ranks[0][0][name]), name


def assert_near(vectors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, vector in expected.items():
        torch.testing.assert_close(vectors[name], vector, rtol=2e-4, atol=2e-6, msg=name)


EVEN = [[4] * NUM_STEPS, [4] * NUM_STEPS]
UNEVEN = [[3] * 20, [5] * NUM_STEPS, [1, 0, 4] * 15]


@pytest.mark.parametrize("rule", [Momentum(weight_decay=0.01), Adam()], ids=str)
def test_two_ranks_are_one_process_with_twice_the_batch(run, rule):
    ranks = run(EVEN, rule)
    assert_alike(ranks)
    assert_near(ranks[0][0], reference(EVEN, rule, None).vectors)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_batches_of_any_sizes_and_numbers_are_weighed_by_their_images(run, clip_norm):
    ranks = run(UNEVEN, RMS, clip_norm=clip_norm)
    assert_alike(ranks)
    assert_near(ranks[0][0], reference(UNEVEN, RMS, clip_norm).vectors)
    assert ranks[0][2] == [len(each) for each in UNEVEN]


def test_every_step_counts_as_one_update_and_every_batch_as_reported(run):
    ranks = run(UNEVEN)
    reports = [each for _, steps, _ in ranks for each in steps]
    outcomes = [receipt.outcome for each in reports for receipt in each.receipts]
    assert outcomes.count(Outcome.APPLIED) == NUM_STEPS
    assert len(outcomes) == sum(size > 0 for sizes in UNEVEN for size in sizes)
    assert set(outcomes) == {Outcome.APPLIED, Outcome.ACCUMULATED}
    for (_, steps, _), sizes in zip(ranks, UNEVEN, strict=True):
        assert [each.sequence for each in steps] == list(range(len(sizes)))
        assert [each.num_samples for each in steps] == list(sizes)
        assert all((each.gradient is not None) == (each.num_samples > 0) for each in steps)


def by_hand(sizes: Sizes) -> dict[str, Tensor]:
    """SGD with BN: each rank's pass starts from the same state, and all are averaged."""
    flat = build("norm")
    computer = GradientComputer(flat, OBJECTIVE, None)
    parameters, statistics = flat.parameters.clone(), flat.statistics.clone()
    clocks = Clocks()
    for step, parts in enumerate(steps_of(sizes)):
        total = sum(size for _, size in parts)
        gradient, delta = torch.zeros_like(parameters), torch.zeros_like(statistics)
        for rank, size in parts:
            flat.parameters.copy_(parameters)
            flat.statistics.copy_(statistics)
            computer.compute(batch_of(100 * step + rank, size))
            gradient += flat.gradients * size / total
            delta += computer.statistics_delta * size / total
        parameters -= SCHEDULE.rate(clocks, horizon(sizes)) * gradient
        statistics += delta
        clocks = Clocks(clocks.updates + 1, clocks.samples + total)
    return {"parameters": parameters, "statistics": statistics}


def test_all_ranks_keep_the_mean_of_their_statistics(run):
    sizes = [[2, 6, 3, 4], [0, 6]]
    ranks = run(sizes, SGD(), kind="norm")
    assert_alike(ranks)
    assert_near(ranks[0][0], by_hand(sizes))


def test_a_gradient_that_is_not_finite_is_dropped_by_all(run):
    ranks = run([[4] * 4, [4] * 4], SGD(), poisoned=2)
    assert_alike(ranks)
    assert torch.isfinite(ranks[0][0]["parameters"]).all()
    for _, steps, _ in ranks:
        outcomes = [each.receipts[0].outcome for each in steps]
        assert outcomes[2] is Outcome.NOT_FINITE
        assert outcomes.count(Outcome.NOT_FINITE) == 1
        assert [each.receipts[0].version for each in steps] == [0, 1, 2, 2]


def test_parameters_out_of_reach_are_refused(run):
    with pytest.raises(InputError, match="find_unused_parameters"):
        run([[4, 4], [4, 4]], kind="unused")
