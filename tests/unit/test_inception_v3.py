"""Both Inception V3: counts, shapes, and what training asks of them.

That they compute what Keras's compute is proved in `tests/integration/test_keras_parity.py`.
"""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from model.batch_norm import UnscaledBatchNorm2d
from model.errors import InputError
from model.flat import FlatModule, parameter_segments, statistic_segments
from model.head import HeadSettings
from model.inception_blocks import Branches, Conv, ConvBatchNormRelu, ConvReluBatchNorm, chain
from model.inception_v3 import (
    SMALLEST_SIZE,
    InceptionV3,
    InceptionV3Of2016,
    InceptionV3Of2016Settings,
    InceptionV3Settings,
)

Inception = InceptionV3 | InceptionV3Of2016
BUILDS = {
    "inception_v3": lambda classes, **given: InceptionV3(InceptionV3Settings(**given), classes),
    "inception_v3_2016": lambda classes, **given: InceptionV3Of2016(
        InceptionV3Of2016Settings(**given), classes
    ),
}
both = pytest.mark.parametrize("name", BUILDS)
each_unit = pytest.mark.parametrize("unit", [ConvBatchNormRelu, ConvReluBatchNorm])


def on_meta(name: str, num_classes: int, **settings: Any) -> Inception:
    with torch.device("meta"):
        return BUILDS[name](num_classes, **settings)


@pytest.fixture(scope="module", params=BUILDS)
def full(request: pytest.FixtureRequest) -> Inception:
    """With random statistics; tests copy it before they change it."""
    torch.manual_seed(0)
    model = BUILDS[request.param](3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.1)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.3, 0.8)
    return model


# Counts and shapes


@pytest.mark.parametrize(
    ("name", "num_classes", "fc_widths", "expected"),
    [
        ("inception_v3", 1000, (), 23_817_352),
        ("inception_v3", 17_000, (), 56_601_352),
        ("inception_v3", 17_000, (4096, 4096), 116_591_368),
        ("inception_v3_2016", 1000, (), 23_626_728),
        ("inception_v3_2016", 17_000, (), 56_410_728),
        ("inception_v3_2016", 17_000, (4096, 4096), 116_400_744),
    ],
)
def test_counts_are_the_papers(
    name: str, num_classes: int, fc_widths: tuple[int, ...], expected: int
) -> None:
    model = on_meta(name, num_classes, fc_widths=fc_widths)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert sum(segment.numel for segment in parameter_segments(model)) == expected


@both
def test_every_one_of_94_convolutions_has_its_batch_norm(name: str) -> None:
    model = on_meta(name, 7)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    todays = name == "inception_v3"
    assert len(convolutions) == len(norms) == 94
    assert all((conv.bias is None) == todays for conv in convolutions)
    assert all((norm.weight is None) == todays for norm in norms)
    assert {norm.eps for norm in norms} == {1e-3 if todays else 1e-5}
    assert {norm.momentum for norm in norms} == {0.01}


@both
def test_weight_decay_covers_kernels_and_servers_hold_all_statistics(name: str) -> None:
    model = on_meta(name, 7)
    decayed = [segment for segment in parameter_segments(model) if segment.decayed]
    assert len(decayed) == 95
    assert all(len(segment.shape) > 1 for segment in decayed)
    assert len(statistic_segments(model)) == 2 * 94


SIDES_AT_299 = (149, 147, 147, 73, 73, 71, 35, 35, 35, 35, 17, 17, 17, 17, 17, 8, 8, 8)
CHANNELS = {
    "inception_v3": (256, 288, 288, 768),
    "inception_v3_2016": (256, 256, 256, 736),
}


@both
def test_shapes_at_299(name: str) -> None:
    model = on_meta(name, 1000)
    shapes: dict[str, tuple[int, ...]] = {}
    for part, module in model.named_children():
        module.register_forward_hook(
            lambda _module, _inputs, out, part=part: shapes.update({part: tuple(out.shape)})
        )
    model(torch.empty(2, 3, 299, 299, device="meta"))
    channels = (32, 32, 64, 64, 80, 192, 192, *CHANNELS[name], 768, 768, 768, 768, 1280, 2048, 2048)
    expected = [(2, c, side, side) for c, side in zip(channels, SIDES_AT_299, strict=True)]
    assert list(shapes.values()) == [*expected, (2, 1000)]
    assert list(shapes)[-5:] == ["Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "head"]


@both
@pytest.mark.parametrize("size", [(SMALLEST_SIZE, SMALLEST_SIZE), (75, 130), (224, 161)])
def test_other_sizes(name: str, size: tuple[int, int]) -> None:
    """Each side by itself goes through the strides that the paper's table lists."""

    def strided(side: int) -> int:
        for window, stride in ((3, 2), (3, 1), (3, 2), (3, 1), (3, 2), (3, 2), (3, 2)):
            side = (side - window) // stride + 1
        return side

    model = on_meta(name, 5)
    images = torch.empty(2, 3, *size, device="meta")
    assert model.forward_features(images).shape == (2, 2048, strided(size[0]), strided(size[1]))
    assert model(images).shape == (2, 5)


@both
@pytest.mark.parametrize("size", [(SMALLEST_SIZE - 1, 299), (299, SMALLEST_SIZE - 1), (0, 0)])
def test_images_too_small_are_refused_with_the_smallest_size(
    name: str, size: tuple[int, int]
) -> None:
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]} .* {name}: .* at least 75x75$"):
        on_meta(name, 5)(torch.empty(1, 3, *size, device="meta"))


