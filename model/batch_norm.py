"""Batch norm that shifts and does not scale."""

from torch import nn


class UnscaledBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with beta (`bias`) and without gamma: Keras's `scale=False`.

    Takes and gives (N, num_features, H, W). Gamma adds nothing where a ReLU and another layer
    with a free scale follow. Its `weight` is None rather than a buffer of ones: such a buffer
    would be garbage after `to_empty`, and on the CPU the kernel is as fast without it.
    """

    def __init__(self, num_features: int, eps: float, momentum: float) -> None:
        super().__init__(num_features, eps, momentum)
        self.register_parameter("weight", None)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        nn.init.zeros_(self.bias)
