"""Xception (Chollet, arXiv 1610.02357v3, figure 5), with Keras's constants."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from model.errors import InputError
from model.head import Head
from model.separable import (
    SameMaxPool2d,
    SeparableConv2d,
    StridedShortcut,
    batch_norm,
    initialize_glorot_,
)
from model.settings import Settings

SMALLEST_SIZE = 7
"""Pixels: the stem's two 'valid' convolutions make one pixel of seven, and nothing of six."""

_CHANNEL_STEP = 8
"""Channel counts are multiples of this, which vector units like."""


class XceptionSettings(Settings):
    """What of Xception can be varied; the defaults are the paper's model for JFT."""

    width: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Factor on every channel count; the result is rounded to a multiple of 8, at least 8."""

    middle_blocks: int = Field(default=8, ge=0)
    """Number of residual blocks in the middle flow."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of features dropped before the dense layer; the paper has 0.5 for ImageNet."""


class Stem(nn.Module):
    """Block 1: two 3x3 'valid' convolutions, the first of stride 2, each with BN and ReLU."""

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, mid_channels, 3, stride=2, bias=False)
        self.bn1 = batch_norm(mid_channels)
        self.conv2 = nn.Conv2d(mid_channels, out_channels, 3, bias=False)
        self.bn2 = batch_norm(out_channels)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.bn1(self.conv1(images)), inplace=True)
        return F.relu(self.bn2(self.conv2(maps)), inplace=True)


class DownsamplingBlock(nn.Module):
    """Blocks 2 to 4 and 13: two separable convolutions and a pool, plus a strided shortcut.

    Takes (N, in_channels, H, W) and gives (N, out_channels, ceil(H / 2), ceil(W / 2)). Block 2
    has no leading ReLU, because its input has just passed one.
    """

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, leading_relu: bool
    ) -> None:
        super().__init__()
        self.leading_relu = leading_relu
        self.sep1 = SeparableConv2d(in_channels, mid_channels)
        self.bn1 = batch_norm(mid_channels)
        self.sep2 = SeparableConv2d(mid_channels, out_channels)
        self.bn2 = batch_norm(out_channels)
        self.pool = SameMaxPool2d(kernel=3, stride=2)
        self.shortcut = StridedShortcut(in_channels, out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        # Not in place: the shortcut reads the values from before this ReLU.
        residual = F.relu(maps) if self.leading_relu else maps
        residual = F.relu(self.bn1(self.sep1(residual)), inplace=True)
        pooled: Tensor = self.pool(self.bn2(self.sep2(residual)))
        return pooled.add_(self.shortcut(maps))


class MiddleBlock(nn.Module):
    """Blocks 5 to 12: three times ReLU, separable convolution, BN, plus the identity."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.sep1 = SeparableConv2d(num_channels, num_channels)
        self.bn1 = batch_norm(num_channels)
        self.sep2 = SeparableConv2d(num_channels, num_channels)
        self.bn2 = batch_norm(num_channels)
        self.sep3 = SeparableConv2d(num_channels, num_channels)
        self.bn3 = batch_norm(num_channels)

    def forward(self, maps: Tensor) -> Tensor:
        # Only this first ReLU must not be in place: the identity reads what it would overwrite.
        residual: Tensor = self.bn1(self.sep1(F.relu(maps)))
        residual = self.bn2(self.sep2(F.relu(residual, inplace=True)))
        residual = self.bn3(self.sep3(F.relu(residual, inplace=True)))
        return residual.add_(maps)


class FinalBlock(nn.Module):
    """Block 14: two separable convolutions, each with BN and ReLU, and no shortcut."""

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int) -> None:
        super().__init__()
        self.sep1 = SeparableConv2d(in_channels, mid_channels)
        self.bn1 = batch_norm(mid_channels)
        self.sep2 = SeparableConv2d(mid_channels, out_channels)
        self.bn2 = batch_norm(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        maps = F.relu(self.bn1(self.sep1(maps)), inplace=True)
        return F.relu(self.bn2(self.sep2(maps)), inplace=True)


class Xception(nn.Module):
    """Takes float (N, 3, H, W) images and gives (N, num_classes) logits.

    Blocks are numbered without a gap: `block1` to `block14` for the paper's eight middle blocks.

    Raises InputError if `num_classes` is below 1, or in `forward` for images that are not
    (N, 3, H, W) or have a side below `SMALLEST_SIZE`.
    """

    def __init__(self, settings: XceptionSettings, num_classes: int) -> None:
        super().__init__()
        self.num_blocks = 0
        for number, block in enumerate(_blocks(settings), start=1):
            self.add_module(f"block{number}", block)
            self.num_blocks = number
        self.head = Head(scaled_channels(2048, settings.width), num_classes, settings.dropout)
        initialize_glorot_(self)

    def forward(self, images: Tensor) -> Tensor:
        _check_images(images)
        maps = images
        if maps.device.type == "cpu":
            # A third faster there; every later map keeps this format. GPUs keep the caller's.
            maps = maps.contiguous(memory_format=torch.channels_last)
        for number in range(1, self.num_blocks + 1):
            maps = getattr(self, f"block{number}")(maps)
        logits: Tensor = self.head(maps)
        return logits


def scaled_channels(num_channels: int, width: float) -> int:
    """`num_channels * width`, rounded to a multiple of 8 (halves up), at least 8."""
    return max(int(num_channels * width / _CHANNEL_STEP + 0.5), 1) * _CHANNEL_STEP


def _blocks(settings: XceptionSettings) -> Iterator[nn.Module]:
    c32, c64, c128, c256, c728, c1024, c1536, c2048 = (
        scaled_channels(num_channels, settings.width)
        for num_channels in (32, 64, 128, 256, 728, 1024, 1536, 2048)
    )
    yield Stem(3, c32, c64)
    yield DownsamplingBlock(c64, c128, c128, leading_relu=False)
    yield DownsamplingBlock(c128, c256, c256, leading_relu=True)
    yield DownsamplingBlock(c256, c728, c728, leading_relu=True)
    for _ in range(settings.middle_blocks):
        yield MiddleBlock(c728)
    # The one block that widens in its second convolution, not in its first.
    yield DownsamplingBlock(c728, c728, c1024, leading_relu=True)
    yield FinalBlock(c1024, c1536, c2048)


def _check_images(images: Tensor) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3:
        raise InputError(f"images have shape {shape}, but Xception takes (N, 3, height, width)")
    if min(shape[2:]) < SMALLEST_SIZE:
        raise InputError(
            f"images of {shape[2]}x{shape[3]} pixels vanish in Xception's first convolutions:"
            f" make them at least {SMALLEST_SIZE}x{SMALLEST_SIZE}"
        )
