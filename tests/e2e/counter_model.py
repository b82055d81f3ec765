"""A model whose parameters say how many updates each has had.

Its gradient is -1 in every element, and the learning rate 1. It can take its time until it is told
to hurry, so that a run lasts as long as its test needs; which processes train by then is seen.
"""

from pathlib import Path

HURRY, TRAINS = "hurry", "trains-"

SOURCE = """
import os, time
from pathlib import Path

import torch
from torch import nn

FOLDER, STEP_S = Path({folder}), {step_s}
POLL_S = 0.02

def take_time():
    (FOLDER / f"{trains}{os.getpid()}").touch()
    end_s = time.monotonic() + STEP_S
    while time.monotonic() < end_s and not (FOLDER / "{hurry}").exists():
        time.sleep(POLL_S)

class Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, weight, num_classes):
        ctx.shape = weight.shape
        return images.new_zeros(len(images), num_classes)

    @staticmethod
    def backward(ctx, gradient):
        return None, torch.full(ctx.shape, -1.0), None

class Counter(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.zeros(2, 4096))

    def forward(self, images):
        if STEP_S and self.training:
            take_time()
        return Counted.apply(images, self.weight, self.num_classes)

def build(num_classes):
    return Counter(num_classes)
"""


def counting(folder: Path, step_s: float = 0.0) -> dict[str, object]:
    """Settings of a run without checkpoints before its last one; the model's file is put there.

    step_s: how long each gradient takes, until `hurry`.
    """
    path, source = folder / "counter.py", SOURCE
    values = {"folder": repr(str(folder)), "hurry": HURRY, "trains": TRAINS, "step_s": str(step_s)}
    for name, value in values.items():
        source = source.replace(f"{{{name}}}", value)
    path.write_text(source)
    return {
        "model.factory": f"{path}:build",
        "training.clip_norm": "none",
        "optimizer.name": "sgd",
        "schedule.final": 1.0,
        "schedule.lr": 1.0,
        "evaluation.every_epochs": 1000,
        "checkpoint.every_epochs": "none",
        "checkpoint.every_s": "none",
    }


def hurry(folder: Path) -> None:
    """From now on gradients take no time."""
    (folder / HURRY).touch()


def take_time(folder: Path) -> None:
    """From now on gradients take their time again."""
    (folder / HURRY).unlink()


def num_training(folder: Path) -> int:
    """Processes that have begun to compute a gradient, of those that take their time."""
    return sum(1 for _ in folder.glob(f"{TRAINS}*"))
