"""Xception's forward and backward pass against figure 5, written apart from it."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.xception import Xception, XceptionSettings

SMALL = XceptionSettings(width=0.05, middle_blocks=2)
"""Channels: 8, 8, 8, 16, 40, 48, 80, 104."""

VARIANTS = [
    {
        "residual": residual,
        "separable_activation": activation,
        "separable_order": order,
        "segments": segments,
    }
    for residual, activation, order, segments in itertools.product(
        (True, False),
        ("none", "relu", "elu"),
        ("spatial_first", "pointwise_first"),
        (1, 2, "depthwise"),
    )
]


FUNCTIONS = {"none": lambda maps: maps, "relu": F.relu, "elu": F.elu}


def reference_forward(
    images: Tensor, tensors: dict[str, Tensor], settings: XceptionSettings, training: bool
) -> Tensor:
    """Figure 5, line by line, over a state dict of a model with two middle blocks."""

    def conv(maps: Tensor, name: str) -> Tensor:
        """With zeros around the map if the kernel needs them, in as many groups as it tells."""
        kernel = tensors[name]
        padded = F.pad(maps, (kernel.shape[-1] // 2,) * 4)
        return F.conv2d(padded, kernel, groups=maps.shape[1] // kernel.shape[1])

    def bn(maps: Tensor, name: str) -> Tensor:
        statistics = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
        gamma, beta = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return F.batch_norm(maps, *statistics, gamma, beta, training, momentum=0.01, eps=0.001)

    def sep(maps: Tensor, block: str, number: int) -> Tensor:
        first, second = halves
        maps = function(conv(maps, f"{block}.sep{number}.{first}.weight"))
        return bn(conv(maps, f"{block}.sep{number}.{second}.weight"), f"{block}.bn{number}")

    def pool(maps: Tensor) -> Tensor:
        before = [0 if side % 2 == 0 else 1 for side in maps.shape[2:]]
        padded = F.pad(maps, (before[1], 1, before[0], 1), value=-math.inf)
        return F.max_pool2d(padded, kernel_size=3, stride=2)

    def shortcut(maps: Tensor, block: str) -> Tensor | float:
        if not settings.residual:
            return 0.0
        kernel = tensors[f"{block}.shortcut.conv.weight"]
        return bn(F.conv2d(maps[:, :, ::2, ::2], kernel), f"{block}.shortcut.bn")

    function = FUNCTIONS[settings.separable_activation]
    spatial_first = settings.separable_order == "spatial_first"
    halves = ("depthwise", "pointwise") if spatial_first else ("pointwise", "spatial")
    x = F.conv2d(images, tensors["block1.conv1.weight"], stride=2)
    x = bn(x, "block1.bn1").relu()
    x = bn(F.conv2d(x, tensors["block1.conv2.weight"]), "block1.bn2").relu()
    x = pool(sep(sep(x, "block2", 1).relu(), "block2", 2)) + shortcut(x, "block2")
    for block in ("block3", "block4"):
        x = pool(sep(sep(x.relu(), block, 1).relu(), block, 2)) + shortcut(x, block)
    for block in ("block5", "block6"):
        x = sep(sep(sep(x.relu(), block, 1).relu(), block, 2).relu(), block, 3) + (
            x if settings.residual else 0.0
        )
    x = pool(sep(sep(x.relu(), "block7", 1).relu(), "block7", 2)) + shortcut(x, "block7")
    x = sep(sep(x, "block8", 1).relu(), "block8", 2).relu()
    features = x.flatten(start_dim=2).sum(dim=2) / (x.shape[2] * x.shape[3])
    return features @ tensors["head.dense.weight"].T + tensors["head.dense.bias"]


def with_random_state(settings: XceptionSettings, seed: int) -> Xception:
    """In float64, with batch norm values that are neutral nowhere, so that each one matters."""
    torch.manual_seed(seed)
    model = Xception(settings, 5).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.1)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2)
    nn.init.normal_(model.head.dense.bias)
    return model


def check_against_the_figure(
    settings: XceptionSettings, size: tuple[int, int], training: bool
) -> None:
    """Logits, every gradient and every running statistic, in float64."""
    model = with_random_state(settings, seed=size[0]).train(training)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    for name in parameters:
        tensors[name].requires_grad_()

    logits = model(images)
    expected = reference_forward(images, tensors, settings, training)
    weights = torch.randn_like(expected)
    torch.autograd.backward([logits, expected], [weights, weights])

    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, tensors[name].grad, rtol=1e-7, atol=1e-7)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            torch.testing.assert_close(buffer, tensors[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(71, 71), (75, 75), (96, 130)])
def test_outputs_gradients_and_statistics_are_those_of_the_figure(
    size: tuple[int, int], training: bool
) -> None:
    check_against_the_figure(SMALL, size, training)


@pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values()))
)
def test_every_variant_is_the_figure_with_that_part_changed(variant: dict[str, Any]) -> None:
    settings = XceptionSettings(width=0.05, middle_blocks=2, **variant)
    check_against_the_figure(settings, size=(40, 54), training=True)


def test_forward_leaves_its_images_alone_and_takes_both_memory_formats() -> None:
    model = with_random_state(SMALL, seed=0).eval()
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    before = images.clone()
    logits = model(images)
    assert torch.equal(images, before)
    rearranged = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(rearranged, logits)
