"""Our models against Keras's own, with the same weights: outputs, one training step, files.

Keras runs on its torch backend. The Inception V3 of 2016 is in no Keras of today's, so it is
written down again in `keras_inception_2016.py`.
"""

import copy
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keras_inception_2016 import inception_v3_of_2016
from torch import Tensor, nn

from model.head import pooled
from model.inception_blocks import SameAvgPool2d
from model.inception_v3 import (
    InceptionV3,
    InceptionV3Of2016,
    InceptionV3Of2016Settings,
    InceptionV3Settings,
)
from model.keras_files import read_keras_weights
from model.keras_layers import keras_layers
from model.keras_weights import load_keras_weights
from model.separable import SameMaxPool2d
from model.xception import Xception, XceptionSettings

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:keras.*"),
]

NUM_CLASSES = 10
TOLERANCE = 1e-4
"""Of the logits' and the features' spread."""
STEP_TOLERANCE = 1e-6
KERAS_MOMENTUM = 0.99


@dataclass(frozen=True)
class Case:
    build: Callable[[int], nn.Module]
    build_keras: Callable[[Any], Any]
    """The model up to the maps that are pooled, for images of any size."""
    build_whole_keras: Callable[[Any, int], Any]
    """The model with its head, for a number of classes."""
    num_parameters: int
    sizes: tuple[tuple[int, int], ...]
    step_size: tuple[int, int]


def application(name: str) -> Callable[[Any], Any]:
    return lambda keras: getattr(keras.applications, name)(
        weights=None, include_top=False, input_shape=(None, None, 3)
    )


def whole_application(name: str) -> Callable[[Any, int], Any]:
    return lambda keras, classes: getattr(keras.applications, name)(
        weights=None, classes=classes, classifier_activation=None
    )


def with_head(keras: Any, base: Any, num_classes: int) -> tuple[Any, Any]:
    """The pooled features and the logits, as Keras's applications compute them."""
    features = keras.layers.GlobalAveragePooling2D()(base.output)
    return features, keras.layers.Dense(num_classes)(features)


def whole_of_2016(keras: Any, num_classes: int) -> Any:
    base = inception_v3_of_2016(keras)
    return keras.Model(base.input, with_head(keras, base, num_classes)[1])


CASES = {
    "xception": Case(
        build=lambda classes: Xception(XceptionSettings(), classes),
        build_keras=application("Xception"),
        build_whole_keras=whole_application("Xception"),
        num_parameters=22_855_952,
        sizes=((299, 299), (150, 150), (96, 130)),
        step_size=(96, 96),
    ),
    "inception_v3": Case(
        build=lambda classes: InceptionV3(InceptionV3Settings(), classes),
        build_keras=application("InceptionV3"),
        build_whole_keras=whole_application("InceptionV3"),
        num_parameters=23_817_352,
        sizes=((299, 299), (150, 150), (150, 182)),
        step_size=(139, 139),
    ),
    "inception_v3_2016": Case(
        build=lambda classes: InceptionV3Of2016(InceptionV3Of2016Settings(), classes),
        build_keras=inception_v3_of_2016,
        build_whole_keras=whole_of_2016,
        num_parameters=23_626_728,
        sizes=((299, 299), (150, 150), (150, 182)),
        step_size=(139, 139),
    ),
}


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keras on torch and the CPU, whatever the user's `keras.json` says.

    The environment matters while Keras is imported and is as before afterwards, so that no
    process of another test inherits it.
    """
    settings = {
        "KERAS_BACKEND": "torch",
        "KERAS_TORCH_DEVICE": "cpu",
        "KERAS_HOME": str(tmp_path_factory.mktemp("keras")),
    }
    with mock.patch.dict(os.environ, settings):
        imported = importlib.import_module("keras")
    assert imported.backend.backend() == "torch"
    assert imported.backend.image_data_format() == "channels_last"
    return imported


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@dataclass(frozen=True)
class Pair:
    ours: nn.Module
    keras: Any
    """Gives the pooled features and the logits."""


@pytest.fixture(scope="module")
def pair(case: Case, keras: Any) -> Pair:
    """Both in float32, with the same random weights."""
    return build_pair(case, keras)


def build_pair(case: Case, keras: Any) -> Pair:
    base = case.build_keras(keras)
    model = keras.Model(base.input, with_head(keras, base, NUM_CLASSES))
    set_random_weights(model)
    ours = case.build(NUM_CLASSES).to(getattr(torch, keras.backend.floatx()))
    load_keras_weights(ours, model.get_weights())
    return Pair(ours, model)


def set_random_weights(model: Any) -> None:
    """Neutral nowhere, so that each one matters, and of a scale that maps keep through layers."""
    random = np.random.default_rng(0)
    model.set_weights([random_weight(weight, random) for weight in model.weights])


def random_weight(weight: Any, random: np.random.Generator) -> np.ndarray:
    kind = weight.path.rpartition("/")[2]
    shape = tuple(weight.shape)
    if kind in ("gamma", "moving_variance"):
        return random.uniform(0.7, 1.3, shape)
    if kind in ("beta", "moving_mean", "bias"):
        return random.normal(0, 0.2, shape)
    if kind == "depthwise_kernel":
        return random.normal(0, (shape[0] * shape[1]) ** -0.5, shape)
    followed_by_relu = kind == "kernel"
    return random.normal(0, ((1 + followed_by_relu) / np.prod(shape[:-1])) ** 0.5, shape)


def random_images(size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Two images as Keras takes them, (2, H, W, 3): noise at every scale, one paler."""
    generator = torch.Generator().manual_seed(size[0] + size[1])
    images = torch.zeros(2, 3, *size, dtype=dtype)
    for side in (3, 11, 37, max(size)):
        noise = torch.randn(2, 3, side, side, generator=generator, dtype=dtype)
        images += F.interpolate(noise, size, mode="nearest") / 2
    images[1] *= 0.5
    return images.permute(0, 2, 3, 1)


def channels_first(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2)


def outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Ours, as Keras's gives them: pooled features and logits."""
    with torch.no_grad():
        maps = model.eval().forward_features(channels_first(images))
        return pooled(maps), model(channels_first(images))


def keras_outputs(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        features, logits = model(images, training=False)
    return features, logits


def error(result: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the spread of what was expected."""
    return ((result - expected).abs().max() / expected.std()).item()


# Outputs


def test_counts_are_those_of_the_paper_and_of_keras(case: Case, keras: Any) -> None:
    model = case.build_whole_keras(keras, 1000)
    assert sum(np.prod(weight.shape) for weight in model.trainable_weights) == case.num_parameters
    with torch.device("meta"):
        ours = case.build(1000)
    assert sum(parameter.numel() for parameter in ours.parameters()) == case.num_parameters


@pytest.mark.parametrize("position", [0, 1, 2])
def test_features_and_logits_are_keras_s(case: Case, pair: Pair, position: int) -> None:
    images = random_images(case.sizes[position], torch.float32)
    features, logits = outputs(pair.ours, images)
    expected_features, expected_logits = keras_outputs(pair.keras, images)
    assert 0.5 < expected_logits.std() < 50
    assert error(features, expected_features) < TOLERANCE
    assert error(logits, expected_logits) < TOLERANCE


def pad_alike_on_both_sides(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, SameMaxPool2d):
            module.forward = nn.MaxPool2d(3, stride=2, padding=1).forward


def count_padding(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, SameAvgPool2d):
            module.count_include_pad = True


def use_other_epsilon(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5 if module.eps > 1e-4 else 1e-3


def swap_two_statistics(model: nn.Module) -> None:
    """Of the last two layers that have as many channels, as a wrong order of layers would."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    first, second = [norm for norm in norms if norm.num_features == norms[-4].num_features][-2:]
    first.running_mean, second.running_mean = second.running_mean, first.running_mean


def mistake_in_pools(model: nn.Module) -> None:
    (pad_alike_on_both_sides if isinstance(model, Xception) else count_padding)(model)


@pytest.mark.parametrize("mistake", [mistake_in_pools, use_other_epsilon, swap_two_statistics])
def test_mistakes_that_others_made_would_show(
    case: Case, pair: Pair, mistake: Callable[[nn.Module], None]
) -> None:
    images = random_images(case.sizes[1], torch.float32)
    mistaken = copy.deepcopy(pair.ours)
    mistake(mistaken)
    assert error(outputs(mistaken, images)[1], outputs(pair.ours, images)[1]) > 10 * TOLERANCE


# One training step


@pytest.fixture
def in_float64(keras: Any) -> Iterator[None]:
    """Keras in float64 throughout: on torch its batch norm and means else compute in float32."""
    dtypes = importlib.import_module("keras.src.backend.common.dtypes")
    with mock.patch.dict(dtypes.BIT64_TO_BIT32_DTYPE, {"float64": "float64"}):
        set_dtype(keras, "float64")
        yield
        set_dtype(keras, "float32")


def set_dtype(keras: Any, dtype: str) -> None:
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)


def count_samples(model: nn.Module) -> dict[str, int]:
    """Filled by the next forward pass: values per channel that each batch norm sees."""
    counts: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
            counts[name] = inputs[0].numel() // inputs[0].shape[1]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(count(name))
    return counts


def as_torch_counts(before: Tensor, after: Tensor, num_samples: int) -> Tensor:
    """Keras's running variance, had it taken the unbiased variance of the batch, as torch does."""
    biased = (after - KERAS_MOMENTUM * before) / (1 - KERAS_MOMENTUM)
    unbiased = biased * num_samples / (num_samples - 1)
    return KERAS_MOMENTUM * before + (1 - KERAS_MOMENTUM) * unbiased


@pytest.mark.usefixtures("in_float64")
def test_one_training_step_is_keras_s(case: Case, keras: Any) -> None:
    """Loss, every gradient and every running statistic."""
    pair = build_pair(case, keras)
    images = random_images(case.step_size, torch.float64)
    labels = torch.tensor([3, 7])
    before = [torch.from_numpy(array) for array in pair.keras.get_weights()]
    counts = count_samples(pair.ours)

    loss = F.cross_entropy(pair.ours.train()(channels_first(images)), labels)
    loss.backward()
    expected_loss = F.cross_entropy(pair.keras(images, training=True)[1], labels)
    expected_loss.backward()

    assert loss.dtype == expected_loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected_loss.item(), rel=STEP_TOLERANCE)
    ours = [weight for layer in keras_layers(pair.ours) for weight in layer.weights]
    parameters = dict(pair.ours.named_parameters())
    for (name, tensor, axes), weight, old in zip(ours, pair.keras.weights, before, strict=True):
        value = weight.value.detach()
        if name in parameters:
            assert parameters[name].grad is not None
            assert weight.value.grad is not None
            assert_close(name, parameters[name].grad, weight.value.grad.permute(axes))
        elif name.endswith("running_var"):
            num_samples = counts[name.removesuffix(".running_var")]
            assert_close(name, tensor, as_torch_counts(old, value, num_samples))
        else:
            assert_close(name, tensor, value)


