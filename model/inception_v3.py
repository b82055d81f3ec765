"""Inception V3 (Szegedy et al., arXiv 1512.00567): today's, and the Xception paper's.

The two differ because "Inception V3" changed under its name. Table 3 of the Xception paper counts
23,626,728 parameters, which is the Inception V3 of Keras 1.1; everyone's since is tf-slim's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from model.head import Head, HeadSettings
from model.images import check_images
from model.inception_blocks import (
    Conv,
    ConvBatchNormRelu,
    ConvReluBatchNorm,
    ConvUnit,
    block_8,
    block_17,
    block_35,
    reduction_17,
    reduction_35,
)
from model.separable import initialize_glorot_

SMALLEST_SIZE = 75
"""Pixels: the 'valid' strides make one pixel of 75, and nothing of 74."""

NUM_FEATURES = 2048


class InceptionV3Settings(HeadSettings):
    """What of today's Inception V3 can be varied; the defaults are the paper's model for JFT."""


class InceptionV3Of2016Settings(HeadSettings):
    """What of the Inception V3 of 2016 can be varied; the defaults are the paper's for JFT."""


@dataclass(frozen=True)
class _Variant:
    """What the two differ in, from the images to the maps."""

    name: str
    unit: ConvUnit
    pool_channels: tuple[int, int, int]
    """Of the pool branches in the three blocks at 35x35 pixels."""
    last_double_first: int
    """Channels of the first convolution in the longest branch of the last block at 17x17."""
    last_pool: type[nn.MaxPool2d] | type[nn.AvgPool2d]
    """The pool on the way from 17x17 to 8x8 pixels."""


_TODAYS = _Variant("inception_v3", ConvBatchNormRelu, (32, 64, 64), 192, nn.MaxPool2d)
_OF_2016 = _Variant("inception_v3_2016", ConvReluBatchNorm, (32, 32, 32), 160, nn.AvgPool2d)


class _Inception(nn.Module):
    """What both share: parts under torchvision's names, applied in order, then the head."""

    def __init__(self, variant: _Variant, settings: HeadSettings, num_classes: int) -> None:
        super().__init__()
        self.variant = variant
        for name, part in _parts(variant):
            self.add_module(name, part)
        self.part_names = tuple(name for name, _ in self.named_children())
        self.head = Head(NUM_FEATURES, num_classes, settings)
        initialize_glorot_(self)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.forward_features(images))
        return logits

    def forward_features(self, images: Tensor) -> Tensor:
        """The feature maps that the head pools: (N, 2048, H', W'), 8x8 for images of 299x299.

        All maps keep the memory format of the images.
        """
        check_images(self.variant.name, images, SMALLEST_SIZE)
        maps = images
        for name in self.part_names:
            maps = getattr(self, name)(maps)
        return maps


class InceptionV3(_Inception):
    """Today's Inception V3, as in Keras from version 2 and in tf-slim, without auxiliary tower.

    Takes float (N, 3, H, W) images and gives (N, num_classes) logits. 94 convolutions without
    bias, each with batch norm without gamma and ReLU; 23,817,352 parameters for 1,000 classes.
    Blocks are named as in torchvision, whose model differs: it has gammas, and its average pools
    count the padding.

    Raises InputError if `num_classes` is below 1, or in `forward` for images that are not
    (N, 3, H, W) or have a side below `SMALLEST_SIZE`.
    """

    def __init__(self, settings: InceptionV3Settings, num_classes: int) -> None:
        super().__init__(_TODAYS, settings, num_classes)


class InceptionV3Of2016(_Inception):
    """The Inception V3 of Keras 1.1, 23,626,728 parameters for 1,000 classes as in Table 3.

    Takes and gives what `InceptionV3` does, and raises the same errors. It differs in narrower
    convolutions after the pools at 35x35 pixels and in one at 17x17, in its last reduction, which
    pools by average, and in its conv unit: with bias, ReLU before batch norm, and gamma.
    """

    def __init__(self, settings: InceptionV3Of2016Settings, num_classes: int) -> None:
        super().__init__(_OF_2016, settings, num_classes)


def _parts(variant: _Variant) -> Iterator[tuple[str, nn.Module]]:
    yield from _stem(variant.unit)
    yield from _parts_35(variant.unit, variant.pool_channels)
    yield from _parts_17(variant)
    yield "Mixed_7b", block_8(variant.unit, 1280)
    yield "Mixed_7c", block_8(variant.unit, NUM_FEATURES)


def _stem(unit: ConvUnit) -> Iterator[tuple[str, nn.Module]]:
    yield "Conv2d_1a_3x3", unit(3, Conv(32, (3, 3), stride=2))
    yield "Conv2d_2a_3x3", unit(32, Conv(32, (3, 3), valid=True))
    yield "Conv2d_2b_3x3", unit(32, Conv(64, (3, 3)))
    yield "maxpool1", nn.MaxPool2d(3, stride=2)
    yield "Conv2d_3b_1x1", unit(64, Conv(80))
    yield "Conv2d_4a_3x3", unit(80, Conv(192, (3, 3), valid=True))
    yield "maxpool2", nn.MaxPool2d(3, stride=2)


def _parts_35(
    unit: ConvUnit, pool_channels: tuple[int, int, int]
) -> Iterator[tuple[str, nn.Module]]:
    channels = 192
    for letter, pooled in zip("bcd", pool_channels, strict=True):
        yield f"Mixed_5{letter}", block_35(unit, channels, pooled)
        channels = 224 + pooled
    yield "Mixed_6a", reduction_35(unit, channels)


def _parts_17(variant: _Variant) -> Iterator[tuple[str, nn.Module]]:
    unit = variant.unit
    yield "Mixed_6b", block_17(unit, 480 + 224 + variant.pool_channels[-1], 128, 128)
    yield "Mixed_6c", block_17(unit, 768, 160, 160)
    yield "Mixed_6d", block_17(unit, 768, 160, 160)
    yield "Mixed_6e", block_17(unit, 768, 192, variant.last_double_first)
    yield "Mixed_7a", reduction_17(unit, 768, variant.last_pool(3, stride=2))
