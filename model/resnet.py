"""ResNet-152 (He et al., arXiv 1512.03385, table 1), a row of the Xception paper's Table 1."""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from model.class_count import check_num_classes
from model.head import pooled
from model.images import check_images
from model.settings import Settings

SMALLEST_SIZE = 1
"""Pixels: every stride is padded and rounds up, so one pixel stays one."""

_STAGES = ((64, 3), (128, 8), (256, 36), (512, 3))
"""Width of the bottlenecks and their number, by stage."""

_EXPANSION = 4
"""A bottleneck's outgoing channels over its width."""


class ResNet152Settings(Settings):
    """What of ResNet-152 can be varied; the default is the original."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of features dropped before the last layer; the original has none."""


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with batch norm, plus the identity or its projection.

    Takes (N, in_channels, H, W) and gives (N, 4 * width, ceil(H / stride), ceil(W / stride)).
    The stride is the 3x3's, as in torchvision and not in the paper, which has it in the first
    1x1 and so never reads three quarters of the maps.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * _EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, maps: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(maps)), inplace=True)
        residual = F.relu(self.bn2(self.conv2(residual)), inplace=True)
        residual = self.bn3(self.conv3(residual)).add_(self.downsample(maps))
        return F.relu(residual, inplace=True)


class ResNet152(nn.Module):
    """Takes float (N, 3, H, W) images and gives (N, num_classes) logits.

    The state dict has torchvision's names, so its published `resnet152` weights load as they
    are; batch norm has torch's own constants for the same reason. 60,192,808 parameters for
    1,000 classes.

    Raises InputError if `num_classes` is below 1, or in `forward` for images that are not
    (N, 3, H, W) or have no pixels.
    """

    def __init__(self, settings: ResNet152Settings, num_classes: int) -> None:
        super().__init__()
        check_num_classes(num_classes)
        self.dropout = settings.dropout
        in_channels = _STAGES[0][0]
        self.conv1 = nn.Conv2d(3, in_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for number, (width, num_blocks) in enumerate(_STAGES, start=1):
            stride = 1 if number == 1 else 2
            self.add_module(f"layer{number}", _stage(in_channels, width, num_blocks, stride))
            in_channels = width * _EXPANSION
        self.fc = nn.Linear(in_channels, num_classes)
        _initialize_(self)

    def forward(self, images: Tensor) -> Tensor:
        features = pooled(self.forward_features(images))
        if self.dropout > 0:
            features = F.dropout(features, self.dropout, self.training)
        logits: Tensor = self.fc(features)
        return logits

    def forward_features(self, images: Tensor) -> Tensor:
        """The feature maps that are pooled: (N, 2048, ceil(H / 32), ceil(W / 32))."""
        check_images("resnet152", images, SMALLEST_SIZE)
        maps: Tensor = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for number in range(1, len(_STAGES) + 1):
            maps = getattr(self, f"layer{number}")(maps)
        return maps


def _stage(in_channels: int, width: int, num_blocks: int, stride: int) -> nn.Sequential:
    """Only the first block strides and widens."""
    rest = [Bottleneck(width * _EXPANSION, width, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(Bottleneck(in_channels, width, stride), *rest)


def _initialize_(model: nn.Module) -> None:
    """The paper's (He et al., arXiv 1502.01852), by outgoing connections as in torchvision."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
