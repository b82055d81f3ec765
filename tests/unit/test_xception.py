"""Xception against the paper's counts and shapes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from model.errors import InputError
from model.separable import SeparableConv2d
from model.xception import SMALLEST_SIZE, Xception, XceptionSettings, scaled_channels


def on_meta(settings: XceptionSettings, num_classes: int) -> Xception:
    with torch.device("meta"):
        return Xception(settings, num_classes)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def full() -> Xception:
    return on_meta(XceptionSettings(), 1000)


# Counts and shapes


def test_counts_are_those_of_table_3(full: Xception) -> None:
    assert num_parameters(full) == 22_855_952
    assert sum(p.numel() for p in full.parameters() if p.requires_grad) == 22_855_952
    assert sum(b.numel() for b in full.buffers() if b.is_floating_point()) == 54_528


@pytest.mark.parametrize(("fc_widths", "expected"), [((), 55_639_952), ((4096, 4096), 115_629_968)])
def test_counts_of_the_papers_models_for_jft(fc_widths: tuple[int, ...], expected: int) -> None:
    assert num_parameters(on_meta(XceptionSettings(fc_widths=fc_widths), 17_000)) == expected


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


def test_head_settings_reach_the_head() -> None:
    model = on_meta(XceptionSettings(dropout=0.5, fc_widths=(12,), middle_blocks=0), 3)
    assert model.head.dropout == 0.5
    assert model.head.dense.in_features == 12


# Inputs


@pytest.mark.parametrize("size", [(SMALLEST_SIZE - 1, 71), (71, SMALLEST_SIZE - 1), (1, 1), (0, 0)])
def test_images_too_small_are_refused_with_the_smallest_size(
    full: Xception, size: tuple[int, int]
) -> None:
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]} .* at least 7x7$"):
        full(torch.empty(1, 3, *size, device="meta"))


def test_the_smallest_size_works() -> None:
    model = Xception(XceptionSettings(width=0.05, middle_blocks=2), 5)
    assert model(torch.randn(2, 3, SMALLEST_SIZE, SMALLEST_SIZE)).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 71, 71), (3, 71, 71), (1, 71, 71, 3)])
def test_other_shapes_than_rgb_batches_are_refused(full: Xception, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"takes \(N, 3, height, width\)"):
        full(torch.empty(shape, device="meta"))