def test_one_pixel_less_than_the_smallest_size_is_one_too_few() -> None:
    model = on_meta("inception_v3", 5)
    maps = torch.empty(2, 3, SMALLEST_SIZE - 1, SMALLEST_SIZE - 1, device="meta")
    parts = nn.Sequential(*(getattr(model, name) for name in model.part_names))
    with pytest.raises(RuntimeError, match="greater than actual input size"):
        parts(maps)


@both
@pytest.mark.parametrize("shape", [(1, 1, 75, 75), (3, 75, 75), (1, 75, 75, 3)])
def test_other_shapes_than_rgb_batches_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=rf"{name} takes \(N, 3, height, width\)"):
        on_meta(name, 5)(torch.empty(shape, device="meta"))


@both
def test_no_classes_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="num_classes = 0 "):
        on_meta(name, 0)


@pytest.mark.parametrize("settings", [InceptionV3Settings, InceptionV3Of2016Settings])
def test_settings_are_the_heads(settings: type[HeadSettings]) -> None:
    assert settings.model_fields.keys() == HeadSettings.model_fields.keys()
    with pytest.raises(ValidationError):
        settings(width=0.5)


@both
def test_settings_reach_the_head(name: str) -> None:
    model = on_meta(name, 5, dropout=0.5, fc_widths=(6,))
    assert model.head.dropout == 0.5
    assert model.head.fc1.weight.shape == (6, 2048)


def test_kernels_are_glorot_uniform_and_biases_zero(full: Inception) -> None:
    for name, module in full.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            pixels = weight[0, 0].numel()
            bound = math.sqrt(6 / (pixels * (weight.shape[0] + weight.shape[1])))
            assert weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
            assert module.bias is None or not module.bias.any(), name


# Forward and backward


def test_an_image_s_logits_do_not_depend_on_its_batch(full: Inception) -> None:
    images = torch.randn(2, 3, 99, 107)
    before = images.clone()
    with torch.no_grad():
        logits = full.eval()(images)
        alone = torch.cat([full(image[None]) for image in images])
    torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(images, before)
    assert logits.std() > 0.01


def test_training_updates_statistics_and_evaluation_does_not(full: Inception) -> None:
    model = copy.deepcopy(full)
    statistics = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    before = {name: buffer.clone() for name, buffer in statistics.items()}
    images = torch.randn(2, 3, 107, 107)
    with torch.no_grad():
        model.eval()(images)
        assert all(torch.equal(before[name], statistics[name]) for name in before)
        model.train()(images)
    assert not any(torch.equal(before[name], statistics[name]) for name in before)


def test_a_training_step_stays_in_the_flat_vectors(full: Inception) -> None:
    model = copy.deepcopy(full).train()
    flat = FlatModule(model)
    model(torch.randn(2, 3, 107, 107)).square().sum().backward()
    flat.check_views()
    assert all(parameter.grad.any() for parameter in model.parameters())
    assert flat.gradients.isfinite().all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_keep_the_memory_format_of_the_images(
    full: Inception, memory_format: torch.memory_format
) -> None:
    model = copy.deepcopy(full)
    formats = []
    for name in model.part_names:
        getattr(model, name).register_forward_hook(
            lambda _module, _inputs, out: formats.append(
                out.is_contiguous(memory_format=memory_format)
            )
        )
    with torch.no_grad():
        model(torch.randn(2, 3, 99, 107).contiguous(memory_format=memory_format))
    assert formats == [True] * len(model.part_names)


# Parts


@each_unit
@pytest.mark.parametrize("training", [False, True])
def test_a_unit_is_its_layers_in_order(
    unit: type[ConvBatchNormRelu | ConvReluBatchNorm], training: bool
) -> None:
    """Values and gradients, from operations that overwrite nothing."""
    torch.manual_seed(0)
    module = unit(3, Conv(5, (3, 1), stride=2)).double().train(training)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    gamma = module.bn.weight
    scale = torch.ones(5, dtype=torch.float64) if gamma is None else gamma
    statistics = torch.randn(5).double(), torch.rand(5).double() + 0.5
    module.bn.running_mean.copy_(statistics[0])
    module.bn.running_var.copy_(statistics[1])
    maps = torch.randn(2, 3, 9, 8, dtype=torch.float64)

    def norm(maps: Tensor) -> Tensor:
        return F.batch_norm(maps, *statistics, scale, module.bn.bias, training, 0.01, module.bn.eps)

    expected = F.conv2d(maps, module.conv.weight, module.conv.bias, stride=2)
    todays = unit is ConvBatchNormRelu
    expected = norm(expected).relu() if todays else norm(expected.relu())
    result = module(maps)
    torch.testing.assert_close(result, expected)
    weights = torch.randn_like(result)
    parameters = list(module.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(result, parameters, weights),
        torch.autograd.grad(expected, parameters, weights),
    )
    torch.testing.assert_close(module.bn.running_var, statistics[1])


