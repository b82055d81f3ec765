"""The parts that Xception is built of: 'same' padding, separable convolutions, batch norm.

'same' means what TensorFlow means by it. `torch`'s `padding="same"` refuses strides above 1, and
symmetric padding puts the windows of an even-sized map one pixel too far to the upper left.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from model.errors import InputError

Activation = Literal["none", "relu", "elu"]

ChannelSegments = PositiveInt | Literal["depthwise"]
"""Into how many equal segments a 3x3 convolution cuts its channels; "depthwise": one each."""

BATCH_NORM_EPSILON = 1e-3
BATCH_NORM_MOMENTUM = 0.01
"""The weight of the newest batch, as torch counts it: Keras calls the same thing 0.99."""


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels to add before and after an axis of `size` so that ceil(size / stride) come out."""
    num_windows = -(-size // stride)
    total = max((num_windows - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """A square convolution with 'same' zero padding at any stride, and no bias.

    Takes (N, in_channels, H, W) and gives (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        top, bottom = same_padding(maps.shape[-2], self.kernel_size[0], self.stride[0])
        left, right = same_padding(maps.shape[-1], self.kernel_size[1], self.stride[1])
        if (top, left) != (bottom, right):
            # A copy of the input; the convolution itself can pad both sides alike without one.
            maps = F.pad(maps, (0, right - left, 0, bottom - top))
        return F.conv2d(maps, self.weight, None, self.stride, (top, left), 1, self.groups)


class SameMaxPool2d(nn.Module):
    """A square max pool with 'same' padding of minus infinity.

    Takes (N, C, H, W) and gives (N, C, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride

    def forward(self, maps: Tensor) -> Tensor:
        top, bottom = same_padding(maps.shape[-2], self.kernel, self.stride)
        left, right = same_padding(maps.shape[-1], self.kernel, self.stride)
        uneven = (top, left) != (bottom, right)
        if uneven and self.stride == 1:
            maps = F.pad(maps, (0, right - left, 0, bottom - top), value=float("-inf"))
        # At larger strides, rounding the number of windows up adds the one that overhangs at
        # the bottom or right, clipped to the map: the same result as padding, without the copy.
        ceil_mode = uneven and self.stride > 1
        return F.max_pool2d(maps, self.kernel, self.stride, (top, left), ceil_mode=ceil_mode)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"


class SegmentedConv2d(SameConv2d):
    """A 3x3 'same' convolution that works on equal, non-overlapping segments of the channels.

    Takes (N, num_channels, H, W) and gives the same shape. One segment makes it a regular
    convolution, and `num_channels` of them, or "depthwise", a depthwise one.

    Raises InputError if `segments` does not divide `num_channels`.
    """

    def __init__(self, num_channels: int, segments: ChannelSegments) -> None:
        groups = segments if isinstance(segments, int) else num_channels
        fitting = fitting_segments([num_channels])
        if groups not in fitting:
            raise InputError(
                f"segments = {groups} does not cut {num_channels} channels into equal parts:"
                f' choose {", ".join(map(str, fitting))} or "depthwise"'
            )
        super().__init__(num_channels, num_channels, 3, groups=groups)


class SeparableConv2d(nn.Module):
    """A 3x3 'same' convolution, depthwise unless told otherwise, then a 1x1; no biases.

    Takes (N, in_channels, H, W) and gives (N, out_channels, H, W).

    segments: of the 3x3's channels; its weights are named `depthwise` whatever their number.
    activation: between the two. Xception, figure 10, found that any hurts.

    Raises InputError if `segments` does not divide `in_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        segments: ChannelSegments = "depthwise",
        activation: Activation = "none",
    ) -> None:
        super().__init__()
        self.depthwise = SegmentedConv2d(in_channels, segments)
        self.activation = activation_after_convolution(activation)
        self.pointwise = SameConv2d(in_channels, out_channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        pointwise: Tensor = self.pointwise(self.activation(self.depthwise(maps)))
        return pointwise


class StridedShortcut(nn.Module):
    """A residual block's projection: 1x1 convolution of stride 2, then batch norm, no ReLU.

    Takes (N, in_channels, H, W) and gives (N, out_channels, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = SameConv2d(in_channels, out_channels, 1, stride=2)
        self.bn = batch_norm(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        projected: Tensor = self.bn(self.conv(maps))
        return projected


def activation_after_convolution(name: Activation) -> nn.Module:
    """An activation that overwrites its input, which no convolution needs for its gradient."""
    if name == "relu":
        return nn.ReLU(inplace=True)
    return nn.ELU(inplace=True) if name == "elu" else nn.Identity()


def fitting_segments(channel_counts: Iterable[int]) -> list[int]:
    """The numbers of segments that cut each of these channel counts into equal parts."""
    divisor = math.gcd(*channel_counts)
    return [number for number in range(1, divisor + 1) if divisor % number == 0]


def batch_norm(num_channels: int) -> nn.BatchNorm2d:
    """Batch norm with the constants of Keras, which are not torch's."""
    return nn.BatchNorm2d(num_channels, eps=BATCH_NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM)


def initialize_glorot_(module: nn.Module) -> None:
    """Draw every kernel from Glorot's uniform distribution and zero every bias, in place.

    For a depthwise kernel torch swaps Keras's fan-in and fan-out; Glorot's bound has their sum.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
