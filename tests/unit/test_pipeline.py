"""The worker loop against real shards: in turn, overlapped, pushed early, accumulated."""

import threading

import pytest
import torch
from local_shards import LocalClient, layout_of
from torch import Tensor, nn

from model.errors import InputError
from model.flat import FlatModule
from ps.consistency import Async
from ps.push import Push
from ps.rules import SGD, Ema
from ps.schedule import Constant, Horizon
from ps.shard import ShardConfig
from worker import pipeline as pipeline_module
from worker.data.labels import LabelLists
from worker.data.loader import Batch
from worker.data.transform import normalize
from worker.early import ShardsReady
from worker.gradient import GradientComputer
from worker.host_vectors import HostVectors
from worker.loop import WorkerLoop
from worker.objective import create_objective
from worker.pipeline import PipelineSettings
from worker.step_report import StepReport

NUM_CLASSES, LR = 4, 0.1
OBJECTIVE = create_objective("multilabel", NUM_CLASSES)
HORIZON = Horizon(epoch_samples=100, num_workers=1)
DEADLINE_S = 60.0
IN_TURN, OVERLAP = PipelineSettings(), PipelineSettings(overlap=True)
EARLY = PipelineSettings(early_push=True)
BOTH = PipelineSettings(overlap=True, early_push=True)


class Tiny(nn.Module):
    """Small layers first, and most of the parameters in the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.hidden = nn.Linear(5, 40)
        self.dense = nn.Linear(40, NUM_CLASSES)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(images)).relu().mean(dim=(2, 3))
        return self.dense(self.hidden(features).relu())


def tiny_model() -> nn.Module:
    torch.manual_seed(7)
    return Tiny()


def batch_of(seed: int, num_images: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num_images, 3, 6, 6), generator=generator, dtype=torch.uint8)
    labels = LabelLists.from_lists([(seed + i) % NUM_CLASSES] for i in range(num_images))
    return Batch(images, labels, 0, num_images, ())


class Setting:
    """One worker, its model, and the shards."""

    def __init__(self, num_shards: int, settings: PipelineSettings, **loop) -> None:
        self.flat = FlatModule(tiny_model())
        self.client = LocalClient(
            self.flat,
            num_shards,
            lambda ranges: ShardConfig(
                ranges,
                SGD(),
                Constant(lr=LR),
                Horizon(epoch_samples=100, num_workers=1),
                Ema(),
                Async(),
            ),
        )
        self.computer = GradientComputer(self.flat, OBJECTIVE, None)
        self.loop = WorkerLoop(0, 0, self.computer, self.client, pipeline=settings, **loop)
        self.reports: list[StepReport] = []

    def run(self, batches: list[Batch]) -> tuple[Tensor, Tensor]:
        self.loop.run(batches, self.reports.append)
        return self.client.held()


def delayed_sgd(batches: list[Batch], delay: int) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, where the n-th gradient is taken at the parameters before update n - delay.

    BN statistics are moved, as by the servers, by what each batch did to those it found.
    """
    flat = FlatModule(tiny_model())
    history = [(flat.parameters.clone(), flat.statistics.clone())]
    for number, batch in enumerate(batches):
        seen = history[max(0, number - delay)]
        flat.parameters.copy_(seen[0])
        flat.statistics.copy_(seen[1])
        flat.zero_gradients()
        flat.module.train()
        images = normalize(batch.images).contiguous(memory_format=torch.channels_last)
        OBJECTIVE.loss(flat.module(images), batch.labels).backward()
        delta = flat.statistics - seen[1]
        parameters, statistics = history[-1]
        history.append((parameters - LR * flat.gradients, statistics + delta))
    return history[-1]


BATCHES = [batch_of(seed) for seed in range(9)]


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(("settings", "delay"), [(IN_TURN, 0), (EARLY, 0), (OVERLAP, 1), (BOTH, 1)])
def test_one_worker_is_sgd_and_overlap_delays_it_by_one(num_shards, settings, delay):
    setting = Setting(num_shards, settings)
    parameters, statistics = setting.run(BATCHES)
    expected = delayed_sgd(BATCHES, delay)
    torch.testing.assert_close(parameters, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics, expected[1], rtol=1e-5, atol=1e-6)
    staleness = [{receipt.staleness for receipt in each.receipts} for each in setting.reports]
    assert staleness == [{0}] + [{delay}] * 8
    assert [report.sequence for report in setting.reports] == list(range(9))
    assert all(len(report.receipts) == num_shards for report in setting.reports)


@pytest.mark.parametrize("settings", [IN_TURN, EARLY, OVERLAP, BOTH])
def test_a_device_with_memory_of_its_own_does_the_same(settings, monkeypatch):
    """The path of a GPU, on the CPU: pulled into and pushed from twins."""
    expected = Setting(2, settings).run(BATCHES)

    def with_twins(computer, *, overlap):
        return HostVectors(computer, overlap=overlap, twins=True)

    monkeypatch.setattr(pipeline_module, "HostVectors", with_twins)
    apart = Setting(2, settings).run(BATCHES)
    torch.testing.assert_close(apart, expected, rtol=0, atol=0)


