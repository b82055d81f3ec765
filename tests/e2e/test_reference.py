"""With one worker and one server, asynchronous training is plain SGD, to float32's accuracy."""

import re
from dataclasses import dataclass

import pytest
import torch
from clusters import JoinedRun
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from asynception.building import open_train, train_loader
from asynception.config import TrainConfig
from asynception.recipe import load_config
from model.registry import create_model
from worker.data.lease import Lease

# Few updates, and small ones: a hundred large ones make 1e-7 into 1e-1, in one process as well.
NUM_UPDATES, BATCH_SIZE, NUM_CLASSES = 16, 16, 10
LR, LR_DECAY, LR_EVERY = 0.005, 0.8, 5
KERNELS = (nn.Conv2d, nn.Linear)
MOMENTUM, WEIGHT_DECAY, EMA_DECAY, CLIP_NORM = 0.9, 1e-3, 0.9, 3.0
TOLERANCE = 1e-5

SETTINGS = {
    "scaling.num_workers": 1,
    "scaling.num_servers": 1,
    "training.samples": NUM_UPDATES * BATCH_SIZE,
    "training.seed": 7,
    "training.clip_norm": CLIP_NORM,
    "data.augment.max_shift": 0.1,
    "data.lease_batches": 3,
    "optimizer.name": "momentum",
    "optimizer.momentum": MOMENTUM,
    "optimizer.weight_decay": WEIGHT_DECAY,
    "ema.decay": EMA_DECAY,
    "ema.warmup": "true",
}

SCHEDULE = f"""
[schedule]
kind = "exponential"
lr = {LR}
decay = {LR_DECAY}
every = {LR_EVERY}
unit = "updates"
"""


@dataclass
class Reference:
    """What plain PyTorch comes to."""

    first: dict[str, torch.Tensor]
    last: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]
    losses: list[float]


def train_in_one_process(config: TrainConfig) -> Reference:
    torch.manual_seed(7)
    module = create_model("xception", NUM_CLASSES, width=0.05, middle_blocks=1).train()
    kernels = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, KERNELS)}
    optimizer = torch.optim.SGD(
        [
            {"params": [p], "weight_decay": WEIGHT_DECAY if name in kernels else 0.0}
            for name, p in module.named_parameters()
        ],
        lr=LR,
        momentum=MOMENTUM,
    )
    first = {name: tensor.clone() for name, tensor in float_state(module).items()}
    average = dict(first)
    losses = []
    all_positions = Lease(0, NUM_UPDATES * BATCH_SIZE)
    for step, batch in enumerate(train_loader(config, open_train(config)).batches([all_positions])):
        for group in optimizer.param_groups:
            group["lr"] = LR * LR_DECAY ** (step // LR_EVERY)
        targets = torch.zeros(BATCH_SIZE, NUM_CLASSES)
        for row, (begin, end) in enumerate(batch.labels.offsets.unfold(0, 2, 1).tolist()):
            targets[row, batch.labels.ids[begin:end]] = 1
        optimizer.zero_grad()
        logits = module(batch.images.float() / 127.5 - 1)
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / BATCH_SIZE
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
        optimizer.step()
        losses.append(loss.item())
        alpha = min(EMA_DECAY, (1 + step) / (10 + step))
        for name, tensor in float_state(module).items():
            average[name] = alpha * average[name] + (1 - alpha) * tensor
    return Reference(first, float_state(module), average, losses)


def float_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and BN statistics."""
    state = module.state_dict()
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


@pytest.fixture(scope="module")
def run(recipe, cluster, tmp_path_factory):
    text, swapped = re.subn(r"\[schedule\][^\[]*", SCHEDULE, recipe.read_text())
    assert swapped == 1
    recipe = recipe.with_name("alone.toml")
    recipe.write_text(text)
    run = JoinedRun(cluster, tmp_path_factory.mktemp("alone"), recipe, SETTINGS)
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    return run


@pytest.fixture(scope="module")
def reference(run):
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train_in_one_process(load_config(run.path))
    torch.set_num_threads(num_threads)


def assert_same(saved: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


def test_the_loop_that_is_compared_with_goes_far_enough_to_tell(reference):
    moved = [
        (reference.last[name] - tensor).abs().max() for name, tensor in reference.first.items()
    ]
    assert torch.stack(moved).median() > 1000 * TOLERANCE
    assert reference.losses[-1] < 0.9 * reference.losses[0]


def test_parameters_and_statistics_equal_those_of_a_plain_loop(run, reference):
    path = run.path / "checkpoints" / run.checkpoints()[-1]
    assert_same(load_file(path / "model.safetensors"), reference.last)


def test_the_ema_equals_that_of_a_plain_loop(run, reference):
    path = run.path / "checkpoints" / run.checkpoints()[-1]
    assert_same(load_file(path / "ema.safetensors"), reference.average)


def test_no_push_was_stale_and_the_losses_are_the_same(run, reference):
    result = run.result()
    assert result["staleness"] == {"mean": 0, "p50": 0, "p99": 0, "max": 0}
    assert result["receipts"] == {"applied": NUM_UPDATES}
    points = [point for point in run.metrics("train") if point["loss"] is not None]
    done = [0, *(point["pushes"] for point in points)]
    for point, first, stop in zip(points, done, done[1:], strict=False):
        assert point["loss"] == pytest.approx(sum(reference.losses[first:stop]) / (stop - first))
