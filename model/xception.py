"""Xception (Chollet, arXiv 1610.02357v3, figure 5), with Keras's constants."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from model.head import Head, HeadSettings
from model.images import check_images
from model.separable import (
    Activation,
    ChannelSegments,
    SameMaxPool2d,
    SeparableConv2d,
    StridedShortcut,
    batch_norm,
    fitting_segments,
    initialize_glorot_,
)
from model.spectrum import SpectrumConv2d

SMALLEST_SIZE = 7
"""Pixels: the stem's two 'valid' convolutions make one pixel of seven, and nothing of six."""

_CHANNEL_STEP = 8
"""Channel counts are multiples of this, which vector units like."""

_SEPARABLE_CHANNELS = (64, 128, 256, 728, 1024, 1536, 2048)
"""What the separable layers take and give at width 1: all but the last, and all but the first."""

Order = Literal["spatial_first", "pointwise_first"]

Separable = Callable[[int, int], nn.Module]
"""Builds a layer of a 3x3 and a 1x1 convolution from its channels, those in and those out."""


class XceptionSettings(HeadSettings):
    """What of Xception can be varied; the defaults are the paper's model for JFT."""

    width: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Factor on every channel count; the result is rounded to a multiple of 8, at least 8."""

    middle_blocks: int = Field(default=8, ge=0)
    """Number of residual blocks in the middle flow."""

    residual: bool = True
    """Connections around blocks, as in figure 9; without them, their projections go as well."""

    separable_activation: Activation = "none"
    """Between the 3x3 and the 1x1 convolution of each separable layer, as in figure 10."""

    separable_order: Order = "spatial_first"
    """Of a separable layer's two convolutions: "pointwise_first" is that of Inception modules, as
    in figures 3 and 4, and its 3x3 works on the channels that the layer gives, not takes."""

    segments: ChannelSegments = "depthwise"
    """Into how many segments each separable layer's 3x3 cuts its channels, from 1 (a regular
    convolution) to "depthwise" (one channel a segment); it must divide every layer's channels."""

    @field_validator("segments", mode="wrap")
    @classmethod
    def _fits_every_layer(
        cls, given: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> ChannelSegments:
        try:
            segments: ChannelSegments = validate(given)
        except ValidationError:
            # One complaint in place of pydantic's two, one for each type that it could have been.
            raise PydanticCustomError(
                "segments", 'input should be a whole number of at least 1, or "depthwise"'
            ) from None
        if isinstance(segments, int) and {"width", "separable_order"} <= info.data.keys():
            _check_segments(segments, info.data["width"], info.data["separable_order"])
        return segments


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
    has no leading ReLU, because its input has just passed one. Without `residual` there is no
    shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        separable: Separable,
        residual: bool,
        leading_relu: bool = True,
    ) -> None:
        super().__init__()
        self.leading_relu = leading_relu
        self.sep1 = separable(in_channels, mid_channels)
        self.bn1 = batch_norm(mid_channels)
        self.sep2 = separable(mid_channels, out_channels)
        self.bn2 = batch_norm(out_channels)
        self.pool = SameMaxPool2d(kernel=3, stride=2)
        self.shortcut = StridedShortcut(in_channels, out_channels) if residual else None

    def forward(self, maps: Tensor) -> Tensor:
        # Not in place: the shortcut reads the values from before this ReLU.
        residual = F.relu(maps) if self.leading_relu else maps
        residual = F.relu(self.bn1(self.sep1(residual)), inplace=True)
        pooled: Tensor = self.pool(self.bn2(self.sep2(residual)))
        return pooled if self.shortcut is None else pooled.add_(self.shortcut(maps))


class MiddleBlock(nn.Module):
    """Blocks 5 to 12: three times ReLU, separable convolution, BN, plus the identity.

    Takes and gives (N, num_channels, H, W). Without `residual` nothing is added.
    """

    def __init__(self, num_channels: int, *, separable: Separable, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.sep1 = separable(num_channels, num_channels)
        self.bn1 = batch_norm(num_channels)
        self.sep2 = separable(num_channels, num_channels)
        self.bn2 = batch_norm(num_channels)
        self.sep3 = separable(num_channels, num_channels)
        self.bn3 = batch_norm(num_channels)

    def forward(self, maps: Tensor) -> Tensor:
        # Only this first ReLU must not be in place: the identity reads what it would overwrite.
        residual: Tensor = self.bn1(self.sep1(F.relu(maps)))
        residual = self.bn2(self.sep2(F.relu(residual, inplace=True)))
        residual = self.bn3(self.sep3(F.relu(residual, inplace=True)))
        return residual.add_(maps) if self.residual else residual


class FinalBlock(nn.Module):
    """Block 14: two separable convolutions, each with BN and ReLU, and no shortcut.

    Takes (N, in_channels, H, W) and gives (N, out_channels, H, W).
    """

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, *, separable: Separable
    ) -> None:
        super().__init__()
        self.sep1 = separable(in_channels, mid_channels)
        self.bn1 = batch_norm(mid_channels)
        self.sep2 = separable(mid_channels, out_channels)
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
        self.head = Head(scaled_channels(2048, settings.width), num_classes, settings)
        initialize_glorot_(self)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.forward_features(images))
        return logits

    def forward_features(self, images: Tensor) -> Tensor:
        """The feature maps that the head pools: (N, num_features, ceil(H / 32), ...).

        All maps keep the memory format of the images.
        """
        check_images("xception", images, SMALLEST_SIZE)
        maps = images
        for number in range(1, self.num_blocks + 1):
            maps = getattr(self, f"block{number}")(maps)
        return maps


def scaled_channels(num_channels: int, width: float) -> int:
    """`num_channels * width`, rounded to a multiple of 8 (halves up), at least 8."""
    return max(int(num_channels * width / _CHANNEL_STEP + 0.5), 1) * _CHANNEL_STEP


def _check_segments(segments: int, width: float, order: Order) -> None:
    taken, given = _SEPARABLE_CHANNELS[:-1], _SEPARABLE_CHANNELS[1:]
    worked_on = taken if order == "spatial_first" else given
    channels = [scaled_channels(count, width) for count in worked_on]
    fitting = fitting_segments(channels)
    if segments not in fitting:
        raise PydanticCustomError(
            "segments",
            "input does not divide the {channels} channels of a layer:"
            ' at this width, choose {fitting} or "depthwise"',
            {
                "channels": next(count for count in channels if count % segments),
                "fitting": ", ".join(map(str, fitting)),
            },
        )


def _blocks(settings: XceptionSettings) -> Iterator[nn.Module]:
    c32, c64, c128, c256, c728, c1024, c1536, c2048 = (
        scaled_channels(num_channels, settings.width) for num_channels in (32, *_SEPARABLE_CHANNELS)
    )
    separable = _separable(settings)
    downsampling = partial(DownsamplingBlock, separable=separable, residual=settings.residual)
    yield Stem(3, c32, c64)
    yield downsampling(c64, c128, c128, leading_relu=False)
    yield downsampling(c128, c256, c256)
    yield downsampling(c256, c728, c728)
    for _ in range(settings.middle_blocks):
        yield MiddleBlock(c728, separable=separable, residual=settings.residual)
    # The one block that widens in its second convolution, not in its first.
    yield downsampling(c728, c728, c1024)
    yield FinalBlock(c1024, c1536, c2048, separable=separable)


def _separable(settings: XceptionSettings) -> Separable:
    layer = SeparableConv2d if settings.separable_order == "spatial_first" else SpectrumConv2d
    return partial(layer, segments=settings.segments, activation=settings.separable_activation)
