"""VGG-16 (Simonyan and Zisserman, arXiv 1409.1556, configuration D), a row of Table 1."""

from collections.abc import Iterator

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from model.class_count import check_num_classes
from model.images import check_images
from model.settings import Settings

SMALLEST_SIZE = 32
"""Pixels: five pools that halve make one pixel of 32, and nothing of 31."""

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions before each pool."""

_POOLED_SIDE = 7
"""Pixels that the classifier sees, whatever the images: five halvings of 224."""

_HIDDEN = 4096


class VGG16Settings(Settings):
    """What of VGG-16 can be varied; the default is the original."""

    dropout: float = Field(default=0.5, ge=0, lt=1)
    """Share of features dropped after each of the two hidden layers; the original has 0.5."""


class VGG16(nn.Module):
    """Takes float (N, 3, H, W) images and gives (N, num_classes) logits.

    The state dict has torchvision's names, so its published `vgg16` weights load as they are.
    138,357,544 parameters for 1,000 classes, 124 M of them in the classifier, and no batch norm.
    Images of other sizes than 224 are averaged to the 7x7 maps that the classifier takes.

    Raises InputError if `num_classes` is below 1, or in `forward` for images that are not
    (N, 3, H, W) or have a side below `SMALLEST_SIZE`.
    """

    def __init__(self, settings: VGG16Settings, num_classes: int) -> None:
        super().__init__()
        check_num_classes(num_classes)
        self.features = nn.Sequential(*_convolutions())
        self.classifier = nn.Sequential(
            nn.Linear(_STAGES[-1][-1] * _POOLED_SIDE**2, _HIDDEN),
            nn.ReLU(inplace=True),
            nn.Dropout(settings.dropout),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(inplace=True),
            nn.Dropout(settings.dropout),
            nn.Linear(_HIDDEN, num_classes),
        )
        _initialize_(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.adaptive_avg_pool2d(self.forward_features(images), _POOLED_SIDE)
        logits: Tensor = self.classifier(maps.flatten(start_dim=1))
        return logits

    def forward_features(self, images: Tensor) -> Tensor:
        """The feature maps that the classifier pools: (N, 512, H // 32, W // 32)."""
        check_images("vgg16", images, SMALLEST_SIZE)
        maps: Tensor = self.features(images)
        return maps


def _convolutions() -> Iterator[nn.Module]:
    in_channels = 3
    for stage in _STAGES:
        for out_channels in stage:
            yield nn.Conv2d(in_channels, out_channels, 3, padding=1)
            yield nn.ReLU(inplace=True)
            in_channels = out_channels
        yield nn.MaxPool2d(2)


def _initialize_(model: nn.Module) -> None:
    """torchvision's, with which 16 layers train from scratch; the original needed stages."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.01)
            nn.init.zeros_(part.bias)
