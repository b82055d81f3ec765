"""Xception against the paper's counts, and against code written apart from it."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from model.errors import InputError
from model.head import Head
from model.separable import SameConv2d, SameMaxPool2d, SeparableConv2d, same_padding
from model.xception import SMALLEST_SIZE, Xception, XceptionSettings, scaled_channels

SMALL = XceptionSettings(width=0.05, middle_blocks=2)
"""Channels: 8, 8, 8, 16, 40, 48, 80, 104."""

sizes = st.integers(1, 13)
kernels = st.integers(1, 5)
strides = st.integers(1, 4)


def on_meta(settings: XceptionSettings, num_classes: int) -> Xception:
    with torch.device("meta"):
        return Xception(settings, num_classes)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def full() -> Xception:
    return on_meta(XceptionSettings(), 1000)


# 'same' padding


def tensorflow_before(size: int, kernel: int, stride: int) -> int:
    """TensorFlow's documentation states the rule in this other form."""
    leftover = size % stride or stride
    return max(kernel - leftover, 0) // 2


def slide(
    maps: np.ndarray,
    kernel: int,
    stride: int,
    combine: Callable[[np.ndarray, slice, slice], object],
) -> np.ndarray:
    """`combine` over every window's real pixels and the part of the kernel that meets them."""
    windows = []
    for size in maps.shape[-2:]:
        first = -tensorflow_before(size, kernel, stride)
        starts = [first + index * stride for index in range(math.ceil(size / stride))]
        windows.append([(max(start, 0), min(start + kernel, size), start) for start in starts])
    return np.array(
        [
            [
                combine(
                    maps[:, top:bottom, left:right],
                    slice(top - row, bottom - row),
                    slice(left - column, right - column),
                )
                for left, right, column in windows[1]
            ]
            for top, bottom, row in windows[0]
        ]
    ).transpose(2, 0, 1)


@pytest.mark.parametrize(("size", "expected"), [(147, (1, 1)), (74, (0, 1)), (37, (1, 1))])
def test_padding_of_the_papers_pools(size: int, expected: tuple[int, int]) -> None:
    assert same_padding(size, kernel=3, stride=2) == expected


@settings(deadline=None)
@given(height=sizes, width=sizes, kernel=kernels, stride=strides, seed=st.integers(0, 99))
def test_same_max_pool_is_the_maximum_of_the_real_pixels(
    height: int, width: int, kernel: int, stride: int, seed: int
) -> None:
    maps = np.random.default_rng(seed).normal(-5, 1, size=(2, height, width))
    pooled = SameMaxPool2d(kernel, stride)(torch.from_numpy(maps)[None])[0]
    expected = slide(maps, kernel, stride, lambda part, _rows, _columns: part.max(axis=(1, 2)))
    np.testing.assert_array_equal(pooled.numpy(), expected)


@settings(deadline=None)
@given(height=sizes, width=sizes, kernel=kernels, stride=strides, seed=st.integers(0, 99))
def test_same_convolution_is_the_sum_over_the_real_pixels(
    height: int, width: int, kernel: int, stride: int, seed: int
) -> None:
    maps = np.random.default_rng(seed).normal(size=(2, height, width))
    torch.manual_seed(seed)
    conv = SameConv2d(2, 3, kernel, stride).double()
    weight = conv.weight.detach().numpy()

    def weigh(part: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        sums: np.ndarray = np.einsum("chw,ochw->o", part, weight[:, :, rows, columns])
        return sums

    result = conv(torch.from_numpy(maps)[None])[0].detach()
    np.testing.assert_allclose(result.numpy(), slide(maps, kernel, stride, weigh), atol=1e-12)


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (SameConv2d(2, 2, 3), 6),
        (SameConv2d(2, 2, 3, stride=2), 7),
        (SameConv2d(2, 2, 1, stride=2), 6),
        (SameMaxPool2d(3, 2), 7),
        (SameMaxPool2d(3, 2), 6),
    ],
)
def test_padding_copies_nothing_where_the_operation_can_pad(module: nn.Module, size: int) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        module(torch.zeros(1, 2, size, size))
    called = {event.key for event in profiled.key_averages()}
    assert called & {"aten::conv2d", "aten::max_pool2d"}
    assert "aten::constant_pad_nd" not in called