def test_batches_without_images_keep_their_numbers_and_order():
    empty = Batch(torch.empty(0, 3, 6, 6, dtype=torch.uint8), LabelLists.from_lists([]), 0, 1, "x")
    for settings in (IN_TURN, BOTH):
        setting = Setting(2, settings)
        parameters, _ = setting.run([empty, batch_of(0), empty, batch_of(1), empty])
        expected, _ = delayed_sgd([batch_of(0), batch_of(1)], delay=int(settings.overlap))
        torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-6)
        reports = setting.reports
        assert [report.sequence for report in reports] == list(range(5))
        assert [report.num_samples for report in reports] == [0, 3, 0, 3, 0]


def test_accumulated_batches_make_one_push_of_their_mean():
    setting = Setting(2, IN_TURN, batches_per_push=4)
    setting.run(BATCHES)
    assert [report.num_samples for report in setting.reports] == [12, 12, 3]
    assert [shard.service.status().clocks.updates for shard in setting.client.shards] == [3, 3]


@pytest.mark.parametrize(("settings", "per_push"), [(IN_TURN, 1), (IN_TURN, 3), (BOTH, 1)])
def test_who_leaves_settles_the_push_at_hand_and_begins_no_other(settings, per_push):
    for asked_at in range(len(BATCHES)):
        setting = Setting(2, settings, batches_per_push=per_push)

        def batches(setting=setting, asked_at=asked_at):
            for number, batch in enumerate(BATCHES):
                if number == asked_at:
                    setting.loop.leave()
                yield batch

        num_pushes = -(-asked_at // per_push)
        parameters, _ = setting.run(batches())
        assert [report.num_samples for report in setting.reports] == [3 * per_push] * num_pushes
        assert all(len(report.receipts) == 2 for report in setting.reports)
        assert {s.service.status().clocks.updates for s in setting.client.shards} == {num_pushes}
        if per_push == 1:
            expected, _ = delayed_sgd(BATCHES[:asked_at], delay=int(settings.overlap))
            torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-6)


def test_overlapped_calls_run_while_a_gradient_is_computed():
    """The third forward pass waits for the second push and what is pulled after it."""
    setting = Setting(1, OVERLAP)
    (shard,) = setting.client.shards
    pushed, pulled, forwards = threading.Event(), threading.Event(), []
    shard.before_push = lambda push: pushed.set() if push.sequence == 1 else None
    shard.after_pull = lambda version: pulled.set() if version == 2 else None

    def wait(module, arguments) -> None:
        forwards.append(None)
        if len(forwards) == 3:
            assert pushed.wait(DEADLINE_S), "the last push waits for the computation"
            assert pulled.wait(DEADLINE_S), "the next pull waits for the computation"

    setting.flat.module.register_forward_pre_hook(wait)
    setting.run(BATCHES[:5])
    assert len(forwards) == 5


def test_a_gradient_is_not_overwritten_while_it_is_pushed():
    """The first push is held up until the second gradient is complete."""
    setting = Setting(1, OVERLAP)
    computed = threading.Event()
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def hold(push: Push) -> None:
        early = push.gradient.clone()
        if push.sequence == 0:
            assert computed.wait(DEADLINE_S)
        kept[push.sequence] = (early, push.gradient.clone())

    setting.client.shards[0].before_push = hold
    finish, finished = setting.computer.finish, []

    def count():
        finished.append(finish())
        if len(finished) == 2:
            computed.set()
        return finished[-1]

    setting.computer.finish = count
    setting.run(BATCHES[:4])
    for early, late in kept.values():
        assert torch.equal(early, late)
    assert not torch.equal(kept[0][0], kept[1][0])


def test_the_last_layers_are_pushed_before_the_first_ones_are_done():
    setting = Setting(3, EARLY)
    arrived = threading.Event()
    setting.client.shards[2].before_push = lambda push: arrived.set()

    def wait(gradient: Tensor) -> None:
        assert arrived.wait(DEADLINE_S), "the last shard's part waits for the first layer"

    setting.flat.module.conv.weight.register_hook(wait)
    setting.run(BATCHES[:1])
    assert setting.flat.parameter_segments[-1].name.startswith("dense")


def test_a_gradient_that_is_added_to_twice_is_refused():
    flat = FlatModule(tiny_model())
    ready = ShardsReady(flat, layout_of(flat, 2))
    ready.arm(lambda shard: None)
    flat.module(torch.randn(2, 3, 6, 6)).sum().backward()
    with pytest.raises(InputError, match="early_push"):
        flat.module(torch.randn(2, 3, 6, 6)).sum().backward()
    ready.disarm()
    flat.module(torch.randn(2, 3, 6, 6)).sum().backward()


@pytest.mark.parametrize("settings", [IN_TURN, OVERLAP, BOTH])
def test_an_error_of_a_shard_ends_the_loop(settings):
    setting = Setting(2, settings)

    def fail(push: Push) -> None:
        if push.sequence == 2:
            raise ConnectionError("gone")

    setting.client.shards[1].before_push = fail
    with pytest.raises(ConnectionError, match="gone"):
        setting.run(BATCHES)
    assert len(setting.reports) <= 2
