"""Workers that train by themselves, against plain PyTorch and against synchronous SGD."""

import copy
from collections.abc import Sequence

import pytest
import torch
from local_shards import RecordingClient
from torch import Tensor, nn

from model.flat import FlatModule
from ps.consistency import Averaging, Policy, Sync
from ps.layout import plan_layout
from ps.push import Push
from ps.rules import SGD, Ema, Momentum, Rule
from ps.schedule import Clocks, Constant, Exponential, Horizon, Schedule
from ps.shard import Outcome, Receipt, Shard, ShardConfig, initial_state
from worker.data.labels import LabelLists
from worker.data.loader import Batch
from worker.data.transform import normalize
from worker.gradient import GradientComputer
from worker.local_steps import LocalSteps
from worker.loop import WorkerLoop
from worker.objective import create_objective
from worker.step_report import StepReport

NUM_CLASSES, BATCH_SIZE, NUM_WORKERS = 4, 3, 2
OBJECTIVE = create_objective("multilabel", NUM_CLASSES)
HORIZON = Horizon(epoch_samples=60, num_workers=NUM_WORKERS)
LR = 0.05


class Tiny(nn.Module):
    """A convolution with batch norm, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.dense = nn.Linear(5, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.dense(self.norm(self.conv(images)).relu().mean(dim=(2, 3)))


def tiny_model() -> nn.Module:
    torch.manual_seed(2)
    return Tiny()


def batch_of(number: int, num_images: int = BATCH_SIZE) -> Batch:
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (num_images, 3, 6, 6), generator=generator, dtype=torch.uint8)
    labels = LabelLists.from_lists([(number + i) % NUM_CLASSES] for i in range(num_images))
    return Batch(images, labels, number, number + num_images, ())


def server(policy: Policy, rule: Rule, schedule: Schedule) -> Shard:
    flat = FlatModule(tiny_model())
    (ranges,) = plan_layout(flat.parameter_segments, flat.statistic_segments, 1).shards
    config = ShardConfig(ranges, rule, schedule, HORIZON, Ema(decay=0.5), policy)
    return Shard(config, initial_state(rule, flat.parameters, flat.statistics))


class Worker:
    """One that pulls from a shard and pushes to it."""

    def __init__(
        self, number: int, shard: Shard, rule: Rule | None, schedule: Schedule | None = None
    ) -> None:
        self.number, self.shard, self.sequence = number, shard, 0
        self.flat = FlatModule(tiny_model())
        self.computer = GradientComputer(self.flat, OBJECTIVE, clip_norm=None)
        self.local = rule and LocalSteps(
            self.computer, rule, schedule or Constant(lr=LR), HORIZON, Clocks()
        )

    def work(self, batches: Sequence[Batch]) -> Receipt:
        newest = self.shard.pin()
        self.flat.parameters.copy_(newest.parameters)
        self.flat.statistics.copy_(newest.statistics)
        version = newest.version
        self.shard.release(newest)
        if self.local is None:
            (batch,) = batches
            self.computer.compute(batch)
        else:
            self.local.begin()
            for batch in batches:
                self.local.add(batch)
            self.local.finish()
        num_samples = sum(batch.labels.num_images for batch in batches)
        gradient, delta = self.flat.gradients.clone(), self.computer.statistics_delta.clone()
        push = Push(self.number, 0, self.sequence, version, num_samples, gradient, delta)
        self.sequence += 1
        return self.shard.push(push)


def values(shard: Shard) -> tuple[Tensor, Tensor]:
    state = shard.capture()
    return state.vectors["parameters"], state.vectors["statistics"]


def assert_same(left: Shard, right: Shard, tolerance: float = 1e-6) -> None:
    for one, other in zip(values(left), values(right), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_one_step_of_sgd_between_averages_is_synchronous_sgd():
    averaging = Averaging(local_steps=1)
    mean = server(averaging, averaging.server_rule(SGD()), Constant(lr=LR))
    sync = server(Sync(), SGD(weight_decay=0.01), Constant(lr=LR))
    trainers = [Worker(n, mean, SGD(weight_decay=0.01)) for n in range(NUM_WORKERS)]
    followers = [Worker(n, sync, None) for n in range(NUM_WORKERS)]
    for step in range(6):
        for trainer, follower in zip(trainers, followers, strict=True):
            batch = batch_of(10 * step + trainer.number, num_images=2 + trainer.number)
            assert trainer.work([batch]).outcome == follower.work([batch]).outcome
        assert mean.version == sync.version == step + 1
        assert_same(mean, sync)


def train_alone(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    rates: Sequence[float],
) -> None:
    for batch, rate in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        OBJECTIVE.loss(module(normalize(batch.images)), batch.labels).backward()
        optimizer.step()


@pytest.mark.parametrize("local_steps", [3, None])
def test_averages_are_those_of_plain_optimizers(local_steps):
    """Momentum is kept from one average to the next, and the rate follows the worker's clock."""
    policy = Averaging(local_steps=local_steps)
    schedule = Exponential(lr=LR, decay=0.5, every=12, unit="samples")
    shard = server(policy, policy.server_rule(Momentum()), schedule)
    workers = [Worker(n, shard, Momentum(momentum=0.9), schedule) for n in range(NUM_WORKERS)]
    modules = [tiny_model().train() for _ in workers]
    optimizers = [torch.optim.SGD(m.parameters(), lr=LR, momentum=0.9) for m in modules]
    steps = local_steps or 5
    for round_number in range(2 if local_steps else 1):
        for worker, module, optimizer in zip(workers, modules, optimizers, strict=True):
            first = 100 * worker.number + 10 * round_number
            batches = [batch_of(first + step) for step in range(steps)]
            # All workers' samples: this one's, times their number.
            done = [steps * round_number + step for step in range(steps)]
            rates = [LR * 0.5 ** (n * BATCH_SIZE * NUM_WORKERS // 12) for n in done]
            train_alone(module, optimizer, batches, rates)
            worker.work(batches)
        average_(modules)
        flat = FlatModule(copy.deepcopy(modules[0]))
        parameters, statistics = values(shard)
        torch.testing.assert_close(parameters, flat.parameters, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics, flat.statistics, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def average_(modules: Sequence[nn.Module]) -> None:
    for tensors in zip(*(module.state_dict().values() for module in modules), strict=True):
        if tensors[0].is_floating_point():
            mean = torch.stack(tensors).mean(dim=0)
            for tensor in tensors:
                tensor.copy_(mean)


def test_an_outer_momentum_is_nesterovs():
    policy = Averaging(local_steps=2, outer_lr=0.7, outer_momentum=0.9)
    shard = server(policy, policy.server_rule(SGD()), Constant(lr=LR))
    reference = nn.Parameter(values(shard)[0].clone())
    outer = torch.optim.SGD([reference], lr=0.7, momentum=0.9, nesterov=True)
    workers = [Worker(n, shard, SGD()) for n in range(NUM_WORKERS)]
    for round_number in range(3):
        before = values(shard)[0].clone()
        ends = []
        for worker in workers:
            worker.work([batch_of(100 * worker.number + 2 * round_number + n) for n in range(2)])
            ends.append(worker.flat.parameters.clone())
        reference.grad = before - torch.stack(ends).mean(dim=0)
        outer.step()
        torch.testing.assert_close(values(shard)[0], reference.data, rtol=1e-5, atol=1e-6)


def test_asynchronous_differences_are_applied_as_they_come():
    policy = Averaging(local_steps=2, asynchronous=True)
    shard = server(policy, policy.server_rule(SGD()), Constant(lr=LR))
    worker = Worker(0, shard, SGD())
    before = values(shard)[0].clone()
    assert worker.work([batch_of(0), batch_of(1)]).outcome is Outcome.APPLIED
    moved = (worker.flat.parameters - before) / NUM_WORKERS
    torch.testing.assert_close(values(shard)[0], before + moved, rtol=1e-5, atol=1e-7)


def test_differences_that_are_not_finite_are_dropped_and_the_optimizer_begins_anew():
    policy = Averaging(local_steps=2)
    shard = server(policy, policy.server_rule(SGD()), Constant(lr=LR))
    worker = Worker(0, shard, Momentum(), Constant(lr=LR))
    before = values(shard)[0].clone()
    worker.computer.flat.module.dense.bias.register_hook(lambda gradient: gradient * torch.inf)
    assert worker.work([batch_of(0), batch_of(1)]).outcome is Outcome.NOT_FINITE
    assert torch.equal(values(shard)[0], before)
    assert worker.flat.gradients.isnan().all()
    fresh = Worker(0, shard, Momentum(), Constant(lr=LR))
    worker.flat.module.dense.bias._backward_hooks.clear()
    fresh.sequence = 2
    for each in (worker, fresh):
        each.work([batch_of(2)])
    torch.testing.assert_close(worker.flat.parameters, fresh.flat.parameters)


@pytest.mark.parametrize(
    ("batches_per_push", "pushes"),
    [(1, [(0, 3), (1, 3), (3, 3), (4, 2)]), (2, [(0, 6), (1, 3), (2, 2)]), (None, [(0, 11)])],
)
def test_pushes_hold_so_many_batches(batches_per_push, pushes):
    """Also of one that has no image, and where the data end in the middle."""
    flat = FlatModule(tiny_model())
    client = RecordingClient(flat, 1)
    computer = GradientComputer(flat, OBJECTIVE, None)
    local = LocalSteps(computer, SGD(), Constant(lr=LR), HORIZON, Clocks())
    loop = WorkerLoop(0, 0, computer, client, local=local, batches_per_push=batches_per_push)
    reports: list[StepReport] = []
    empty = Batch(
        torch.empty(0, 3, 6, 6, dtype=torch.uint8), LabelLists.from_lists([]), 6, 7, ("x",)
    )
    loop.run([batch_of(0), batch_of(3), empty, batch_of(7), batch_of(10, 2)], reports.append)
    (shard,) = client.shards
    assert [(push.sequence, push.num_samples) for push in shard.pushes] == pushes
    assert shard.calls == ["pull", "push"] * len(pushes)
    assert [report.sequence for report in reports] == list(range(len(reports)))
    assert sum(report.num_samples for report in reports) == 11
    assert [key for report in reports for key in report.corrupt_keys] == ["x"]