def test_separable_convolution_has_nothing_between_its_halves() -> None:
    torch.manual_seed(0)
    separable = SeparableConv2d(4, 6).double()
    maps = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    # A depthwise convolution followed by a 1x1 is one dense convolution of the products.
    depthwise, pointwise = separable.depthwise.weight[:, 0], separable.pointwise.weight[:, :, 0, 0]
    dense = torch.einsum("oc,chw->ochw", pointwise, depthwise)
    torch.testing.assert_close(separable(maps), F.conv2d(maps, dense, padding=1))


# Counts and shapes


def test_counts_are_those_of_table_3(full: Xception) -> None:
    assert num_parameters(full) == 22_855_952
    assert sum(p.numel() for p in full.parameters() if p.requires_grad) == 22_855_952
    assert sum(b.numel() for b in full.buffers() if b.is_floating_point()) == 54_528


def test_count_with_the_classes_of_jft() -> None:
    assert num_parameters(on_meta(XceptionSettings(), 17_000)) == 55_639_952


def test_has_36_convolutions_besides_the_shortcuts_and_no_biases(full: Xception) -> None:
    convolutions = {n: m for n, m in full.named_modules() if isinstance(m, nn.Conv2d)}
    separable = [m for m in full.modules() if isinstance(m, SeparableConv2d)]
    shortcuts = [name for name in convolutions if "shortcut" in name]
    assert (len(separable), len(shortcuts)) == (34, 4)
    assert len(convolutions) == 2 + 2 * 34 + 4
    assert all(convolution.bias is None for convolution in convolutions.values())


def test_batch_norm_has_the_constants_of_keras(full: Xception) -> None:
    norms = [module for module in full.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum, norm.affine) for norm in norms} == {(1e-3, 0.01, True)}


def test_names_and_kernel_shapes(full: Xception) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in full.state_dict().items()}
    assert shapes["block1.conv1.weight"] == (32, 3, 3, 3)
    assert shapes["block2.sep1.depthwise.weight"] == (64, 1, 3, 3)
    assert shapes["block2.shortcut.conv.weight"] == (128, 64, 1, 1)
    assert shapes["block12.sep3.pointwise.weight"] == (728, 728, 1, 1)
    assert shapes["block13.sep1.pointwise.weight"] == (728, 728, 1, 1)
    assert shapes["block13.sep2.pointwise.weight"] == (1024, 728, 1, 1)
    assert shapes["block14.sep1.pointwise.weight"] == (1536, 1024, 1, 1)
    assert shapes["block14.bn2.running_var"] == (2048,)
    assert shapes["head.dense.weight"] == (1000, 2048)


@pytest.mark.parametrize(
    ("image", "blocks_1_to_4_then_13"),
    [
        ((299, 299), [(147, 147), (74, 74), (37, 37), (19, 19), (10, 10)]),
        ((150, 150), [(72, 72), (36, 36), (18, 18), (9, 9), (5, 5)]),
        ((71, 71), [(33, 33), (17, 17), (9, 9), (5, 5), (3, 3)]),
        ((96, 130), [(45, 62), (23, 31), (12, 16), (6, 8), (3, 4)]),
    ],
)
def test_sizes_of_the_maps(
    full: Xception, image: tuple[int, int], blocks_1_to_4_then_13: list[tuple[int, int]]
) -> None:
    maps: dict[str, tuple[int, ...]] = {}
    hooks = [
        block.register_forward_hook(
            lambda _module, _inputs, out, name=name: maps.update({name: tuple(out.shape[1:])})
        )
        for name, block in full.named_children()
    ]
    logits = full(torch.empty(2, 3, *image, device="meta"))
    for hook in hooks:
        hook.remove()
    *entry, last = blocks_1_to_4_then_13
    sides = [*entry, *[entry[-1]] * 8, last, last]
    channels = [64, 128, 256, *[728] * 9, 1024, 2048]
    assert list(maps) == [*(f"block{number}" for number in range(1, 15)), "head"]
    assert list(maps.values())[:14] == [(c, *side) for c, side in zip(channels, sides, strict=True)]
    assert logits.shape == (2, 1000)


# Forward and backward


