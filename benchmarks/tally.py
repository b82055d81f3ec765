"""A model whose parameters count how often each image was trained on, and images to count.

With SGD and a learning rate of 1, a push of a batch takes 1 off the parameter of each of its
images, at each of two shards of the same size. So the parameters of a finished run are the negative
number of times that each image's work was applied: an update that was lost, or made twice, shows
there whatever anybody counted.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

NUM_IMAGES = 512
NUM_SHARDS = 2
SIDE = 8


class _Count(torch.autograd.Function):
    """Logits of zero, whose gradient says which images they are of."""

    @staticmethod
    def forward(context: Any, tally: Tensor, images: Tensor, num_classes: int) -> Tensor:
        """images: their numbers."""
        context.save_for_backward(images)
        return tally.new_zeros(len(images), num_classes)

    @staticmethod
    def backward(context: Any, *_: Any) -> tuple[Tensor, None, None]:
        """Each image's count in the batch, once for each shard."""
        (images,) = context.saved_tensors
        counts = torch.bincount(images, minlength=NUM_IMAGES).to(torch.float32)
        return counts.repeat(NUM_SHARDS), None, None


class Tally(nn.Module):
    """Takes `pause_s` for a step, for as long as there is no file `hurry`."""

    def __init__(self, num_classes: int, pause_s: float, hurry: str) -> None:
        super().__init__()
        self.tally = nn.Parameter(torch.zeros(NUM_SHARDS * NUM_IMAGES))
        self._num_classes, self._pause_s, self._hurry = num_classes, pause_s, Path(hurry)

    def forward(self, images: Tensor) -> Tensor:
        """Of images that are one colour each, which is their number."""
        if self.training and not self._hurry.exists():
            time.sleep(self._pause_s)
        red, green = ((images[:, channel, 0, 0] + 1) * 127.5 for channel in (0, 1))
        numbers = (red.round() + 256 * green.round()).long().clamp(0, NUM_IMAGES - 1)
        return _Count.apply(self.tally, numbers, self._num_classes)  # type: ignore[no-any-return, no-untyped-call]


def build(num_classes: int, pause_s: float = 0.0, hurry: str = "") -> nn.Module:
    """For model.factory."""
    return Tally(num_classes, pause_s, hurry)


class Numbers:
    """Images of one colour each, which is their number."""

    targets = tuple(number % 2 for number in range(NUM_IMAGES))

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        colour = np.array([index % 256, index // 256, 0], np.uint8)
        return np.broadcast_to(colour, (SIDE, SIDE, 3)).copy(), self.targets[index]


def images() -> Numbers:
    """For data.train and data.val."""
    return Numbers()
