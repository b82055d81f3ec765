"""The spectrum from regular to depthwise convolutions (Xception, section 1.2, figures 2 to 4)."""

from torch import Tensor, nn

from model.separable import (
    Activation,
    ChannelSegments,
    SameConv2d,
    SegmentedConv2d,
    activation_after_convolution,
)


class SpectrumConv2d(nn.Module):
    """A 1x1 convolution, then a 3x3 'same' one over segments of its output, without biases.

    Takes (N, in_channels, H, W) and gives (N, out_channels, H, W). This is figure 3, which
    computes what the towers of figure 2 do: a tower's own 1x1 and 3x3 are one segment's share of
    both. With one segment it is a 1x1 and a regular 3x3; with one channel a segment, figure 4's
    "extreme" Inception module, which differs from a separable convolution in the order alone.

    segments: of the 3x3's channels, which are the `out_channels` that the 1x1 gives.
    activation: between the two; Inception modules have a ReLU there.

    Raises InputError if `segments` does not divide `out_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        segments: ChannelSegments = "depthwise",
        activation: Activation = "none",
    ) -> None:
        super().__init__()
        self.pointwise = SameConv2d(in_channels, out_channels, 1)
        self.activation = activation_after_convolution(activation)
        self.spatial = SegmentedConv2d(out_channels, segments)

    def forward(self, maps: Tensor) -> Tensor:
        spatial: Tensor = self.spatial(self.activation(self.pointwise(maps)))
        return spatial
