"""A batch's gradient in flat vectors, and what the loop makes of it."""

import copy
import itertools

import pytest
import torch
from local_shards import RecordingClient
from torch import nn

from model.errors import InputError
from model.flat import FlatModule, named_views
from model.registry import create_model
from worker.data.labels import LabelLists
from worker.data.loader import Batch
from worker.data.transform import normalize
from worker.gradient import GradientComputer
from worker.loop import WorkerLoop
from worker.objective import create_objective

NUM_CLASSES = 5
OBJECTIVE = create_objective("multilabel", NUM_CLASSES)


def tiny_model() -> nn.Module:
    torch.manual_seed(3)
    return create_model("xception", NUM_CLASSES, width=0.05, middle_blocks=0)


def batch_of(num_images: int, seed: int = 0, corrupt: tuple[str, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num_images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = LabelLists.from_lists([(seed + i) % NUM_CLASSES, i % 2 + 3] for i in range(num_images))
    return Batch(images, labels, 0, num_images + len(corrupt), corrupt)


def reference(module: nn.Module, batch: Batch) -> float:
    """Forward and backward of a plain module; gradients and BN statistics stay in it."""
    module.train()
    images = normalize(batch.images).contiguous(memory_format=torch.channels_last)
    loss = OBJECTIVE.loss(module(images), batch.labels)
    loss.backward()
    return loss.item()


def test_gradient_delta_and_loss_are_those_of_the_plain_module():
    module = tiny_model()
    plain = copy.deepcopy(module)
    before = {name: value.clone() for name, value in plain.named_buffers()}
    flat = FlatModule(module)
    computer = GradientComputer(flat, OBJECTIVE, clip_norm=None)
    batch = batch_of(4)
    summary = computer.compute(batch)
    assert summary.loss == reference(plain, batch)
    gradients = {name: p.grad for name, p in flat.module.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=0)
    for segment in flat.statistic_segments:
        delta = computer.statistics_delta[segment.offset : segment.stop].view(segment.shape)
        after = dict(plain.named_buffers())[segment.name]
        torch.testing.assert_close(delta, after - before[segment.name], rtol=0, atol=0)
    assert summary.norm == pytest.approx(flat.gradients.norm().item(), rel=1e-6)


def test_a_second_batch_starts_from_zero_gradients():
    flat = FlatModule(tiny_model())
    computer = GradientComputer(flat, OBJECTIVE, clip_norm=None)
    start = flat.statistics.clone()
    computer.compute(batch_of(4))
    once = flat.gradients.clone()
    flat.statistics.copy_(start)
    computer.compute(batch_of(4))
    torch.testing.assert_close(flat.gradients, once, rtol=0, atol=0)


def test_several_batches_give_the_mean_by_samples_and_one_delta():
    flat, plain = FlatModule(tiny_model()), tiny_model()
    computer = GradientComputer(flat, OBJECTIVE, clip_norm=None)
    batches = [batch_of(4), batch_of(2, seed=1), batch_of(3, seed=2)]
    before = flat.statistics.clone()
    computer.begin()
    losses = []
    expected = torch.zeros_like(flat.gradients)
    parts = named_views(expected, flat.parameter_segments)
    for batch in batches:
        computer.add(batch)
        plain.zero_grad()
        losses.append(reference(plain, batch))
        for name, parameter in plain.named_parameters():
            parts[name].add_(parameter.grad, alpha=len(batch.images) / 9)
    summary = computer.finish()
    torch.testing.assert_close(flat.gradients, expected, rtol=1e-3, atol=2e-6)
    assert summary.loss == pytest.approx((4 * losses[0] + 2 * losses[1] + 3 * losses[2]) / 9)
    assert summary.norm == pytest.approx(expected.norm().item(), rel=1e-4)
    assert torch.equal(computer.statistics_delta, flat.statistics - before)
    after = named_views(flat.statistics, flat.statistic_segments)
    for name, value in after.items():
        torch.testing.assert_close(value, plain.get_buffer(name), rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.1, 0.9, 1.5])
def test_clipping_scales_only_what_is_too_long(share):
    flat = FlatModule(tiny_model())
    free = GradientComputer(flat, OBJECTIVE, clip_norm=None).compute(batch_of(4))
    unclipped = flat.gradients.clone()
    limit = share * free.norm
    fresh = FlatModule(tiny_model())
    summary = GradientComputer(fresh, OBJECTIVE, clip_norm=limit).compute(batch_of(4))
    assert summary.norm == pytest.approx(free.norm), "the norm is reported before clipping"
    torch.testing.assert_close(fresh.gradients, unclipped * min(1.0, share), rtol=1e-5, atol=1e-8)


def test_a_gradient_of_nan_is_not_hidden_by_clipping():
    flat = FlatModule(tiny_model())
    flat.parameters[0] = float("nan")
    GradientComputer(flat, OBJECTIVE, clip_norm=1.0).compute(batch_of(4))
    assert flat.gradients.isnan().all(), "every shard must see it"


class _Part(nn.Module):
    """Two layers, of which the last alone has a gradient, BN delta or norm that is not finite."""

    def __init__(self, bad: str) -> None:
        super().__init__()
        self.bad = bad
        self.dense = nn.Linear(3, NUM_CLASSES)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("running_mean", torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.bad == "delta":
            self.running_mean += torch.inf
        factor = {"gradient": torch.inf, "norm": 1e30}.get(self.bad, 1.0)
        scaled = 1 + (self.scale - self.scale.detach()) * factor
        return self.dense(images.mean((2, 3))) * scaled


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("bad", ["nothing", "gradient", "norm", "delta"])
def test_what_is_not_finite_somewhere_is_dropped_everywhere(bad, clip_norm):
    flat = FlatModule(_Part(bad))
    GradientComputer(flat, OBJECTIVE, clip_norm).compute(batch_of(4))
    if bad == "nothing":
        assert flat.gradients.isfinite().all()
    else:
        assert flat.gradients.isnan().all()


def test_a_module_that_leaves_its_flat_vectors_is_refused():
    class Leaver(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(3, NUM_CLASSES)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.dense.zero_grad(set_to_none=True)
            return self.dense(images.mean((2, 3)))

    computer = GradientComputer(FlatModule(Leaver()), OBJECTIVE, clip_norm=None)
    with pytest.raises(InputError, match=r"dense\.weight"):
        computer.compute(batch_of(2))


def run_loop(batches):
    """A loop with two shards, which hold the first model's vectors; then its reports."""
    flat = FlatModule(tiny_model())
    client = RecordingClient(flat, 2)
    flat.parameters.fill_(float("nan"))
    ticks = itertools.count()
    computer = GradientComputer(flat, OBJECTIVE, None)
    loop = WorkerLoop(2, 5, computer, client, clock=lambda: float(next(ticks)))
    reports = []
    loop.run(batches, reports.append)
    return client, reports


def test_each_batch_is_pulled_for_computed_and_pushed_in_order():
    client, reports = run_loop([batch_of(4), batch_of(3, seed=1)])
    for number, shard in enumerate(client.shards):
        assert shard.calls == ["pull", "push"] * 2
        assert [
            (push.worker, push.incarnation, push.sequence, push.pulled_version, push.num_samples)
            for push in shard.pushes
        ] == [(2, 5, 0, number, 4), (2, 5, 1, number, 3)]
    plain = tiny_model()
    reference(plain, batch_of(3, seed=1))
    pushed = client.pushed_gradient(1)
    for segment in FlatModule(copy.deepcopy(plain)).parameter_segments:
        wanted = dict(plain.named_parameters())[segment.name].grad
        got = pushed[segment.offset : segment.stop].view(segment.shape)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert [report.sequence for report in reports] == [0, 1]
    assert all(report.gradient is not None for report in reports)
    assert [receipt.version for receipt in reports[0].receipts] == [0, 1]
    assert min(reports[0].pull_s, reports[0].compute_s, reports[0].push_s, reports[0].data_s) > 0


def test_a_batch_without_images_keeps_its_number_and_is_not_pushed():
    client, reports = run_loop([batch_of(0, corrupt=("a", "b")), batch_of(2)])
    assert [push.sequence for push in client.shards[0].pushes] == [1]
    assert reports[0].corrupt_keys == ("a", "b")
    assert reports[0].num_samples == 0
    assert reports[0].gradient is None
    assert not reports[0].receipts