def reference_forward(images: Tensor, tensors: dict[str, Tensor], training: bool) -> Tensor:
    """Figure 5, line by line, over a state dict."""

    def bn(maps: Tensor, name: str) -> Tensor:
        statistics = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
        gamma, beta = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return F.batch_norm(maps, *statistics, gamma, beta, training, momentum=0.01, eps=0.001)

    def sep(maps: Tensor, block: str, number: int) -> Tensor:
        depthwise = tensors[f"{block}.sep{number}.depthwise.weight"]
        pointwise = tensors[f"{block}.sep{number}.pointwise.weight"]
        maps = F.conv2d(F.pad(maps, (1, 1, 1, 1)), depthwise, groups=maps.shape[1])
        return bn(F.conv2d(maps, pointwise), f"{block}.bn{number}")

    def pool(maps: Tensor) -> Tensor:
        before = [0 if side % 2 == 0 else 1 for side in maps.shape[2:]]
        padded = F.pad(maps, (before[1], 1, before[0], 1), value=-math.inf)
        return F.max_pool2d(padded, kernel_size=3, stride=2)

    def shortcut(maps: Tensor, block: str) -> Tensor:
        kernel = tensors[f"{block}.shortcut.conv.weight"]
        return bn(F.conv2d(maps[:, :, ::2, ::2], kernel), f"{block}.shortcut.bn")

    x = F.conv2d(images, tensors["block1.conv1.weight"], stride=2)
    x = bn(x, "block1.bn1").relu()
    x = bn(F.conv2d(x, tensors["block1.conv2.weight"]), "block1.bn2").relu()
    x = pool(sep(sep(x, "block2", 1).relu(), "block2", 2)) + shortcut(x, "block2")
    for block in ("block3", "block4"):
        x = pool(sep(sep(x.relu(), block, 1).relu(), block, 2)) + shortcut(x, block)
    for block in ("block5", "block6"):
        x = sep(sep(sep(x.relu(), block, 1).relu(), block, 2).relu(), block, 3) + x
    x = pool(sep(sep(x.relu(), "block7", 1).relu(), "block7", 2)) + shortcut(x, "block7")
    x = sep(sep(x, "block8", 1).relu(), "block8", 2).relu()
    features = x.flatten(start_dim=2).sum(dim=2) / (x.shape[2] * x.shape[3])
    return features @ tensors["head.dense.weight"].T + tensors["head.dense.bias"]


def small_with_random_state(seed: int) -> Xception:
    """In float64, with batch norm values that are neutral nowhere, so that each one matters."""
    torch.manual_seed(seed)
    model = Xception(SMALL, 5).double()
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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(71, 71), (75, 75), (96, 130)])
def test_outputs_gradients_and_statistics_are_those_of_the_figure(
    size: tuple[int, int], training: bool
) -> None:
    model = small_with_random_state(seed=size[0]).train(training)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    for name in parameters:
        tensors[name].requires_grad_()

    logits = model(images)
    expected = reference_forward(images, tensors, training)
    weights = torch.randn_like(expected)
    torch.autograd.backward([logits, expected], [weights, weights])

    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, tensors[name].grad, rtol=1e-7, atol=1e-7)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            torch.testing.assert_close(buffer, tensors[name], rtol=1e-9, atol=1e-9)


def test_forward_leaves_its_images_alone_and_takes_both_memory_formats() -> None:
    model = small_with_random_state(seed=0).eval()
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    before = images.clone()
    logits = model(images)
    assert torch.equal(images, before)
    assert torch.equal(model(images.contiguous(memory_format=torch.channels_last)), logits)


def test_maps_are_channels_last_on_a_cpu_which_is_the_faster_format_there() -> None:
    model = Xception(SMALL, 5)
    formats = []
    for block in list(model.children())[:-1]:
        block.register_forward_hook(
            lambda _module, _inputs, out: formats.append(
                out.is_contiguous(memory_format=torch.channels_last)
            )
        )
    model(torch.randn(2, 3, 48, 48))
    assert formats == [True] * model.num_blocks


# Settings


