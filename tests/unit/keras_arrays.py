"""Models that Keras has too, and random arrays in the order of its layers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model.errors import InputError
from model.inception_v3 import (
    InceptionV3,
    InceptionV3Of2016,
    InceptionV3Of2016Settings,
    InceptionV3Settings,
)
from model.keras_layers import KerasLayer
from model.xception import Xception, XceptionSettings

NUM_CLASSES = 5
SMALL = XceptionSettings(width=0.05, middle_blocks=1)

Arrays = list[np.ndarray]


def small() -> Xception:
    torch.manual_seed(0)
    return Xception(SMALL, NUM_CLASSES)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def inception_v3() -> InceptionV3:
    return InceptionV3(InceptionV3Settings(), NUM_CLASSES)


def inception_v3_2016() -> InceptionV3Of2016:
    return InceptionV3Of2016(InceptionV3Of2016Settings(), NUM_CLASSES)


def random_arrays(layers: Sequence[KerasLayer]) -> Arrays:
    random = np.random.default_rng(0)
    shapes = [weight.keras_shape for layer in layers for weight in layer.weights]
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def complaint(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def tampered(arrays: Arrays, index: int, array: Any) -> Arrays:
    return [*arrays[:index], array, *arrays[index + 1 :]]
