"""Figures 1 to 4 of the Xception paper: what a segmented convolution equals, and where."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.errors import InputError
from model.separable import SeparableConv2d
from model.spectrum import SpectrumConv2d

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "elu": nn.ELU}

channels = st.integers(1, 5)
sides = st.integers(1, 8)
seeds = st.integers(0, 9999)


def images(num_channels: int, height: int = 7, width: int = 5) -> Tensor:
    return torch.randn(2, num_channels, height, width, dtype=torch.float64, requires_grad=True)


def same_gradients(maps: Tensor, result: Tensor, copy: Tensor, expected: Tensor) -> None:
    """Send one random gradient backward through both, and compare what reaches the inputs."""
    weights = torch.randn_like(result)
    torch.autograd.backward([result, expected], [weights, weights])
    assert maps.grad is not None
    torch.testing.assert_close(maps.grad, copy.grad)


# Figure 3 is figure 2


class SimplifiedInception(nn.Module):
    """Figure 2: towers of a 1x1 and a 3x3 convolution side by side, concatenated."""

    def __init__(self, num_towers: int, in_channels: int, tower_channels: int, activation: str):
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels, tower_channels, 1, bias=False),
                ACTIVATIONS[activation](),
                nn.Conv2d(tower_channels, tower_channels, 3, padding=1, bias=False),
            )
            for _ in range(num_towers)
        )

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([tower(maps) for tower in self.towers], dim=1)

    def stacked(self, layer: int) -> tuple[Tensor, list[Tensor]]:
        """One layer's kernels of all towers, as one kernel, and the parameters they are."""
        kernels = [tower[layer].weight for tower in self.towers]
        return torch.cat([kernel.detach() for kernel in kernels]), kernels


@settings(max_examples=60, deadline=None)
@given(
    num_towers=st.integers(1, 7),
    in_channels=channels,
    tower_channels=channels,
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    height=sides,
    width=sides,
    seed=seeds,
)
def test_one_segment_a_tower_gives_the_outputs_and_gradients_of_the_towers(
    num_towers: int,
    in_channels: int,
    tower_channels: int,
    activation: str,
    height: int,
    width: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    towers = SimplifiedInception(num_towers, in_channels, tower_channels, activation).double()
    spectrum = SpectrumConv2d(
        in_channels, num_towers * tower_channels, segments=num_towers, activation=activation
    ).double()
    pointwise, pointwise_parts = towers.stacked(0)
    spatial, spatial_parts = towers.stacked(2)
    spectrum.load_state_dict({"pointwise.weight": pointwise, "spatial.weight": spatial})

    maps = images(in_channels, height, width)
    copy = maps.detach().clone().requires_grad_()
    result, expected = spectrum(maps), towers(copy)
    torch.testing.assert_close(result, expected)

    same_gradients(maps, result, copy, expected)
    for merged, parts in (
        (spectrum.pointwise.weight, pointwise_parts),
        (spectrum.spatial.weight, spatial_parts),
    ):
        torch.testing.assert_close(merged.grad, torch.cat([part.grad for part in parts]))


# The two ends


@settings(max_examples=30, deadline=None)
@given(in_channels=channels, out_channels=channels, height=sides, width=sides, seed=seeds)
def test_one_segment_is_a_1x1_and_a_regular_3x3(
    in_channels: int, out_channels: int, height: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    spectrum = SpectrumConv2d(in_channels, out_channels, segments=1).double()
    regular = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
    ).double()
    for mine, theirs in zip(spectrum.parameters(), regular.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    maps = images(in_channels, height, width)
    copy = maps.detach().clone().requires_grad_()
    result, expected = spectrum(maps), regular(copy)
    torch.testing.assert_close(result, expected)
    same_gradients(maps, result, copy, expected)
    for mine, theirs in zip(spectrum.parameters(), regular.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("as_number", [False, True])
@settings(max_examples=20, deadline=None)
@given(in_channels=channels, out_channels=channels, height=sides, width=sides, seed=seeds)
def test_one_channel_a_segment_sees_every_channel_alone(
    as_number: bool, in_channels: int, out_channels: int, height: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    segments = out_channels if as_number else "depthwise"
    spectrum = SpectrumConv2d(in_channels, out_channels, segments).double()
    maps = images(in_channels, height, width)
    expected = torch.zeros(2, out_channels, height, width, dtype=torch.float64)
    for channel in range(out_channels):
        mixed = sum(
            spectrum.pointwise.weight[channel, source, 0, 0] * maps[:, source]
            for source in range(in_channels)
        )
        padded = F.pad(mixed, (1, 1, 1, 1))
        for row in range(3):
            for column in range(3):
                shifted = padded[:, row : row + height, column : column + width]
                expected[:, channel] += spectrum.spatial.weight[channel, 0, row, column] * shifted
    torch.testing.assert_close(spectrum(maps), expected)


@pytest.mark.parametrize("segments", [1, 3, "depthwise"])
def test_in_a_stack_the_order_only_says_where_one_layer_ends(segments) -> None:
    """The paper's argument for calling the order unimportant: 1x1, (3x3, 1x1) = (1x1, 3x3), 1x1."""
    torch.manual_seed(0)
    spectrum = SpectrumConv2d(4, 6, segments, "relu").double()
    separable = SeparableConv2d(6, 5, segments, "none").double()
    separable.depthwise.weight.data.copy_(spectrum.spatial.weight.data)
    maps = images(4)
    spatial_first = separable(F.relu(spectrum.pointwise(maps)))
    torch.testing.assert_close(separable.pointwise(spectrum(maps)), spatial_first)


# Counts


@given(
    in_channels=st.integers(1, 50),
    segments=st.integers(1, 12),
    per_segment=st.integers(1, 12),
)
def test_parameters_along_the_spectrum(in_channels: int, segments: int, per_segment: int) -> None:
    worked_on = segments * per_segment
    with torch.device("meta"):
        spectrum = SpectrumConv2d(in_channels, worked_on, segments)
        separable = SeparableConv2d(worked_on, in_channels, segments)
    for layer in (spectrum, separable):
        count = sum(parameter.numel() for parameter in layer.parameters())
        assert count == in_channels * worked_on + 9 * worked_on * per_segment


def test_segments_must_divide_the_channels_that_the_3x3_works_on() -> None:
    SpectrumConv2d(4, 6, segments=3)
    SeparableConv2d(6, 4, segments=3)
    with pytest.raises(InputError, match=r"segments = 3 does not cut 4 channels .* 1, 2, 4 or"):
        SpectrumConv2d(6, 4, segments=3)
    with pytest.raises(InputError, match="segments = 3 does not cut 4 channels"):
        SeparableConv2d(4, 6, segments=3)