@pytest.mark.parametrize("middle_blocks", [0, 1, 8, 11])
def test_blocks_are_numbered_without_a_gap(middle_blocks: int) -> None:
    model = on_meta(XceptionSettings(width=0.1, middle_blocks=middle_blocks), 7)
    names = [name for name, _ in model.named_children()]
    assert names == [*(f"block{number}" for number in range(1, 7 + middle_blocks)), "head"]
    assert model(torch.empty(1, 3, 71, 71, device="meta")).shape == (1, 7)


@settings(deadline=None)
@given(num_channels=st.integers(1, 4096), width=st.floats(1e-3, 8))
def test_scaled_channels_are_the_nearest_multiple_of_8(num_channels: int, width: float) -> None:
    scaled = scaled_channels(num_channels, width)
    assert scaled % 8 == 0
    assert scaled >= 8
    assert scaled == 8 or abs(scaled - num_channels * width) <= 4


@settings(max_examples=20, deadline=None)
@given(width=st.floats(0.01, 2))
def test_width_scales_every_channel_count(width: float) -> None:
    model = on_meta(XceptionSettings(width=width, middle_blocks=1), 3)
    full_model = on_meta(XceptionSettings(middle_blocks=1), 3)
    counts = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    full_counts = [m.num_features for m in full_model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert counts == [scaled_channels(count, width) for count in full_counts]


@pytest.mark.parametrize(
    "bad",
    [
        {"width": 0},
        {"width": math.inf},
        {"width": math.nan},
        {"middle_blocks": -1},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"depth": 3},
    ],
)
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        XceptionSettings(**bad)


def test_settings_are_documented() -> None:
    assert all(field.description for field in XceptionSettings.model_fields.values())


def test_kernels_are_glorot_uniform_and_biases_zero() -> None:
    torch.manual_seed(0)
    model = Xception(XceptionSettings(width=0.5, middle_blocks=1), 50)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            pixels = weight[0, 0].numel()
            bound = math.sqrt(6 / (pixels * (weight.shape[0] + weight.shape[1])))
            assert weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), name
    assert torch.equal(model.head.dense.bias, torch.zeros(50))


# Head


def test_head_averages_over_the_map() -> None:
    head = Head(num_features=3, num_classes=2)
    maps = torch.randn(4, 3, 5, 6)
    expected = F.linear(maps.sum(dim=(2, 3)) / 30, head.dense.weight, head.dense.bias)
    torch.testing.assert_close(head(maps), expected)


def test_dropout_acts_on_features_and_only_in_training() -> None:
    torch.manual_seed(0)
    head = Head(num_features=1000, num_classes=1000, dropout=0.25)
    nn.init.eye_(head.dense.weight)
    nn.init.zeros_(head.dense.bias)
    maps = torch.ones(1, 1000, 2, 2)
    trained = head.train()(maps)
    dropped = trained == 0
    torch.testing.assert_close(trained[~dropped], torch.full_like(trained[~dropped], 1 / 0.75))
    assert 0.2 < dropped.float().mean().item() < 0.3
    assert torch.equal(head.eval()(maps), torch.ones(1, 1000))


def test_dropout_setting_reaches_the_head() -> None:
    assert on_meta(XceptionSettings(dropout=0.5, middle_blocks=0), 3).head.dropout == 0.5


@pytest.mark.parametrize("num_classes", [0, -1])
def test_no_classes_are_refused(num_classes: int) -> None:
    with pytest.raises(InputError, match=f"num_classes = {num_classes} "):
        Head(8, num_classes)


# Inputs


@pytest.mark.parametrize("size", [(SMALLEST_SIZE - 1, 71), (71, SMALLEST_SIZE - 1), (1, 1), (0, 0)])
def test_images_too_small_are_refused_with_the_smallest_size(
    full: Xception, size: tuple[int, int]
) -> None:
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]} .* at least 7x7$"):
        full(torch.empty(1, 3, *size, device="meta"))


def test_the_smallest_size_works() -> None:
    model = Xception(SMALL, 5)
    assert model(torch.randn(2, 3, SMALLEST_SIZE, SMALLEST_SIZE)).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 71, 71), (3, 71, 71), (1, 71, 71, 3)])
def test_other_shapes_than_rgb_batches_are_refused(full: Xception, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"takes \(N, 3, height, width\)"):
        full(torch.empty(shape, device="meta"))