def test_branches_see_the_same_maps_though_units_work_in_place() -> None:
    torch.manual_seed(0)
    chains = {
        "one": chain(ConvReluBatchNorm, 3, Conv(2)),
        "two": nn.MaxPool2d(3, stride=1, padding=1),
        "three": chain(ConvBatchNormRelu, 3, nn.Identity(), Conv(4), Conv(5, (1, 3))),
    }
    branches = Branches(**chains).eval()
    maps = torch.randn(2, 3, 6, 6)
    before = maps.clone()
    expected = [branch(before) for branch in chains.values()]
    assert torch.equal(branches(maps), torch.cat(expected, dim=1))
    assert torch.equal(maps, before)
    assert [name for name, _ in branches.named_children()] == ["one", "two", "three"]


def test_padding_is_same_at_stride_1_and_none_elsewhere() -> None:
    assert Conv(1, (7, 1)).padding == (3, 0)
    assert Conv(1, (5, 5)).padding == (2, 2)
    assert Conv(1, (3, 3), valid=True).padding == (0, 0)
    assert Conv(1, (3, 3), stride=2).padding == (0, 0)


def norms() -> tuple[UnscaledBatchNorm2d, nn.BatchNorm2d]:
    """One without gamma, and torch's with a gamma of ones and the same state."""
    torch.manual_seed(0)
    unscaled, scaled = UnscaledBatchNorm2d(6, 1e-3, 0.01), nn.BatchNorm2d(6, 1e-3, 0.01)
    nn.init.normal_(unscaled.bias)
    nn.init.normal_(unscaled.running_mean)
    nn.init.uniform_(unscaled.running_var, 0.5, 2)
    missing = scaled.load_state_dict(unscaled.state_dict(), strict=False)
    assert missing == (["weight"], [])
    return unscaled, scaled


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_without_gamma_is_one_with_gamma_1(
    training: bool, memory_format: torch.memory_format
) -> None:
    unscaled, scaled = (norm.train(training) for norm in norms())
    maps = torch.randn(4, 6, 5, 7).to(memory_format=memory_format).requires_grad_()
    result, expected = unscaled(maps), scaled(maps)
    torch.testing.assert_close(result, expected)
    assert result.is_contiguous(memory_format=memory_format)
    weights = torch.randn_like(result)
    torch.testing.assert_close(
        torch.autograd.grad(result, [maps, unscaled.bias], weights),
        torch.autograd.grad(expected, [maps, scaled.bias], weights),
    )
    for name, buffer in unscaled.named_buffers():
        torch.testing.assert_close(buffer, scaled.state_dict()[name])


def test_batch_norm_without_gamma_has_none_anywhere() -> None:
    norm, _ = norms()
    assert [name for name, _ in norm.named_parameters()] == ["bias"]
    names = {"bias", "running_mean", "running_var", "num_batches_tracked"}
    assert norm.state_dict().keys() == names
    copied = copy.deepcopy(norm)
    copied.reset_parameters()
    fresh = UnscaledBatchNorm2d(6, 1e-3, 0.01)
    assert all(torch.equal(copied.state_dict()[name], fresh.state_dict()[name]) for name in names)


def test_batch_norm_without_gamma_survives_the_meta_device() -> None:
    """Its state dict is all it has, so that `to_empty` and loading give it back."""
    norm, _ = norms()
    with torch.device("meta"):
        empty = UnscaledBatchNorm2d(6, 1e-3, 0.01)
    revived = empty.to_empty(device="cpu")
    revived.load_state_dict(norm.state_dict())
    maps = torch.randn(4, 6, 5, 7)
    assert torch.equal(revived.eval()(maps), norm.eval()(maps))


def test_batch_norm_without_gamma_compiles_without_a_break() -> None:
    norm, _ = norms()
    copied = copy.deepcopy(norm)
    compiled = torch.compile(copied, backend="aot_eager", fullgraph=True)
    maps = torch.randn(4, 6, 5, 7)
    torch.testing.assert_close(compiled(maps), norm(maps))
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(copied.get_buffer(name), buffer)


def test_batch_norm_without_gamma_follows_autocast() -> None:
    norm, scaled = norms()
    maps = torch.randn(4, 6, 5, 7, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = norm(maps), scaled(maps)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert norm.bias.grad.dtype == torch.float32
