"""A plain PyTorch `Dataset` and `nn.Module` of one's own, in one file that recipes can name.

asynception train examples/stripes.toml
"""

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

SIZE = 32
ANGLES = 8


class Stripes(Dataset[tuple[NDArray[np.uint8], int]]):
    """Stripes in one of eight directions, in noise; the direction is the label."""

    thread_safe = True
    """Threads may read samples at once."""

    def __init__(self, num_images: int, seed: int) -> None:
        self._num_images, self._seed = num_images, seed

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Pixels (32, 32, 3) and a class; always the same for one index."""
        label = index % ANGLES
        chance = np.random.default_rng((self._seed, index))
        angle = np.pi * (label + chance.uniform(-0.3, 0.3)) / ANGLES
        y, x = np.mgrid[:SIZE, :SIZE]
        phase = x * np.cos(angle) + y * np.sin(angle)
        waves = np.sin(chance.uniform(0.6, 1.2) * phase + chance.uniform(0, 2 * np.pi))
        pixels = waves[..., None] + chance.normal(0, 0.8, (SIZE, SIZE, 3))
        return np.clip(127 + 60 * pixels, 0, 255).astype(np.uint8), label


def dataset(split: str) -> Stripes:
    """What `data.train` and `data.val` name; `split` is "train" or "val"."""
    return Stripes(4000, seed=0) if split == "train" else Stripes(400, seed=1)


def build(num_classes: int, width: int = 24) -> nn.Module:
    """What `model.factory` names."""
    return nn.Sequential(
        nn.Conv2d(3, width, 5, stride=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )
