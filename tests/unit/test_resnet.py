"""ResNet-152 against its count, torchvision's names, and code written apart from it."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from model import resnet
from model.errors import InputError
from model.flat import FlatModule, parameter_segments
from model.resnet import ResNet152, ResNet152Settings

BLOCKS = (3, 8, 36, 3)
SMALL_BLOCKS = (1, 2, 2, 1)


@pytest.fixture(scope="module")
def full() -> ResNet152:
    with torch.device("meta"):
        return ResNet152(ResNet152Settings(), 1000)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ResNet152:
    """The same layers, an eighth as wide and fewer, with batch norm that is neutral nowhere."""
    stages = tuple(zip((8, 16, 32, 64), SMALL_BLOCKS, strict=True))
    monkeypatch.setattr(resnet, "_STAGES", stages)
    torch.manual_seed(0)
    model = ResNet152(ResNet152Settings(), 5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def reference_forward(images: Tensor, tensors: dict[str, Tensor], training: bool) -> Tensor:
    def bn(maps: Tensor, name: str) -> Tensor:
        statistics = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
        return F.batch_norm(
            maps, *statistics, tensors[f"{name}.weight"], tensors[f"{name}.bias"], training
        )

    def conv(maps: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = tensors[f"{name}.weight"]
        return F.conv2d(maps, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    maps = bn(conv(images, "conv1", 2), "bn1").relu()
    maps = F.max_pool2d(maps, 3, stride=2, padding=1)
    for layer, num_blocks in enumerate(SMALL_BLOCKS, start=1):
        for block in range(num_blocks):
            name = f"layer{layer}.{block}"
            stride = 2 if block == 0 and layer > 1 else 1
            out = bn(conv(maps, f"{name}.conv1"), f"{name}.bn1").relu()
            out = bn(conv(out, f"{name}.conv2", stride), f"{name}.bn2").relu()
            out = bn(conv(out, f"{name}.conv3"), f"{name}.bn3")
            if block == 0:
                maps = bn(conv(maps, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            maps = (out + maps).relu()
    features = maps.flatten(start_dim=2).sum(dim=2) / (maps.shape[2] * maps.shape[3])
    return F.linear(features, tensors["fc.weight"], tensors["fc.bias"])


def test_count_is_the_papers(full: ResNet152) -> None:
    assert sum(segment.numel for segment in parameter_segments(full)) == 60_192_808


def test_names_and_shapes_are_torchvision_s(full: ResNet152) -> None:
    expected: dict[str, tuple[int, ...]] = {}

    def conv_and_bn(conv: str, bn: str, *shape: int) -> None:
        expected[f"{conv}.weight"] = shape
        for name in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{bn}.{name}"] = shape[:1]
        expected[f"{bn}.num_batches_tracked"] = ()

    conv_and_bn("conv1", "bn1", 64, 3, 7, 7)
    taken = 64
    for layer, (width, num_blocks) in enumerate(
        zip((64, 128, 256, 512), BLOCKS, strict=True), start=1
    ):
        for block in range(num_blocks):
            name = f"layer{layer}.{block}"
            conv_and_bn(f"{name}.conv1", f"{name}.bn1", width, taken, 1, 1)
            conv_and_bn(f"{name}.conv2", f"{name}.bn2", width, width, 3, 3)
            conv_and_bn(f"{name}.conv3", f"{name}.bn3", 4 * width, width, 1, 1)
            if block == 0:
                downsample = f"{name}.downsample"
                conv_and_bn(f"{downsample}.0", f"{downsample}.1", 4 * width, taken, 1, 1)
            taken = 4 * width
    expected |= {"fc.weight": (1000, 2048), "fc.bias": (1000,)}
    assert {name: tuple(tensor.shape) for name, tensor in full.state_dict().items()} == expected


def test_strides_are_where_torchvision_has_them(full: ResNet152) -> None:
    strided = [
        name
        for name, module in full.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2)
    ]
    inner = [f"layer{n}.0.{part}" for n in (2, 3, 4) for part in ("conv2", "downsample.0")]
    assert strided == ["conv1", *inner]


@pytest.mark.parametrize(
    ("size", "sides"), [((224, 224), (7, 7)), ((1, 1), (1, 1)), ((33, 130), (2, 5))]
)
def test_shapes(full: ResNet152, size: tuple[int, int], sides: tuple[int, int]) -> None:
    images = torch.empty(2, 3, *size, device="meta")
    assert full.forward_features(images).shape == (2, 2048, *sides)
    assert full(images).shape == (2, 1000)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (75, 98)])
def test_outputs_gradients_and_statistics_are_the_references(
    small: ResNet152, size: tuple[int, int], training: bool
) -> None:
    model = small.double().train(training)
    images = torch.randn(3, 3, *size, dtype=torch.float64)
    before = images.clone()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    for name in parameters:
        tensors[name].requires_grad_()
    logits = model(images)
    expected = reference_forward(images, tensors, training)
    weights = torch.randn_like(expected)
    torch.autograd.backward([logits, expected], [weights, weights])
    torch.testing.assert_close(logits, expected)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, tensors[name].grad, msg=name)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            torch.testing.assert_close(buffer, tensors[name])
    assert torch.equal(images, before)


def test_an_image_s_logits_do_not_depend_on_its_batch(small: ResNet152) -> None:
    images = torch.randn(2, 3, 40, 32)
    with torch.no_grad():
        logits = small.eval()(images)
        alone = torch.cat([small(image[None]) for image in images])
    torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-4)


def test_a_training_step_stays_in_the_flat_vectors(small: ResNet152) -> None:
    flat = FlatModule(small.train())
    small(torch.randn(2, 3, 64, 64)).square().sum().backward()
    flat.check_views()
    assert all(parameter.grad.any() for parameter in small.parameters())


def test_dropout_is_a_setting_that_acts_only_in_training(small: ResNet152) -> None:
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(small.eval()(images), small(images))
    small.dropout = 0.5
    assert torch.equal(small(images), small(images))
    small.train()
    assert not torch.equal(small(images), small(images))
    with torch.device("meta"):
        assert ResNet152(ResNet152Settings(dropout=0.25), 3).dropout == 0.25
    with pytest.raises(ValidationError):
        ResNet152Settings(dropout=1.0)
    assert all(field.description for field in ResNet152Settings.model_fields.values())


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [((1, 3, 0, 5), "at least 1x1$"), ((1, 1, 64, 64), r"resnet152 takes \(N, 3, height, width\)")],
)
def test_bad_images_are_refused(full: ResNet152, shape: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        full(torch.empty(shape, device="meta"))


def test_no_classes_are_refused() -> None:
    with pytest.raises(InputError, match="num_classes = -1 "), torch.device("meta"):
        ResNet152(ResNet152Settings(), -1)
