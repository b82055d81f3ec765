"""VGG-16 against its counts, torchvision's names, and code written apart from it."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from model import vgg
from model.errors import InputError
from model.flat import FlatModule, parameter_segments
from model.vgg import SMALLEST_SIZE, VGG16, VGG16Settings

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Indices of torchvision's in `features`."""
POOLS = (4, 9, 16, 23, 30)


@pytest.fixture(scope="module")
def full() -> VGG16:
    with torch.device("meta"):
        return VGG16(VGG16Settings(), 1000)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> VGG16:
    """The same layers, a sixteenth as wide."""
    stages = tuple(tuple(channels // 16 for channels in stage) for stage in vgg._STAGES)
    monkeypatch.setattr(vgg, "_STAGES", stages)
    monkeypatch.setattr(vgg, "_HIDDEN", 64)
    torch.manual_seed(0)
    model = VGG16(VGG16Settings(), 5)
    for layer in model.classifier:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def reference_forward(images: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    maps = images
    for index in range(31):
        if index in CONVOLUTIONS:
            weight, bias = tensors[f"features.{index}.weight"], tensors[f"features.{index}.bias"]
            maps = F.conv2d(maps, weight, bias, padding=1).relu()
        elif index in POOLS:
            maps = F.max_pool2d(maps, 2)
    features = F.adaptive_avg_pool2d(maps, (7, 7)).flatten(start_dim=1)
    for index in (0, 3, 6):
        weight, bias = tensors[f"classifier.{index}.weight"], tensors[f"classifier.{index}.bias"]
        features = F.linear(features if index == 0 else features.relu(), weight, bias)
    return features


def test_count_is_the_papers(full: VGG16) -> None:
    assert sum(segment.numel for segment in parameter_segments(full)) == 138_357_544


def test_names_and_shapes_are_torchvision_s(full: VGG16) -> None:
    channels = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    expected: dict[str, tuple[int, ...]] = {}
    for index, taken, given in zip(CONVOLUTIONS, channels, channels[1:], strict=False):
        expected[f"features.{index}.weight"] = (given, taken, 3, 3)
        expected[f"features.{index}.bias"] = (given,)
    for index, taken, given in ((0, 25_088, 4096), (3, 4096, 4096), (6, 4096, 1000)):
        expected[f"classifier.{index}.weight"] = (given, taken)
        expected[f"classifier.{index}.bias"] = (given,)
    assert {name: tuple(tensor.shape) for name, tensor in full.state_dict().items()} == expected


def test_shapes(full: VGG16) -> None:
    images = torch.empty(2, 3, 224, 224, device="meta")
    assert full.forward_features(images).shape == (2, 512, 7, 7)
    assert full(images).shape == (2, 1000)
    assert full.forward_features(torch.empty(1, 3, 95, 130, device="meta")).shape == (1, 512, 2, 4)


@pytest.mark.parametrize("size", [(224, 224), (SMALLEST_SIZE, SMALLEST_SIZE), (96, 130)])
def test_outputs_and_gradients_are_the_references(small: VGG16, size: tuple[int, int]) -> None:
    model = small.double().eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    before = images.clone()
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in model.state_dict().items()}
    logits = model(images)
    expected = reference_forward(images, tensors)
    weights = torch.randn_like(expected)
    torch.autograd.backward([logits, expected], [weights, weights])
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, tensors[name].grad)
    assert torch.equal(images, before)


def test_dropout_acts_twice_and_only_in_training(small: VGG16) -> None:
    images = torch.randn(2, 3, 32, 32)
    assert [layer.p for layer in small.classifier if isinstance(layer, nn.Dropout)] == [0.5, 0.5]
    assert torch.equal(small.eval()(images), small(images))
    assert not torch.equal(small.train()(images), small(images))


def test_dropout_is_a_setting() -> None:
    with torch.device("meta"):
        model = VGG16(VGG16Settings(dropout=0.0), 3)
    assert [layer.p for layer in model.classifier if isinstance(layer, nn.Dropout)] == [0.0, 0.0]
    with pytest.raises(ValidationError):
        VGG16Settings(dropout=1.0)
    with pytest.raises(ValidationError):
        VGG16Settings(fc_widths=(4096,))
    assert all(field.description for field in VGG16Settings.model_fields.values())


def test_a_training_step_stays_in_the_flat_vectors(small: VGG16) -> None:
    flat = FlatModule(small.train())
    small(torch.randn(1, 3, 33, 40)).square().sum().backward()
    flat.check_views()
    assert all(parameter.grad.any() for parameter in small.parameters())


@pytest.mark.parametrize("size", [(SMALLEST_SIZE - 1, 224), (224, SMALLEST_SIZE - 1), (0, 0)])
def test_images_too_small_are_refused_with_the_smallest_size(
    full: VGG16, size: tuple[int, int]
) -> None:
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]} .* vgg16: .* at least 32x32$"):
        full(torch.empty(1, 3, *size, device="meta"))


def test_no_classes_are_refused() -> None:
    with pytest.raises(InputError, match="num_classes = 0 "), torch.device("meta"):
        VGG16(VGG16Settings(), 0)
