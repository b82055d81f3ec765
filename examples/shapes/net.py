"""A small convolutional network."""

from torch import nn


def block(inside: int, outside: int) -> nn.Module:
    """Halves the image."""
    convolution = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU(), nn.MaxPool2d(2))


def build(num_classes: int, width: int = 16) -> nn.Module:
    """What `model.factory` names; `width` is a setting of the recipe."""
    return nn.Sequential(
        block(3, width),
        block(width, 2 * width),
        block(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )
