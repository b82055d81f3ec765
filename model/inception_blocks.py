"""The blocks of Inception V3 (Szegedy et al., arXiv 1512.00567, figures 5 to 7 and 10).

A block is a tree of three kinds of parts: chains (`nn.Sequential`), `Branches`, and at the leaves
pools and conv units. What a conv unit is made of is a parameter, because the Inception V3 of
2016 and today's differ in it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch_norm import UnscaledBatchNorm2d
from model.separable import BATCH_NORM_EPSILON, BATCH_NORM_MOMENTUM

EPSILON_OF_2016 = 1e-5
"""What Keras 1.1 added to variances; every later Keras adds 1e-3."""


class Conv(NamedTuple):
    """A convolution as the paper's table lists it: `stride` 1 means 'same', 2 means 'valid'."""

    channels: int
    kernel: tuple[int, int] = (1, 1)
    """Height and width, odd."""
    stride: int = 1
    valid: bool = False
    """True for no padding even at stride 1, as in the stem."""

    @property
    def padding(self) -> tuple[int, int]:
        if self.valid or self.stride > 1:
            return 0, 0
        return self.kernel[0] // 2, self.kernel[1] // 2


class ConvBatchNormRelu(nn.Module):
    """Today's conv unit: no bias, batch norm without gamma, ReLU."""

    def __init__(self, in_channels: int, conv: Conv) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, conv.channels, conv.kernel, conv.stride, conv.padding, bias=False
        )
        self.bn = UnscaledBatchNorm2d(conv.channels, BATCH_NORM_EPSILON, BATCH_NORM_MOMENTUM)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(maps)), inplace=True)


class ConvReluBatchNorm(nn.Module):
    """The conv unit of 2016: bias, ReLU, then batch norm with gamma."""

    def __init__(self, in_channels: int, conv: Conv) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, conv.channels, conv.kernel, conv.stride, conv.padding)
        self.bn = nn.BatchNorm2d(conv.channels, EPSILON_OF_2016, BATCH_NORM_MOMENTUM)

    def forward(self, maps: Tensor) -> Tensor:
        normalized: Tensor = self.bn(F.relu(self.conv(maps), inplace=True))
        return normalized


ConvUnit = Callable[[int, Conv], nn.Module]
"""A class above, or another that takes the number of incoming channels and a `Conv`."""


class SameAvgPool2d(nn.AvgPool2d):
    """A 3x3 average of stride 1 over the real pixels: padding counts for nothing."""

    def __init__(self) -> None:
        super().__init__(3, stride=1, padding=1, count_include_pad=False)


class Branches(nn.Module):
    """Runs every branch on the same maps and concatenates their channels, in order."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([branch(maps) for branch in self.children()], dim=1)


def chain(unit: ConvUnit, in_channels: int, *parts: Conv | nn.Module) -> nn.Sequential:
    """Conv units and modules, one after the other; the modules keep the number of channels."""
    built = nn.Sequential()
    for part in parts:
        if isinstance(part, Conv):
            built.append(unit(in_channels, part))
            in_channels = part.channels
        else:
            built.append(part)
    return built


def block_35(unit: ConvUnit, in_channels: int, pool_channels: int) -> Branches:
    """At 35x35 pixels, for images of 299: gives 224 + `pool_channels` channels.

    Figure 5, but for one branch: the code that all of these models descend from has 5x5 there,
    where the figure has 3x3.
    """
    return Branches(
        branch1x1=chain(unit, in_channels, Conv(64)),
        branch5x5=chain(unit, in_channels, Conv(48), Conv(64, (5, 5))),
        branch3x3dbl=chain(unit, in_channels, Conv(64), Conv(96, (3, 3)), Conv(96, (3, 3))),
        branch_pool=chain(unit, in_channels, SameAvgPool2d(), Conv(pool_channels)),
    )


def reduction_35(unit: ConvUnit, in_channels: int) -> Branches:
    """Figure 10, from 35x35 to 17x17 pixels: gives 480 + `in_channels` channels."""
    double = Conv(64), Conv(96, (3, 3)), Conv(96, (3, 3), stride=2)
    return Branches(
        branch3x3=chain(unit, in_channels, Conv(384, (3, 3), stride=2)),
        branch3x3dbl=chain(unit, in_channels, *double),
        branch_pool=nn.MaxPool2d(3, stride=2),
    )


def block_17(unit: ConvUnit, in_channels: int, mid: int, double_first: int) -> Branches:
    """Figure 6, at 17x17 pixels: gives 768 channels.

    mid: channels of the branches' inner convolutions; `double_first`: of the longer branch's
    first one.
    """
    single = Conv(mid), Conv(mid, (1, 7)), Conv(192, (7, 1))
    double = (
        Conv(double_first),
        Conv(mid, (7, 1)),
        Conv(mid, (1, 7)),
        Conv(mid, (7, 1)),
        Conv(192, (1, 7)),
    )
    return Branches(
        branch1x1=chain(unit, in_channels, Conv(192)),
        branch7x7=chain(unit, in_channels, *single),
        branch7x7dbl=chain(unit, in_channels, *double),
        branch_pool=chain(unit, in_channels, SameAvgPool2d(), Conv(192)),
    )


def reduction_17(unit: ConvUnit, in_channels: int, pool: nn.Module) -> Branches:
    """From 17x17 to 8x8 pixels, `pool` among the branches: gives 512 + `in_channels` channels."""
    long = Conv(192), Conv(192, (1, 7)), Conv(192, (7, 1)), Conv(192, (3, 3), stride=2)
    return Branches(
        branch3x3=chain(unit, in_channels, Conv(192), Conv(320, (3, 3), stride=2)),
        branch7x7x3=chain(unit, in_channels, *long),
        branch_pool=pool,
    )


def block_8(unit: ConvUnit, in_channels: int) -> Branches:
    """Figure 7, at 8x8 pixels, with branches that fork: gives 2048 channels."""
    return Branches(
        branch1x1=chain(unit, in_channels, Conv(320)),
        branch3x3=chain(unit, in_channels, Conv(384), _fork(unit)),
        branch3x3dbl=chain(unit, in_channels, Conv(448), Conv(384, (3, 3)), _fork(unit)),
        branch_pool=chain(unit, in_channels, SameAvgPool2d(), Conv(192)),
    )


def _fork(unit: ConvUnit) -> Branches:
    return Branches(wide=unit(384, Conv(384, (1, 3))), high=unit(384, Conv(384, (3, 1))))
