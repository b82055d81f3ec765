"""A model whose parameters say how many updates each has had.

Its gradient is -1 in every element, and the learning rate 1. It can take its time until it is told
to hurry, so that a run lasts as long as its test needs.
"""

from pathlib import Path

HURRY = "hurry"

SOURCE = """
import time
from pathlib import Path

import torch
from torch import nn

HURRY, STEP_S = Path({hurry}), {step_s}

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
        if STEP_S and self.training and not HURRY.exists():
            time.sleep(STEP_S)
        return Counted.apply(images, self.weight, self.num_classes)

def build(num_classes):
    return Counter(num_classes)
"""


def counting(folder: Path, step_s: float = 0.0) -> dict[str, object]:
    """Settings of a run without checkpoints before its last one; the model's file is put there.

    step_s: how long each gradient takes, until `hurry`.
    """
    path = folder / "counter.py"
    source = SOURCE.replace("{hurry}", repr(str(folder / HURRY)))
    path.write_text(source.replace("{step_s}", str(step_s)))
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