def assert_close(name: str, result: Tensor, expected: Tensor) -> None:
    """Not only the norms agree: the norm of the difference is as small."""
    assert expected.norm() > 0, name
    assert result.norm().item() == pytest.approx(expected.norm().item(), rel=STEP_TOLERANCE), name
    assert (result - expected).norm() <= STEP_TOLERANCE * expected.norm(), name


# Files


def test_files_that_keras_writes_give_its_logits(case: Case, keras: Any, tmp_path: Path) -> None:
    model = case.build_whole_keras(keras, 3)
    set_random_weights(model)
    whole, weights = tmp_path / "model.h5", tmp_path / "model.weights.h5"
    model.save(whole)
    model.save_weights(weights)
    expected = model.get_weights()
    for path in (whole, weights):
        with torch.device("meta"):
            arrays = read_keras_weights(path, case.build(1))
        path.unlink()
        assert len(arrays) == len(expected)
        assert all(np.array_equal(*both) for both in zip(arrays, expected, strict=True))

    ours = case.build(len(arrays[-1]))
    load_keras_weights(ours, arrays)
    images = random_images((299, 299), torch.float32)
    with torch.no_grad():
        expected_logits = model(images, training=False)
    assert expected_logits.shape == (2, 3)
    assert error(outputs(ours, images)[1], expected_logits) < TOLERANCE
