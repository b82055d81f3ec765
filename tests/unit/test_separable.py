"""'same' padding and the separable layer, against code that goes window by window."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from model.errors import InputError
from model.separable import (
    SameConv2d,
    SameMaxPool2d,
    SegmentedConv2d,
    SeparableConv2d,
    activation_after_convolution,
    fitting_segments,
    same_padding,
)

sizes = st.integers(1, 13)
kernels = st.integers(1, 5)
strides = st.integers(1, 4)


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


# Segments


def windows_of(maps: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """One channel's 3x3 'same' correlation, pixel by pixel: (H, W) to (H, W)."""
    padded = np.pad(maps, 1)
    height, width = maps.shape
    return np.array(
        [
            [float((padded[y : y + 3, x : x + 3] * kernel).sum()) for x in range(width)]
            for y in range(height)
        ]
    )


@settings(max_examples=30, deadline=None)
@given(
    per_segment=st.integers(1, 3),
    segments=st.integers(1, 4),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_a_channel_sees_its_own_segment_and_nothing_else(
    per_segment: int, segments: int, height: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    num_channels = per_segment * segments
    conv = SegmentedConv2d(num_channels, segments).double()
    weight = conv.weight.detach().numpy()
    maps = np.random.default_rng(seed).normal(size=(num_channels, height, width))
    expected = np.zeros_like(maps)
    for channel in range(num_channels):
        first = channel // per_segment * per_segment
        for offset in range(per_segment):
            expected[channel] += windows_of(maps[first + offset], weight[channel, offset])
    result = conv(torch.from_numpy(maps)[None])[0].detach()
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)


def test_depthwise_is_one_channel_a_segment() -> None:
    assert SegmentedConv2d(6, "depthwise").groups == 6
    assert SegmentedConv2d(6, "depthwise").weight.shape == (6, 1, 3, 3)


@pytest.mark.parametrize("segments", [-1, 0, 5, 8, 24])
def test_segments_that_do_not_divide_are_refused_with_those_that_do(segments: int) -> None:
    with pytest.raises(InputError) as caught:
        SegmentedConv2d(12, segments)
    assert str(caught.value) == (
        f"segments = {segments} does not cut 12 channels into equal parts:"
        ' choose 1, 2, 3, 4, 6, 12 or "depthwise"'
    )


@given(st.lists(st.integers(1, 400), min_size=1, max_size=4))
def test_fitting_segments_are_all_common_divisors(channel_counts: list[int]) -> None:
    expected = [n for n in range(1, 401) if all(count % n == 0 for count in channel_counts)]
    assert fitting_segments(channel_counts) == expected


# Activation


@pytest.mark.parametrize(
    ("activation", "function"), [("none", lambda maps: maps), ("relu", F.relu), ("elu", F.elu)]
)
@pytest.mark.parametrize("segments", [1, 2, "depthwise"])
def test_activation_stands_between_the_halves(activation, function, segments) -> None:
    torch.manual_seed(0)
    separable = SeparableConv2d(4, 6, segments, activation).double()
    depthwise, pointwise = (p.detach().clone().requires_grad_() for p in separable.parameters())
    maps = torch.randn(2, 4, 7, 9, dtype=torch.float64, requires_grad=True)
    copy = maps.detach().clone().requires_grad_()
    groups = 4 // depthwise.shape[1]
    expected = F.conv2d(function(F.conv2d(copy, depthwise, padding=1, groups=groups)), pointwise)
    result = separable(maps)
    torch.testing.assert_close(result, expected)

    torch.autograd.backward([result, expected], [torch.ones_like(result)] * 2)
    torch.testing.assert_close(maps.grad, copy.grad)
    torch.testing.assert_close(separable.depthwise.weight.grad, depthwise.grad)
    torch.testing.assert_close(separable.pointwise.weight.grad, pointwise.grad)


@pytest.mark.parametrize("activation", ["none", "relu", "elu"])
def test_an_activation_takes_no_memory_of_its_own(activation) -> None:
    maps = torch.randn(2, 4, 3, 3)
    assert activation_after_convolution(activation)(maps).data_ptr() == maps.data_ptr()
